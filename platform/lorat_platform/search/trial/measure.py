"""What is measured of a trial at a rung: scores by tracking, and latency."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from lorat.config.training import TrainConfig
from lorat.data.shards.images import ImageReader
from lorat.errors import UserError
from lorat.image.codec import DamagedImage
from lorat.learning.learner import Learner
from lorat.learning.tail_average import TailAverage
from lorat.model.network import LoRAT
from lorat.tracking.one_pass import usable_tracks
from lorat.tracking.tracker import Tracker
from lorat_platform.data.sources import open_indexes, resolve_sources
from lorat_platform.evaluation.validation_set import tracking_scores
from lorat_platform.search.trial.crop_cache import (
    CropCache,
)
from lorat_platform.search.trial.progress import Progress, TrialSetup

if TYPE_CHECKING:
    from lorat.data.shards.frame_index import FrameIndex

LATENCY_FRAMES = 12
"""Frames of one sequence alone in a latency measurement; the best of three counts."""


def measure(
    learner: Learner,
    config: TrainConfig,
    setup: TrialSetup,
    progress: Progress,
    cache: CropCache,
    average: TailAverage,
) -> dict[str, float]:
    """Return everything that is reported of a rung which has been trained."""
    with average.in_place():
        scores = validate(learner.model, config, setup, learner.device, progress)
    learner.model.train()
    return scores | {
        "loss": progress.loss,
        "parameters": float(sum(p.numel() for p in learner.parameters)),
        "crop_cache_hit_rate": cache.hit_rate,
        "crops_decoded": float(cache.num_decoded),
    }


def validate(
    model: LoRAT, config: TrainConfig, setup: TrialSetup, device: torch.device, progress: Progress
) -> dict[str, float]:
    """Track the validation sequences and return their mean scores; measure latency once."""
    began = time.perf_counter()
    tracker = Tracker(model, device=device)
    indexes = open_indexes(resolve_sources(config.val_data or "", "val"))
    threads = max(1, int(setup.worker_resources.get("CPU", 1.0)))
    scores = tracking_scores(tracker, indexes, num_sequences=setup.val_sequences, threads=threads)
    if progress.latency_ms is None:
        progress.latency_ms = measure_latency(tracker, indexes[0])
    progress.evaluation_seconds += time.perf_counter() - began
    return scores


def _readable_frames(index: FrameIndex, track: int) -> list[np.ndarray]:
    """Decode the first frames of a track, without those that are damaged."""
    reader = ImageReader(index)
    first, end = int(index.track_start[track]), int(index.track_start[track + 1])
    frames = []
    for row in range(first, min(end, first + LATENCY_FRAMES)):
        with contextlib.suppress(DamagedImage):
            frames.append(reader.decode(row))
    return frames


def measure_latency(tracker: Tracker, index: FrameIndex) -> float:
    """Return the milliseconds per frame of one target alone, decoding not counted.

    Raises:
        UserError: if no sequence has two frames that can be read.
    """
    for track in usable_tracks(index):
        frames = _readable_frames(index, track)
        if len(frames) > 1:
            break
    else:
        raise UserError(
            f"No sequence of {index.uri} has two frames that can be read; check it with 'python "
            f"jobs/ingest.py verify {index.uri}'."
        )
    box = index.box[int(index.track_start[track])].tolist()
    medians = []
    for _ in range(3):
        targets = tracker.start(frames[:1], [tuple(box)])
        seconds = []
        for frame in frames[1:]:
            began = time.perf_counter()
            tracker.step(targets, [frame])
            seconds.append(time.perf_counter() - began)
        medians.append(float(np.median(seconds)))
    return 1e3 * min(medians)
