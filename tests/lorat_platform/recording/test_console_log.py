"""What a job prints is an artefact of its run, and nobody waits for its upload."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from infra.processes import free_port
from lorat.errors import UserError
from lorat_platform.recording import backlog, console_log
from lorat_platform.recording.console_log import LogFile, written_to
from lorat_platform.recording.run import Run, open_run
from lorat_platform.recording.store import connect
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("own_store")
log = logging.getLogger("lorat_platform.workers")


def stored(run: Run, folder: Path, name: str = "console.log") -> str:
    """Return a log as MLflow has it, nothing if it has none."""
    client = connect()
    if name not in {file.path for file in client.list_artifacts(run.wait_for_id())}:
        return ""
    return Path(client.download_artifacts(run.wait_for_id(), name, str(folder))).read_text()


def test_the_log_grows_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_log, "PAUSE_S", 0.1)
    monkeypatch.setattr(console_log, "EVERY_S", 0.05)
    logging.getLogger("lorat_platform").setLevel(logging.INFO)
    console_log.listen().take()
    log.info("before the run was opened")
    run = open_run("lorat", "a", folder=tmp_path / "run")
    with pytest.raises(UserError, match="make room"), written_to(run):  # noqa: PT012
        log.info("step 1 of s3://key:planted-secret@bucket/runs")
        wait_until("the log in MLflow", lambda: "step 1" in stored(run, tmp_path), seconds=30)
        log.info("step 2")
        raise UserError("The disk is full; make room.")
    run.close("FAILED")
    text = stored(run, tmp_path)
    assert [line[20:] for line in text.splitlines() if "UserError" not in line] == [
        "before the run was opened",
        "step 1 of s3://bucket/runs",
        "step 2",
    ]
    assert text.endswith("UserError: The disk is full; make room.\n")
    again = open_run("lorat", "a", folder=tmp_path / "run")
    again.log_console("resumed here\n")
    again.close()
    assert stored(again, tmp_path) == f"{text}resumed here\n"
    elsewhere = open_run("lorat", "a", folder=tmp_path / "other", run_id=run.wait_for_id())
    elsewhere.log_console("resumed elsewhere\n")
    elsewhere.close()
    assert stored(again, tmp_path) == f"{text}resumed here\n", "it is another file"
    name = elsewhere.journal.console.path.name
    assert stored(again, tmp_path, name) == "resumed elsewhere\n"


def test_a_dead_server_costs_no_time_and_gets_the_log_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run = open_run("lorat", "a", folder=tmp_path / "run")
    began = time.monotonic()
    for number in range(200):
        run.log_console(f"line {number}\n")
    assert time.monotonic() - began < 5
    ending = run.end("FINISHED", timeout_s=0.0)
    assert not ending.delivered
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    journal = run.journal
    journal.set_header(store=backlog.store_name(connect_uri()), tracking_uri=connect_uri())
    assert backlog.replay(journal.folder) is not None
    assert stored(run, tmp_path).endswith("line 199\n")
    assert backlog.replay(journal.folder) == 0


def connect_uri() -> str:
    """Return the address of the store in use."""
    from lorat_platform.recording.store import tracking_uri

    return tracking_uri()


def test_a_long_log_keeps_its_begin_and_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_log, "MAX_BYTES", 4000)
    monkeypatch.setattr(console_log, "BEGIN_BYTES", 1000)
    monkeypatch.setattr(console_log, "END_BYTES", 2000)
    file = LogFile(tmp_path / "console.log")
    for number in range(3000):
        file.append(f"line {number}\n")
        assert file.path.stat().st_size <= 4000
    lines = file.path.read_text().splitlines()
    assert lines[0] == "line 0" and lines[-1] == "line 2999"
    assert any("bytes are left out" in line for line in lines)


def test_a_log_that_somebody_put_there_is_not_uploaded(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("planted")
    link = tmp_path / "console.log"
    link.symlink_to(secret)
    for path in (link, tmp_path / "secret"):
        with pytest.raises(UserError, match="is not the log that was put there"):
            LogFile(path).checked()
