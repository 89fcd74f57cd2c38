"""How sure a mean over sequences is: its bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
"""Of the two-sided intervals that stand beside scores."""
RESAMPLES = 10_000
SEED = 42
STREAM = 73
"""Stream number of the resampling, beside the seed."""
_ANGLES = np.linspace(0, math.pi / 2, 2001)
_COSINES = np.cos(_ANGLES)
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
    t = student_quantile(tail, num - 1)
    return NormalDist().cdf(-math.sqrt(num / (num - 1)) * t)


def student_quantile(tail: float, freedom: float) -> float:
    """Return what Student's t exceeds with a probability.

    Args:
        tail: more than 0, at most 0.5.
        freedom: degrees of freedom, 1 or more; they need not be whole.
    """
    # t = sqrt(freedom) tan(angle), whose density is that power of the cosine.
    density = _COSINES ** (freedom - 1)
    above = np.concatenate([np.cumsum((density[1:] + density[:-1])[::-1])[::-1], [0.0]])
    angle = np.interp(-tail, -above / above[0] / 2, _ANGLES)
    return math.sqrt(freedom) * math.tan(angle)


def satterthwaite(parts: Sequence[tuple[float, float]]) -> float:
    """Return the degrees of freedom of a sum of variances that were each estimated.

    Source: F. E. Satterthwaite, "An approximate distribution of estimates of variance components",
    1946.

    Args:
        parts: variance, of which not all are 0, and degrees of freedom of each.
    """
    return sum(part for part, _ in parts) ** 2 / sum(part**2 / own for part, own in parts)
