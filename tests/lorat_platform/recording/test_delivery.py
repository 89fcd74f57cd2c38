"""What is recorded reaches MLflow once, however it answers, and training never waits."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from lorat.errors import UserError
from lorat_platform.recording import backlog
from lorat_platform.recording import run as recording
from lorat_platform.recording.store import connect
from tests.mlflow_runs import find_runs, history, log_fast
from tests.mlflow_server import Proxy, Server

pytestmark = [pytest.mark.processes(minutes=0.5), pytest.mark.usefixtures("own_store")]


def test_run_is_created_once_although_the_answer_was_lost(tmp_path: Path) -> None:
    with recording.open_run("lorat", "a", folder=tmp_path) as run:
        run.log_metrics({"loss": 1.0}, step=0)
    run.journal.set_header(run_id=None)  # as if the process had died before it heard the id
    again = recording.open_run("lorat", "a", folder=tmp_path)
    again.close()
    assert len(find_runs("lorat")) == 1


@pytest.mark.parametrize("journal", ["kept", "lost"])
def test_a_step_that_is_taken_again_is_shown_once_and_gaps_are_filled(
    journal: str, tmp_path: Path
) -> None:
    """A training that was killed goes on from its last checkpoint, maybe on another machine."""
    run = recording.open_run("lorat", "a", folder=tmp_path / "first")
    for step in (0, 1, 2, 4):  # what was to be said of step 3 was lost with its process
        run.log_metrics({"loss": float(step), "speed": 1.0}, step)
    for step in range(3):  # a worker died
        run.log_metrics({"loss": float(step), "speed": 2.0}, step)
    run.close()
    folder = tmp_path / ("first" if journal == "kept" else "second")
    again = recording.open_run("lorat", "a", folder=folder, run_id=run.wait_for_id())
    for step in range(1, 7):
        again.log_metrics({"loss": float(step), "speed": 3.0}, step)
        again.flush()
    again.close()
    client = connect()
    points = client.get_metric_history(run.wait_for_id(), "loss")
    assert sorted((p.step, p.value) for p in points) == [(s, float(s)) for s in range(7)]
    speeds = client.get_metric_history(run.wait_for_id(), "speed")
    assert [p.value for p in sorted(speeds, key=lambda p: p.step)] == [1, 1, 1, 3, 1, 3, 3]


def test_nonfinite_metrics_are_kept_and_marked(tmp_path: Path) -> None:
    with recording.open_run("lorat", "a", folder=tmp_path) as run:
        for step, value in enumerate([1.0, math.inf, math.nan, -math.inf, 2.0]):
            run.log_metrics({"loss": value}, step)
    points = history(run.wait_for_id(), "loss")
    assert [points[0], points[4]] == [1.0, 2.0]
    assert all(math.isnan(points[step]) for step in (1, 2, 3))
    tags = connect().get_run(run.wait_for_id()).data.tags
    assert tags["nonfinite.loss"] == "first inf at step 1"


def test_nonfinite_metrics_pass_through_a_server(
    proxy: Proxy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with recording.open_run("nonfinite", "a", folder=tmp_path) as run:
        for step, value in enumerate([1.0, math.inf, math.nan]):
            run.log_metrics({"loss": value}, step)
    points = history(run.wait_for_id(), "loss")
    assert points[0] == 1.0
    assert math.isnan(points[1])
    assert math.isnan(points[2])
    assert "View run" not in capfd.readouterr().out, "MLflow's own address opens another view"


def test_long_values_are_cut_and_kept_in_full_in_an_artefact(tmp_path: Path) -> None:
    with recording.open_run("lorat", "a", folder=tmp_path) as run:
        run.log_params({"data": "x" * 7000, "many": {str(i): i for i in range(250)}})
    client = connect()
    params = client.get_run(run.wait_for_id()).data.params
    assert len(params) == 251
    assert len(params["data"]) == 6000
    assert params["data"].endswith("[7000 characters; all of it is in long-parameters.json]")
    path = client.download_artifacts(run.wait_for_id(), "long-parameters.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == {"data": "x" * 7000}


def test_a_refused_record_does_not_block_the_others(tmp_path: Path) -> None:
    run = recording.open_run("lorat", "a", folder=tmp_path)
    run.log_metrics({"loss": 1.0}, step=0)
    run.write({"op": "metrics", "time_ms": 1, "step": 1, "values": {"bad\nname": 1.0}})
    run.log_metrics({"loss": 2.0}, step=2)
    run.close()
    assert history(run.wait_for_id(), "loss") == {0: 1.0, 2: 2.0}
    rejected = (run.journal.folder / "rejected.jsonl").read_text()
    assert json.loads(rejected)["record"]["step"] == 1


def test_a_busy_database_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST
    from mlflow.tracking import MlflowClient

    log_batch, answers = MlflowClient.log_batch, ["QueuePool limit reached"] * 2

    def busy(self: MlflowClient, *args: object, **values: object) -> object:
        if answers:
            raise MlflowException(answers.pop(), BAD_REQUEST)
        return log_batch(self, *args, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(MlflowClient, "log_batch", busy)
    run = recording.open_run("lorat", "a", folder=tmp_path)
    run.log_metrics({"loss": 1.0}, step=0)
    assert run.flush()
    run.close()
    assert answers == []
    assert history(run.wait_for_id(), "loss") == {0: 1.0}
    assert not (run.journal.folder / "rejected.jsonl").exists()


def test_an_artefact_that_cannot_be_uploaded_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    log_artifact, missing = MlflowClient.log_artifact, [True]

    def without_boto(self: MlflowClient, *args: object) -> object:
        if missing:
            raise ModuleNotFoundError("No module named 'boto3'")
        return log_artifact(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(MlflowClient, "log_artifact", without_boto)
    run = recording.open_run("lorat", "a", folder=tmp_path)
    run.log_bytes(b"picture", "plots/a.txt")
    run.log_bytes(b"picture", "plots/b.txt")
    run.log_metrics({"loss": 1.0}, step=0)
    began = time.monotonic()
    assert not run.close(), "the artefacts wait"
    assert time.monotonic() - began < 30
    assert history(run.wait_for_id(), "loss") == {0: 1.0}
    assert connect().get_run(run.wait_for_id()).info.status == "FINISHED"
    assert "a.txt of the run cannot be uploaded (ModuleNotFoundError: No module" in caplog.text
    assert "cannot be reached" not in caplog.text
    with pytest.raises(UserError, match=r"2 artefacts cannot be uploaded .*boto3"):
        backlog.replay(run.journal.folder)

    missing.clear()
    again = recording.open_run("lorat", "a", folder=tmp_path)
    assert again.close()
    listed = connect().list_artifacts(run.wait_for_id(), "plots")
    assert [entry.path for entry in listed] == ["plots/a.txt", "plots/b.txt"]


def test_server_killed_in_mid_run_gets_everything_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "RETRY_S", 1.0)
    server = Server(tmp_path / "server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    server.start()
    try:
        run = recording.open_run("lorat", "a", folder=tmp_path / "run")
        log_fast(run, range(50))
        assert run.flush()
        server.kill()
        log_fast(run, range(50, 100))
        assert not run.flush(timeout_s=2)
        server.start()
        log_fast(run, range(100, 150))
        assert run.close()
        assert history(run.wait_for_id(), "loss") == {step: float(step) for step in range(150)}
        assert len(find_runs("lorat")) == 1
    finally:
        server.kill()


def test_server_that_errs_gets_everything_later(proxy: Proxy, tmp_path: Path) -> None:
    proxy.broken = True
    run = recording.open_run("errors", "a", folder=tmp_path)
    log_fast(run, range(100))
    assert not run.flush(timeout_s=2)
    proxy.broken = False
    assert run.close()
    assert history(run.wait_for_id(), "loss") == {step: float(step) for step in range(100)}


def test_slow_server_does_not_slow_training(proxy: Proxy, tmp_path: Path) -> None:
    proxy.delay_s = 2.0
    run = recording.open_run("slow", "a", folder=tmp_path)
    log_fast(run, range(2000))
    assert run.close()
    assert proxy.num_calls < 20, "metrics are sent in batches"
    proxy.delay_s = 0.0
    assert history(run.wait_for_id(), "loss") == {step: float(step) for step in range(2000)}
