"""Every benchmark names the device and writes its figures as JSON."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lorat.errors import UserError
from lorat_platform.cluster.machine import processor_name
from lorat_platform.data.benchmark import DataBenchmark, cores_for
from lorat_platform.evaluation.benchmark import TrackBenchmark
from lorat_platform.search.benchmark import SearchBenchmark
from lorat_platform.training.benchmark import TrainBenchmark
from tests.jobs.in_process import import_job, run_in_process

job = import_job("benchmark")
KINDS = (DataBenchmark, TrainBenchmark, TrackBenchmark, SearchBenchmark)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_figures_go_to_json_with_options_and_device(
    kind: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[Any] = []
    figures = {"step_ms": 1.5, "mfu": float("nan"), "name": "B", "parts": (1, 2)}

    def benchmark(options: Any) -> dict[str, Any]:
        given.append(options)
        return figures

    file = tmp_path / "figures.json"
    with caplog.at_level(logging.INFO):
        job.measure(kind, benchmark, ["--json", str(file)])
        job.measure(kind, benchmark, [])
    assert all(isinstance(options, kind) for options in given)
    written = json.loads(file.read_text())
    assert written["figures"] == {"step_ms": 1.5, "mfu": None, "name": "B", "parts": [1, 2]}
    assert written["benchmark"] == kind.__name__
    assert written["options"].keys() > {"json"}
    assert written["device"]
    assert written["processor"] == processor_name()
    assert caplog.messages.count(f"On {written['device']}:") == 2


def test_a_benchmark_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    file.write_text("before")

    def fails(options: Any) -> dict[str, Any]:
        raise UserError("It cannot be measured.")

    with pytest.raises(UserError, match="cannot be measured"):
        job.measure(TrainBenchmark, fails, ["--json", str(file)])
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_place_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        job.measure(TrainBenchmark, pytest.fail, ["--json", str(tmp_path)])


def test_tracking_is_measured_from_the_command_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = tmp_path / "track.json"
    size = ("--width", 96, "--height", 96, "--frames", 1, "--rounds", 1, "--batch", 1)
    arguments = ("--variant", "N-112", *size, "--device", "cpu", "--json", file)
    assert run_in_process("benchmark", "track", *arguments) == 0
    assert json.loads(file.read_text())["device"] == processor_name()
    assert "1 video, eager" in caplog.text


def test_an_unknown_benchmark_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("benchmark", "tracks") == 2
    assert "error: There is no benchmark tracks; give data, train, track" in capsys.readouterr().err


def test_cores_that_feed_a_device_follow_from_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(4))
    assert cores_for(2000, 1000, 2) == pytest.approx(4)
    assert cores_for(500, 1000, 4) == pytest.approx(2)
    # More processes than cores share them.
    assert cores_for(500, 1000, 16) == pytest.approx(2)
