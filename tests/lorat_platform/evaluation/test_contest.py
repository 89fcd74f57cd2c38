"""Trackers and published results are compared on the sequences that all have."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.images import ImageReader
from lorat.errors import UserError
from lorat.metrics.explanation import LEFT
from lorat.metrics.result_files import write_got10k, write_pytracking
from lorat.tracking.baselines import baseline
from lorat.tracking.one_pass import track_by_all
from lorat_platform.evaluation import contest, gap
from lorat_platform.evaluation.published import published, read
from lorat_platform.evaluation.report import flat_metrics
from lorat_platform.evaluation.sets import DatasetResult, restricted, scored, scored_as
from lorat_platform.evaluation.subject import load_subject
from lorat_platform.evaluation.workers import EvaluationConfig
from tests.small_shards import make_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FrameIndex:
    return FrameIndex.open(make_shards(tmp_path_factory.mktemp("data") / "val"))


@pytest.fixture(scope="module")
def tracked(index: FrameIndex) -> list[DatasetResult]:
    """What the box that never moves and MIL find, and the results of the latter as files."""
    trackers = [baseline("static"), baseline("mil")]
    found = track_by_all(trackers, index, ImageReader(index), range(index.num_tracks))
    return [scored(index, {r.name: r for r in results}, {}) for results in found]


def files_of(result: DatasetResult, folder: Path) -> Path:
    write_pytracking(folder, {name: r.boxes for name, r in result.results.items()})
    return folder


def test_published_results_score_as_the_tracker_itself(
    index: FrameIndex, tracked: list[DatasetResult], tmp_path: Path
) -> None:
    """In every layout, without a speed that nobody knows; 1-based files are told by their boxes."""
    mil = tracked[1]
    boxes = {name: result.boxes for name, result in mil.results.items()}
    flat = files_of(mil, tmp_path / "flat" / "mil" / "default")
    one_based = tmp_path / "otb"
    write_pytracking(one_based, {name: each + 1 for name, each in boxes.items()})
    write_got10k(tmp_path / "got10k.zip", [boxes, boxes], tracker="MIL")
    for place, allowed in ((flat, 1e-3), (tmp_path / "flat", 1e-3), (one_based, 1e-3),
                           (tmp_path / "got10k.zip", 0.05)):  # fmt: skip
        result = read(published(f"results:{place}"), index.uri, EvaluationConfig())
        assert result.left_out == {}
        assert result.scores == pytest.approx(mil.scores, abs=allowed), place
        assert not any("fps" in name for name in flat_metrics([result]))


def test_only_sequences_that_all_have_are_compared(
    index: FrameIndex, tracked: list[DatasetResult], tmp_path: Path
) -> None:
    names = list(tracked[1].results)
    folder = files_of(tracked[1], tmp_path / "mil")
    (folder / f"{names[0]}.txt").unlink()
    short = (folder / f"{names[1]}.txt").read_text().splitlines()[:-3]
    (folder / f"{names[1]}.txt").write_text("\n".join(short))
    entrant = published(f"results:{folder}")
    (result,) = contest.evaluate_entrants([entrant], index.uri, EvaluationConfig())
    assert list(result.results) == names[2:]
    assert "no file in" in result.left_out[names[0]]
    assert "57 rows for 60 frames" in result.left_out[names[1]]
    both = [restricted(tracked[0], set(result.results), "not all have results of it"), result]
    text = contest.comparison([load_subject("static"), entrant], [[each] for each in both])
    assert f"left out {names[0]}, {names[1]}" in text


def test_a_comparison_has_one_table_and_one_plot_of_each_kind(
    tracked: list[DatasetResult], tmp_path: Path
) -> None:
    entrants = [load_subject("static"), load_subject("mil")]
    results = [[each] for each in tracked]
    text = contest.write_comparison(entrants, results, tmp_path / "report", clips=False)
    rows = [line for line in text.splitlines() if line.startswith(("| static", "| mil"))]
    assert len(rows) == 4, "two dialects"
    assert all(line.count("[") >= 6 for line in rows), "every score has its interval"
    best, other = sorted(tracked, key=lambda result: -result.scores["AO"])
    difference = other.scores["AO"] - best.scores["AO"]
    assert f"| {difference:+.3f} [" in rows[1]
    place = tmp_path / "report" / tracked[0].name
    for plot in ("success", "precision", "normalized_precision", "attributes"):
        assert (place / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    with open(place / "comparison.csv") as file:
        table = [row for row in csv.DictReader(file) if row["score"] == "AO"]
    assert {row["tracker"] for row in table} == {"static", "mil"}
    assert all(float(r["low"]) <= float(r["value"]) <= float(r["high"]) for r in table)
    with open(place / "sequences.csv") as file:
        assert next(csv.reader(file)) == ["sequence", "static", "mil"]
    own = sorted(path.name for path in (tmp_path / "report" / "models").iterdir())
    assert own == ["1-static", "2-mil"]
    assert (tmp_path / "report" / "models" / "2-mil" / "report.md").exists()
    assert list(json.loads((tmp_path / "report" / "scores.json").read_text())) == ["static", "mil"]


def test_a_gap_is_explained_in_files_and_words(
    tracked: list[DatasetResult], tmp_path: Path
) -> None:
    """Theirs are MIL's results, one file short and all 1-based; ours are those of the still box."""
    static, mil = tracked
    names = list(mil.results)
    write_pytracking(tmp_path / "mil", {n: r.boxes + 1 for n, r in mil.results.items()})
    short = (tmp_path / "mil" / f"{names[2]}.txt").read_text().splitlines()[:-20]
    (tmp_path / "mil" / f"{names[2]}.txt").write_text("\n".join(short))
    text = gap.explain_gaps(load_subject("static"), [static], tmp_path / "mil", tmp_path)
    assert "off by one: 1-based, where 0-based is the custom (all)" in text
    assert f"fewer rows than frames ({names[2]})" in text
    place = tmp_path / static.name / "explanation"
    with open(place / "account.csv") as file:
        account = {row["cause"]: float(row["AO"]) for row in csv.DictReader(file)}
    # MIL's boxes are whole pixels.
    assert list(account) == ["boxes' convention", "short files", "rounding", LEFT]
    lost = static.evaluations["compatible"].sequences[names[2]].frame_iou[-20:].clip(0).sum()
    assert account["short files"] == pytest.approx(-lost / 60 / len(names), abs=1e-6)
    with open(place / "sequences.csv") as file:
        rows = list(csv.DictReader(file))
    differences = [float(row["AO_difference"]) for row in rows]
    assert differences == sorted(differences)
    left = {row["sequence"]: float(row["AO_left"]) for row in rows}
    for name in set(names) - {names[2]}:
        assert left[name] == pytest.approx(mil.overlaps[name] - static.overlaps[name], abs=0.02)
    overlap = static.results[names[0]].boxes, mil.results[names[0]].boxes
    apart = next(row["apart_at_frame"] for row in rows if row["sequence"] == names[0])
    assert apart == first_apart(*overlap)


