"""Is the best trial of a search better than the default?  A race of contenders over seeds.

Contenders are trained with the same seeds and measured on the same sequences.  A paired difference
of two, of seed s and sequence q, is taken as ``d[s, q] = mean + seed[s] + sequence[q] + rest[s,
q]``, where seeds and sequences both are samples of what could have been (a crossed layout of two
random effects).

**Interval of a mean difference.**  Its variance is that of two random effects: a seed part, the
variance of the seeds' means over their number, and a sequence part, likewise, less that of the
rest, which is in both (Owen 2007, "The pigeonhole bootstrap", without this correction).  Seeds are
few, so the variance between them is the larger one of the pair's own and of what all contenders
have in common (the mean square of contender by seed), each with its degrees of freedom.  The width
is that of Student's t with the degrees of freedom of Satterthwaite (1946).  Assumed: the parts are
roughly normal, or sequences many; and where a pair seems to vary less with its seeds than all do,
it does so by chance.  In simulations of equal contenders whose spread between seeds differs up to
fourfold, 94 to 99 of 100 races hold in all their intervals.

**Looking after every seed.**  The error is spent (Lan and DeMets 1983) over the looks, in
proportion to the cube of their share of the seeds (Kim and DeMets 1987), and by Bonferroni over
the pairs: all intervals of a race hold together with its confidence, whichever contender leads and
whenever it ends.  One seed tells nothing of the spread between seeds: nothing is spent, nobody
leaves.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from lorat.config.bounds import Bounds, check_bounds
from lorat.metrics.uncertainty import (
    CONFIDENCE,
    SEED,
    Interval,
    satterthwaite,
    student_quantile,
)

STREAM = 97
"""Stream number of the draws of the contenders' means, beside the seed."""
DRAWS = 4000
_UNKNOWN = Interval(-math.inf, math.inf)

Outcome = Literal["better than the default", "not distinguishable from the default", "worse"]


@dataclass(frozen=True, kw_only=True)
class RaceRules:
    """How a race goes."""

    within: Annotated[float, Bounds(0, 1)] = 0.005
    """Differences that do not matter, 0 to 1: a race ends when the intervals of all that are left
    lie within it."""
    max_seeds: Annotated[int, Bounds(2, 100)] = 5
    """Seeds that every contender is trained with at most, 2 to 100."""
    confidence: Annotated[float, Bounds(0, 1, above=True, below=True)] = CONFIDENCE
    """That all intervals of a race hold, more than 0, below 1."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a contender stands."""

    name: str
    num_seeds: int
    """That count: those that it raced with."""
    mean: float
    """Over these seeds."""
    difference: float
    """To the leader, over the seeds of both, 0 or less while it races."""
    interval: Interval
    """Of the difference; without ends while one seed is known."""
    left_after: int | None
    """Seeds after which it was shown not to be the best; none while it races."""
    p_best: float
    """Probability that its mean over seeds and sequences is the largest."""


@dataclass(frozen=True, kw_only=True)
class Standings:
    """How a race stands after the seeds that all who race have."""

    num_seeds: int
    """That all who race have."""
    leader: str
    standings: tuple[Standing, ...]
    """The leader first, the others that race, best first, then those that left, likewise."""
    over: bool
    reason: str
    """Why it is over; empty while it is not."""

    @property
    def left(self) -> tuple[str, ...]:
        """Return the names of those that still race."""
        return tuple(each.name for each in self.standings if each.left_after is None)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a race has shown."""

    winner: str
    """The best of the search's trials."""
    chosen: str
    """What to register: the winner if it is better than the default, else the default."""
    minus_default: float
    """The winner's mean less the default's, over the seeds that both have."""
    interval: Interval
    """Of this difference; holds whichever trial won, and whenever the race ended."""
    verdict: Outcome
    p_best: Mapping[str, float]
    """Probability of each contender that its mean over seeds and sequences is the largest."""
    regrets: Mapping[str, float]
    """By how much the best is expected to be better than each contender, 0 or more."""
    per_seed: Mapping[str, np.ndarray]
    """(seeds,) of each trial: its mean over sequences less the default's, by seed."""

    @property
    def regret(self) -> float:
        """Return by how much the best is expected to be better than the chosen one."""
        return self.regrets[self.chosen]


