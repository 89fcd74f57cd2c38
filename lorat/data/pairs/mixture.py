"""Deal data sets in their exact shares, as a function of the pair's number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from lorat.data.pairs.permutation import mix
from lorat.errors import UserError

_LARGEST_PERIOD = 1 << 16


class DatasetSchedule:
    """Deal data sets in exact shares: pair i belongs to a data set and is its n-th pair.

    The shares repeat with the smallest period that they allow (4 for four equal weights), so the
    counts are exact in every whole period; inside of it every prefix of the pattern is within
    one pair of exact (Tijdeman's schedule of the chairman assignment problem), shuffled in small
    chunks so that neighbouring pairs come in random order.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        if not weights or any(not (math.isfinite(w) and w > 0) for w in weights):
            raise UserError(
                f"The data set weights are {list(weights)}; give finite numbers above 0."
            )
        # As they are written, so that 0.1 is a tenth and the period small.
        exact = [Fraction(repr(float(w))).limit_denominator(10_000) for w in weights]
        if min(exact) <= 0:
            raise UserError(
                f"The data set weights are {list(weights)}; give none below 1/10000 of 1."
            )
        shares = [w / sum(exact) for w in exact]
        period = math.lcm(*(s.denominator for s in shares))
        if period > _LARGEST_PERIOD:
            period = _LARGEST_PERIOD
        self.counts = _apportion(shares, period)
        """Pairs of each data set in one period."""
        self.period = period
        self._pattern = _chairman_assignment(self.counts)
        # How many pairs of the same data set come before a slot: together with the period's number
        # that numbers the pairs of each data set without gaps, whoever asks for which pair.
        seen = [0] * len(self.counts)
        self._ordinal = []
        for dataset in self._pattern:
            self._ordinal.append(seen[dataset])
            seen[dataset] += 1
        # A chunk is shuffled within itself, which needs the period to be whole chunks.
        self._chunk = max(c for c in range(1, min(period, 64) + 1) if period % c == 0)
        rng = np.random.default_rng([seed, 1])
        self._shuffles = [rng.permutation(self._chunk).tolist() for _ in range(256)]
        self._seed = seed

    def __call__(self, index: int) -> tuple[int, int]:
        """Return the data set of pair ``index`` and the number of its earlier pairs."""
        period, slot = divmod(index, self.period)
        first = slot - slot % self._chunk
        shuffle = self._shuffles[mix(self._seed, index - slot + first) & 255]
        slot = first + shuffle[slot - first]
        dataset = self._pattern[slot]
        return dataset, period * self.counts[dataset] + self._ordinal[slot]


def _apportion(shares: Sequence[Fraction], total: int) -> list[int]:
    """Split ``total`` by largest remainder, at least one each."""
    counts = [math.floor(share * total) for share in shares]
    by_remainder = sorted(
        range(len(shares)), key=lambda d: shares[d] * total - counts[d], reverse=True
    )
    for dataset in by_remainder[: total - sum(counts)]:
        counts[dataset] += 1
    if min(counts) == 0:
        raise UserError(
            f"A data set weight is too small: its share of all pairs is {float(min(shares)):.2g}; "
            f"give at least {1 / total:.2g}."
        )
    return counts


def _chairman_assignment(counts: Sequence[int]) -> list[int]:
    """Order the data sets so that every prefix has less than one pair too many or too few.

    R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): among those
    whose deficit has reached 1 / (2k - 2), the one whose deadline comes first is next.
    """
    num, total = len(counts), sum(counts)
    if num == 1:
        return [0] * total
    # All times total, to stay with whole numbers: deficits and slack are shares of one pair.
    slack = total / (2 * num - 2)
    taken = [0] * num
    order = []
    for position in range(1, total + 1):
        deficit = [counts[d] * position - taken[d] * total for d in range(num)]
        due = [d for d in range(num) if deficit[d] >= slack - 1e-9]
        chosen = min(due, key=lambda d: (total - slack - deficit[d]) / counts[d])
        taken[chosen] += 1
        order.append(chosen)
    return order
