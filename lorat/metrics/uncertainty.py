"""How sure a mean over sequences is: its bootstrap interval."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
"""Of the two-sided intervals that stand beside scores."""
RESAMPLES = 10_000
SEED = 42
STREAM = 73
"""Stream number of the resampling, beside the seed."""
_CHUNK = 1000
"""Resamples drawn at once: bounded memory for long benchmarks."""


class Interval(NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


def mean_intervals(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[Interval]:
    """Return the interval of each column's mean over what was sampled, the rows.

    The interval is that of the percentiles, expanded to the width of Student's t (Hesterberg 2015,
    "What teachers should know about the bootstrap"): the bare one is too short for the ten or
    twenty sequences of a small benchmark.  The same arguments give the same interval.

    Args:
        values: (n, k), one row per sequence, n at least 2.
        weights: (n,), such as the frames of each sequence; none means equal ones.
        confidence: of the two-sided interval, more than 0, below 1.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    num = len(values)
    if num < 2:
        raise ValueError("One sequence tells nothing about others; give at least two.")
    weights = np.ones(num) if weights is None else np.asarray(weights, np.float64)
    weighted = np.asarray(values, np.float64) * weights[:, None]
    rng = np.random.default_rng([seed, STREAM])
    means = np.empty((resamples, values.shape[1]))
    for start in range(0, resamples, _CHUNK):
        drawn = rng.multinomial(num, np.full(num, 1 / num), min(_CHUNK, resamples - start))
        total = np.maximum(drawn @ weights, 1e-12)
        means[start : start + len(drawn)] = drawn @ weighted / total[:, None]
    tail = _expanded_tail((1 - confidence) / 2, num)
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return [Interval(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def _expanded_tail(tail: float, num: int) -> float:
    """Return the share of resamples to cut off, for the width that Student's t would give."""
    normal = NormalDist()
    z, freedom = normal.inv_cdf(1 - tail), num - 1
    # The quantile of Student's t by that of the normal: Abramowitz and Stegun, 26.7.5.
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return normal.cdf(-math.sqrt(num / freedom) * t)
