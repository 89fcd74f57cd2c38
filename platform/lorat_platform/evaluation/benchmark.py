"""How fast tracking is, stage by stage, one video alone and many in a batch."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch

from lorat.config.bounds import Bounds, Few, check_bounds
from lorat.config.fields import flag
from lorat.config.variants import get_variant
from lorat.image.boxes import Box
from lorat.model.network import LoRAT
from lorat.tracking.tracker import STAGES, Target, Tracker, resolve_device

log = logging.getLogger(__name__)

WARM_UP = 5
"""Steps of each kind that are not counted; a CUDA graph is captured meanwhile."""
FRAMES = 8
"""Fewest different frames, so that they are not all in the processor's cache."""
OBJECT_SHARE = 0.2
"""Sides of the object, as a share of the frame's height."""


@dataclass(frozen=True, kw_only=True)
class TrackBenchmark:
    """Measure tracking of noise in memory: frames per second, and the time of each stage."""

    variant: str = "T-112"
    """Model, such as T-112 or B-224; its weights are random."""
    batch: Annotated[int, Bounds(1, 4096)] = 8
    """Videos in a batch, 1 to 4096, measured beside one video alone."""
    frames: Annotated[int, Bounds(1, 1_000_000)] = 30
    """Frames of each video in a measurement, 1 to 1,000,000."""
    rounds: Annotated[int, Bounds(1, 1000)] = 5
    """Measurements of each kind, in turn, 1 to 1000; the medians count."""
    width: Annotated[int, Bounds(16, 16_384)] = 1280
    """Of a frame, in pixels, 16 to 16,384."""
    height: Annotated[int, Bounds(16, 16_384)] = 720
    """Of a frame, in pixels, 16 to 16,384."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Auto means the GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the weights; auto is float32, on a GPU under float16 autocast."""
    threads: Few | None = None
    """Torch threads on a CPU, 1 to 1024; none means one per CPU."""

    def __post_init__(self) -> None:
        check_bounds(self, flag)


def benchmark_track(options: TrackBenchmark) -> dict[str, float]:
    """Run the benchmark, print its table and return its figures.

    On a GPU a step is measured both as a CUDA graph and with its kernels started one by one.

    Raises:
        UserError: if there is no such variant or device.
    """
    device = resolve_device({"auto": None, "cpu": "cpu", "gpu": "cuda"}[options.device])
    if options.threads:
        torch.set_num_threads(options.threads)
    dtypes = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    network = LoRAT(get_variant(options.variant))
    kinds = {"eager": False, "captured": True} if device.type == "cuda" else {"eager": False}
    trackers = {
        kind: Tracker(network, device=device, dtype=dtypes[options.precision], capture=capture)
        for kind, capture in kinds.items()
    }
    log.info(
        "%s, %dx%d, precision %s, %s",
        options.variant, options.width, options.height, options.precision, device.type,
    )  # fmt: skip
    log.info("  %-22s %9s" + " %12s" * len(STAGES), "", "frames/s", *(f"{s}, ms" for s in STAGES))
    figures: dict[str, float] = {}
    for num_videos in dict.fromkeys((1, options.batch)):
        runs = {kind: _Run(tracker, num_videos, options) for kind, tracker in trackers.items()}
        seconds: dict[str, list[float]] = {kind: [] for kind in runs}
        for _ in range(options.rounds):
            for kind, run in runs.items():
                seconds[kind].append(run.seconds(options.frames))
        for kind, run in runs.items():
            fps = num_videos * options.frames / statistics.median(seconds[kind])
            stages = run.stages(options.frames)
            figures[f"{kind}_{num_videos}_fps"] = fps
            figures |= {
                f"{kind}_{num_videos}_{stage.replace(' ', '_')}_ms": value
                for stage, value in stages.items()
            }
            what = f"{num_videos} video{'s' * (num_videos > 1)}, {kind}"
            log.info("  %-22s %9.1f" + " %12.3f" * len(stages), what, fps, *stages.values())
    if "captured" in trackers:
        # None where capturing failed, which was said: then the figures are those of eager steps.
        figures["num_captured"] = trackers["captured"].num_captured
    return figures


class _Run:
    """Videos that one tracker follows, always from the same box: a lost target changes nothing."""

    def __init__(self, tracker: Tracker, num_videos: int, options: TrackBenchmark) -> None:
        rng = np.random.default_rng(0)
        shape = (options.height, options.width, 3)
        self._frames = [
            rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(max(FRAMES, num_videos))
        ]
        side = OBJECT_SHARE * options.height
        x, y = 0.4 * options.width, 0.4 * options.height
        self._box: Box = (x, y, x + side, y + side)
        self._tracker = tracker
        self._targets: list[Target] = tracker.start(
            self._frames[:num_videos], [self._box] * num_videos
        )
        self._taken = 0
        for _ in range(WARM_UP):
            self._step()

    def _step(self) -> None:
        self._taken += 1
        for target in self._targets:
            target.box = self._box
        num = len(self._frames)
        frames = [self._frames[(self._taken + n) % num] for n in range(len(self._targets))]
        self._tracker.step(self._targets, frames)

    def seconds(self, num_steps: int) -> float:
        """Return how long steps take."""
        began = time.perf_counter()
        for _ in range(num_steps):
            self._step()
        return time.perf_counter() - began

    def stages(self, num_steps: int) -> dict[str, float]:
        """Return milliseconds per stage of a step, the device waited for after each."""
        seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
        last = 0.0

        def note(stage: str) -> None:
            nonlocal last
            if self._tracker.device.type == "cuda":
                torch.cuda.synchronize(self._tracker.device)
            now = time.perf_counter()
            seconds[stage].append(now - last)
            last = now

        before, self._tracker.after_stage = self._tracker.after_stage, note
        for _ in range(num_steps):
            last = time.perf_counter()
            self._step()
        self._tracker.after_stage = before
        return {stage: 1e3 * statistics.median(values) for stage, values in seconds.items()}
