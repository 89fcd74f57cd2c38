"""What the driver of a search does with the MLflow runs of its trials."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from lorat_platform import search_session
from lorat_platform.leaderboard import Leaderboard
from lorat_platform.scheduling import Rungs
from lorat_platform.search_session import SearchSession


class BlackHole:
    """A run whose server never answers."""

    reference = "key:parent"

    def __init__(self) -> None:
        self.status = ""

    def close(self, status: str, timeout_s: float) -> bool:
        self.status = status
        time.sleep(timeout_s)
        return False


def test_a_server_that_never_answers_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_session, "CLOSE_S", 1.0)
    nothing: Any = BlackHole()
    session = SearchSession(
        "many",
        folder=tmp_path,
        board=Leaderboard(objectives=("ao",), rungs=Rungs(max_steps=4, reduction=2, num_rungs=1)),
        parent=nothing,
        experiment="lorat-search",
        num_trials=100,
        remember_parent=lambda _: None,
    )
    ended, running = [BlackHole() for _ in range(50)], [BlackHole() for _ in range(50)]
    for status, runs in (("FINISHED", ended), ("RUNNING", running)):
        for number, run in enumerate(runs):
            trial: Any = run
            session._runs[f"{status}-{number}"] = trial
            if status == "FINISHED":
                session._close(f"{status}-{number}", "FINISHED")
    began = time.monotonic()
    session.end()
    assert time.monotonic() - began < 5.0
    assert {run.status for run in ended} == {"FINISHED"}
    assert {run.status for run in running} == {"KILLED"}
