"""A test fails if something that the tests started listened for other machines while it ran.

So every job, server and cluster of the suite is looked at, embedded or submitted, as long as it
runs.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.processes import listeners
from lorat_platform.cluster.sockets import is_loopback
from tests.time_limit import started

EVERY_S = 0.5


class Watch:
    """Looks for sockets of the tests' processes that others reach, in the background."""

    def __init__(self) -> None:
        self._found: set[str] = set()
        self._known: set[str] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="open doors", daemon=True)
        self._thread.start()

    def take(self) -> set[str]:
        """Return what was found since the last call: ``PROGRAM on ADDRESS:PORT``."""
        found, self._found = self._found, set()
        return found

    def stop(self) -> None:
        """End the watch."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(EVERY_S):
            reachable = {
                name: f"{address}:{port}"
                for name, (address, port) in listeners().items()
                if not is_loopback(address)
            }
            # Whose a socket is takes long to find out, and is asked once.
            new = reachable.keys() - self._known
            self._known = set(reachable)
            if new:
                for process in (psutil.Process(), *started()):
                    for name in new & _sockets(process.pid):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            command = " ".join(process.cmdline())[:100]
                            self._found.add(f"{command} on {reachable[name]}")


def _sockets(pid: int) -> set[str]:
    """Return the names of a process's sockets."""
    names = set()
    with contextlib.suppress(OSError):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                names.add(os.readlink(handle))
    return names


@pytest.fixture(scope="session")
def watch() -> Iterator[Watch]:
    """Watch from the first test to the last."""
    watch = Watch()
    yield watch
    watch.stop()


@pytest.fixture(autouse=True)
def no_open_door(watch: Watch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Look at what was found during the test."""
    yield
    found = watch.take()
    if request.node.get_closest_marker("reachable"):
        return
    assert not found, f"other machines could reach {found}"
