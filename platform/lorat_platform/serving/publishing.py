"""The figures of a replica as Ray's metrics, for Prometheus."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from lorat_platform.serving.drift import Drift
from lorat_platform.serving.engine import Engine
from lorat_platform.serving.shadow import Shadow
from lorat_platform.serving.shadow_record import ShadowRecord

log = logging.getLogger(__name__)

PERIOD_S = 2.0
COMPARE_S = 20.0
"""Between two looks at the scores of all replicas."""
RECORD_S = 30.0
"""Between two entries of a shadow's run in MLflow."""
COUNTERS = (
    "frames", "skipped", "sessions", "refused", "swaps", "moved", "refused_models", "drifts",
)  # fmt: skip

GAUGES = {
    "sessions": ("model",),
    "drift": ("model",),
    "batch": ("quantile",),
    "seconds": ("stage", "quantile"),
}
"""Names and tags of what is shown as it is now."""


class Publishing:
    """Publishes what an engine counts and measures, every two seconds, from a thread.

    Counters are ``lorat_serve_NAME_total``, the present state ``lorat_serve_NAME``; quantiles of
    the seconds of each stage have the tags ``stage`` and ``quantile``.
    """

    def __init__(self, engine: Engine, drift: Drift, shadow: Shadow | None) -> None:
        from ray.util.metrics import Counter, Gauge

        self._engine, self._drift = engine, drift
        self._record = ShadowRecord(shadow, engine.name) if shadow is not None else None
        self._counters = {
            name: Counter(f"lorat_serve_{name}_total", description=name) for name in COUNTERS
        }
        self._seen: dict[str, int] = {}
        self._gauges: dict[str, Any] = {
            name: Gauge(f"lorat_serve_{name}", description=name, tag_keys=tags)
            for name, tags in GAUGES.items()
        }
        self._models: set[str] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="publishing", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and the shadow's runs."""
        self._stopped.set()
        self._thread.join(5)
        if self._record is not None:
            self._record.close()

    def _run(self) -> None:
        recorded = compared = time.monotonic()
        while not self._stopped.wait(PERIOD_S):
            if time.monotonic() - compared > COMPARE_S:
                compared = time.monotonic()
                try:
                    self._drift.compare()
                except Exception:  # Ray's head may be away for a while, and the figures go on
                    log.exception("The scores could not be compared; they are again in a while.")
            self.publish()
            if self._record is not None and time.monotonic() - recorded > RECORD_S:
                recorded = time.monotonic()
                self._record.write()

    def publish(self) -> None:
        """Publish the figures as they are now."""
        counts = self._engine.statistics.counts()
        for name, counter in self._counters.items():
            more = counts.get(name, 0) - self._seen.get(name, 0)
            if more:
                counter.inc(more)
        self._seen = counts
        sessions = {self._engine.model.name: 0} | self._engine.models_in_use()
        for model in self._models | sessions.keys():
            self._gauges["sessions"].set(sessions.get(model, 0), tags={"model": model})
        self._models |= sessions.keys()
        for model in sessions:
            if (index := self._drift.index(model)) is not None:
                self._gauges["drift"].set(index, tags={"model": model})
        for stage, (median, high) in self._engine.statistics.quantiles(0.5, 0.99).items():
            for quantile, value in (("0.5", median), ("0.99", high)):
                tags = {"quantile": quantile}
                if stage == "batch":
                    self._gauges["batch"].set(value, tags=tags)
                else:
                    self._gauges["seconds"].set(value, tags=tags | {"stage": stage})
