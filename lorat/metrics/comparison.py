"""The promotion gate: is the candidate better than the champion, sequence by sequence?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from typing_extensions import Doc

from lorat.config.bounds import Bounds, Count, Seed, Share, check_bounds
from lorat.errors import UserError
from lorat.metrics.catalogue import MAIN, METRICS, SCORES, criterion, listed
from lorat.metrics.uncertainty import satterthwaite, student_quantile

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
    """By how much the candidate is better than the champion, per sequence; means over seeds."""
    resampled_means: np.ndarray
    interval: tuple[float, float]
    candidate_seeds: dict[str, float]
    """Mean score of each of the candidate's trainings, by seed."""
    champion_seeds: dict[str, float]
    passed: bool
    reason: str

    @property
    def mean_difference(self) -> float:
        """Mean over the sequences."""
        return float(self.differences.mean())

    def numbers(self) -> dict[str, Any]:
        """Return what is recorded with the decision."""
        return {
            f"candidate_{self.metric}": round(_mean(self.candidate_seeds), 4),
            f"champion_{self.metric}": round(_mean(self.champion_seeds), 4),
            "difference": round(self.mean_difference, 4),
            "interval_low": round(self.interval[0], 4),
            "interval_high": round(self.interval[1], 4),
            "sequences": len(self.names),
            "candidate_seeds": len(self.candidate_seeds),
            "champion_seeds": len(self.champion_seeds),
            "better": int((self.differences > 0).sum()),
            "worse": int((self.differences < 0).sum()),
        }


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def compare(
    candidate: Mapping[str, float], champion: Mapping[str, float], config: GateConfig
) -> Comparison:
    """Compare the scores of the sequences of two trainings, as :func:`compare_seeds` does."""
    return compare_seeds({"": candidate}, {"": champion}, config)


def compare_seeds(
    candidate: Mapping[str, Mapping[str, float]],
    champion: Mapping[str, Mapping[str, float]],
    config: GateConfig,
) -> Comparison:
    """Compare the scores of the sequences, of one or several trainings of each.

    With one training of each, the interval is that of the percentiles of a paired bootstrap over
    the sequences (Efron and Tibshirani 1993, section 13.3).  It speaks of these two trainings.
    With several, which differ in their seeds, it speaks of the configurations: the variance of the
    mean over sequences and those of the means over seeds add up, with the width of Student's t by
    Satterthwaite (1946), as in :mod:`lorat.metrics.race`; the seeds of the two are not paired.

    Args:
        candidate: the score of ``config.metric`` per sequence, by seed.
        champion: that of the same sequences.
        config: when the candidate passes.

    Raises:
        UserError: if the sequences differ.
    """
    names = sorted(next(iter(candidate.values())))
    every = [*candidate.values(), *champion.values()]
    if not names or any(each.keys() != set(names) for each in every):
        raise UserError("Candidate and champion were evaluated on different sequences; do it anew.")
    ours, theirs = (
        np.array([[scores[name] for name in names] for scores in each.values()])
        for each in (candidate, champion)
    )
    differences = METRICS[config.metric].sign * (ours.mean(0) - theirs.mean(0))
    rng = np.random.default_rng([config.seed, BOOTSTRAP_STREAM])
    means = np.empty(config.resamples)
    for start in range(0, config.resamples, 1000):  # bounded memory for long benchmarks
        count = min(1000, config.resamples - start)
        rows = rng.integers(0, len(names), (count, len(names)))
        means[start : start + count] = differences[rows].mean(axis=1)
    tail = (1 - config.confidence) / 2
    low, high = (float(value) for value in np.quantile(means, [tail, 1 - tail]))
    by_seed = [each.mean(1) for each in (ours, theirs) if len(each) > 1]
    if by_seed and len(names) > 1:
        parts = [(float(each.var(ddof=1)) / len(each), len(each) - 1) for each in by_seed]
        parts.append((float(differences.var(ddof=1)) / len(names), len(names) - 1))
        width = _width(parts, tail)
        low, high = float(differences.mean()) - width, float(differences.mean()) + width
        for each in by_seed:  # drawn from n, a mean varies by (n - 1) / n of what it should
            drawn = rng.integers(0, len(each), (config.resamples, len(each)))
            spread = math.sqrt(len(each) / (len(each) - 1))
            means += (each[drawn].mean(1) - each.mean()) * spread
    passed, reason = _decide(len(names), low, high, config)
    return Comparison(
        metric=config.metric,
        names=names,
        differences=differences,
        resampled_means=means,
        interval=(low, high),
        candidate_seeds=dict(zip(candidate, ours.mean(1).tolist(), strict=True)),
        champion_seeds=dict(zip(champion, theirs.mean(1).tolist(), strict=True)),
        passed=passed,
        reason=reason,
    )


def _width(parts: list[tuple[float, int]], tail: float) -> float:
    """Return half the width of an interval, from the parts of a variance.

    Args:
        parts: variance and degrees of freedom of each.
        tail: beyond either end.
    """
    variance = sum(part for part, _ in parts)
    return math.sqrt(variance) * student_quantile(tail, satterthwaite(parts)) if variance else 0.0


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
