"""Runs are complete in MLflow, whatever becomes of the process and however many write."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lorat_platform.recording import run as recording
from lorat_platform.recording.delivery import Delivery
from lorat_platform.recording.store import connect, ensure_experiment, tracking_uri
from tests.mlflow_runs import find_runs, history
from tests.mlflow_server import Server

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("own_store")


def test_default_store_is_in_the_home_folder_with_artefacts_beside_it(own_store: Path) -> None:
    (own_store / "mlflow.db").unlink()
    assert tracking_uri() == f"sqlite:///{own_store}/mlflow.db"
    with recording.open_run("lorat", "a") as run:
        run.log_bytes(b"hello", "plots/a.txt")
    assert (own_store / "mlflow.db").exists()
    assert [p.read_bytes() for p in (own_store / "mlartifacts").rglob("a.txt")] == [b"hello"]


def test_store_of_the_environment_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_store: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    with recording.open_run("lorat", "a"):
        pass
    assert (tmp_path / "other.db").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert find_runs("lorat") == []


def test_metrics_params_tags_and_status_arrive(tmp_path: Path) -> None:
    with recording.open_run(
        "lorat", "first", folder=tmp_path / "run", tags={"variant": "N-112"}
    ) as run:
        run.set_description("# Hello")
        run.log_metrics({"train/loss": 2.0, "val/P@20": 0.5}, step=3)
        run.log_params({"lora": {"rank": 8, "targets": ("q", "k")}, "lr": 1e-3, "init": None})
    stored = connect().get_run(run.wait_for_id())
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "first"
    assert stored.data.metrics == {"train/loss": 2.0, "val/P_20": 0.5}
    assert stored.data.params == {
        "lora.rank": "8", "lora.targets": '["q", "k"]', "lr": "0.001", "init": "None",
    }  # fmt: skip
    assert stored.data.tags["variant"] == "N-112"
    assert stored.data.tags["mlflow.note.content"] == "# Hello"


@pytest.mark.exhaustive
def test_many_runs_of_a_process_reach_mlflow_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The database of a default store lets 15 connections in, and fails the sixteenth."""
    mutex, talking, most = threading.Lock(), 0, 0
    step = Delivery.step

    def counted_step(delivery: Delivery) -> int:
        nonlocal talking, most
        with mutex:
            talking += 1
            most = max(most, talking)
        try:
            time.sleep(0.05)
            return step(delivery)
        finally:
            with mutex:
                talking -= 1

    monkeypatch.setattr(Delivery, "step", counted_step)
    runs = [recording.open_run("lorat", f"trial-{number}") for number in range(20)]
    assert all(run.close() for run in runs)
    assert len(find_runs("lorat")) == 20
    assert 1 < most <= recording.SENDERS + 1 < 15  # one may deliver what others left
    assert "cannot be reached" not in capsys.readouterr().err


def test_a_user_without_a_name_is_known_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert recording.user_name() == str(os.getuid())


def test_exception_marks_the_run_as_failed(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="broken"),
        recording.open_run("lorat", "a", folder=tmp_path) as run,
    ):
        raise RuntimeError("broken")
    assert connect().get_run(run.wait_for_id()).info.status == "FAILED"


def test_restart_with_the_same_folder_continues_the_same_run(tmp_path: Path) -> None:
    with recording.open_run("lorat", "a", folder=tmp_path) as first:
        first.log_metrics({"loss": 1.0}, step=0)
        first.log_params({"workers": 1})
    second = recording.open_run("lorat", "a", folder=tmp_path)
    second.flush()
    assert connect().get_run(second.wait_for_id()).info.status == "RUNNING"
    second.log_metrics({"loss": 0.5}, step=1)
    second.log_params({"workers": 2})
    second.close()
    assert [run.info.run_id for run in find_runs("lorat")] == [first.run_id] == [second.run_id]
    assert history(second.wait_for_id(), "loss") == {0: 1.0, 1: 0.5}
    data = connect().get_run(second.wait_for_id()).data
    assert data.params["workers"] == "1"
    assert data.tags["changed.workers"] == "1 -> 2"


