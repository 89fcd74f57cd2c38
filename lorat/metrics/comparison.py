"""The promotion gate: is the candidate better than the champion, sequence by sequence?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from typing_extensions import Doc

from lorat.config.bounds import Bounds, Count, Seed, Share, check_bounds
from lorat.errors import UserError
from lorat.metrics.catalogue import MAIN, METRICS, SCORES, criterion, listed

BOOTSTRAP_STREAM = 71
"""Stream number of the resampling, beside the seed."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a candidate passes."""

    metric: Annotated[str, Doc(f"Score of the sequences that decides: {listed(list(SCORES))}.")] = (
        MAIN
    )
    allow_equal: bool = False
    """Also pass a candidate that is not worse: the interval lies above -margin."""
    margin: Share = 0.01
    """Largest loss of the mean score that counts as not worse, 0 to 1."""
    confidence: Annotated[float, Bounds(0, 1, above=True, below=True)] = 0.95
    """Of the two-sided bootstrap interval of the mean difference, more than 0, below 1."""
    resamples: Annotated[int, Bounds(1, 10_000_000)] = 10_000
    """Bootstrap samples, 1 to 10,000,000."""
    min_sequences: Count = 5
    """Fewest sequences that a decision may rest on, 1 to 1,000,000,000."""
    seed: Seed = 42
    """Seed of the resampling, 0 to 4,294,967,295."""

    def __post_init__(self) -> None:
        check_bounds(self)
        criterion(self.metric)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A paired comparison of two trackers on the same sequences."""

    metric: str
    """What was compared, a name of :data:`lorat.metrics.METRICS`."""
    names: list[str]
    differences: np.ndarray
    """By how much the candidate is better than the champion, per sequence."""
    resampled_means: np.ndarray
    interval: tuple[float, float]
    candidate_mean: float
    champion_mean: float
    passed: bool
    reason: str

    @property
    def mean_difference(self) -> float:
        """Mean over the sequences."""
        return float(self.differences.mean())

    def numbers(self) -> dict[str, Any]:
        """Return what is recorded with the decision."""
        return {
            f"candidate_{self.metric}": round(self.candidate_mean, 4),
            f"champion_{self.metric}": round(self.champion_mean, 4),
            "difference": round(self.mean_difference, 4),
            "interval_low": round(self.interval[0], 4),
            "interval_high": round(self.interval[1], 4),
            "sequences": len(self.names),
            "better": int((self.differences > 0).sum()),
            "worse": int((self.differences < 0).sum()),
        }


def compare(
    candidate: Mapping[str, float], champion: Mapping[str, float], config: GateConfig
) -> Comparison:
    """Compare the scores of the sequences by a paired bootstrap over the sequences.

    The interval is that of the percentiles (Efron and Tibshirani 1993, section 13.3).

    Args:
        candidate: the score of ``config.metric`` per sequence.
        champion: that of the same sequences.
        config: when the candidate passes.

    Raises:
        UserError: if the sequences differ.
    """
    if set(candidate) != set(champion) or not candidate:
        raise UserError("Candidate and champion were evaluated on different sequences; do it anew.")
    names = sorted(candidate)
    ours = np.array([candidate[name] for name in names])
    theirs = np.array([champion[name] for name in names])
    differences = METRICS[config.metric].sign * (ours - theirs)
    rng = np.random.default_rng([config.seed, BOOTSTRAP_STREAM])
    means = np.empty(config.resamples)
    for start in range(0, config.resamples, 1000):  # bounded memory for long benchmarks
        count = min(1000, config.resamples - start)
        rows = rng.integers(0, len(names), (count, len(names)))
        means[start : start + count] = differences[rows].mean(axis=1)
    tail = (1 - config.confidence) / 2
    low, high = (float(value) for value in np.quantile(means, [tail, 1 - tail]))
    passed, reason = _decide(len(names), low, high, config)
    return Comparison(
        metric=config.metric,
        names=names,
        differences=differences,
        resampled_means=means,
        interval=(low, high),
        candidate_mean=float(ours.mean()),
        champion_mean=float(theirs.mean()),
        passed=passed,
        reason=reason,
    )


def _decide(num: int, low: float, high: float, config: GateConfig) -> tuple[bool, str]:
    interval = f"[{low:+.4f}, {high:+.4f}]"
    share = f"{config.confidence:.0%}"
    if num < config.min_sequences:
        return False, f"{num} sequences are too few, {config.min_sequences} are needed"
    if low > 0:
        return True, f"better: the {share} interval of the mean difference is {interval}"
    if config.allow_equal and low >= -config.margin:
        return True, f"not worse by {config.margin:g}: the {share} interval is {interval}"
    if high < 0:
        return False, f"worse: the {share} interval of the mean difference is {interval}"
    return False, f"not shown to be better: the {share} interval of the difference is {interval}"