def first_apart(first: np.ndarray, second: np.ndarray) -> str:
    size = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    inter = size.clip(0).prod(axis=1)
    union = sum((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (first, second)) - inter
    below = np.flatnonzero(inter / union < 0.5)
    return str(below[0]) if len(below) else ""


def test_any_dialect_can_be_asked_for(tracked: list[DatasetResult]) -> None:
    result = scored_as(tracked[0], "trackingnet")
    assert list(result.evaluations) == ["compatible", "plain", "trackingnet"]
    assert result.scores == tracked[0].scores
    assert math.isfinite(result.evaluations["trackingnet"].scores["SUC"])


def test_what_cannot_be_compared_is_one_sentence(
    index: FrameIndex, tracked: list[DatasetResult], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.zip").write_text("no zip")
    for place in ("one", "two"):
        files_of(tracked[1], tmp_path / "twice" / place)
    write_pytracking(tmp_path / "others", {"nobody": tracked[1].results[index.sequence(0)].boxes})
    for place, message in (
        ("empty", "holds no result files"),
        ("no.zip", "neither a folder nor a zip"),
        ("twice", r"holds several results of .*give the folder of one tracker"),
        ("others", "No result of .* fits"),
    ):
        with pytest.raises(UserError, match=message):
            read(published(f"results:{tmp_path / place}"), index.uri, EvaluationConfig())
