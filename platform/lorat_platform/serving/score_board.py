"""The scores of all replicas: each writes its own where all of them read.

They lie in the key-value store of Ray's head, which outlives a replica and needs no process more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from lorat.metrics.confidence import BINS
from lorat_platform.cluster import ray_internals

Counts = Mapping[str, np.ndarray]
"""Scores in bins, int64 (BINS,), by model."""


class OwnBoard:
    """The board of a replica that is alone."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._hour: int | None = None

    def add_up(self, hour: int, own: Counts) -> Counts:
        """Return the counts of all replicas in an hour, of which these are this one's."""
        return own

    def is_first(self, hour: int, what: str) -> bool:
        """Tell whether no replica has said this in this hour; it counts as said then."""
        if self._hour != hour:
            self._hour = hour
            self._said.clear()
        is_first = what not in self._said
        self._said.add(what)
        return is_first


class SharedBoard(OwnBoard):
    """The board of the replicas of an application.

    Args:
        application: its name in this Ray.
        replica: whose counts are written.
    """

    def __init__(self, application: str, replica: str) -> None:
        super().__init__()
        self._place = f"{application}/scores/"
        self._replica = replica

    def add_up(self, hour: int, own: Counts) -> Counts:
        """Write this replica's counts of an hour; return those of all."""
        if self._hour != hour:
            for key in ray_internals.stored_keys(self._place):
                if not key.startswith(f"{self._place}{hour}/"):
                    ray_internals.forget(key)
            self._hour = hour
        written = json.dumps({model: counts.tolist() for model, counts in own.items()})
        ray_internals.store(f"{self._place}{hour}/of/{self._replica}", written)
        total: dict[str, np.ndarray] = {}
        for key in ray_internals.stored_keys(f"{self._place}{hour}/of/"):
            for model, counts in json.loads(ray_internals.stored(key) or "{}").items():
                total[model] = total.get(model, np.zeros(BINS, np.int64)) + np.asarray(counts)
        return total

    def is_first(self, hour: int, what: str) -> bool:
        """Tell whether no replica has said this in this hour; it counts as said then."""
        return ray_internals.store(f"{self._place}{hour}/said/{what}", "", overwrite=False)
