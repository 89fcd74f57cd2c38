"""Result files: exact lines, archive layouts, and the same scores when read back."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from lorat.errors import UserError
from lorat.metrics import GroundTruth, evaluate
from lorat.metrics.result_files import (
    whole_pixels,
    write_got10k,
    write_pytracking,
    write_trackingnet,
)
from tests.lorat.result_files import read_got10k, read_pytracking, read_trackingnet
from tests.real_data import REAL_DATA

BOXES = np.array([[10.25, 20.5, 40.75, 60.0], [11.0, 21.99995, 40.00005, 60.3]])
SECONDS = np.array([0.5, 0.0125])


def test_pytracking_lines_are_tab_separated_with_times(tmp_path: Path) -> None:
    write_pytracking(tmp_path, {"a-1": BOXES}, seconds={"a-1": SECONDS})
    assert (tmp_path / "a-1.txt").read_text() == (
        "10.250\t20.500\t30.500\t39.500\n11.000\t22.000\t29.000\t38.300\n"
    )
    assert (tmp_path / "a-1_time.txt").read_text() == "0.500000\n0.012500\n"


@pytest.mark.parametrize(
    ("dataset", "file", "first"),
    [
        ("LaSOT", "a.txt", "11.250\t21.500"),
        ("VastTrack", "a.txt", "11.250\t21.500"),
        ("LaSOT_Extension", "a.txt", "10.250\t20.500"),
        ("UAV123", "uav_a.txt", "10.250\t20.500"),
        ("nfs", "nfs_a.txt", "10.250\t20.500"),
        ("TC128", "tpl_a.txt", "10.250\t20.500"),
    ],
)
def test_pytracking_names_and_origins_follow_the_data_set(
    tmp_path: Path, dataset: str, file: str, first: str
) -> None:
    write_pytracking(tmp_path, {"a": BOXES}, dataset=dataset, seconds={"a": SECONDS})
    assert (tmp_path / file).read_text().startswith(first)
    boxes, seconds = read_pytracking(tmp_path, dataset=dataset)
    np.testing.assert_allclose(boxes["a"], BOXES, atol=2e-3)
    np.testing.assert_allclose(seconds["a"], SECONDS)


def test_got10k_zip_has_the_servers_layout_and_lines(tmp_path: Path) -> None:
    name = "GOT-10k_Test_000001"
    runs = [{name: BOXES}, {name: BOXES + 1}]
    path = write_got10k(
        tmp_path / "x.zip", runs, tracker="Mine", seconds=[{name: SECONDS}, {name: SECONDS * 2}]
    )
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == [
            f"Mine/{name}/{name}_001.txt",
            f"Mine/{name}/{name}_002.txt",
            f"Mine/{name}/{name}_time.txt",
        ]
        assert archive.read(f"Mine/{name}/{name}_001.txt").decode().splitlines() == [
            "10.2500,20.5000,30.5000,39.5000",
            "11.0000,21.0000,29.0000,40.0000",
        ]
        assert archive.read(f"Mine/{name}/{name}_time.txt").decode().splitlines() == [
            "0.50000000,1.00000000",
            "0.01250000,0.02500000",
        ]
    read, seconds = read_got10k(path, tracker="Mine")
    assert len(read) == 2
    np.testing.assert_allclose(read[1][name], whole_pixels(BOXES + 1), atol=1e-4)
    assert seconds[name].shape == (2, 2)


def test_a_got10k_folder_holds_what_its_zip_does(tmp_path: Path) -> None:
    for target in ("folder", "archive.zip"):
        write_got10k(tmp_path / target, [{"s": BOXES}])
    folder, archive = (read_got10k(tmp_path / t)[0] for t in ("folder", "archive.zip"))
    np.testing.assert_array_equal(folder[0]["s"], archive[0]["s"])


def test_trackingnet_zip_is_flat(tmp_path: Path) -> None:
    path = write_trackingnet(tmp_path / "t.zip", {"b_0": BOXES, "-a_1": BOXES})
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["-a_1.txt", "b_0.txt"]
        assert archive.read("b_0.txt").decode() == (
            "10.25,20.50,30.50,39.50\n11.00,21.00,29.00,40.00\n"
        )
    np.testing.assert_allclose(read_trackingnet(path)["b_0"], whole_pixels(BOXES), atol=0.01)


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (
        write_trackingnet(tmp_path / name, {"b": BOXES, "a": BOXES}) for name in ("1.zip", "2.zip")
    )
    assert first.read_bytes() == second.read_bytes()


def test_whole_pixels_are_those_a_box_touches() -> None:
    boxes = np.array([[0.5, 0.5, 1.5, 1.5], [3.2, 4.0, 5.00001, 6.1], [-1.5, 0, 2, 2.0]])
    assert whole_pixels(boxes).tolist() == [[0.5, 0.5, 1.5, 1.5], [3, 4, 5, 7], [-2, 0, 2, 2]]


def test_written_results_score_as_those_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = np.cumsum(rng.normal(0, 1, (40, 4)), axis=0) * 0.2 + [50, 60, 90, 100]
    predicted = truth + rng.normal(0, 3, truth.shape)
    predicted[0] = truth[0]
    write_pytracking(tmp_path, {"a": predicted}, dataset="LaSOT")
    read, _ = read_pytracking(tmp_path, dataset="LaSOT")
    truths = {"a": GroundTruth(boxes=truth)}
    scores = evaluate({"a": predicted}, truths).scores
    for name, value in evaluate(read, truths).scores.items():
        assert value == pytest.approx(scores[name], abs=1e-3)


def test_runs_that_cannot_be_written_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other sequences"):
        write_got10k(tmp_path / "x.zip", [{"a": BOXES}, {"b": BOXES}])
    with pytest.raises(UserError, match="no results to write"):
        write_got10k(tmp_path / "x.zip", [])


@pytest.mark.skipif(not (REAL_DATA / "metrics").is_dir(), reason="the devkit's zips are not here")
def test_the_devkits_own_submission_is_read(tmp_path: Path) -> None:
    folder = REAL_DATA / "metrics" / "trackingnet_dummy"
    truth = read_trackingnet(folder / "GT.zip")
    again = read_trackingnet(write_trackingnet(tmp_path / "again.zip", truth))
    truths = {name: GroundTruth(boxes=boxes) for name, boxes in truth.items()}
    result = evaluate(again, truths, dialect="trackingnet")
    assert result.scores["coverage"] == 1
    assert result.scores["SUC"] > 0.85


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\\b", "..", "a\nb"])
def test_a_sequence_cannot_write_outside_the_results(tmp_path: Path, name: str) -> None:
    target = tmp_path / "deep" / "results"
    with pytest.raises(UserError, match="cannot be that of a file"):
        write_pytracking(target, {"good": BOXES, name: BOXES})
    for path in (target, target.with_suffix(".zip")):
        with pytest.raises(UserError, match="cannot be that of a file"):
            write_got10k(path, [{name: BOXES}])
        with pytest.raises(UserError, match="cannot be that of a file"):
            write_got10k(path, [{"good": BOXES}], tracker=name)
        with pytest.raises(UserError, match="cannot be that of a file"):
            write_trackingnet(path, {name: BOXES})
    assert list(tmp_path.rglob("*")) == []
