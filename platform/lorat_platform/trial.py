"""One trial: train to each rung, track the validation sequences, report, until stopped.

A trial of one worker runs inside of Ray Tune's process, which serves one trial after another, so
that nothing is imported or started again.  What a rung reported lies in its checkpoint, from which
the trial goes on after any interruption; long rungs are saved in between, too.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.fs as pafs
import torch
from ray import tune

from lorat import storage
from lorat.config import TrainConfig
from lorat.metrics import evaluate
from lorat.model import LoRAT
from lorat.one_pass import track_sequences
from lorat.shards import ImageReader
from lorat.tracker import Tracker
from lorat_platform.crop_cache import (
    CachedSource,
    CropCache,
    cache_root,
    content_key,
    remove_stale_caches,
)
from lorat_platform.evaluation import ground_truth
from lorat_platform.learner import Learner, World
from lorat_platform.scheduling import BUDGET, HISTORY, Rungs
from lorat_platform.sources import fingerprints, open_indexes, open_pairs, resolve_sources
from lorat_platform.space import SearchSpace
from lorat_platform.train_loop import Hooks, run

if TYPE_CHECKING:
    from lorat.frame_index import FrameIndex

STATE_FILE = "trial.json"
LATENCY_FRAMES = 12
"""Frames of one sequence alone in a latency measurement; the best of three counts."""


@dataclass(frozen=True, kw_only=True)
class TrialSetup:
    """What all trials of a search have in common."""

    space: SearchSpace
    objectives: tuple[str, ...]
    rungs: Rungs
    folder: str
    """The search's folder, where trials save between rungs."""
    val_sequences: int | None
    """Sequences of each validation set; none means all."""
    workers: int
    worker_resources: dict[str, float]
    crop_cache: str
    """Name of the search's crop cache."""
    crop_cache_bytes: int
    save_every_s: float = 600.0
    """Longest training that an interruption may cost."""


@dataclass(kw_only=True)
class Progress:
    """What a trial carries from rung to rung, through its checkpoints."""

    history: list[dict[str, Any]]
    """``budget`` and objectives of every report."""
    latency_ms: float | None = None
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    total_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(self.__dict__)


def run_trial(values: dict[str, Any], setup: TrialSetup) -> None:
    """Run a trial of one worker; Ray Tune's function trainable.

    Raises:
        UserError: with the step if the loss is not finite, or for a configuration that cannot be.
    """
    began = time.perf_counter()
    config = setup.space.configure(values)
    device = _prepare_process(setup)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_saved_state(setup))
        learner = Learner(config, world=World(device=device), resume=folder, start_weights=None)
        progress = Progress(history=[])
        if folder is not None:
            progress = Progress(**json.loads((folder / STATE_FILE).read_text()))
        before = progress.total_seconds
        cache = stack.enter_context(_open_cache(config, setup))
        source = CachedSource(
            cache, batch_size=config.batch_size or 1, end_step=setup.rungs.max_steps
        )
        for rung in range(len(progress.history), setup.rungs.num_rungs):
            metrics = _train_to(setup, rung, learner, source, progress)
            scores = _evaluate(learner.model, config, setup, device, progress)
            progress.total_seconds = before + time.perf_counter() - began
            report: dict[str, Any] = scores | {
                BUDGET: setup.rungs.budget(rung),
                "loss": metrics["train/loss"],
                "parameters": float(sum(p.numel() for p in learner.parameters)),
                "latency": progress.latency_ms,
            }
            progress.history.append({n: report[n] for n in (BUDGET, *setup.objectives)})
            report |= {
                "crop_cache_hit_rate": cache.hit_rate,
                "crops_decoded": float(cache.num_decoded),
            }
            _report(report, setup, rung, learner, progress)
    _drop_partial(setup)


def _train_to(
    setup: TrialSetup, rung: int, learner: Learner, source: CachedSource, progress: Progress
) -> dict[str, float]:
    """Train to a rung's step and return the metrics of the way there."""
    began = saved = time.perf_counter()
    step = setup.rungs.steps[rung]
    metrics: dict[str, float] = {}

    def due(steps: int) -> bool:
        return steps < step and time.perf_counter() - saved > setup.save_every_s

    def save(learner: Learner, _: dict[str, float]) -> None:
        nonlocal saved
        if learner.step < step:
            _save_partial(setup, learner, progress)
            saved = time.perf_counter()

    def keep(_: int, values: dict[str, float]) -> None:
        metrics.update(values)

    hooks = Hooks(
        log_every=setup.rungs.max_steps, on_interval=keep, on_step=due, on_checkpoint=save
    )
    run(learner.config, source, world=learner.world, hooks=hooks, learner=learner, end_step=step)
    progress.train_seconds += time.perf_counter() - began
    return metrics


