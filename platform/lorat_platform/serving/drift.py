"""Whether the scores of an hour are distributed as those of the version's evaluation were."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lorat.metrics.confidence import BINS, DRIFT, histogram, stability_index
from lorat_platform.serving.session import Session

log = logging.getLogger(__name__)

HOUR_S = 3600.0
ENOUGH = 1000
"""Scores below which an hour says nothing."""


class Drift:
    """Counts the scores of each model by the hour, and compares them with its evaluation's.

    Args:
        reference: returns the histogram of a model's evaluation by its name, none without one; it
            is asked once for each.
        alarm: is called with a sentence, once an hour for a model.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        reference: Callable[[str], np.ndarray | None],
        alarm: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reference, self._alarm, self._clock = reference, alarm, clock
        self._references: dict[str, np.ndarray | None] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._began = clock()
        self._alarmed: set[str] = set()

    def observe(self, session: Session, image: np.ndarray, answer: dict[str, Any]) -> None:
        """Count the scores of an answer."""
        if self._clock() - self._began > HOUR_S:
            self._began = self._clock()
            self._counts.clear()
            self._alarmed.clear()
        scores = [found["score"] for name, found in answer["targets"].items()]
        counts = self._counts.setdefault(answer["model"], np.zeros(BINS, np.int64))
        before = counts.sum()
        counts += histogram(scores)
        if before // ENOUGH != counts.sum() // ENOUGH:
            self._compare(answer["model"])

    def _compare(self, model: str) -> None:
        index = self.index(model)
        if index is not None and index > DRIFT and model not in self._alarmed:
            self._alarmed.add(model)
            self._alarm(
                f"The scores of {model} are no longer distributed as in its evaluation: stability "
                f"index {index:.2f}, above {DRIFT}."
            )

    def index(self, model: str) -> float | None:
        """Return the stability index of this hour; none without a reference or enough scores."""
        counts = self._counts.get(model)
        if counts is None or counts.sum() < ENOUGH:
            return None
        if model not in self._references:
            self._references[model] = self._reference(model)
        reference = self._references[model]
        return None if reference is None else stability_index(reference, counts)


def stored_reference(text: str | None) -> np.ndarray | None:
    """Read the histogram of a version's tag; none if there is none, or it is none of ours."""
    try:
        counts = np.asarray(json.loads(text or "null"), dtype=float)
    except (ValueError, TypeError):
        return None
    return counts if counts.shape == (BINS,) and counts.sum() > 0 else None
