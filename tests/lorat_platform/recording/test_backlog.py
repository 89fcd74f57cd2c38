"""What MLflow could not take is delivered later, by the next run or by one command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.processes import free_port
from lorat.errors import UserError
from lorat_platform.recording import backlog, delivery
from lorat_platform.recording import run as recording
from lorat_platform.recording.store import connect
from tests.mlflow_runs import find_runs, history, log_fast
from tests.mlflow_server import Proxy, Server
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.processes(minutes=0.5), pytest.mark.usefixtures("own_store")]


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
    run = recording.open_run("lorat", "a", folder=tmp_path)
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


def test_a_journal_forgotten_at_that_moment_does_not_end_the_sender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording.open_run("lorat", "other", folder=tmp_path / "other") as other:
        pass
    backlog.remember(other.journal)
    [entry] = backlog._folder().glob("*.json")
    read_text = Path.read_text

    def forgotten_meanwhile(path: Path, *args: object, **values: object) -> str:
        if path == entry:
            entry.unlink(missing_ok=True)
        return read_text(path, *args, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", forgotten_meanwhile)
    run = recording.open_run("lorat", "a", folder=tmp_path / "run")
    assert run.flush()
    run.log_metrics({"loss": 1.0}, step=0)
    wait_until("look for journals of others", lambda: not entry.exists())
    run.log_metrics({"loss": 2.0}, step=1)
    assert run.close()
    assert history(run.wait_for_id(), "loss") == {0: 1.0, 1: 2.0}


def test_server_too_slow_for_the_end_of_a_run_gets_the_rest_by_replay(
    proxy: Proxy, tmp_path: Path
) -> None:
    proxy.delay_s = 10.0
    began = time.monotonic()
    run = recording.open_run("slower", "a", folder=tmp_path)
    log_fast(run, range(2000))
    logged = time.monotonic()
    assert logged - began < proxy.delay_s, "training waits for no call"
    assert not run.close(timeout_s=1)
    assert time.monotonic() - logged < proxy.delay_s, "nor does its end"
    assert run.journal.num_pending() > 0
    proxy.delay_s = 0.0
    wait_until(
        "end of the call that is still under way",
        lambda: backlog.replay(run.journal.folder) is not None,
    )
    [stored] = find_runs("slower")
    assert history(stored.info.run_id, "loss") == {step: float(step) for step in range(2000)}
    assert stored.info.status == "FINISHED"


def test_dead_server_leaves_a_journal_for_the_documented_command(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    run = recording.open_run("replay", "a", folder=tmp_path / "run")
    log_fast(run, range(20))
    run.log_bytes(b"picture", "plots/a.txt")
    assert not run.close()
    assert time.monotonic() - start < 30
    said = re.search(
        r"Nothing of this run has arrived in MLflow at (?:\S+) \(.+\): "
        r"(\d+) records wait in (\S+)\. .* or now: (.+)",
        caplog.text,
    )
    assert said, caplog.text
    assert (int(said[1]), said[2]) == (run.journal.num_pending(), str(run.journal.folder))
    command = ["sh", "-c", said[3]]
    # By then the shell has another MLflow.
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}",
    }
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
        "from lorat_platform.recording import run as runs\n"
        "run = runs.open_run('lorat', 'killed', folder=sys.argv[1])\n"
        "for step in range(100): run.log_metrics({'loss': step}, step)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "killed")], env=environment)
    run = recording.open_run("lorat", "next", folder=tmp_path / "next")
    run.flush()
    wait_until("delivery of all other journals", lambda: backlog.waiting() == [run.journal.folder])
    run.close()
    killed = next(r for r in find_runs("lorat") if r.info.run_name == "killed")
    assert history(killed.info.run_id, "loss") == {step: float(step) for step in range(100)}


def test_replay_refuses_a_journal_of_another_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording.open_run("lorat", "a", folder=tmp_path / "run") as run:
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        backlog.replay(run.journal.folder)
    with pytest.raises(UserError, match="no journal"):
        backlog.replay(tmp_path)


def test_journals_of_another_mlflow_are_listed_on_request_and_else_left_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def leave(name: str, uri: str) -> recording.Run:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        run = recording.open_run("lorat", name, folder=tmp_path / name)
        run.log_metrics({"loss": 1.0}, step=0)
        wait_until("an attempt", lambda: run._failed_attempts > 0)
        assert not run.close(timeout_s=0.0)
        return run

    here, gone = f"sqlite:///{tmp_path}/here.db", f"http://127.0.0.1:{free_port()}"
    (tmp_path / "here.db").write_text("no database yet")
    mine, other = leave("mine", here), leave("other", gone)
    (tmp_path / "here.db").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", here)
    caplog.clear()
    with caplog.at_level("INFO"):
        backlog.deliver_quietly()
    assert str(mine.journal.folder) in caplog.text
    assert str(other.journal.folder) not in caplog.text
    assert history(mine.wait_for_id(), "loss") == {0: 1.0}

    assert backlog.main(["replay"]) == 0, "what waits for another MLflow is no failure"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"1 journal waits for another MLflow than {here}; listed by: ")
    assert line.endswith("-m lorat_platform.recording list")

    assert backlog.main(["list"]) == 0
    server, row, command = capsys.readouterr().out.splitlines()
    assert server == f"MLflow at {gone}"
    assert row.split() == ["3", "records", "lorat/other", str(other.journal.folder)]
    assert f"MLFLOW_TRACKING_URI={gone} " in command
    assert command.endswith("-m lorat_platform.recording replay")
    backlog.forget(other.journal)
    assert backlog.main(["list"]) == 0
    assert capsys.readouterr().out == "Nothing waits on this machine.\n"
    assert backlog.main(["lists"]) == 2
