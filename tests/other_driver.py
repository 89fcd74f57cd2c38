"""Another driver of a folder, as its file there tells."""

from __future__ import annotations

import os
import time

from lorat.files.scratch import Process
from lorat.files.storage import Location
from lorat_platform.runs.claim import Announcement

FOREIGN = Process("0123456789ab", 7, "1")
"""Of a machine that nobody can ask."""


def announce(folder: Location, process: Process, *, held: bool = True, age_s: float = 0) -> str:
    """Write the file of another driver; return its token."""
    token = os.urandom(8).hex()
    other = Announcement(
        token=token, host="elsewhere", process=process, began=time.time(), held=held, rank=1
    )
    name = f"driver-{token}.json"
    folder.write_bytes(name, other.to_bytes())
    if age_s:
        then = time.time() - age_s
        os.utime(folder.file(name), (then, then))
    return token
