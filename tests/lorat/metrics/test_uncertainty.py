"""Intervals hold what they promise, also for the few sequences of a small benchmark."""

from __future__ import annotations

import numpy as np
import pytest

from lorat.metrics import SCORE_NAMES, GroundTruth, evaluate
from lorat.metrics.uncertainty import mean_intervals


@pytest.mark.parametrize("num", [8, 20, 100])
def test_95_of_100_intervals_hold_the_mean(num: int) -> None:
    """Scores of sequences are skewed: many near 0.7, some at 0."""
    values = np.random.default_rng([num, 0]).beta(2.0, 1.0, (num, 1500))
    held = [low <= 2 / 3 <= high for low, high in mean_intervals(values, resamples=3000)]
    assert 0.925 <= np.mean(held) <= 0.975


def test_the_same_scores_have_the_same_interval() -> None:
    values = np.random.default_rng(0).uniform(0, 1, (12, 2))
    assert mean_intervals(values, seed=1) == mean_intervals(values, seed=1)
    assert mean_intervals(values, seed=1) != mean_intervals(values, seed=2)
    with pytest.raises(ValueError, match="at least two"):
        mean_intervals(values[:1])


@pytest.mark.parametrize("dialect", ["compatible", "got10k"])
def test_every_score_lies_in_its_interval(dialect: str) -> None:
    """Also where the toolkit pools the frames, of sequences of very unequal lengths."""
    rng = np.random.default_rng(3)
    truths, predicted = {}, {}
    for number, length in enumerate([5, 400, 30, 60, 9]):
        boxes = np.tile([10.0, 10, 60, 60], (length, 1))
        truths[f"s{number}"] = GroundTruth(boxes=boxes)
        predicted[f"s{number}"] = boxes + rng.normal(0, 3 + 5 * number, boxes.shape)
    result = evaluate(predicted, truths, dialect=dialect)
    assert list(result.intervals) == list(SCORE_NAMES)
    for name, (low, high) in result.intervals.items():
        assert low <= result.scores[name] <= high
        assert high - low > 0.01
    alone = evaluate(predicted, {"s1": truths["s1"]}, dialect=dialect)
    assert alone.intervals == {}
