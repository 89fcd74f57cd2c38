"""A model that is ready to track: loaded, warm, and found fit."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorat.config.variants import VARIANTS
from lorat.errors import UserError
from lorat.tracking.tracker import FirstView, Target, Tracker
from lorat_platform.evaluation.subject import load_subject

KEPT_AREA_FACTOR = max(variant.template_area_factor for variant in VARIANTS.values())
WARM_UP_SIZES = (1, 4)
"""Targets of the passes with which a model is tried."""
WARM_UP_PASSES = 5
THREADS = torch.get_num_threads()
"""That a product may use."""
SHORT_MS = 20.0
"""A batch that one thread can do in this time is left to one.  The threads of a product wait for
each other, and where others want the same cores, that takes longer than the work does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedModel:
    """A tracker and what is known of it."""

    uri: str
    """The model, with a version instead of an alias."""
    tracker: Tracker
    latency_ms: float
    """Of one target, crop and network, as measured when it was loaded."""

    @property
    def name(self) -> str:
        """How people call it: ``lorat/3``, or the file's name."""
        match = re.fullmatch(r"models:/(.+)", self.uri)
        return match[1] if match else self.uri.rstrip("/").rpartition("/")[2]

    def step(
        self, targets: Sequence[Target], images: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Advance targets as :meth:`Tracker.step` does, with as many threads as can pay off."""
        use_threads(1 if len(targets) * self.latency_ms < SHORT_MS else THREADS)
        return self.tracker.step(targets, images)

    @property
    def kept_area_factor(self) -> float:
        """Area factor of the part of a first frame that any model can begin with."""
        return max(KEPT_AREA_FACTOR, self.tracker.variant.template_area_factor)


def use_threads(number: int) -> None:
    """Let products that this thread starts use so many threads from now on."""
    if torch.get_num_threads() != number:
        torch.set_num_threads(number)


def load_served(
    uri: str, *, variant: str | None, max_latency_ms: float, device: str | None = None
) -> ServedModel:
    """Load a model, try it on noise, and measure it.

    Args:
        uri: of one model for good, as :func:`lorat_platform.registry.versions.pinned` returns it.
        variant: of a released file.
        max_latency_ms: the most that it may need for one target.
        device: by default the GPU where there is one.

    Raises:
        UserError: if it cannot be loaded, gives what is not finite, or is too slow.
    """
    subject = load_subject(uri, variant=variant)
    if subject.model is None:
        raise UserError(f"{uri} is a baseline, which cannot be served; give a model.")
    tracker = Tracker(subject.model, device=device)
    latency_ms = warm_up(tracker)
    if latency_ms > max_latency_ms:
        raise UserError(
            f"{uri} needs {latency_ms:.0f} ms for one target here, and {max_latency_ms:g} ms are "
            "allowed; raise --max-latency-ms or serve a smaller one."
        )
    return ServedModel(uri=uri, tracker=tracker, latency_ms=latency_ms)


def warm_up(tracker: Tracker) -> float:
    """Track noise, so that later frames find everything made; return the time of one target, ms.

    Raises:
        UserError: if the outputs are not finite.
    """
    use_threads(THREADS)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (WARM_UP_PASSES, 360, 480, 3), np.uint8)
    view = FirstView.of(frames[0], (200.0, 150.0, 260.0, 200.0))
    latency_ms = 0.0
    for size in WARM_UP_SIZES:
        times = []
        targets = tracker.start_from([view] * size)
        for frame in frames:
            began = time.perf_counter()
            tracker.step(targets, [frame] * size)
            times.append(1000 * (time.perf_counter() - began))
        latency_ms = latency_ms or float(np.median(times))
    return latency_ms
