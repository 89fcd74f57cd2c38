"""Where the time of a training step goes, and how well the hardware is used."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("data", "copy", "augment", "forward", "backward", "optimiser", "replay", "checkpoint")
"""Parts of a step: waiting for data, to the device, augmentation, ..., writing checkpoints.
``replay`` is forward, backward and optimiser together, where they are a captured graph."""

PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10G": 125e12, "A10": 125e12, "T4": 65e12, "V100": 125e12,
    "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "A6000": 155e12,
}  # fmt: skip
"""Dense fp16 / bf16 tensor-core peaks with fp32 accumulation, from the makers' data sheets."""


class StepClock:
    """Sum the seconds of every part of the steps since the last reading.

    On CUDA the parts are timed with events, which are only waited for when the sums are read, and
    augmentation runs beside the step before, so its time is not part of a step's.
    """

    def __init__(self, device: torch.device) -> None:
        self._paused_in: int | None = None
        self._cuda = device.type == "cuda"
        self.reset()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time no part that the device does in this thread, such as while a graph is recorded."""
        self._paused_in = threading.get_ident()
        try:
            yield
        finally:
            self._paused_in = None

    def reset(self) -> None:
        """Start anew."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, Any, Any]] = []
        self._start = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the step that the host does."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    @contextmanager
    def device_part(self, name: str) -> Iterator[None]:
        """Time a part of the step that the device does."""
        if self._paused_in == threading.get_ident():
            yield
            return
        if not self._cuda:
            with self.part(name):
                yield
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        try:
            yield
        finally:
            after.record()
            self._events.append((name, before, after))

    def read(self) -> tuple[float, dict[str, float]]:
        """Return wall seconds and seconds per part since the last reading, and start anew."""
        # Another thread may add some meanwhile: they count for the next reading.
        events, self._events = self._events, []
        if events:
            torch.cuda.synchronize()
            for name, before, after in events:
                self._seconds[name] += before.elapsed_time(after) / 1e3
        now = time.perf_counter()
        wall, seconds = now - self._start, self._seconds
        self._seconds, self._start = dict.fromkeys(PARTS, 0.0), now
        return wall, seconds


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Return the assumed peak of one worker, in FLOP/s, and where the figure comes from.

    A GPU's is its data sheet's; a CPU's is measured with a large float32 matrix product.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, peak in PEAK_FLOPS.items():
            if key in name:
                return peak, f"{name}, data sheet, dense fp16"
        return float("nan"), f"{name}, unknown"
    size = 768
    a, b = torch.rand(size, size), torch.rand(size, size)
    a @ b
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"CPU, {torch.get_num_threads()} threads, measured fp32 product"


def memory_bytes(device: torch.device) -> dict[str, float]:
    """Return the memory of this process, and on CUDA its peak on the device, in bytes."""
    memory = {"host": _resident_bytes()}
    if device.type == "cuda":
        memory["device_peak"] = float(torch.cuda.max_memory_allocated(device))
    return memory


def _resident_bytes() -> float:
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * float(resource.getpagesize())
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def summarise(
    *,
    wall_s: float,
    parts_s: dict[str, float],
    num_steps: int,
    num_pairs: int,
    num_workers: int,
    flops_per_pair: float,
    peak: float,
) -> dict[str, float]:
    """Turn sums over an interval into the metrics that are shown.

    Args:
        wall_s: duration of the interval.
        parts_s: seconds per part, averaged over the workers.
        num_steps: steps in the interval.
        num_pairs: pairs of all workers.
        num_workers: workers.
        flops_per_pair: of forward and backward.
        peak: FLOP/s of one worker.
    """
    wall_s = max(wall_s, 1e-9)
    rate = num_pairs / wall_s
    metrics = {
        "system/samples_per_s": rate,
        "system/samples_per_s_per_worker": rate / num_workers,
        "system/data_stall_share": min(parts_s["data"] / wall_s, 1.0),
        "system/step_ms": 1e3 * wall_s / max(num_steps, 1),
    }
    if peak == peak:
        metrics["system/mfu"] = rate * flops_per_pair / (peak * num_workers)
    metrics |= {f"system/time_ms/{k}": 1e3 * v / max(num_steps, 1) for k, v in parts_s.items()}
    return metrics


def duration(seconds: float) -> str:
    """Write a duration such as ``2 h 05 min`` or ``48 s``."""
    seconds = round(max(seconds, 0))
    if seconds < 60:
        return f"{seconds} s"
    minutes = seconds // 60
    if minutes < 60:
        return f"{minutes} min {seconds % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
