"""Every job says in a sentence that the home folder cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.in_process import run_in_process

SMALL = ("--variant", "N-112", "--epochs", "1", "--pairs-per-epoch", "16", "--batch-size", "8")


@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        ("train", SMALL),
        ("tune", ("--trials", "1")),
        ("evaluate", ("--model", "static")),
        ("promote", ()),
        ("export", ("--model", "models:/lorat@champion")),
    ],
)
def test_a_home_folder_that_cannot_be_written_is_a_sentence(
    job: str,
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("no folder, also not for root")
    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "file" / "home"))
    assert run_in_process(job, *arguments) == 2
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and str(tmp_path / "file") in told
    assert "can" in told.rpartition(";")[2]  # what to do
