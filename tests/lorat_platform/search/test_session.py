"""What the driver of a search does with its trials, their MLflow runs, and a snapshot."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ray.exceptions import RayActorError

from lorat.errors import UserError
from lorat.files.storage import locate
from lorat_platform.failures import TrialFailed
from lorat_platform.recording.run import Run, open_run
from lorat_platform.recording.store import connect
from lorat_platform.recording.trouble import Ending
from lorat_platform.runs.claim import LEASE_S, Lease
from lorat_platform.search import session as search_session
from lorat_platform.search.results.board import Leaderboard
from lorat_platform.search.rungs import Rungs
from lorat_platform.search.session import SearchCallback, SearchSession


class BlackHole:
    """A run whose server never answers."""

    reference = "key:parent"
    run_id = None

    def __init__(self) -> None:
        self.status = ""

    def set_tags(self, values: dict[str, str]) -> None:
        pass

    def log_console(self, text: str) -> None:
        pass

    def end(self, status: str, timeout_s: float) -> Ending:
        self.status = status
        time.sleep(timeout_s)
        return Ending(False, True, 1, 0, 0, Path(), "", "")


def _session(
    folder: Path,
    *,
    num_trials: int = 100,
    resumes: bool = False,
    need: Any = None,
    parent: Run | None = None,
) -> SearchSession:
    nothing: Any = BlackHole()
    return SearchSession(
        "many",
        identity="many-id",
        folder=folder,
        board=Leaderboard(objectives=("ao",), rungs=Rungs(max_steps=4, reduction=2, num_rungs=1)),
        parent=parent or nothing,
        experiment="lorat-search",
        num_trials=num_trials,
        remember_parent=lambda _: None,
        lease=nothing,
        on_resume=(lambda: None) if resumes else None,
        need=need,
    )


def test_a_server_that_never_answers_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_session, "CLOSE_S", 1.0)
    session = _session(tmp_path)
    ended, running = [BlackHole() for _ in range(50)], [BlackHole() for _ in range(50)]
    for status, runs in (("FINISHED", ended), ("RUNNING", running)):
        for number, run in enumerate(runs):
            trial: Any = run
            session._runs[f"{status}-{number}"] = trial
            if status == "FINISHED":
                session._close(f"{status}-{number}", "FINISHED")
    began = time.monotonic()
    assert sum(ending.waiting for ending in session.end()) == 100
    assert time.monotonic() - began < 5.0
    assert {run.status for run in ended} == {"FINISHED"}
    assert {run.status for run in running} == {"KILLED"}


class FakeGauge:
    """Keeps what would be exported; no node's exporter is read in a test."""

    values: ClassVar[dict[tuple[str, str], float]] = {}

    def __init__(self, name: str, *, description: str, tag_keys: tuple[str, ...]) -> None:
        assert (name, tag_keys) == ("lorat_search_trials", ("search", "status"))

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tags["search"], tags["status"]] = value


def _exported() -> dict[str, float]:
    return {status: value for (_, status), value in FakeGauge.values.items()}


def test_a_trial_that_was_stopped_looks_stopped_in_mlflow(own_store: Path, tmp_path: Path) -> None:
    with open_run("lorat-search", "many", folder=tmp_path / "parent") as parent:
        session = _session(tmp_path, parent=parent)
        trials: list[Any] = [
            SimpleNamespace(trial_id=name, config={"lora.rank": 8})
            for name in ("completed", "stopped", "interrupted")
        ]
        for trial, step in zip(trials, (4, 2, 2), strict=True):
            session.begin(trial, trials)
            session.report(trial, {"step": step, "ao": 0.5, "loss": 1.0, "system/gpu": 3.0})
        runs = dict(session._runs)
        session.finish(trials[0])
        session.finish(trials[1])
        session.end()
    client = connect()
    for name, opened in runs.items():
        run = client.get_run(opened.wait_for_id())
        assert run.info.status == ("FINISHED" if name == "completed" else "KILLED")
        assert run.data.tags["lorat.trial_status"] == name
        assert run.data.metrics == {"val/ao": 0.5, "train/loss": 1.0, "system/gpu": 3.0}
        assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"console.log"}
    stopped = client.get_run(runs["stopped"].wait_for_id())
    assert stopped.info.run_name == "t01 r8"
    assert stopped.data.tags["mlflow.note.content"] == "Stopped early, after 2 of 4 steps."


