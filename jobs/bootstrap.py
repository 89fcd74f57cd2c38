"""Make ``lorat`` and ``lorat_platform`` importable; imported first by every job.

A job runs as ``python jobs/NAME.py`` from any folder, installed or not, or as
``ray job submit --working-dir . -- python jobs/NAME.py`` on a cluster that has the dependencies
but not this project.  The code beside the job always wins over an installed copy, so that a
submitted job never mixes two versions.  Workers get the same through the runtime environment
(:func:`lorat_platform.cluster.connection.connect`).

Importing the rest takes seconds, in which a job can be stopped without a traceback already.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing import current_process
from types import FrameType


def leave(number: int, frame: FrameType | None) -> None:
    """End a job that has not begun; :func:`command.run` deals with what has."""
    os.write(2, b"\nInterrupted.\n")
    os._exit(130)


for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, leave)

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

if os.path.exists(os.path.join(ROOT, "lorat", "__init__.py")):
    for folder in (os.path.join(ROOT, "platform"), ROOT):
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)

from loading import LOADING  # noqa: E402  (found by the paths above)

if current_process().name == "MainProcess":  # what a job spawns imports this, too, and goes on
    LOADING.begin("loading libraries", quiet=True)
