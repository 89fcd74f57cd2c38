"""The console log of a run: what a job printed, an artefact that grows while the job runs.

:func:`written_to` gives what this process logs, the lines of all workers among it, to a run.  The
run keeps it in a :class:`LogFile` beside its journal, and the thread that delivers the journal
uploads the file now and then: nothing waits for MLflow.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from lorat.config.json_files import read_json, write_json
from lorat.errors import UserError
from lorat.files.addresses import without_secrets
from lorat_platform.recording.recorder import Recorder

NAME = "console.log"
EVERY_S = 1.0
"""Seconds between two looks for lines to hand on."""
MAX_LINES = 10_000
"""Lines that wait for a run at most; the oldest are dropped."""
MAX_BYTES = 4 << 20
"""Size above which the middle of a log is left out: every upload sends all of it."""
BEGIN_BYTES, END_BYTES = 1 << 20, 2 << 20
"""What stays of its begin and its end then."""
PAUSE_S = 15.0
"""Shortest time between two uploads."""
BYTES_PER_S = 20_000
"""What uploads take at most on average."""
_NAME = re.compile(r"console(-[0-9T-]+)?\.log")


class LogFile:
    """A text file of bounded size, and how much of it was uploaded.

    Args:
        path: of the file; ``NAME.json`` beside it holds what it was at the last upload.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = path.with_name(f"{path.name}.json")
        self._lock = threading.Lock()

    def append(self, text: str) -> None:
        """Add text, without the secrets of addresses.

        Raises:
            OSError: if the disk does not take it.
        """
        with self._lock:
            with open(self.path, "ab") as file:
                file.write(without_secrets(text).encode())
                size = file.tell()
            if size > MAX_BYTES:
                self._leave_out_the_middle()

    def _leave_out_the_middle(self) -> None:
        data = self.path.read_bytes()
        begin = data[: data.rfind(b"\n", 0, BEGIN_BYTES) + 1]
        end = data[data.find(b"\n", len(data) - END_BYTES) + 1 :]
        left_out = f"[... {len(data) - len(begin) - len(end)} bytes are left out ...]\n"
        scratch = self.path.with_name(f"{self.path.name}.cut")
        scratch.write_bytes(begin + left_out.encode() + end)
        os.replace(scratch, self.path)

    def version(self) -> list[int]:
        """Return what tells two states of the file apart; nothing for no file."""
        try:
            found = self.path.stat(follow_symlinks=False)
        except FileNotFoundError:
            return []
        return [found.st_size, found.st_mtime_ns]

    def is_ahead(self) -> bool:
        """Tell whether there is something that was not uploaded."""
        now = self.version()
        return bool(now) and now != read_json(self._state, "delete it", shape=[int], missing=[])

    def set_uploaded(self, version: list[int]) -> None:
        """Note which state of the file was uploaded."""
        write_json(version, self._state)

    def checked(self) -> Path:
        """Return the file, to be uploaded.

        Raises:
            UserError: if it is a link or was named by somebody else: whoever can write there would
                choose what is uploaded.
        """
        if not _NAME.fullmatch(self.path.name) or self.path.is_symlink():
            raise UserError(
                f"{self.path} is not the log that was put there; remove it, and look who else can "
                "write there."
            )
        return self.path

    def pause_s(self) -> float:
        """Return the seconds until the next upload."""
        return max(PAUSE_S, sum(self.version()[:1]) / BYTES_PER_S)


class _Lines(logging.Handler):
    """Keeps what this process logs until a run takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._lines: deque[str] = deque(maxlen=MAX_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line; nobody waits here."""
        try:
            self._lines.append(self.format(record))
        except Exception:
            self.handleError(record)

    def take(self) -> str:
        """Return and forget all lines."""
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        return "".join(f"{line}\n" for line in lines)


def listen() -> _Lines:
    """Begin to keep what this process logs; what it did before the run was opened belongs to it."""
    root = logging.getLogger()
    for handler in root.handlers:
        if isinstance(handler, _Lines):
            return handler
    lines = _Lines()
    root.addHandler(lines)
    return lines


def stamped(text: str) -> str:
    """Return a line as the log has it."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"


@contextlib.contextmanager
def written_to(run: Recorder) -> Iterator[None]:
    """Write what this process logs meanwhile to a run's console log, and why it ended early."""
    lines, stop = listen(), threading.Event()
    own = copy.copy(run)  # a run of another process counts its calls, in one thread

    def hand_on() -> None:
        while not stop.wait(EVERY_S):
            own.log_console(lines.take())

    thread = threading.Thread(target=hand_on, name="console-log", daemon=True)
    thread.start()
    last = ""
    try:
        yield
    except BaseException as error:
        last = stamped("".join(traceback.format_exception_only(error)).strip())
        raise
    finally:
        stop.set()
        thread.join()
        run.log_console(lines.take() + last)
