"""Metrics reproduce the numbers of the toolkits, and their rules on small hand-made cases.

The raw results of published trackers are read from the folder of :mod:`tests.real_data`; where it
is missing those tests are skipped.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorat.errors import UserError
from lorat.image.boxes import xyxy_from_xywh
from lorat.metrics import DIALECTS, SCORE_NAMES, Evaluation, GroundTruth, SequenceScores, evaluate
from lorat.metrics.overlap import iou
from tests.real_data import REAL_DATA

METRICS = REAL_DATA / "metrics"
OTB_TRACKERS = ("KCF", "SRDCF", "Struck", "SiamFC-3s")

needs_data = pytest.mark.skipif(not METRICS.is_dir(), reason="the raw results are not here")


def read_json(path: Path) -> Any:
    if path.suffix == ".gz":
        with gzip.open(path, "rt") as stream:
            return json.load(stream)
    return json.loads(path.read_text())


def boxes_from_one_based(rows: list[Any]) -> np.ndarray:
    """Convert stored 1-based xywh rows, null for NaN, to 0-based xyxy."""
    filled = [[np.nan] * 4 if row is None else row for row in rows]
    xywh = np.array(filled, dtype=np.float64)
    return xyxy_from_xywh(xywh) - 1.0


@functools.cache
def otb(tracker: str, dialect: str) -> Evaluation:
    folder = METRICS / "otb100"
    annotations = read_json(folder / "annotations.json.gz")
    results = read_json(folder / f"results_{tracker}.json.gz")
    return evaluate(
        {name: boxes_from_one_based(rows) for name, rows in results.items()},
        {name: GroundTruth(boxes=boxes_from_one_based(r)) for name, r in annotations.items()},
        dialect=dialect,
        dataset="OTB100",
    )


@needs_data
@pytest.mark.parametrize(
    ("tracker", "success", "precision"),
    [
        ("KCF", 0.477, None),
        ("SRDCF", 0.598, None),
        ("Struck", 0.429, None),
        ("SiamFC-3s", 0.582, 0.771),
    ],
)
def test_otb_rule_gives_the_published_scores(
    tracker: str, success: float, precision: float | None
) -> None:
    scores = otb(tracker, "otb").scores
    assert scores["SUC"] == pytest.approx(success, abs=6e-4)
    if precision is not None:
        assert scores["P"] == pytest.approx(precision, abs=1e-3)


@needs_data
@pytest.mark.parametrize("tracker", ["KCF", "SRDCF", "Struck"])
def test_otb_rule_gives_the_curves_of_the_matlab_toolkit(tracker: str) -> None:
    stored = read_json(METRICS / "otb100" / "matlab_curves.json.gz")[tracker]
    result = otb(tracker, "otb")
    for name, curves in stored.items():
        sequence = result.sequences[name]
        np.testing.assert_allclose(sequence.success_curve, curves["success"], atol=1e-6)
        np.testing.assert_allclose(sequence.precision_curve, curves["precision"], atol=1e-6)
    for ours, kind in ((result.success_curve, "success"), (result.precision_curve, "precision")):
        mean = np.mean([curves[kind] for curves in stored.values()], axis=0)
        np.testing.assert_allclose(ours, mean, atol=1e-6)


@needs_data
@pytest.mark.parametrize("tracker", OTB_TRACKERS)
@pytest.mark.parametrize(("dialect", "key"), [("pysot", "pysot"), ("pytracking", "pytracking")])
def test_otb_scores_equal_those_of_pysot_and_pytracking(
    tracker: str, dialect: str, key: str
) -> None:
    expected = read_json(METRICS / "otb100" / "expected.json")[tracker][key]
    result = otb(tracker, dialect)
    assert_curves(result, expected, atol=2e-6)
    assert result.scores["SUC"] == pytest.approx(expected["auc"], abs=1e-6)
    assert result.scores["P"] == pytest.approx(expected["precision20"], abs=1e-6)
    assert result.scores["P_norm"] == pytest.approx(expected["norm_precision_at_0_20"], abs=1e-6)
    if "norm_precision_auc_0_to_0_5" in expected:
        area = result.norm_precision_curve.mean()
        assert area == pytest.approx(expected["norm_precision_auc_0_to_0_5"], abs=1e-6)


@needs_data
@pytest.mark.parametrize("tracker", OTB_TRACKERS)
def test_otb_scores_equal_those_of_the_got10k_package(tracker: str) -> None:
    expected = read_json(METRICS / "otb100" / "expected.json")[tracker]["got10k_pip_otb"]
    result = otb(tracker, "got10k_otb")
    assert_curves(result, expected, atol=2e-6)
    assert result.scores["SUC"] == pytest.approx(expected["auc"], abs=1e-6)
    assert result.scores["P"] == pytest.approx(expected["precision20"], abs=1e-6)
    assert result.success_curve[10] == pytest.approx(expected["success_rate_0_5"], abs=1e-6)


@needs_data
@pytest.mark.parametrize("tracker", OTB_TRACKERS)
def test_otb_scores_per_sequence(tracker: str) -> None:
    expected = read_json(METRICS / "otb100" / "expected.json")[tracker]
    for dialect, source, keys in (
        ("pysot", expected["per_sequence"], ("pysot_auc", "pysot_p20", "pysot_np20")),
        ("got10k_otb", expected["per_sequence"], ("got10k_otb_auc", "got10k_otb_p20")),
        ("pytracking", expected["pytracking"]["per_sequence"], ("auc", "p20", "np20")),
    ):
        for name, sequence in otb(tracker, dialect).sequences.items():
            for score, key in zip(("SUC", "P", "P_norm"), keys, strict=False):
                assert sequence.scores[score] == pytest.approx(source[name][key], abs=1e-6), name


@needs_data
def test_struck_agrees_with_the_benchmarks_own_score_file() -> None:
    rows = read_json(METRICS / "otb100_struck.json.gz")
    names = [row["sequence"] for row in rows]
    result = evaluate(
        {r["sequence"]: boxes_from_one_based(r["result_xywh_1based"]) for r in rows},
        {
            r["sequence"]: GroundTruth(boxes=boxes_from_one_based(r["ground_truth_xywh_1based"]))
            for r in rows
        },
        dialect="otb",
        dataset="otb",
    )
    assert len(set(names)) == 100
    assert result.scores["SUC"] == pytest.approx(0.4617, abs=1e-3)
    assert result.scores["P"] == pytest.approx(0.6391, abs=1e-3)


@needs_data
@pytest.mark.parametrize("tracker", ["synthA", "synthB"])
@pytest.mark.parametrize(
    ("dialect", "key"),
    [
        ("lasot", "lasot_matlab_rule"),
        ("pysot", "pysot_with_absent"),
        ("pytracking", "pytracking"),
        ("compatible", "pytracking"),
    ],
)
def test_lasot_scores_with_absent_targets(tracker: str, dialect: str, key: str) -> None:
    folder = METRICS / "lasot_style"
    annotations, absent, results = (
        read_json(folder / name)
        for name in ("annotations.json.gz", "absent.json.gz", f"results_{tracker}.json.gz")
    )
    expected = read_json(folder / "expected.json")[tracker][key]
    result = evaluate(
        {name: boxes_from_one_based(rows) for name, rows in results.items()},
        {
            name: GroundTruth(
                boxes=boxes_from_one_based(rows), visible=~np.array(absent[name], dtype=bool)
            )
            for name, rows in annotations.items()
        },
        dialect=dialect,
        dataset="LaSOT",
    )
    # The toolkits themselves differ by up to 1e-4 in absent frames.
    atol = 1e-4 if dialect == "compatible" else 2e-6
    assert_curves(result, expected, atol=atol)
    for score, whole, one in (
        ("SUC", "auc", "auc"),
        ("P", "precision20", "p20"),
        ("P_norm", "norm_precision_at_0_20", "np20"),
    ):
        assert result.scores[score] == pytest.approx(expected[whole], abs=atol)
        for name, sequence in result.sequences.items():
            value = expected["per_sequence"][name][one]
            assert sequence.scores[score] == pytest.approx(value, abs=max(atol, 1e-6))
    if "norm_precision_auc" in expected:
        area = result.norm_precision_curve.mean()
        assert area == pytest.approx(expected["norm_precision_auc"], abs=atol)


@needs_data
@pytest.mark.parametrize("tracker", ["CSRT", "KCF_thresh0", "static", "synth"])
def test_got10k_scores_equal_those_of_the_toolkit(tracker: str) -> None:
    inputs = read_json(METRICS / "got10k_style" / "inputs.json.gz")
    expected = read_json(METRICS / "got10k_style" / "expected_got10k_pip.json")[tracker]
    result = evaluate(
        {n: xyxy_from_xywh(np.array(s["pred"][tracker], float)) for n, s in inputs.items()},
        {
            name: GroundTruth(
                boxes=xyxy_from_xywh(np.array(s["groundtruth"], float)),
                cover=np.array(s["cover"]),
                size_wh=np.array(s["resolution"]),
            )
            for name, s in inputs.items()
        },
        dialect="got10k",
        dataset="got10k",
    )
    overall = expected["overall"]
    assert result.scores["AO"] == pytest.approx(overall["ao"], abs=1e-9)
    assert result.scores["SR0.5"] == pytest.approx(overall["sr"], abs=1e-9)
    assert result.scores["SR0.75"] == pytest.approx(overall["succ_curve"][75], abs=1e-9)
    np.testing.assert_allclose(result.success_curve, overall["succ_curve"], atol=1e-9)
    for name, sequence in result.sequences.items():
        values = expected["seq_wise"][name]
        assert sequence.scores["AO"] == pytest.approx(values["ao"], abs=1e-9)
        assert sequence.scores["SR0.5"] == pytest.approx(values["sr"], abs=1e-9)


@needs_data
def test_trackingnet_scores_equal_those_of_its_script() -> None:
    folder = METRICS / "trackingnet_dummy"
    truth, submitted = (read_zip(folder / name) for name in ("GT.zip", "submission.zip"))
    result = evaluate(
        submitted,
        {name: GroundTruth(boxes=boxes) for name, boxes in truth.items()},
        dialect="trackingnet",
        dataset="TrackingNet",
    )
    expected = dict(
        line.rsplit(" ", 1) for line in (folder / "expected.txt").read_text().splitlines() if line
    )
    for name, score in (
        ("Success", "SUC"),
        ("Precision", "P"),
        ("Normalized Precision", "P_norm"),
        ("Coverage", "coverage"),
    ):
        assert 100 * result.scores[score] == pytest.approx(float(expected[name]), abs=1e-9)


def read_zip(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        return {
            name: xyxy_from_xywh(np.loadtxt(io.BytesIO(archive.read(name)), delimiter=",", ndmin=2))
            for name in archive.namelist()
        }


def assert_curves(result: Evaluation, expected: dict[str, Any], atol: float) -> None:
    for curve in ("success_curve", "precision_curve", "norm_precision_curve"):
        if curve in expected:
            np.testing.assert_allclose(getattr(result, curve), expected[curve], atol=atol)


TRUTH = np.array([[10.0, 10, 20, 20]] * 4)
"""Four frames of a 10 x 10 box."""


def shifted(pixels: float) -> np.ndarray:
    boxes = TRUTH.copy()
    boxes[1:, [0, 2]] += pixels
    return boxes


def score_one(predicted: np.ndarray, truth: GroundTruth, **rules: str) -> SequenceScores:
    return evaluate({"one": predicted}, {"one": truth}, **rules).sequences["one"]


def test_scores_of_a_hand_made_sequence() -> None:
    # Shifted by 2 px: IoU 80/120; three of four frames, the first is exact.
    scores = score_one(shifted(2), GroundTruth(boxes=TRUTH)).scores
    overlap = 80 / 120
    above = np.linspace(0, 1, 21)
    expected = np.mean(0.25 * (above < 1) + 0.75 * (overlap > above))
    assert scores["SUC"] == pytest.approx(expected)
    assert scores["AO"] == pytest.approx(0.25 + 0.75 * overlap)
    assert (scores["P"], scores["P_norm"]) == (1.0, 1.0)
    assert (scores["SR0.5"], scores["SR0.75"]) == (1.0, 0.25)


def test_thresholds_are_strict_or_not_as_the_toolkit_says() -> None:
    exact = GroundTruth(boxes=TRUTH)
    assert score_one(TRUTH, exact).success_curve[-1] == 0
    assert score_one(TRUTH, exact, dialect="plain").success_curve[-1] == 1
    assert score_one(TRUTH, exact, dialect="trackingnet").success_curve[-1] == 1
    twenty = shifted(20.0)
    assert score_one(twenty, exact).scores["P"] == 1.0
    assert score_one(shifted(20.001), exact).scores["P"] == 0.25


@pytest.mark.parametrize(
    ("dataset", "precision", "norm"),
    [("GOT-10k", 0.5, 0.75), ("LaSOT", 0.5, 0.5), ("lasot_ext", 0.5, 0.75), ("UAV123", 0.75, 0.75)],
)
def test_an_absent_target_counts_as_each_data_set_has_it(
    dataset: str, precision: float, norm: float
) -> None:
    boxes = TRUTH.copy()
    boxes[2] = np.nan
    predicted = shifted(0)
    predicted[3] += 500
    truth = GroundTruth(boxes=boxes, visible=np.array([True, True, False, True]))
    scores = score_one(predicted, truth, dataset=dataset).scores
    assert (scores["P"], scores["P_norm"]) == (precision, norm)
    assert scores["AO"] == 0.5
    assert score_one(predicted, truth, dialect="plain").scores["AO"] == 2 / 3


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_every_dialect_survives_absence_and_broken_predictions(dialect: str) -> None:
    boxes = TRUTH.copy()
    boxes[2] = np.nan
    predicted = shifted(1)
    predicted[1] = [5, 5, 5, 5]
    predicted[3] = np.nan
    truth = GroundTruth(boxes=boxes, visible=np.array([True, True, False, True]))
    result = evaluate({"a": predicted}, {"a": truth}, dialect=dialect, dataset="LaSOT")
    for name in SCORE_NAMES:
        assert 0 <= result.scores[name] <= 1
    for curve in (result.success_curve, result.precision_curve, result.norm_precision_curve):
        assert np.isfinite(curve).all()
        assert ((curve >= 0) & (curve <= 1)).all()


def test_the_data_set_score_is_the_mean_over_sequences_or_pooled_over_frames() -> None:
    truths = {
        "short": GroundTruth(boxes=TRUTH),
        "long": GroundTruth(boxes=np.tile(TRUTH[:1], (31, 1))),
    }
    predictions = {"short": TRUTH, "long": np.tile(TRUTH[:1], (31, 1)) + 500}
    predictions["long"][0] = TRUTH[0]
    mean = evaluate(predictions, truths).scores["AO"]
    assert mean == pytest.approx((1 + 1 / 31) / 2)
    assert evaluate(predictions, truths, dialect="got10k").scores["AO"] == pytest.approx(3 / 33)


def test_attribute_subsets_are_scored_on_their_own() -> None:
    truths = {name: GroundTruth(boxes=TRUTH) for name in "abc"}
    predictions = {"a": TRUTH, "b": shifted(100), "c": shifted(100)}
    result = evaluate(
        predictions, truths, attributes={"fast": ["b", "c"], "slow": ["a"], "never": []}
    )
    assert set(result.attributes) == {"fast", "slow"}
    assert result.attributes["slow"]["AO"] == 1
    assert result.attributes["fast"]["AO"] == 0.25
    with pytest.raises(UserError, match="unknown sequences: z"):
        evaluate(predictions, truths, attributes={"fast": ["z"]})


def test_frame_rates_are_averaged_over_time() -> None:
    truths = {name: GroundTruth(boxes=TRUTH) for name in "ab"}
    seconds = {"a": np.full(4, 0.1), "b": np.full(4, 0.3)}
    result = evaluate({"a": TRUTH, "b": TRUTH}, truths, seconds=seconds)
    assert result.sequences["a"].scores["FPS"] == pytest.approx(10)
    assert result.scores["FPS"] == pytest.approx(5)


def test_predictions_that_do_not_fit_are_all_named() -> None:
    truths = {name: GroundTruth(boxes=TRUTH) for name in "abc"}
    with pytest.raises(UserError, match=r"b \(missing\); c \(shape \(3, 4\), 4 frames"):
        evaluate({"a": TRUTH, "c": TRUTH[:3]}, truths)
    with pytest.raises(UserError, match="choose from compatible, plain"):
        evaluate({"a": TRUTH}, truths, dialect="vot")
    with pytest.raises(UserError, match="at least one"):
        evaluate({}, {})


def test_trackingnet_rounds_what_the_file_says() -> None:
    """Halves are decided to even, and the way to corners in float32 and back must not move them."""
    rng = np.random.default_rng(0)
    boxes = rng.integers(1, 900, (4000, 4)) + rng.choice([0.0, 0.5, 0.1], (4000, 4))
    corners = xyxy_from_xywh(boxes).astype(np.float32).astype(np.float64)
    other = np.roll(corners, 1, axis=0)
    errors = DIALECTS["trackingnet"].frames(GroundTruth(boxes=corners), other, "trackingnet")
    expected = iou(np.round(boxes), np.round(np.roll(boxes, 1, axis=0)))
    np.testing.assert_array_equal(errors.overlap[1:], expected[1:])
