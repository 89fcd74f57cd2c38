"""A worker that trains writes metrics without importing MLflow or waiting for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from infra.processes import free_port
from lorat_platform import cluster
from lorat_platform.cluster.console import Console, ConsolePrinter
from lorat_platform.recording.remote import RemoteRun, open_remote_run
from lorat_platform.recording.run import CLOSE_S
from lorat_platform.recording.store import connect
from tests.mlflow_home import make_home
from tests.waiting import wait_until

pytestmark = pytest.mark.processes(minutes=0.5)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with cluster.connected("local", num_cpus=2):
        yield


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAT_HOME", str(make_home(tmp_path / "home")))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@ray.remote(num_cpus=1)
def train(run: RemoteRun, steps: int, folder: Path) -> tuple[float, bool]:
    import sys

    began = time.perf_counter()
    for step in range(steps):
        run.log_metrics({"train/loss": 1.0 / (step + 1)}, step)
    seconds = time.perf_counter() - began
    (folder / "plots").mkdir(exist_ok=True)
    (folder / "plots" / "a.txt").write_text("a")
    (folder / "plots" / "link").symlink_to("/etc/hostname")
    run.log_artifact(folder / "plots")
    run.log_bytes(b"b", "other/b.txt")
    assert run.settle()
    return seconds, "mlflow" in sys.modules


def test_metrics_of_a_worker_arrive_in_one_run(tmp_path: Path) -> None:
    run = open_remote_run("lorat", "remote", folder=tmp_path / "run", tags={"a": 1})
    seconds, imported = ray.get(train.remote(run, 500, tmp_path))
    assert not imported
    assert seconds < 5
    run_id = run.wait_for_id()
    assert run.close()
    client = connect()
    assert len(client.get_metric_history(run_id, "train/loss")) == 500
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(run_id).data.tags["a"] == "1"
    assert [a.path for a in client.list_artifacts(run_id, "plots")] == ["plots/a.txt"]
    assert [a.path for a in client.list_artifacts(run_id, "other")] == ["other/b.txt"]
    left = [path for path in (tmp_path / "run").rglob("*") if path.name in ("a.txt", "b.txt")]
    assert left == [], "what was uploaded does not fill the disk"


def test_a_step_is_shown_once_it_is_recorded(tmp_path: Path) -> None:
    """So that nothing that was shown is lost, whatever is killed."""
    console = ConsolePrinter().console

    @ray.remote(num_cpus=0)
    def work(run: RemoteRun, console: Console) -> bool:
        run.log_metrics({"loss": 0.0}, 1)
        console.line("step 1", run.in_flight()[-1:])
        return run.settle()

    def shown() -> list[str]:
        return [line for _, line in ray.get(console.actor.take.remote())]

    run = open_remote_run("lorat", "shown", folder=tmp_path / "run")
    sink = ray.get(run._actor.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(sink, signal.SIGSTOP)
    try:
        working = work.remote(run, console)
        ray.wait([working], timeout=3)
        assert shown() == []
    finally:
        os.kill(sink, signal.SIGCONT)
    assert ray.get(working)
    wait_until("the line", lambda: shown() == ["step 1"])
    assert run.close()


def test_killed_sink_comes_back_and_loses_nothing(tmp_path: Path) -> None:
    run = open_remote_run("lorat", "killed", folder=tmp_path / "run")
    ray.get(train.remote(run, 100, tmp_path))
    assert run.flush()
    run_id = run.wait_for_id()
    ray.kill(run._actor, no_restart=False)
    for step in range(100, 200):
        run.log_metrics({"train/loss": 0.0}, step)
    assert run.close()
    client = connect()
    points = client.get_metric_history(run_id, "train/loss")
    assert sorted(point.step for point in points) == list(range(200))
    experiment = client.get_experiment_by_name("lorat")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_dead_server_does_not_hold_a_worker_up_and_is_said_by_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with ConsolePrinter() as console:
        run = open_remote_run("lorat", "dead", console=console, folder=tmp_path / "run")
        seconds, _ = ray.get(train.remote(run, 500, tmp_path))
        assert seconds < 5
        assert run.run_id is None
        wait_until("line of the sink", lambda: "cannot be reached" in caplog.text)
        began = time.monotonic()
        assert not run.close()
        assert time.monotonic() - began < CLOSE_S + 60
    (journal,) = (tmp_path / "run").glob("mlflow-*")
    assert caplog.text.count("cannot be reached") == 1, "at once, and once"
    # 500 steps, two artefacts, the tags of the start, and the end
    assert f"504 records wait in {journal}. The next job" in caplog.text
    assert f"lorat_platform.recording replay {journal}\n" in caplog.text
