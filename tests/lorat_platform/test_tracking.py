"""Runs are complete in MLflow, and training never waits for MLflow."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorat.errors import UserError
from lorat_platform import backlog, delivery, tracking
from lorat_platform.mlflow_store import connect, ensure_experiment, tracking_uri
from tests.mlflow_home import make_home
from tests.mlflow_server import Proxy, Server, free_port, running_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAT_HOME", str(make_home(tmp_path / "home")))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    yield proxy
    proxy.close()


def history(run_id: str, name: str) -> dict[int, float]:
    points = connect().get_metric_history(run_id, name)
    steps = [point.step for point in points]
    assert len(steps) == len(set(steps)), "a metric arrived twice"
    return {point.step: point.value for point in points}


def find_runs(experiment: str) -> list:
    client = connect()
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


def test_default_store_is_in_the_home_folder_with_artefacts_beside_it(home: Path) -> None:
    (home / "mlflow.db").unlink()
    assert tracking_uri() == f"sqlite:///{home}/mlflow.db"
    with tracking.open_run("lorat", "a") as run:
        run.log_bytes(b"hello", "plots/a.txt")
    assert (home / "mlflow.db").exists()
    assert [p.read_bytes() for p in (home / "mlartifacts").rglob("a.txt")] == [b"hello"]


def test_store_of_the_environment_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    with tracking.open_run("lorat", "a"):
        pass
    assert (tmp_path / "other.db").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert find_runs("lorat") == []


def test_metrics_params_tags_and_status_arrive(tmp_path: Path) -> None:
    with tracking.open_run(
        "lorat", "first", folder=tmp_path / "run", tags={"variant": "N-112"}, description="# Hello"
    ) as run:
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


def test_a_user_without_a_name_is_known_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert tracking.user_name() == str(os.getuid())


def test_exception_marks_the_run_as_failed(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="broken"),
        tracking.open_run("lorat", "a", folder=tmp_path) as run,
    ):
        raise RuntimeError("broken")
    assert connect().get_run(run.wait_for_id()).info.status == "FAILED"


def test_restart_with_the_same_folder_continues_the_same_run(tmp_path: Path) -> None:
    with tracking.open_run("lorat", "a", folder=tmp_path) as first:
        first.log_metrics({"loss": 1.0}, step=0)
        first.log_params({"workers": 1})
    second = tracking.open_run("lorat", "a", folder=tmp_path)
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


def test_run_is_created_once_although_the_answer_was_lost(tmp_path: Path) -> None:
    with tracking.open_run("lorat", "a", folder=tmp_path) as run:
        run.log_metrics({"loss": 1.0}, step=0)
    run.journal.set_header(run_id=None)  # as if the process had died before it heard the id
    again = tracking.open_run("lorat", "a", folder=tmp_path)
    again.close()
    assert len(find_runs("lorat")) == 1


def test_nonfinite_metrics_are_kept_and_marked(tmp_path: Path) -> None:
    with tracking.open_run("lorat", "a", folder=tmp_path) as run:
        for step, value in enumerate([1.0, math.inf, math.nan, -math.inf, 2.0]):
            run.log_metrics({"loss": value}, step)
    points = history(run.wait_for_id(), "loss")
    assert [points[0], points[4]] == [1.0, 2.0]
    assert all(math.isnan(points[step]) for step in (1, 2, 3))
    tags = connect().get_run(run.wait_for_id()).data.tags
    assert tags["nonfinite.loss"] == "first inf at step 1"


def test_nonfinite_metrics_pass_through_a_server(proxy: Proxy, tmp_path: Path) -> None:
    with tracking.open_run("nonfinite", "a", folder=tmp_path) as run:
        for step, value in enumerate([1.0, math.inf, math.nan]):
            run.log_metrics({"loss": value}, step)
    points = history(run.wait_for_id(), "loss")
    assert points[0] == 1.0
    assert math.isnan(points[1])
    assert math.isnan(points[2])


def test_long_values_are_cut_and_kept_in_full_in_an_artefact(tmp_path: Path) -> None:
    with tracking.open_run("lorat", "a", folder=tmp_path) as run:
        run.log_params({"data": "x" * 7000, "many": {str(i): i for i in range(250)}})
    client = connect()
    params = client.get_run(run.wait_for_id()).data.params
    assert len(params) == 251
    assert len(params["data"]) == 6000
    assert params["data"].endswith("[7000 characters; all of it is in long-parameters.json]")
    path = client.download_artifacts(run.wait_for_id(), "long-parameters.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == {"data": "x" * 7000}


def test_a_refused_record_does_not_block_the_others(tmp_path: Path) -> None:
    run = tracking.open_run("lorat", "a", folder=tmp_path)
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
    run = tracking.open_run("lorat", "a", folder=tmp_path)
    run.log_metrics({"loss": 1.0}, step=0)
    assert run.flush()
    run.close()
    assert answers == []
    assert history(run.wait_for_id(), "loss") == {0: 1.0}
    assert not (run.journal.folder / "rejected.jsonl").exists()


def test_what_was_refused_is_sent_again_by_the_documented_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST
    from mlflow.tracking import MlflowClient

    log_batch, refuse = MlflowClient.log_batch, [True]
    tried: list[object] = []

    def refusing(self: MlflowClient, *args: object, **values: object) -> object:
        if refuse and "metrics" in values:
            tried.append(values["metrics"])
            raise MlflowException("no", BAD_REQUEST)
        return log_batch(self, *args, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(MlflowClient, "log_batch", refusing)
    monkeypatch.setattr(delivery, "DOUBTFUL_ATTEMPTS", 3)
    run = tracking.open_run("lorat", "a", folder=tmp_path)
    run.log_metrics({"loss": 1.0}, step=0)
    run.log_params({"after": 1})
    assert run.flush()
    run.close()
    assert len(tried) == 4, "three times as a batch, then alone"
    assert history(run.wait_for_id(), "loss") == {}
    assert connect().get_run(run.wait_for_id()).data.params == {"after": "1"}

    refuse.clear()
    assert backlog.main(["replay", str(run.journal.folder)]) == 0
    assert "1 records delivered" in capsys.readouterr().out
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
    run = tracking.open_run("lorat", "a", folder=tmp_path)
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
    again = tracking.open_run("lorat", "a", folder=tmp_path)
    assert again.close()
    listed = connect().list_artifacts(run.wait_for_id(), "plots")
    assert [entry.path for entry in listed] == ["plots/a.txt", "plots/b.txt"]


def test_a_journal_forgotten_at_that_moment_does_not_end_the_sender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracking.open_run("lorat", "other", folder=tmp_path / "other") as other:
        pass
    backlog.remember(other.journal)
    [entry] = backlog._folder().glob("*.json")
    read_text = Path.read_text

    def forgotten_meanwhile(path: Path, *args: object, **values: object) -> str:
        if path == entry:
            entry.unlink(missing_ok=True)
        return read_text(path, *args, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", forgotten_meanwhile)
    run = tracking.open_run("lorat", "a", folder=tmp_path / "run")
    assert run.flush()
    run.log_metrics({"loss": 1.0}, step=0)
    time.sleep(1.5)  # the sender has looked for journals of others
    assert not entry.exists()
    run.log_metrics({"loss": 2.0}, step=1)
    assert run.close()
    assert history(run.wait_for_id(), "loss") == {0: 1.0, 1: 2.0}


def test_line_cut_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    with tracking.open_run("lorat", "a", folder=tmp_path) as run:
        run.log_metrics({"loss": 1.0}, step=0)
    with open(run.journal.folder / "journal.jsonl", "a") as file:
        file.write('{"op": "metr')
    again = tracking.open_run("lorat", "a", folder=tmp_path)
    again.log_metrics({"loss": 2.0}, step=1)
    assert again.close()
    assert history(run.wait_for_id(), "loss") == {0: 1.0, 1: 2.0}


def test_full_disk_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tracking.open_run("lorat", "a", folder=tmp_path)
    run.flush()
    journal = run.journal.folder / "journal.jsonl"
    journal.rename(journal.with_name("aside"))
    journal.mkdir()  # every attempt to append fails now, also for root
    for step in range(10):
        run.log_metrics({"loss": float(step)}, step)
    assert "cannot be written" in caplog.text
    journal.rmdir()
    journal.with_name("aside").rename(journal)
    run.close()
    assert history(run.wait_for_id(), "loss") == {step: float(step) for step in range(10)}


def test_children_find_a_parent_that_arrives_later(tmp_path: Path) -> None:
    parent = tracking.open_run("search", "parent", folder=tmp_path / "parent")
    with tracking.open_run(
        "search", "child", folder=tmp_path / "child", parent_run_id=parent.reference
    ) as child:
        pass
    parent.close()
    tags = connect().get_run(child.wait_for_id()).data.tags
    assert tags["mlflow.parentRunId"] == parent.run_id


def test_deleted_experiment_comes_back_instead_of_losing_metrics(tmp_path: Path) -> None:
    client = connect()
    client.delete_experiment(ensure_experiment(client, "lorat", tracking_uri()))
    with tracking.open_run("lorat", "a", folder=tmp_path) as run:
        run.log_metrics({"loss": 1.0}, step=0)
    assert history(run.wait_for_id(), "loss") == {0: 1.0}


# -- a server that is down, slow or broken -------------------------------------------------------


def log_fast(run: tracking.Run, steps: range) -> None:
    """Log a metric per step, and show that no call waits for MLflow."""
    slowest = 0.0
    for step in steps:
        start = time.perf_counter()
        run.log_metrics({"loss": float(step)}, step)
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 0.5


def test_server_killed_in_mid_run_gets_everything_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "RETRY_S", 1.0)
    server = Server(tmp_path / "server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    server.start()
    try:
        run = tracking.open_run("lorat", "a", folder=tmp_path / "run")
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
    run = tracking.open_run("errors", "a", folder=tmp_path)
    log_fast(run, range(100))
    assert not run.flush(timeout_s=2)
    proxy.broken = False
    assert run.close()
    assert history(run.wait_for_id(), "loss") == {step: float(step) for step in range(100)}


def test_slow_server_does_not_slow_training(proxy: Proxy, tmp_path: Path) -> None:
    proxy.delay_s = 2.0
    run = tracking.open_run("slow", "a", folder=tmp_path)
    log_fast(run, range(2000))
    assert run.close()
    assert proxy.num_calls < 20, "metrics are sent in batches"
    proxy.delay_s = 0.0
    assert history(run.wait_for_id(), "loss") == {step: float(step) for step in range(2000)}


def test_dead_server_leaves_a_journal_for_the_documented_command(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    run = tracking.open_run("replay", "a", folder=tmp_path / "run")
    log_fast(run, range(20))
    run.log_bytes(b"picture", "plots/a.txt")
    assert not run.close()
    assert time.monotonic() - start < 30
    assert f"python -m lorat_platform.tracking replay {run.journal.folder}" in caplog.text

    command = [sys.executable, "-m", "lorat_platform.tracking", "replay"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert failed.returncode == 1
    late = Server(server.folder.parent / "late", port=port)
    late.start()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        [stored] = find_runs("replay")
        assert stored.info.status == "FINISHED"
        assert history(stored.info.run_id, "loss") == {step: float(step) for step in range(20)}
        assert connect().list_artifacts(stored.info.run_id, "plots")[0].path == "plots/a.txt"
    finally:
        late.kill()


def test_next_run_delivers_what_a_killed_process_left(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from lorat_platform import tracking\n"
        "run = tracking.open_run('lorat', 'killed', folder=sys.argv[1])\n"
        "for step in range(100): run.log_metrics({'loss': step}, step)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "killed")], env=environment)
    run = tracking.open_run("lorat", "next", folder=tmp_path / "next")
    run.flush()
    deadline = time.monotonic() + 30
    while backlog.waiting() != [run.journal.folder] and time.monotonic() < deadline:
        time.sleep(0.1)
    run.close()
    killed = next(r for r in find_runs("lorat") if r.info.run_name == "killed")
    assert history(killed.info.run_id, "loss") == {step: float(step) for step in range(100)}


def test_replay_refuses_a_journal_of_another_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracking.open_run("lorat", "a", folder=tmp_path / "run") as run:
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        backlog.replay(run.journal.folder)
    with pytest.raises(UserError, match="no journal"):
        backlog.replay(tmp_path)


def test_passwords_are_not_written_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    run = tracking.open_run("lorat", "a", folder=tmp_path / "run")
    run.close()
    for path in tmp_path.rglob("*.json*"):
        assert "secret" not in path.read_text()


# -- many processes ------------------------------------------------------------------------------

WRITER = """
import sys
from lorat_platform import tracking
number, folder, barrier = int(sys.argv[1]), sys.argv[2], sys.argv[3]
open(f"{barrier}/{number}", "w").close()
import os, time
while len(os.listdir(barrier)) < 8:
    time.sleep(0.01)
run = tracking.open_run("crowd", f"trial {number}", folder=folder)
for step in range(200):
    run.log_metrics({"loss": number + step, "ao": step}, step)
    if step % 20 == 0:
        run.flush()
run.log_params({"number": number})
sys.exit(0 if run.close(timeout_s=120) else 3)
"""


@pytest.mark.parametrize("store", ["sqlite", "server"])
def test_eight_processes_lose_nothing(
    store: str, server: Server, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "mlflow.db").unlink()  # they also race to make it
    if store == "server":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    (tmp_path / "barrier").mkdir()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(i), str(tmp_path / str(i)), tmp_path / "barrier"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(8)
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=300)
        assert writer.returncode == 0, errors
        assert "locked" not in errors
    runs = find_runs("crowd")
    assert sorted(run.data.params["number"] for run in runs) == [str(i) for i in range(8)]
    for run in runs:
        number = int(run.data.params["number"])
        assert history(run.info.run_id, "loss") == {s: float(number + s) for s in range(200)}
        assert len(history(run.info.run_id, "ao")) == 200
    assert not list(connect().search_runs(["0"])), "a run went to the Default experiment"
