"""Lines of workers, printed by the driver."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from lorat_platform.cluster.console import ConsolePrinter
from lorat_platform.cluster.phases import Phases


def test_lines_of_an_actor_that_takes_long_to_start_are_printed_once_and_in_order(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A question that is not answered in time is not asked again: its answer has the lines."""
    answers = {1: [(logging.INFO, "first")], 2: [(logging.INFO, "second")]}
    asked: list[int] = []
    ready: set[int] = set()

    def ask() -> int:
        asked.append(len(asked) + 1)
        return asked[-1]

    def wait(refs: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return [r for r in refs if r in ready], [r for r in refs if r not in ready]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda ref: answers[ref])
    printer: Any = object.__new__(ConsolePrinter)
    printer.console = SimpleNamespace(actor=SimpleNamespace(take=SimpleNamespace(remote=ask)))
    printer._asked, printer._phases = None, Phases()
    printer._log = logging.getLogger("lorat_platform.workers")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            printer._print(0.1)
        assert asked == [1] and not caplog.messages
        ready |= {1, 2}
        printer._print(0.1)
        printer._print(0.1)
    assert caplog.messages == ["first", "second"]
