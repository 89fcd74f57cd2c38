"""How busy a machine is, under the names that MLflow's own monitor of it uses.

MLflow's monitor talks to the server by itself, and waits for it.  This one records as everything
else does; the page "System metrics" of a run shows it.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import psutil

from lorat.errors import UserError
from lorat_platform.cluster import ray_internals
from lorat_platform.recording.recorder import Recorder

INTERVAL = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
"""Variable of MLflow with the seconds between two samples."""
EVERY_S = 10.0
"""What they are where it is not set, as in MLflow."""


def interval_s() -> float | None:
    """Return the seconds between two samples; none if MLflow's own switch is off.

    Raises:
        UserError: if the environment asks for an interval that is none.
    """
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("false", "0"):
        return None
    given = os.environ.get(INTERVAL) or f"{EVERY_S}"
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"{INTERVAL} is {given!r}; give seconds above 0, or leave it out.")
    return seconds


class SystemMonitor:
    """Samples this machine in a thread while it is entered.

    Args:
        every_s: seconds between two samples; none means no samples.
        node: number of the machine among several; none where the run has one.
        on_sample: gets the metrics of every sample.
    """

    def __init__(
        self,
        every_s: float | None,
        *,
        node: int | None = None,
        on_sample: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self._every_s = every_s
        self._prefix = "system/" if node is None else f"system/node_{node}/"
        self._on_sample = on_sample
        self._sums: defaultdict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="system-monitor", daemon=True)

    def __enter__(self) -> Self:
        if self._every_s is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()

    def take(self) -> dict[str, float]:
        """Return the means of the samples since the last call, and forget them."""
        with self._lock:
            sums, self._sums = self._sums, defaultdict(list)
        return {name: sum(values) / len(values) for name, values in sums.items()}

    def _watch(self) -> None:
        psutil.cpu_percent()  # the next call tells the share since this one
        nvml = ray_internals.nvml()
        while not self._stop.wait(self._every_s):
            sampled = {self._prefix + name: value for name, value in _sample(nvml).items()}
            with self._lock:
                for name, value in sampled.items():
                    self._sums[name].append(value)
            if self._on_sample is not None:
                self._on_sample(sampled)


def recorded_in(run: Recorder, every_s: float | None, *, node: int | None = None) -> SystemMonitor:
    """Return a monitor that records every sample in a run.

    The time is the step, so that a run which goes on elsewhere never takes one again.
    """

    def record(sampled: dict[str, float]) -> None:
        run.log_metrics(sampled, step=int(time.time()))

    return SystemMonitor(every_s, node=node, on_sample=record)


def _sample(nvml: Any) -> dict[str, float]:
    """Return what this machine uses now: CPU in percent, memory, and each GPU's."""
    memory = psutil.virtual_memory()
    sample = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": 100 * memory.used / memory.total,
    }
    for gpu in range(nvml.nvmlDeviceGetCount() if nvml is not None else 0):
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
        for part in (_gpu_use, _gpu_memory, _gpu_power):
            try:
                values = part(nvml, handle)
            except nvml.NVMLError:  # not every GPU, or part of one, tells everything
                continue
            sample |= {f"gpu_{gpu}_{name}": value for name, value in values.items()}
    return sample


def _gpu_use(nvml: Any, handle: Any) -> dict[str, float]:
    return {"utilization_percentage": nvml.nvmlDeviceGetUtilizationRates(handle).gpu}


def _gpu_memory(nvml: Any, handle: Any) -> dict[str, float]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "memory_usage_megabytes": memory.used / 1e6,
        "memory_usage_percentage": 100 * memory.used / memory.total,
    }


def _gpu_power(nvml: Any, handle: Any) -> dict[str, float]:
    watts = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
    limit = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3
    return {"power_usage_watts": watts, "power_usage_percentage": 100 * watts / limit}
