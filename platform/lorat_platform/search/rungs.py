"""The rungs on which trials are compared, and the order that several objectives give.

A rung is a number of optimisation steps of the full schedule.  Schedulers count in *budget*: the
first rung is 1, each next one ``reduction`` times more, the last ``reduction ** (num_rungs - 1)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lorat.errors import UserError

BUDGET = "budget"
"""Reported progress: 1 at the first rung, ``reduction ** (num_rungs - 1)`` at the last."""


HISTORY = "history"
"""Reported list of all the trial's reports so far, as ``{"budget": ..., objective: ...}``."""


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """The steps at which trials are compared."""

    max_steps: int
    """Optimisation steps of a trial that is never stopped."""
    reduction: int
    """About one trial in so many goes on from a rung; also the ratio of two rungs."""
    num_rungs: int

    def __post_init__(self) -> None:
        if self.reduction < 2 or self.num_rungs < 1:
            raise UserError(
                f"There are {self.num_rungs} rungs with a reduction of {self.reduction}; "
                "give 1 or more rungs and a reduction of 2 or more."
            )
        if self.max_steps < self.max_budget:
            raise UserError(
                f"{self.max_steps} steps cannot hold {self.num_rungs} rungs with a reduction of "
                f"{self.reduction}; give fewer rungs or at least {self.max_budget} steps."
            )

    @property
    def max_budget(self) -> int:
        """Budget of the last rung."""
        return self.reduction ** (self.num_rungs - 1)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of all rungs, ascending; the last is ``max_steps``."""
        return tuple(
            math.ceil(self.max_steps / self.reduction**k) for k in reversed(range(self.num_rungs))
        )

    def steps_of(self, total_steps: int, base_steps: int) -> tuple[int, ...]:
        """Return the rungs in the steps of a trial, after the same share of its schedule.

        Args:
            total_steps: of the trial's schedule.
            base_steps: of the schedule that the rungs are steps of.
        """
        return tuple(-(-step * total_steps // base_steps) for step in self.steps)

    def budget(self, rung: int) -> int:
        """Return the budget of a rung, counted from 0."""
        return self.reduction**rung


def pareto_fronts(points: np.ndarray) -> list[list[int]]:
    """Sort points (n, d), where more is better, into non-dominated fronts of indices."""
    left = list(range(len(points)))
    fronts: list[list[int]] = []
    while left:
        rows = points[left]
        at_least = np.all(rows[None] >= rows[:, None], axis=2)
        more = np.any(rows[None] > rows[:, None], axis=2)
        dominated = np.any(at_least & more, axis=1).tolist()
        fronts.append([index for index, worse in zip(left, dominated, strict=True) if not worse])
        left = [index for index, worse in zip(left, dominated, strict=True) if worse]
    return fronts


def pareto_order(points: np.ndarray) -> list[int]:
    """Order points (n, d) by front, then by crowding distance, the most isolated first."""
    order: list[int] = []
    for front in pareto_fronts(points):
        distance = np.zeros(len(front))
        for column in points[front].T:
            ranks = np.argsort(column, kind="stable")
            span = column[ranks[-1]] - column[ranks[0]]
            distance[ranks[[0, -1]]] = np.inf
            if span > 0 and len(front) > 2:
                distance[ranks[1:-1]] += (column[ranks[2:]] - column[ranks[:-2]]) / span
        order += [front[i] for i in np.argsort(-distance, kind="stable")]
    return order