def _report(
    report: dict[str, Any],
    setup: TrialSetup,
    rung: int,
    learner: Learner,
    progress: Progress,
) -> None:
    """Hand metrics and checkpoint to Ray Tune, which may end the trial here."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        learner.save(folder)
        (folder / STATE_FILE).write_text(json.dumps(progress.to_dict()))
        tune.report(
            report
            | {
                HISTORY: progress.history,
                "step": setup.rungs.steps[rung],
                "train_seconds": progress.train_seconds,
                "evaluation_seconds": progress.evaluation_seconds,
                "total_seconds": progress.total_seconds,
            },
            checkpoint=tune.Checkpoint.from_directory(name),
        )


def _prepare_process(setup: TrialSetup) -> torch.device:
    """Fit this process to the trial's resources, and let go of the trial before."""
    import cv2

    gc.collect()
    cv2.setNumThreads(1)
    gpus = setup.worker_resources.get("GPU", 0.0)
    if gpus and torch.cuda.is_available():
        torch.cuda.empty_cache()
        # A trial that takes more than its share fails alone.
        torch.cuda.set_per_process_memory_fraction(min(gpus, 1.0))
        return torch.device("cuda")
    torch.set_num_threads(max(1, int(setup.worker_resources.get("CPU", 1.0))))
    return torch.device("cpu")


# -- training data ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_cache(config: TrainConfig, setup: TrialSetup) -> Iterator[CropCache]:
    """Open the crops of this configuration's pairs; trials of the same pairs share them."""
    from lorat.pairs import load_pairs

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
    root = cache_root(setup.crop_cache_bytes)
    remove_stale_caches(root)
    load = functools.partial(load_pairs, sampler, readers)
    with CropCache(root / setup.crop_cache, key, load, max_bytes=setup.crop_cache_bytes) as cache:
        yield cache


# -- validation ------------------------------------------------------------------------------------


def _evaluate(
    model: LoRAT, config: TrainConfig, setup: TrialSetup, device: torch.device, progress: Progress
) -> dict[str, float]:
    """Track the validation sequences and return their mean scores."""
    began = time.perf_counter()
    tracker = Tracker(model, device=device)
    sums: dict[str, float] = {}
    indexes = open_indexes(resolve_sources(config.val_data or "synthetic", "val"))
    for index in indexes:
        tracks = range(min(index.num_tracks, setup.val_sequences or index.num_tracks))
        results = track_sequences(
            tracker, index, ImageReader(index), tracks, batch_size=16, decode_threads=1
        )
        scores = evaluate(
            {r.name: r.boxes for r in results},
            {r.name: ground_truth(index, r.track) for r in results},
            dataset=index.name,
        ).scores
        for ours, theirs in (("ao", "AO"), ("auc", "SUC"), ("sr50", "SR0.5"), ("sr75", "SR0.75")):
            sums[ours] = sums.get(ours, 0.0) + float(scores[theirs]) / len(indexes)
    if progress.latency_ms is None:
        progress.latency_ms = measure_latency(tracker, indexes[0])
    model.train()
    progress.evaluation_seconds += time.perf_counter() - began
    return sums


def measure_latency(tracker: Tracker, index: FrameIndex) -> float:
    """Return the milliseconds per frame of one target alone, decoding not counted."""
    first = int(index.track_start[0])
    rows = range(first, min(int(index.track_start[1]), first + LATENCY_FRAMES))
    reader = ImageReader(index)
    frames = [reader.decode(row) for row in rows]
    medians = []
    for _ in range(3):
        targets = tracker.start(frames[:1], [tuple(index.box[first].tolist())])
        seconds = []
        for frame in frames[1:]:
            began = time.perf_counter()
            tracker.step(targets, [frame])
            seconds.append(time.perf_counter() - began)
        medians.append(float(np.median(seconds)))
    return 1e3 * min(medians)


# -- state -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _saved_state(setup: TrialSetup) -> Iterator[Path | None]:
    """Fetch the state to go on from: what was saved last, at a rung or between two."""
    checkpoint = tune.get_checkpoint()
    location = _partial(setup)
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        history: list[Any] = []
        if checkpoint is not None:
            folder = Path(stack.enter_context(checkpoint.as_directory()))
            history = json.loads((folder / STATE_FILE).read_text())["history"]
        if (
            location.exists(STATE_FILE)
            and json.loads(location.read_bytes(STATE_FILE))["history"] == history
        ):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            pafs.copy_files(location.path, str(folder), source_filesystem=location.filesystem)
        yield folder


def _partial(setup: TrialSetup) -> storage.Location:
    trial_id = tune.get_context().get_trial_id()
    return storage.locate(setup.folder).child("between-rungs").child(str(trial_id))


def _save_partial(setup: TrialSetup, learner: Learner, progress: Progress) -> None:
    """Save between two rungs; ``trial.json`` goes last and makes it count."""
    location = _partial(setup)
    with tempfile.TemporaryDirectory() as name:
        learner.save(name)
        location.make()
        location.delete(STATE_FILE)
        pafs.copy_files(name, location.path, destination_filesystem=location.filesystem)
    location.write_bytes(STATE_FILE, json.dumps(progress.to_dict()).encode())


def _drop_partial(setup: TrialSetup) -> None:
    location = _partial(setup)
    if location.is_local:
        shutil.rmtree(location.path, ignore_errors=True)
    elif location.exists(STATE_FILE):
        location.filesystem.delete_dir(location.path)
