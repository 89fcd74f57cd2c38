"""What every trial does, with one worker or several: its samples, its validation, its progress."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorat.config.training import TrainConfig
from lorat.data.pairs.sampler import load_pairs
from lorat.data.shards.images import ImageReader
from lorat.errors import UserError
from lorat.files.scratch import sweep
from lorat.image.codec import DamagedImage
from lorat.learning.learner import Learner, World
from lorat.learning.tail_average import TailAverage
from lorat.model.network import LoRAT
from lorat.tracking.tracker import Tracker
from lorat_platform.data.sources import fingerprints, open_indexes, open_pairs, resolve_sources
from lorat_platform.evaluation.sets import usable_tracks
from lorat_platform.evaluation.validation_set import tracking_scores
from lorat_platform.search.algorithms import BUDGET, Rungs
from lorat_platform.search.space import SearchSpace
from lorat_platform.search.trial.crop_cache import (
    CachedSource,
    CropCache,
    cache_folder,
    content_key,
    remove_stale_caches,
)

if TYPE_CHECKING:
    from lorat.data.shards.frame_index import FrameIndex

LATENCY_FRAMES = 12
"""Frames of one sequence alone in a latency measurement; the best of three counts."""


@dataclass(frozen=True, kw_only=True)
class TrialSetup:
    """What all trials of a search have in common."""

    space: SearchSpace
    objectives: tuple[str, ...]
    rungs: Rungs
    folder: str
    """Address of the search's folder."""
    val_sequences: int | None
    """Sequences of all validation sets together; none means all there are."""
    workers: int
    worker_resources: dict[str, float]
    crop_cache: str
    """Name of the search's crop cache."""
    crop_cache_bytes: int
    save_every_s: float = 600.0
    """Longest training that an interruption may cost."""
    sum_every: int = 10
    """Steps between which the loss is added up; a trial is saved only where one such ends."""


@dataclass(kw_only=True)
class Progress:
    """What a trial carries from rung to rung, through its checkpoints."""

    history: list[dict[str, Any]]
    """``budget`` and objectives of every report."""
    loss_sum: float = 0.0
    """Training losses of the rung that is being trained, added up over its steps."""
    loss_steps: int = 0
    """Steps in that sum, without those whose loss was not finite."""
    latency_ms: float | None = None
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    total_seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Mean training loss over the rung, whatever interrupted it."""
        return self.loss_sum / self.loss_steps if self.loss_steps else math.nan

    def add_losses(self, mean: float, steps: int) -> None:
        """Take in the mean loss of some steps."""
        if steps:
            self.loss_sum += mean * steps
            self.loss_steps += steps

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(self.__dict__)

    def report(
        self, setup: TrialSetup, rung: int, measured: dict[str, float], seconds: float
    ) -> dict[str, Any]:
        """Take in what a rung measured and return what is reported of it.

        Args:
            setup: of the search.
            rung: from 0.
            measured: scores, loss, parameters, cache figures.
            seconds: the trial's, up to now.
        """
        self.total_seconds = seconds
        report: dict[str, Any] = measured | {
            BUDGET: setup.rungs.budget(rung),
            "step": setup.rungs.steps[rung],
            "latency": self.latency_ms,
            "train_seconds": self.train_seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "total_seconds": self.total_seconds,
        }
        self.history.append({name: report[name] for name in (BUDGET, *setup.objectives)})
        self.loss_sum, self.loss_steps = 0.0, 0
        return report


def prepare_process(setup: TrialSetup) -> torch.device:
    """Fit this process to its share of the machine, and let go of the trial before."""
    import cv2

    # How long Ray Tune waits for a stopped trial before it gives this process up.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "20"
    # A search is not gone on with where others can write.
    os.umask(os.umask(0o077) | 0o022)
    gc.collect()
    sweep(Path(tempfile.gettempdir()))  # what killed trials left on this machine
    cv2.setNumThreads(1)
    gpus = setup.worker_resources.get("GPU", 0.0)
    if gpus and torch.cuda.is_available():
        torch.cuda.empty_cache()
        # A trial that takes more than its share fails alone.
        torch.cuda.set_per_process_memory_fraction(min(gpus, 1.0))
        return torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(max(1, int(setup.worker_resources.get("CPU", 1.0))))
    return torch.device("cpu")


def start_weights(config: TrainConfig) -> Path | None:
    """Fetch what ``config.init_from`` names, if anything."""
    if config.init_from is None:
        return None
    from lorat_platform.registry.versions import resolve

    return resolve(config.init_from)


@contextlib.contextmanager
def open_cache(config: TrainConfig, setup: TrialSetup) -> Iterator[CropCache]:
    """Open the crops of this configuration's pairs; trials of the same pairs share them."""
    sources = resolve_sources(config.data, "train")
    sampler, readers = open_pairs(config, sources)
    variant = config.model_variant
    key = content_key(
        data=fingerprints(sources),
        weights=[source.weight for source in sources],
        crops=[
            variant.template_size, variant.template_area_factor,
            variant.search_size, variant.search_area_factor,
        ],
        sampling=config.sampling.__dict__,
        augment=config.augment.__dict__,
        seed=config.seed,
    )  # fmt: skip
    remove_stale_caches()
    folder = cache_folder(setup.crop_cache, setup.crop_cache_bytes)
    load = functools.partial(load_pairs, sampler, readers)
    with CropCache(folder, key, load, max_bytes=setup.crop_cache_bytes) as cache:
        yield cache


def batch_source(
    cache: CropCache, config: TrainConfig, setup: TrialSetup, world: World, end_step: int
) -> CachedSource:
    """Return a worker's batches up to a step."""
    assert config.batch_size is not None
    return CachedSource(
        cache,
        batch_size=config.batch_size,
        end_step=end_step,
        rank=world.rank,
        num_workers=world.size,
        threads=max(1, int(setup.worker_resources.get("CPU", 1.0)) - 1),
    )


def rung_average(learner: Learner, setup: TrialSetup, rung: int, saved: Path | None) -> TailAverage:
    """Return the mean of the weights by which a rung is judged.

    It is over the second half of the steps up to the rung.  It stays empty at the end of the
    schedule, where the learning rate is down and the weights themselves are what training gives.

    Args:
        learner: that is going to train to the rung.
        setup: of the search.
        rung: from 0.
        saved: folder of the state that the learner goes on from, if any.
    """
    start = setup.rungs.steps[rung - 1] if rung else 0
    end = setup.rungs.steps[rung]
    annealed = end >= learner.config.total_steps
    average = TailAverage(learner.parameters, after=end if annealed else max(start, end // 2))
    if saved is not None and learner.step > start:
        average.load(saved)
    return average


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
