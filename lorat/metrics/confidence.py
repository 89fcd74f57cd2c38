"""How a tracker's scores are distributed, and how far two distributions are apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

BINS = 20
"""Of equal width, over the scores 0 to 1."""
DRIFT = 0.25
"""A population stability index above this is a major shift, below 0.1 a minor one at most.

Source: N. Siddiqi, *Credit Risk Scorecards* (2006), chapter 7.
"""


def histogram(scores: Iterable[float] | np.ndarray) -> np.ndarray:
    """Count scores, 0 to 1, in :data:`BINS` bins; return int64 (BINS,)."""
    values = np.clip(np.asarray(scores, dtype=np.float64).ravel(), 0.0, 1.0)
    return np.histogram(values, bins=BINS, range=(0.0, 1.0))[0]


def stability_index(
    reference: Sequence[float] | np.ndarray, present: Sequence[float] | np.ndarray
) -> float:
    """Return the population stability index of two histograms, 0 for the same shares.

    It is the sum over bins of ``(p - q) ln(p / q)``, with half a count added to every bin, so that
    empty ones count and do not make it infinite.

    Args:
        reference, present: counts, of as many bins.

    Raises:
        ValueError: if they have other numbers of bins, or one has no counts.
    """
    first, second = np.asarray(reference, float), np.asarray(present, float)
    if first.shape != second.shape or not first.sum() or not second.sum():
        raise ValueError("Two histograms of as many bins are needed, with counts in both.")
    p = (first + 0.5) / (first + 0.5).sum()
    q = (second + 0.5) / (second + 0.5).sum()
    return float(((p - q) * np.log(p / q)).sum())
