"""Records outlive kills and full disks, and name no password."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import pytest

from infra.processes import free_port
from lorat.errors import UserError
from lorat_platform.recording import journal
from lorat_platform.recording import run as recording
from lorat_platform.recording.journal import Journal
from lorat_platform.recording.store import connect
from lorat_platform.recording.trouble import Trouble, say_what_is_left
from tests.mlflow_runs import history
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("own_store")


def test_line_cut_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    with recording.open_run("lorat", "a", folder=tmp_path) as run:
        run.log_metrics({"loss": 1.0}, step=0)
    with open(run.journal.folder / "journal.jsonl", "a") as file:
        file.write('{"op": "metr')
    again = recording.open_run("lorat", "a", folder=tmp_path)
    again.log_metrics({"loss": 2.0}, step=1)
    assert again.close()
    assert history(run.wait_for_id(), "loss") == {0: 1.0, 1: 2.0}


def test_full_disk_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = recording.open_run("lorat", "a", folder=tmp_path)
    run.flush()
    file = run.journal.folder / "journal.jsonl"
    file.rename(file.with_name("aside"))
    file.mkdir()  # every attempt to append fails now, also for root
    for step in range(10):
        run.log_metrics({"loss": float(step)}, step)
    assert caplog.text.count("cannot be written") == 1
    file.rmdir()
    file.with_name("aside").rename(file)
    run.close()
    assert "lost" not in caplog.text.replace("is lost if the job ends so", "")
    assert history(run.wait_for_id(), "loss") == {step: float(step) for step in range(10)}


def test_a_line_cut_by_a_full_disk_is_written_again_as_a_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    records = [{"op": "tags", "time_ms": step, "values": {"text": "x" * 80}} for step in range(20)]
    for record in records[:5]:
        journal.append(record)
    size = (tmp_path / "journal.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for part in (1, 30, 140, 250):  # room for so many bytes more, as a disk that fills up has
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + part, limits[1]))
        try:
            for record in records[5:8]:
                journal.append(record)
            assert journal.disk_error is not None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        journal.append(records[8])
        assert journal.disk_error is None
        read = [entry.record for entry in journal.read(limit=100)]
        assert read == records[:9]
        os.truncate(tmp_path / "journal.jsonl", size)


def test_passwords_are_not_written_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        recording.open_run("lorat", "a", folder=tmp_path / "run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    run = recording.open_run("lorat", "a", folder=tmp_path / "run")
    run.log_params({"storage": "s3://key:secret@bucket"})
    run.set_tags({"lorat.failure": "no answer from s3://bucket?secret_key=secret&scheme=http"})
    run.set_description("see https://me:secret@wiki/page")
    run.close()
    texts = [path.read_text() for path in tmp_path.rglob("*.json*")]
    assert any("s3://bucket?secret_key=***&scheme=http" in text for text in texts)
    assert not any("secret@" in text or "=secret" in text for text in texts)


def test_a_process_of_the_same_number_overwrites_no_waiting_artefact(tmp_path: Path) -> None:
    """As the first process of a container that is started again."""
    first, again = Journal(tmp_path), Journal(tmp_path)
    places = [each.stage(b"content", "a.txt") for each in (first, again)]
    assert len(set(places)) == 2
    assert [first.staged(place).read_bytes() for place in places] == [b"content"] * 2


def test_only_what_the_journal_itself_put_there_is_uploaded_and_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As others can write into a run's folder, or leave one for us."""
    run = recording.open_run("lorat", "a", folder=tmp_path / "run")
    own, secret = run.journal, tmp_path / "others" / "secret.txt"
    secret.parent.mkdir()
    secret.write_text("secret")
    (own.folder / "own.txt").write_text("own")
    with_link = own.stage(b"good", "replaced.txt")
    own.staged(with_link).unlink()
    own.staged(with_link).symlink_to(secret)
    folder = tmp_path / "plots"
    folder.mkdir()
    (folder / "good.txt").write_text("good")
    with_link_inside = own.stage(folder, "plots")
    (own.folder / with_link_inside / "bad.txt").symlink_to(secret)
    elsewhere = f"artifacts/{'0' * 32}"
    (own.folder / elsewhere).symlink_to(secret.parent)
    good = own.stage(b"good", "good.txt")
    forged: list[object] = [
        str(secret), "../../others/secret.txt", "own.txt", "run.json", with_link, with_link_inside,
        f"{elsewhere}/secret.txt", f"artifacts/../../../others/{'0' * 32}/secret.txt", "artifacts",
        f"{Path(good).parent}/..", f"{good}/../../..", "", None, 7,
    ]  # fmt: skip
    for staged in forged:
        run.write({"op": "artifact", "time_ms": 0, "staged": staged, "folder": ""})
    run.write({"op": "artifact", "time_ms": 0, "staged": good, "folder": "../.."})
    no_records: list[object] = [
        7, [], "op", {}, {"op": 3}, {"op": "metrics"}, {"op": "metrics", "values": [1]},
        {"op": "artifact", "staged": good, "folder": 7}, {"op": "tags", "values": "a"},
    ]  # fmt: skip
    for line in no_records:
        own.append(line)  # type: ignore[arg-type]
    run.write({"op": "artifact", "time_ms": 0, "staged": good, "folder": ""})
    assert run.close()
    assert [a.path for a in connect().list_artifacts(run.wait_for_id())] == ["good.txt"]
    num_refused = len(forged) + 1 + len(no_records)
    assert len((own.folder / "rejected.jsonl").read_text().splitlines()) == num_refused
    assert caplog.text.count("MLflow refuses a record") == 1
    assert f"MLflow refused {num_refused} records; they are in" in caplog.text
    assert secret.read_text() == "secret"
    assert (own.folder / "own.txt").exists()
    assert not (own.folder / good).exists()
    for staged in forged:
        with pytest.raises(UserError):
            own.unstage(staged)  # type: ignore[arg-type]
    assert secret.exists()