def standings(
    scores: Mapping[str, np.ndarray], rules: RaceRules, *, weights: np.ndarray | None = None
) -> Standings:
    """Replay a race over the seeds that there are, and return how it stands.

    The scores are all that it needs: who left, and when, follows from them.  A seed counts when
    all who race have it.

    Args:
        scores: (seeds, sequences) by contender, more is better; row s belongs to the same seed of
            all, and who left early has fewer rows.
        rules: of the race.
        weights: (sequences,), the sequences' shares of the score; none means equal ones.

    Raises:
        ValueError: if there is no contender, or the shapes do not fit.
    """
    shares = _shares(scores, weights)
    pairs = math.comb(len(scores), 2)
    racing, left_after = list(scores), dict.fromkeys(scores, 0)
    look, reason = 0, "one is left" if len(scores) == 1 else ""
    while not reason and all(len(scores[name]) > look for name in racing):
        look += 1
        means = {name: float((scores[name][:look] @ shares).mean()) for name in racing}
        racing.sort(key=means.__getitem__, reverse=True)
        seen = _Seen({name: scores[name] for name in racing}, look, rules, shares, pairs)
        leader, *others = racing
        racing = [leader, *(name for name in others if seen.difference(name, leader)[1].high >= 0)]
        left_after |= {name: look for name in others if name not in racing}
        if len(racing) == 1:
            reason = "one is left"
        elif all(
            max(abs(end) for end in seen.difference(a, b)[1]) <= rules.within
            for a, b in itertools.combinations(racing, 2)
        ):
            reason = f"the rest are within {rules.within:g}"
        elif look >= rules.max_seeds:
            reason = f"{look} seeds"
    counted = {name: rows[: left_after[name] or look] for name, rows in scores.items()}
    p_best, _ = _prospects(counted, shares)
    rows = []
    for name, own in counted.items():
        seen = _Seen(counted, len(own), rules, shares, pairs)
        difference, interval = seen.difference(name, racing[0])
        rows.append(
            Standing(
                name=name,
                num_seeds=len(own),
                mean=float((own @ shares).mean()) if len(own) else math.nan,
                difference=difference,
                interval=interval,
                left_after=left_after[name] or None,
                p_best=p_best[name],
            )
        )
    rows.sort(key=lambda row: (row.left_after is not None, -row.difference))
    return Standings(
        num_seeds=look,
        leader=racing[0],
        standings=tuple(rows),
        over=bool(reason),
        reason=reason,
    )


def verdict(
    scores: Mapping[str, np.ndarray],
    rules: RaceRules,
    *,
    default: str,
    weights: np.ndarray | None = None,
) -> Verdict:
    """Return what a race has shown, also of one that is not over.

    Args:
        scores: as for :func:`standings`.
        rules: of the race.
        default: the contender that is registered unless another one is better.
        weights: as for :func:`standings`.

    Raises:
        ValueError: as :func:`standings`, or if there is no default, or nothing beside it.
    """
    if default not in scores or len(scores) == 1:
        raise ValueError(f"The default {default} and at least one other contender must race.")
    stand = standings(scores, rules, weights=weights)
    shares = _shares(scores, weights)
    counted = {row.name: scores[row.name][: row.num_seeds] for row in stand.standings}
    winner = next(row.name for row in stand.standings if row.name != default)
    common = min(len(counted[winner]), len(counted[default]))
    # Below, any of the other contenders may err.  Above, only the truly best of them: what leads
    # with less than its due has that one below its own due by more.
    seen = _Seen(counted, common, rules, shares, len(scores) / 2)
    difference, interval = seen.difference(winner, default)
    outcome: Outcome = "not distinguishable from the default"
    if interval.low > 0:
        outcome = "better than the default"
    elif interval.high < 0:
        outcome = "worse"
    p_best, regrets = _prospects(counted, shares)
    base = counted[default]
    return Verdict(
        winner=winner,
        chosen=winner if interval.low > 0 else default,
        minus_default=difference,
        interval=interval,
        verdict=outcome,
        p_best=p_best,
        regrets=regrets,
        per_seed={
            name: (rows[: len(base)] - base[: len(rows)]) @ shares
            for name, rows in counted.items()
            if name != default
        },
    )