def test_a_run_says_which_job_made_it_from_which_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789" * 4
    for given in ("/home/x/lorat/jobs/train.py", "jobs/train.py"):
        monkeypatch.setattr(sys, "argv", [given])
        made = recording.made_by({"git_revision": f"{commit}-dirty"})
        assert made["mlflow.source.name"] == "jobs/train.py"
        assert made["mlflow.source.type"] == "JOB"
        assert made["mlflow.source.git.commit"] == commit
    assert "mlflow.source.git.commit" not in recording.made_by({"git_revision": "unknown"})
    client = connect()
    theirs = client.create_experiment("theirs")
    with recording.open_run("theirs", "a", folder=tmp_path / "a") as run:
        pass
    assert run.page == (f"#/experiments/{theirs}/runs/{run.run_id}?workflowType=machine_learning")
    tags = client.get_run(run.wait_for_id()).data.tags
    assert tags["mlflow.source.name"] == "jobs/train.py"
    assert client.get_experiment(theirs).tags["mlflow.experimentKind"] == "custom_model_development"
    # A run that goes on from another folder, or machine, has the same page.
    with recording.open_run("theirs", "a", folder=tmp_path / "b", run_id=run.run_id) as again:
        pass
    assert again.page == run.page


def test_children_find_a_parent_that_arrives_later(tmp_path: Path) -> None:
    parent = recording.open_run("search", "parent", folder=tmp_path / "parent")
    with recording.open_run(
        "search", "child", folder=tmp_path / "child", parent_run_id=parent.reference
    ) as child:
        pass
    parent.close()
    tags = connect().get_run(child.wait_for_id()).data.tags
    assert tags["mlflow.parentRunId"] == parent.run_id


def test_deleted_experiment_comes_back_instead_of_losing_metrics(tmp_path: Path) -> None:
    client = connect()
    client.delete_experiment(ensure_experiment(client, "lorat", tracking_uri()))
    with recording.open_run("lorat", "a", folder=tmp_path) as run:
        run.log_metrics({"loss": 1.0}, step=0)
    assert history(run.wait_for_id(), "loss") == {0: 1.0}


WRITER = """
import sys
from lorat_platform.recording import run as recording
from lorat_platform.recording.delivery import Delivery
number, count, folder, barrier = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
open(f"{barrier}/{number}", "w").close()
import os, time
while len(os.listdir(barrier)) < count:
    time.sleep(0.01)
run = recording.open_run(f"crowd of {count}", f"trial {number}", folder=folder)
for step in range(200):
    run.log_metrics({"loss": number + step, "ao": step}, step)
    if step % 20 == 0:
        run.flush()
run.log_params({"number": number})
sys.exit(0 if run.close(timeout_s=120) else 3)
"""


@pytest.mark.parametrize(
    ("store", "count"),
    [
        ("sqlite", 3),
        ("server", 3),
        pytest.param("sqlite", 8, marks=pytest.mark.exhaustive),
        pytest.param("server", 8, marks=pytest.mark.exhaustive),
    ],
)
def test_processes_that_write_at_once_lose_nothing(
    store: str,
    count: int,
    server: Server,
    own_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (own_store / "mlflow.db").unlink()  # they also race to make it
    if store == "server":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    (tmp_path / "barrier").mkdir()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    start = [sys.executable, "-c", WRITER]
    writers = [
        subprocess.Popen(
            [*start, str(i), str(count), str(tmp_path / str(i)), str(tmp_path / "barrier")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=300)
        assert writer.returncode == 0, errors
        assert "locked" not in errors
    runs = find_runs(f"crowd of {count}")
    assert sorted(run.data.params["number"] for run in runs) == [str(i) for i in range(count)]
    for run in runs:
        number = int(run.data.params["number"])
        assert history(run.info.run_id, "loss") == {s: float(number + s) for s in range(200)}
        assert len(history(run.info.run_id, "ao")) == 200
    assert not list(connect().search_runs(["0"])), "a run went to the Default experiment"