def test_links_in_what_is_recorded_are_not_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret, report = tmp_path / "secret.txt", tmp_path / "report"
    secret.write_text("secret")
    (report / "clips").mkdir(parents=True)
    (report / "clips" / "good.txt").write_text("good")
    (report / "clips" / "bad.txt").symlink_to(secret)
    (report / "folder").symlink_to(tmp_path)
    os.mkfifo(report / "pipe")
    (tmp_path / "link").symlink_to(secret)
    with recording.open_run("lorat", "a", folder=tmp_path / "run") as run:
        run.log_artifact(report)
        run.log_artifact(tmp_path / "link")
    client, run_id = connect(), run.wait_for_id()
    assert [a.path for a in client.list_artifacts(run_id)] == ["report"]
    assert [a.path for a in client.list_artifacts(run_id, "report")] == ["report/clips"]
    (kept,) = client.list_artifacts(run_id, "report/clips")
    assert kept.path == "report/clips/good.txt"
    assert "3 links or special files of" in caplog.text
    assert "The artefact link is left out" in caplog.text


def test_records_that_no_disk_takes_are_said_to_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal, "MAX_WAITING", 5)
    for name in ("NOT_WRITTEN", "LOST"):
        monkeypatch.setattr(recording, name, Trouble())
    run = recording.open_run("lorat", "a", folder=tmp_path)
    run.flush()
    (run.journal.folder / "journal.jsonl").unlink()
    (run.journal.folder / "journal.jsonl").mkdir()  # nobody can append now
    for step in range(10):
        run.log_metrics({"loss": float(step)}, step)
    assert caplog.text.count("records are lost from now on") == 1
    assert not run.close(timeout_s=0.1)
    assert f"11 records are lost, since the journal in {run.journal.folder}" in caplog.text


def test_many_runs_have_one_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    runs = [recording.open_run("lorat", name, folder=tmp_path / name) for name in "abc"]
    wait_until("that all have tried", lambda: all(run._failed_attempts for run in runs))
    say_what_is_left([run.end(timeout_s=0.0) for run in runs])
    assert caplog.text.count("cannot be reached") == 1
    first = runs[0].journal.folder
    assert f"6 records wait in 3 journals, the first one {first}." in caplog.text
    assert "lorat_platform.recording replay\n" in caplog.text


def test_a_server_that_hangs_is_said_before_the_call_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "SILENT_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        run = recording.open_run("lorat", "a", folder=tmp_path)

        def said() -> bool:
            run.log_metrics({"loss": 1.0}, step=0)
            return "has not answered" in caplog.text

        wait_until("line", said)
        assert "cannot be reached" not in caplog.text
        run.end(timeout_s=0.0)
    assert f"MLflow at {uri} has not answered" in caplog.text
