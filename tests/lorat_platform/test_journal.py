"""Records outlive kills and full disks, and name no password."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.processes import free_port
from lorat.errors import UserError
from lorat_platform import tracking
from lorat_platform.journal import Journal
from tests.mlflow_runs import history

pytestmark = pytest.mark.usefixtures("own_store")


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


def test_passwords_are_not_written_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        tracking.open_run("lorat", "a", folder=tmp_path / "run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    run = tracking.open_run("lorat", "a", folder=tmp_path / "run")
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
    places = [journal.stage(b"content", "a.txt") for journal in (first, again)]
    assert len(set(places)) == 2
    assert [first.staged(place).read_bytes() for place in places] == [b"content"] * 2
