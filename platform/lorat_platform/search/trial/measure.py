"""What is measured of a trial at a rung: scores by tracking, with every setting, and latency."""

from __future__ import annotations

import time
from typing import Any

import torch

from lorat.config.training import TrainConfig
from lorat.learning.learner import Learner
from lorat.learning.tail_average import TailAverage
from lorat.model.network import LoRAT
from lorat.tracking.tracker import Tracker
from lorat_platform.data.sources import open_indexes, resolve_sources
from lorat_platform.evaluation.validation_set import (
    mean_scores,
    scores_of_sequences,
    tracking_evaluations,
)
from lorat_platform.search.settings import best_of, tracking_of
from lorat_platform.search.trial.crop_cache import CropCache
from lorat_platform.search.trial.latency import latency_ms
from lorat_platform.search.trial.progress import SEQUENCES, Progress, TrialSetup


def measure(
    learner: Learner,
    config: TrainConfig,
    setup: TrialSetup,
    progress: Progress,
    cache: CropCache,
    average: TailAverage,
) -> dict[str, Any]:
    """Return everything that is reported of a rung which has been trained."""
    with average.in_place():
        scores = validate(learner.model, config, setup, learner.device, progress)
    learner.model.train()
    assert config.batch_size is not None
    return scores | {
        "optimiser_steps": float(learner.step),
        "pairs": float(learner.step * config.batch_size),
        "loss": progress.loss,
        "parameters": float(sum(p.numel() for p in learner.parameters)),
        "crop_cache_hit_rate": cache.hit_rate,
        "crops_decoded": float(cache.num_decoded),
    }


def validate(
    model: LoRAT, config: TrainConfig, setup: TrialSetup, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """Track the validation sequences and return their mean scores; measure latency once.

    With several settings, the scores are those of the best one, which is returned as ``tracking``,
    and all of them as ``settings``.  The scores of each set's sequences are returned as
    ``sequences``.
    """
    began = time.perf_counter()
    tracker = Tracker(model, device=device)
    indexes = open_indexes(resolve_sources(config.val_data or "", "val"))
    threads = max(1, int(setup.worker_resources.get("CPU", 1.0)))
    found, of_sequences = [], []
    for setting in setup.settings:
        tracker.tracking = tracking_of(config.tracking, setting)
        evaluations = tracking_evaluations(
            tracker, indexes, num_sequences=setup.val_sequences, threads=threads
        )
        found.append({"tracking": setting, "scores": mean_scores(evaluations)})
        of_sequences.append(scores_of_sequences(evaluations))
    best = best_of(found, setup.objectives)
    if progress.latency_ms is None:
        progress.latency_ms = latency_ms(tracker, indexes[0], setup)
    progress.evaluation_seconds += time.perf_counter() - began
    measured = best["scores"] | {SEQUENCES: of_sequences[found.index(best)]}
    if not best["tracking"]:
        return measured
    return measured | {"tracking": best["tracking"], "settings": found}
