"""Every job says in a sentence that the home folder cannot be written, or has no tracker."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest

from lorat.data import synthetic
from tests.jobs.in_process import run_in_process
from tests.mlflow_home import make_home

SMALL = ("--variant", "N-112", "--epochs", "1", "--pairs-per-epoch", "16", "--batch-size", "8")


@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        ("train", SMALL),
        ("tune", ("--trials", "1")),
        ("evaluate", ("--model", "static")),
        ("promote", ()),
        ("export", ()),
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


@pytest.mark.parametrize("job", ["export", "track"])
def test_where_nothing_was_trained_a_model_is_asked_for(
    job: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(make_home(tmp_path / "home")))
    (tmp_path / "frames").mkdir()
    cv2.imwrite(
        str(tmp_path / "frames" / "1.png"), synthetic.render("val", 0, num_frames=1).images[0]
    )
    output = ("--output", tmp_path / "out.mp4")
    arguments = {"export": output, "track": (tmp_path / "frames", "--box", "9,9,30,30", *output)}
    assert run_in_process(job, *arguments[job]) == 2
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: There is no lorat@champion and no lorat@candidate in MLflow at ")
    assert told.endswith("; train one with jobs/train.py, or give --model.")
