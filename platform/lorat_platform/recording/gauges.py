"""The state of a training as Ray's own metrics, for Prometheus."""

from __future__ import annotations

from typing import Any


class Gauges:
    """The same figures as Ray metrics, for Prometheus; made on first use."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges: dict[str, Any] = {}

    def set(self, metrics: dict[str, float]) -> None:
        """Publish every metric as a gauge ``lorat_NAME`` with the tag ``run``."""
        from ray.util.metrics import Gauge

        for name, value in metrics.items():
            key = "lorat_" + name.replace("/", "_")
            if key not in self._gauges:
                self._gauges[key] = Gauge(key, description=name, tag_keys=("run",))
            self._gauges[key].set(value, tags=self._tags)
