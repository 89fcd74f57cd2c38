"""What is sampled of a machine has the names and values of MLflow's own monitor."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from lorat.errors import UserError
from lorat_platform.cluster import ray_internals
from lorat_platform.recording import system_metrics
from lorat_platform.recording.recorder import Recorder


class NVMLError(Exception):
    """What the library raises."""


def no_power(handle: int) -> int:
    if handle == 1:
        raise NVMLError("not supported")
    return 350_000


GPUS: Any = SimpleNamespace(
    NVMLError=NVMLError,
    nvmlInit=lambda: None,
    nvmlDeviceGetCount=lambda: 2,
    nvmlDeviceGetHandleByIndex=lambda index: index,
    nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=20e9, total=80e9),
    nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=87),
    nvmlDeviceGetPowerUsage=no_power,
    nvmlDeviceGetEnforcedPowerLimit=lambda handle: 700_000,
)
"""Two GPUs, of which the second does not tell its power."""


class Records(Recorder):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def _record(self, op: str, **fields: Any) -> None:
        self.records.append(fields)

    def _store(self, source: Any, name: str, folder: str) -> None:
        raise AssertionError


def test_names_are_those_of_mlflows_own_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.system_metrics.metrics import cpu_monitor, gpu_monitor

    monkeypatch.setitem(sys.modules, "pynvml", GPUS)
    monkeypatch.setattr(gpu_monitor, "pynvml", GPUS, raising=False)
    gpus = gpu_monitor.GPUMonitor()
    gpus.collect_metrics()
    cpu = cpu_monitor.CPUMonitor()
    cpu.collect_metrics()
    sample = system_metrics._sample(GPUS)
    assert sample.keys() == {*cpu.aggregate_metrics(), *gpus.aggregate_metrics()}
    for name, value in gpus.aggregate_metrics().items():
        assert sample[name] == pytest.approx(value)
    assert "gpu_1_utilization_percentage" in sample
    assert "gpu_1_power_usage_watts" not in sample


def test_samples_are_recorded_apart_for_each_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_internals, "nvml", lambda: GPUS)
    run = Records()
    with system_metrics.recorded_in(run, 0.02, node=1) as monitor:
        deadline = time.monotonic() + 20
        while len(run.records) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    first = run.records[0]
    assert abs(first["step"] - time.time()) < 60
    assert first["values"]["system/node_1/gpu_0_power_usage_watts"] == 350
    assert 0 < first["values"]["system/node_1/system_memory_usage_percentage"] < 100
    assert monitor.take()["system/node_1/gpu_0_utilization_percentage"] == 87


def test_a_machine_without_a_gpu_has_none() -> None:
    if ray_internals.nvml() is not None:
        pytest.skip("this machine has a GPU")
    assert not any(name.startswith("gpu") for name in system_metrics._sample(None))


def test_mlflows_own_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert system_metrics.interval_s() == 10
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "2.5")
    assert system_metrics.interval_s() == 2.5
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "often")
    with pytest.raises(UserError, match="is 'often'; give seconds above 0"):
        system_metrics.interval_s()
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    assert system_metrics.interval_s() is None