class _Seen:
    """What is seen of a race after some seeds."""

    def __init__(
        self,
        scores: Mapping[str, np.ndarray],
        look: int,
        rules: RaceRules,
        shares: np.ndarray,
        pairs: float,
    ) -> None:
        """Take the contenders that have as many seeds as ``look``; ``pairs`` share the error."""
        self._scores = {name: rows[:look] for name, rows in scores.items() if len(rows) >= look}
        self._look, self._shares = look, shares
        spent, before = (((k - 1) / (rules.max_seeds - 1)) ** 3 for k in (look, look - 1))
        self._tail = (1 - rules.confidence) * (spent - before) / pairs / 2 if look > 1 else 0.0
        if look > 1:
            means = np.array([rows @ shares for rows in self._scores.values()])
            rest = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
            freedom = (len(means) - 1) * (look - 1)
            self._common = 2 * float((rest**2).sum()) / freedom, freedom

    def difference(self, a: str, b: str) -> tuple[float, Interval]:
        """Return the mean difference of two contenders, and its interval."""
        if a == b:
            return 0.0, Interval(0.0, 0.0)
        if not self._look:
            return math.nan, _UNKNOWN
        differences = self._scores[a] - self._scores[b]
        by_seed = differences @ self._shares
        mean = float(by_seed.mean())
        uneven = self._shares**2
        sequence_freedom = uneven.sum() ** 2 / (uneven**2).sum() - 1
        if self._look == 1 or sequence_freedom < 1:
            return mean, _UNKNOWN
        seed_variance, seed_freedom = max(
            self._common, (float(by_seed.var(ddof=1)), self._look - 1)
        )
        centred = differences.mean(0) - mean
        num = len(centred)
        parts = (
            (seed_variance / self._look, seed_freedom),
            (float(uneven @ centred**2) * num / (num - 1), sequence_freedom),
        )
        both = sum(part for part, _ in parts)
        rest = differences - by_seed[:, None] - centred
        rest_part = (rest**2).sum() / ((self._look - 1) * (num - 1)) * uneven.sum() / self._look
        variance = max(both - rest_part, *(part for part, _ in parts))
        if variance == 0:
            return mean, Interval(mean, mean)
        width = math.sqrt(variance) * student_quantile(self._tail, satterthwaite(parts))
        return mean, Interval(mean - width, mean + width)


def _prospects(
    scores: Mapping[str, np.ndarray], shares: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the probability of each to be best, and by how much the best is expected to be better.

    Means are drawn with the spread of their seeds, the same for all, and of sequences, paired.
    """
    names, look = list(scores), max(len(rows) for rows in scores.values())
    if len(names) == 1:
        return {names[0]: 1.0}, {names[0]: 0.0}
    if look < 2:  # nothing is known of the spread between seeds
        return dict.fromkeys(names, 1 / len(names)), dict.fromkeys(names, math.inf)
    # By least squares, rows = contender + seed: who left early is compared by the seeds it has.
    seeds = [(c, s) for c, rows in enumerate(scores.values()) for s in range(len(rows))]
    design = np.zeros((len(seeds), len(names) + look))
    for row, (c, s) in enumerate(seeds):
        design[row, c] = design[row, len(names) + s] = 1
    rows = np.concatenate(list(scores.values()))
    inverse = np.linalg.pinv(design)
    by_sequence = (inverse @ rows)[: len(names)]
    rest = (rows - design @ (inverse @ rows)) @ shares
    freedom = len(seeds) - len(names) - look + 1
    by_contender = inverse[: len(names)] * math.sqrt(rest @ rest / freedom)
    means = by_sequence @ shares
    num = len(shares)
    centred = (by_sequence - means[:, None]) * shares * math.sqrt(num / max(num - 1, 1))
    drawn = np.tile(means, (DRAWS, 1))
    for number, (part, own) in enumerate(((by_contender, freedom), (centred, max(num - 1, 1)))):
        sizes, axes = np.linalg.eigh(part @ part.T)
        drawn += _draws(number, len(names), own) @ (axes * np.sqrt(np.maximum(sizes, 0))) @ axes.T
    best = drawn.max(1)
    share = np.bincount(drawn.argmax(1), minlength=len(names)) / DRAWS
    return (
        {name: float(share[c]) for c, name in enumerate(names)},
        {name: float((best - drawn[:, c]).mean()) for c, name in enumerate(names)},
    )


@functools.lru_cache(maxsize=64)
def _draws(number: int, num: int, freedom: int) -> np.ndarray:
    """Return (draws, num) of Student's t, the same at every call."""
    rng = np.random.default_rng([SEED, STREAM, number])
    scale = np.sqrt(rng.chisquare(freedom, (DRAWS, 1)) / freedom)
    return rng.standard_normal((DRAWS, num)) / scale


def _shares(scores: Mapping[str, np.ndarray], weights: np.ndarray | None) -> np.ndarray:
    """Return the sequences' shares, which add up to 1.

    Raises:
        ValueError: if there is no contender, or the shapes do not fit.
    """
    if not scores:
        raise ValueError("There is no contender.")
    wanted = {rows.shape[1:] for rows in scores.values()}
    shapes = {name: rows.shape for name, rows in scores.items()}
    if len(wanted) != 1 or len(next(iter(wanted))) != 1:
        raise ValueError(f"Scores are (seeds, sequences), of the same sequences; given: {shapes}.")
    (num,) = next(iter(wanted))
    shares = np.ones(num) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (num,) or not (shares >= 0).all() or not shares.sum() > 0:
        raise ValueError(f"Weights are 0 or more for each of the {num} sequences: {shares}.")
    return shares / shares.sum()
