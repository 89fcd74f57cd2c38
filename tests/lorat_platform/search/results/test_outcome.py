"""What is said of a search at its end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.processes import free_port
from lorat_platform.recording.run import open_run
from lorat_platform.search.results.board import Leaderboard
from lorat_platform.search.results.outcome import SearchOutcome, say_where_it_is
from lorat_platform.search.rungs import Rungs


@pytest.mark.usefixtures("own_store")
def test_a_search_that_mlflow_never_took_shows_no_link_and_the_command_for_all_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    runs = [open_run("lorat", name, folder=tmp_path / name) for name in ("parent", "trial")]
    plan: Any = SimpleNamespace(options=SimpleNamespace(experiment="lorat"))
    outcome = SearchOutcome(
        plan=plan,
        board=Leaderboard(objectives=("ao",), rungs=Rungs(max_steps=4, reduction=2, num_rungs=1)),
        best=None,
        best_config=None,
        best_config_file=None,
        run_id=runs[0].run_id,
        page=runs[0].page,
        table=runs[0].table("trials"),
        interrupted=False,
        endings=tuple(run.end(timeout_s=0.0) for run in runs),
    )
    caplog.clear()
    with caplog.at_level("INFO", logger="lorat_platform.search"):
        say_where_it_is(outcome)
    (said,) = caplog.messages
    assert said.startswith(f"Nothing of these runs has arrived in MLflow at {uri}")
    first = runs[0].journal.folder
    assert f": 4 records wait in 2 journals, the first one {first}. " in said
    assert f"MLFLOW_TRACKING_URI={uri} LORAT_HOME=" in said
    assert said.endswith("-m lorat_platform.recording replay")
