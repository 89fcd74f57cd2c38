"""What a replica counts and measures, for its status page and for Prometheus."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator

import numpy as np

RECENT = 1000
"""Values of which a quantile is taken."""


class Statistics:
    """Counters since the start, and the recent values of what is measured; for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._recent: dict[str, deque[float]] = {}

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name] += number

    def observe(self, name: str, value: float) -> None:
        """Note a value."""
        with self._lock:
            self._recent.setdefault(name, deque(maxlen=RECENT)).append(value)

    @contextlib.contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Note the seconds that a block takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.observe(name, time.monotonic() - began)

    def counts(self) -> dict[str, int]:
        """Return the counters."""
        with self._lock:
            return dict(self._counts)

    def quantiles(self, *shares: float) -> dict[str, list[float]]:
        """Return quantiles of the recent values, by name."""
        with self._lock:
            recent = {name: list(values) for name, values in self._recent.items()}
        return {name: np.quantile(values, shares).tolist() for name, values in recent.items()}
