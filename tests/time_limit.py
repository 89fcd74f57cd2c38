"""What happens at the end of a test's time: it shows where everything hangs, and it ends.

pytest-timeout reads the limits and says when a test begins and ends.  A process that a test starts
inherits a mark in its environment, by which it is found again wherever it went: the processes of
Ray leave the family of the process that started them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

MARK = "STARTED_BY_TESTS"
"""Variable that names the test process by which a process was started."""
PATIENCE_S = 30.0
"""How long a test may take to fail, once what it waits for is killed."""
LEAVE_S = 60.0
"""How long what the tests started may take to end after the last of them."""
DUMP_S = 20.0
"""How long one process may take to show its stack."""


def started() -> list[psutil.Process]:
    """Return the processes that this one started, directly or not, and that still run."""
    own = os.environ[MARK]
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            marked = process.environ().get(MARK) == own
            alive = process.status() != psutil.STATUS_ZOMBIE
            # Python's own helper for shared memory lives as long as this process.
            helper = "multiprocessing.resource_tracker" in " ".join(process.cmdline())
            other = process.pid != os.getpid() and not helper
            if alive and other and (marked or process.pid in children):
                found.append(process)
    return found


def end(processes: list[psutil.Process]) -> None:
    """Kill processes."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=PATIENCE_S)


def _stack(process: psutil.Process) -> str:
    """Return a process's command and the stack of each of its threads, where it is Python."""
    with contextlib.suppress(psutil.Error):
        title = " ".join(process.cmdline())[:200] or process.name()
        head = f"Process {process.pid}, for {_age(process):.0f} s: {title}"
        dump = [Path(sys.executable).parent / "py-spy", "dump", "--pid", str(process.pid)]
        try:
            done = subprocess.run(dump, capture_output=True, text=True, timeout=DUMP_S)
        except subprocess.TimeoutExpired:
            return f"{head}\n  no stack within {DUMP_S:.0f} s"
        # The first two lines repeat the command and name the interpreter.
        lines = done.stdout.splitlines()[2:] if done.returncode == 0 else ["  no Python"]
        return "\n".join([head, *lines])
    return f"Process {process.pid} ended meanwhile."


def _own_stack() -> str:
    """Return the stack of each thread of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


class TimeLimit:
    """Ends whatever test holds it too long: by a failure if it can, else with its process."""

    def __init__(self) -> None:
        self._stderr = os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2)
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._test, self._seconds, self._begun, self._text = "", 0.0, 0.0, ""
        threading.Thread(target=self._watch, name="time limit", daemon=True).start()

    def begin(self, test: str, seconds: float) -> None:
        """Count from now on; call this in the main thread."""
        signal.signal(signal.SIGALRM, self._fail)
        with self._changed:
            self._test, self._seconds, self._begun = test, seconds, time.monotonic()
            self._deadline = self._begun + seconds
            self._changed.notify()
        # Where something holds the interpreter itself, no thread of Python's gets to run.
        last = seconds + 3 * PATIENCE_S
        faulthandler.dump_traceback_later(last, exit=True, file=self._stderr)

    def cancel(self) -> None:
        """Stop counting."""
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self._deadline = None
            self._changed.notify()

    def _fail(self, _number: int, _frame: FrameType | None) -> None:
        __tracebackhide__ = True
        pytest.fail(self._text, pytrace=True)

    def _watch(self) -> None:
        with self._changed:
            while True:
                if self._deadline is None:
                    self._changed.wait()
                elif self._deadline > time.monotonic():
                    self._changed.wait(self._deadline - time.monotonic())
                else:
                    begun = self._begun
                    self._strike(begun, f"{self._test} did not end in {self._seconds:g} s.")
                    if self._begun == begun:
                        self._deadline = None

    def _strike(self, begun: float, head: str) -> None:
        """Write down where everything is, and end the test; called with the lock."""

        def ended() -> bool:
            return self._deadline is None or self._begun != begun

        self._changed.release()
        try:
            processes = started()
            with ThreadPoolExecutor(4) as pool:
                stacks = list(pool.map(_stack, processes))
            text = "\n\n".join([head, _own_stack(), *stacks])
        finally:
            self._changed.acquire()
        if ended():
            return
        self._text = text
        # What fixtures of many tests started earlier stays, at first.
        age = time.monotonic() - begun
        end([p for p in processes if _age(p) <= age + 0.1])
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        if not self._changed.wait_for(ended, timeout=PATIENCE_S):
            last = f"\n{text}\n\n{head} It cannot be ended, so this test process gives up.\n"
            os.write(self._stderr, last.encode())
            end(started())
            os._exit(1)


def _age(process: psutil.Process) -> float:
    """Return for how many seconds a process runs; by the wall clock it may differ by a second."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        begun = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - begun
    return 0.0


_LIMIT = pytest.StashKey[TimeLimit]()


def pytest_configure(config: pytest.Config) -> None:
    """Mark what this process starts; the workers of pytest-xdist each do so for themselves."""
    os.environ[MARK] = str(os.getpid())
    config.stash[_LIMIT] = TimeLimit()


def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """Count the time of a test in place of pytest-timeout."""
    item.config.stash[_LIMIT].begin(item.nodeid, settings.timeout)
    return True


def pytest_timeout_cancel_timer(item: pytest.Item) -> bool:
    """Stop counting, also where the test failed and a debugger opens."""
    item.config.stash[_LIMIT].cancel()
    return True


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail at the end if something that the tests started still runs, and end it."""
    yield
    _, left = psutil.wait_procs(started(), timeout=LEAVE_S)
    commands = [" ".join(process.cmdline())[:200] for process in left if process.is_running()]
    end(left)
    assert not commands, f"still running {LEAVE_S:.0f} s after the last test: {commands}"
