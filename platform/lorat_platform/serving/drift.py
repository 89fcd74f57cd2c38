"""Whether the scores of an hour are distributed as those of the version's evaluation were.

The scores of all replicas are added up: what one of them tracks may be a single odd video.  The
alarm is a line in the log of the replica that finds it first, and a count for Prometheus.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lorat.errors import UserError
from lorat.metrics.confidence import BINS, DRIFT, histogram, stability_index
from lorat_platform.serving.score_board import OwnBoard
from lorat_platform.serving.session import Session

log = logging.getLogger(__name__)

HOUR_S = 3600.0
ENOUGH = 1000
"""Scores below which an hour says nothing."""


class Drift:
    """Counts the scores of each model by the hour, and compares them with its evaluation's.

    Args:
        reference: returns the histogram of a model's evaluation by its name, none without one; it
            is asked once for each, unless it raises a UserError.
        alarm: is called with a sentence, once an hour for a model, in one replica.
        board: adds up the counts of all replicas.
        clock: seconds, the same in all replicas.
    """

    def __init__(
        self,
        reference: Callable[[str], np.ndarray | None],
        alarm: Callable[[str], None],
        board: OwnBoard | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._reference, self._alarm, self._clock = reference, alarm, clock
        self._board = board or OwnBoard()
        self._lock = threading.Lock()
        self._references: dict[str, np.ndarray | None] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._hour = self._present_hour()
        self._indexes: dict[str, float] = {}

    def _present_hour(self) -> int:
        return int(self._clock() // HOUR_S)

    def observe(self, session: Session, image: np.ndarray, answer: dict[str, Any]) -> None:
        """Count the scores of an answer."""
        scores = [found["score"] for found in answer["targets"].values()]
        with self._lock:
            self._begin_hour()
            counts = self._counts.setdefault(answer["model"], np.zeros(BINS, np.int64))
            counts += histogram(scores)

    def _begin_hour(self) -> None:
        if self._hour != self._present_hour():
            self._hour = self._present_hour()
            self._counts.clear()

    def compare(self) -> None:
        """Add up this hour's scores of all replicas, and compare them with the evaluations'."""
        with self._lock:
            self._begin_hour()
            hour, own = self._hour, {model: counts.copy() for model, counts in self._counts.items()}
        indexes = {}
        for model, counts in self._board.add_up(hour, own).items():
            if counts.sum() < ENOUGH or (reference := self._reference_of(model)) is None:
                continue
            index = indexes[model] = stability_index(reference, counts)
            if index > DRIFT and self._board.is_first(hour, model):
                self._alarm(
                    f"The scores of {model} are no longer distributed as in its evaluation: "
                    f"stability index {index:.2f} over {counts.sum()} scores, above {DRIFT}."
                )
        self._indexes = indexes

    def _reference_of(self, model: str) -> np.ndarray | None:
        if model not in self._references:
            try:
                self._references[model] = self._reference(model)
            except UserError as error:
                log.warning("What the scores of %s were cannot be read: %s", model, error)
                return None
        return self._references[model]

    def index(self, model: str) -> float | None:
        """Return the stability index of this hour as it was compared last; none without a reference
        or enough scores."""
        return self._indexes.get(model)


def stored_reference(text: str | None) -> np.ndarray | None:
    """Read the histogram of a version's tag; none if there is none, or it is none of ours."""
    try:
        counts = np.asarray(json.loads(text or "null"), dtype=float)
    except (ValueError, TypeError):
        return None
    return counts if counts.shape == (BINS,) and counts.sum() > 0 else None
