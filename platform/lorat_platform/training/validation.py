"""Validation of a checkpoint beside the training: pair loss and real tracking."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorat.config.training import TrainConfig
from lorat.data.pairs.batches import Decoder
from lorat.metrics.catalogue import HEADLINE
from lorat_platform.cluster import ray_internals
from lorat_platform.cluster.console import Console
from lorat_platform.data.sources import Source, open_indexes

if TYPE_CHECKING:
    from lorat.model.network import LoRAT
    from lorat_platform.recording.recorder import Recorder

log = logging.getLogger(__name__)

VALIDATION_SEED = 1_000_003
"""Seed of the held-out pairs, the same in every run."""
CHUNK = 32
ATTEMPTS = 2
"""Processes that may die over the validation of one checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ValidationPlan:
    """What a validation does."""

    config: TrainConfig
    sources: tuple[Source, ...]
    num_pairs: int
    """Held-out pairs whose loss is taken; 0 for none."""
    num_sequences: int
    """Sequences tracked, of all sets together; 0 for none."""
    threads: int = 1


def validate(model: LoRAT, plan: ValidationPlan) -> dict[str, float]:
    """Return ``val/loss``, and ``val/ao`` and the other scores of tracking."""
    from lorat.tracking.tracker import Tracker
    from lorat_platform.evaluation.validation_set import tracking_scores

    metrics: dict[str, float] = {}
    if plan.num_pairs:
        metrics |= pair_loss(model, plan)
    if plan.num_sequences:
        scores = tracking_scores(
            Tracker(model, device=next(model.parameters()).device),
            open_indexes(plan.sources),
            num_sequences=plan.num_sequences,
            threads=plan.threads,
        )
        metrics |= {f"val/{name}": value for name, value in scores.items()}
    return metrics


def pair_loss(model: LoRAT, plan: ValidationPlan) -> dict[str, float]:
    """Return the loss on the first held-out pairs, prepared as for training."""
    import torch

    from lorat.learning.augment import augment, foreground_mask
    from lorat.learning.criterion import Criterion
    from lorat_platform.data.sources import open_pairs

    sampler, readers = open_pairs(plan.config, plan.sources, seed=VALIDATION_SEED)
    decoder = Decoder(sampler, readers, plan.threads)
    device = next(model.parameters()).device
    criterion, variant = Criterion(), model.variant
    sums, positives = np.zeros(3), 0.0
    model.eval()
    with torch.inference_mode():
        for first in range(0, plan.num_pairs, CHUNK):
            arrays = decoder.load(np.arange(first, min(first + CHUNK, plan.num_pairs)))
            tensors = {
                name: torch.from_numpy(value).to(device)
                for name, value in arrays.items()
                if name in ("template", "search", "template_box", "search_box", "augment")
            }
            template, search, template_box, search_box = augment(tensors)
            outputs = model(template, search, foreground_mask(template_box, variant))
            one = torch.ones((), device=device)
            box_norm = search_box / variant.search_size
            losses = criterion(outputs, box_norm, num_positive=one)
            sums += [float(losses[k]) for k in ("loss", "loss_cls", "loss_reg")]
            positives += float(criterion.count_positives(box_norm, variant.search_grid))
    loss, loss_cls, loss_reg = sums / max(positives, 1.0)
    return {"val/loss": loss, "val/loss_cls": loss_cls, "val/loss_reg": loss_reg}


def _has_gpu() -> bool:
    """Tell whether this task was given a GPU; one that it only sees belongs to a worker."""
    import ray
    import torch

    if not torch.cuda.is_available():
        return False
    return not ray.is_initialized() or bool(
        ray.get_runtime_context().get_accelerator_ids().get("GPU")
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointValidation:
    """The function that Ray Train runs as a task of its own for a checkpoint."""

    plan: ValidationPlan
    run: Recorder | None
    console: Console | None

    def __call__(self, checkpoint: Any, **_: Any) -> dict[str, float]:
        """Validate a Ray Train checkpoint and return its metrics.

        Raises:
            RuntimeError: if the processes that tried it before have died.  Ray Train goes on after
                an exception; the death of this task would end the training.
        """
        name, deaths = checkpoint.path.rpartition("/")[2], ray_internals.attempts_before()
        if deaths > 0:
            again = "it is tried once more" if deaths < ATTEMPTS else "the training goes on"
            self._say(
                f"the process that validated {name} died, often because memory ran out; {again}"
            )
        if deaths >= ATTEMPTS:
            raise RuntimeError(f"the validation of {name} died {deaths} times")
        try:
            with checkpoint.as_directory() as folder:
                return self.of_folder(Path(folder))
        except Exception as error:
            self._say(f"the validation of {name} failed: {error!r}")
            raise

    def _say(self, line: str) -> None:
        if self.console is not None:
            self.console.line(line)

    def of_folder(self, folder: Path) -> dict[str, float]:
        """Validate the checkpoint in a local folder, and tell MLflow and the console."""
        # The driver and Ray Train's controller hold this object too, and need no network for it.
        import torch

        from lorat import checkpoint
        from lorat.checkpoint.training_state import read_step

        torch.set_num_threads(self.plan.threads)
        began = time.perf_counter()
        step = read_step(folder)
        device = "cuda" if _has_gpu() else "cpu"
        metrics = validate(checkpoint.load(folder).to(device), self.plan)
        metrics["val/seconds"] = time.perf_counter() - began
        recorded: list[Any] = []
        if self.run is not None:
            self.run.log_metrics(metrics, step)
            recorded = self.run.in_flight()[-1:]
        if self.console is not None:
            shown = {k.removeprefix("val/"): v for k, v in metrics.items() if k != "val/seconds"}
            text = "  ".join(f"{k} {shown[k]:.4f}" for k in ("loss", *HEADLINE) if k in shown)
            took = metrics["val/seconds"]
            self.console.line(f"validation of step {step}: {text}  ({took:.0f} s)", recorded)
        return metrics