def test_the_number_of_trials_by_status_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_session, "Gauge", FakeGauge)
    monkeypatch.setattr(FakeGauge, "values", {})
    session = _session(tmp_path)
    trials = [SimpleNamespace(trial_id=f"t{i}", config={}, status="PENDING") for i in range(3)]
    session.take_note(trials)
    assert _exported() == {"waiting": 3, "running": 0, "completed": 0, "stopped": 0, "failed": 0}
    session.board.rows["t0"].status = "failed"
    session.board.rows["t1"].status = "running"
    session.take_note(trials)
    assert _exported() == {"waiting": 1, "running": 1, "completed": 0, "stopped": 0, "failed": 1}
    trials[1].status = "PAUSED"
    session.take_note(trials)
    assert _exported()["waiting"] == 2
    session.end()
    assert set(_exported().values()) == {0}
    assert {search for search, _ in FakeGauge.values} == {"many"}


def test_a_snapshot_that_ray_tune_could_not_take_up_is_an_error(tmp_path: Path) -> None:
    tune_log = logging.getLogger("ray.tune.execution.tune_controller")
    whole = _session(tmp_path, resumes=True)
    whole.restore(whole.state() | {"run_ids": {}})
    whole.start()
    whole.end()
    lacking = _session(tmp_path, resumes=True)
    with pytest.raises(UserError, match=r"snapshot of the search many.*lacks the table of trials"):
        lacking.start()
    lacking.end()
    late = _session(tmp_path, resumes=True)
    late.restore(late.state())
    try:  # the trials are queued after the table is back
        raise AssertionError
    except AssertionError:
        tune_log.exception("Failed to restore the run state.")
    with pytest.raises(UserError, match=r"AssertionError.* left as it is"):
        late.start()
    late.end()
    assert tune_log.filters == []


def test_a_search_that_another_driver_took_over_stops_before_it_writes(tmp_path: Path) -> None:
    folder = locate(tmp_path)
    lease = Lease(folder, "The search many", "wait").claim()
    session = _session(tmp_path)
    session.lease = lease
    callback = SearchCallback("many-id")
    callback.on_step_begin(1, [])
    folder.delete(f"driver-{lease.token}.json")  # as who takes over does
    callback.on_step_begin(2, [])  # asks the storage only after a suspension
    lease._renewed_at -= LEASE_S
    with pytest.raises(UserError, match="The search many was taken over"):
        callback.on_step_begin(3, [])
    session.end(close=False)
    assert not list(tmp_path.iterdir())


def test_surroundings_get_a_trial_two_more_tries_and_its_own_faults_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed, diverged = RayActorError(error_msg="SIGKILL."), UserError("The loss is not finite.")
    session = _session(tmp_path)
    trials: list[Any] = [SimpleNamespace(trial_id=f"t{i}", config={}) for i in range(3)]
    assert [session.tries_again(trials[0], killed) for _ in range(3)] == [True, True, False]
    assert not session.tries_again(trials[1], TrialFailed(str(diverged), False, 2))
    taken_away = RayActorError(error_msg="preempted", preempted=True)
    assert all(session.tries_again(trials[2], taken_away) for _ in range(5))
    rows = [session.board.rows[trial.trial_id] for trial in trials]
    assert [row.retries for row in rows] == [2, 0, 0]
    assert [row.lost_steps for row in rows] == [3 * 4, 2, 5 * 4]
    assert (rows[1].reason, rows[1].is_own_fault) == ("The loss is not finite.", True)
    said = capsys.readouterr().out
    assert said.count("of 2), for a failure that is not its own: the trial's process died") == 2
    assert said.count("tried again (its node was taken away)") == 5
    for row in rows[:2]:
        row.status = "failed"
    later = _session(tmp_path)
    later.restore(session.state())
    assert [later.reopens(row.trial_id) for row in rows] == [True, False, False]
    assert later.board.rows["t0"].status == "waiting"
    assert later.tries_again(trials[0], killed), "a resumed search counts anew"
    session.end()
    later.end()


def test_a_search_whose_nodes_are_gone_says_what_its_trials_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    session = _session(tmp_path, need={"CPU": 2.0, "GPU": 0.0})
    trials: list[Any] = [SimpleNamespace(status=status) for status in ("PENDING", "TERMINATED")]
    session.remind([SimpleNamespace(status="RUNNING"), *trials])
    session.remind(trials)
    session.remind(trials)
    session.end()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["waiting for nodes: 1 trials, each with 2 CPU on one node, which have 1 CPU"]
    session.end()
