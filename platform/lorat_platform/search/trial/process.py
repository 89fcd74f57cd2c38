"""What every trial's process sets up: its threads, its samples, the mean of its weights."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from lorat.config.training import TrainConfig
from lorat.data.pairs.sampler import load_pairs
from lorat.files.scratch import sweep
from lorat.learning.learner import Learner, World
from lorat.learning.tail_average import TailAverage
from lorat_platform.data.sources import fingerprints, open_pairs, resolve_sources
from lorat_platform.search.trial.cached_source import CachedSource
from lorat_platform.search.trial.crop_cache import (
    CropCache,
    cache_folder,
    content_key,
    remove_stale_caches,
)
from lorat_platform.search.trial.progress import TrialSetup


def prepare_process(setup: TrialSetup) -> torch.device:
    """Fit this process to its share of the machine, and let go of the trial before."""
    import cv2

    # How long Ray Tune waits for a stopped trial before it gives this process up.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "20"
    # A search is not gone on with where others can write.
    os.umask(os.umask(0o077) | 0o022)
    gc.collect()
    with contextlib.suppress(OSError):  # somebody else's, and no reason to fail
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
    steps = setup.steps(learner.config)
    start, end = steps[rung - 1] if rung else 0, steps[rung]
    annealed = end >= learner.config.total_steps
    average = TailAverage(learner.parameters, after=end if annealed else max(start, end // 2))
    if saved is not None and learner.step > start:
        average.load(saved)
    return average
