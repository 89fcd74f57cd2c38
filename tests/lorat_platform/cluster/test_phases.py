"""A person who waits is told what for, at once and again."""

from __future__ import annotations

import re
import threading
import time

import pytest

from lorat_platform.cluster import phases as module
from lorat_platform.cluster.phases import Phases


class Said:
    """Keeps lines, and lets a test wait for one."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()

    def __call__(self, line: str) -> None:
        with self._more:
            self.lines.append(line)
            self._more.notify_all()

    def wait_for(self, pattern: str) -> None:
        def found() -> bool:
            return any(re.fullmatch(pattern, line) for line in self.lines)

        with self._more:
            assert self._more.wait_for(found, timeout=10.0), self.lines


def test_a_phase_is_said_at_once_and_again_as_long_as_it_lasts() -> None:
    said = Said()
    with Phases(said) as phases:
        phases.begin("building", every_s=0.05)
        phases.begin("building", every_s=0.05)  # goes on
        said.wait_for(r"still building, \d+ s")
        phases.begin("compiling", every_s=0.05)
        said.wait_for("still compiling, 0 s")
    assert [line for line in said.lines if "still" not in line] == ["building", "compiling"]
    last = max(n for n, line in enumerate(said.lines) if "building" in line)
    assert last < said.lines.index("compiling")
    ended = len(said.lines)
    time.sleep(0.15)
    assert len(said.lines) == ended


def test_a_quiet_phase_is_said_once_it_lasts() -> None:
    said = Said()
    with Phases(said) as phases:
        phases.begin("taking step 3", quiet=True, every_s=0.05)
        assert said.lines == []
        said.wait_for("still taking step 3, 0 s")
        phases.end()
        phases.begin("ending", every_s=0.05)
        said.wait_for("still ending, 0 s")


def test_the_silence_is_never_longer_than_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    said: list[str] = []
    phases = Phases(said.append)

    def wait(timeout: float) -> bool:
        waits.append(timeout)
        clock[0] += timeout
        if len(waits) == 3:
            phases._thread = None  # as end() does
        return False

    monkeypatch.setattr(phases._changed, "wait", wait)
    phases._thread = threading.current_thread()
    phases.begin("compiling")
    phases._repeat()
    assert waits == [10.0, 10.0, 10.0]
    assert said[:3] == ["compiling", "still compiling, 10 s", "still compiling, 20 s"]
