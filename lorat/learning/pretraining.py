"""Pretraining of the small variant's backbone on collages, in a given time.

All weights are trained, on pairs that :class:`lorat.data.synthetic.collage.Collage` draws in
processes beside the training.  The first part runs at the coarser grid of T-112, where a step costs
two fifths; the positions are resampled in between.  The learning rate is a function of the share of
the time that is used up: warm-up, level, and a fall to zero.  So a run ends when it should however
fast the machine is, and can be cut off and gone on with at any time.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from lorat import checkpoint
from lorat.checkpoint.folder import read_config
from lorat.config.bounds import Bounds, Share, check_bounds
from lorat.config.training import TrainConfig, resolve
from lorat.data.synthetic.beside import draw_beside
from lorat.data.synthetic.material import Material
from lorat.files.scratch import make_folder
from lorat.files.tensors import read_safetensors, write_tensors
from lorat.learning.learner import Learner, World
from lorat.model.backbone import SHIPPED
from lorat.model.network import LoRAT, assemble

log = logging.getLogger(__name__)

COARSE = "T-112"
WARMUP_STEPS = 200
AVERAGE_DECAY = 0.999
STATE, MEAN, AVERAGE = "state", "mean", "average.safetensors"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What a pretraining does, and for how long."""

    variant: str = "T-168"
    """Variant whose backbone is made; its width and depth must be those of T-112."""
    start: str | None = None
    """Backbone file to start from, with its head if it has one; none means that of T-112."""
    minutes: Annotated[float, Bounds(0, 100_000, above=True)] = 170.0
    """Length of the training, more than 0, at most 100,000 minutes; starting is not counted."""
    coarse_share: Share = 0.4
    """Share of the time at the coarse grid, 0 to 1."""
    fall_share: Share = 0.4
    """Share of the time, at its end, in which the learning rate falls, 0 to 1."""
    lr: Annotated[float, Bounds(0, 10, above=True)] = 1e-3
    """Level of the learning rate, more than 0, at most 10."""
    batch_size: Annotated[int, Bounds(1, 65_536)] = 32
    """Pairs in one step, 1 to 65,536."""
    drawers: Annotated[int, Bounds(1, 256)] = 1
    """Processes that draw pairs, 1 to 256; one feeds two cores that compute."""
    checkpoint_minutes: Annotated[float, Bounds(0, 100_000, above=True)] = 5.0
    """Time between checkpoints, more than 0, at most 100,000 minutes."""

    def __post_init__(self) -> None:
        check_bounds(self, "pretraining.{}".format)

    def learning_rate(self, share: float, steps: int) -> float:
        """Return the learning rate.

        Args:
            share: of the time that is used up, 0 to 1.
            steps: taken since the last change of the grid.
        """
        rate = self.lr * min(1.0, (steps + 1) / WARMUP_STEPS)
        left = 1.0 - share
        return rate * min(1.0, left / self.fall_share) if self.fall_share else rate


class PretrainingLearner(Learner):
    """A learner whose learning rate follows the time that is used up."""

    def __init__(self, config: TrainConfig, plan: PretrainConfig, **given: Any) -> None:
        super().__init__(config, **given)
        self.plan = plan
        self.share = 0.0
        """Share of the time that is used up, 0 to 1."""
        self.first_step = self.step
        """Steps taken when the present grid was begun with."""

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.plan.learning_rate(self.share, self.step - self.first_step)


class MovingAverage:
    """The exponential mean of weights that training changes in place."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self.mean = [p.detach().clone() for p in self._parameters]
        self._updates = 0

    def add(self) -> None:
        """Take in the weights as they are; the first ones are forgotten quickly."""
        self._updates += 1
        weight = 1 - min(AVERAGE_DECAY, (1 + self._updates) / (10 + self._updates))
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, [p.detach() for p in self._parameters], weight)

    def swap(self) -> None:
        """Exchange the weights and their mean."""
        with torch.no_grad():
            for parameter, mean in zip(self._parameters, self.mean, strict=True):
                current = parameter.detach().clone()
                parameter.copy_(mean)
                mean.copy_(current)


def pretrain(plan: PretrainConfig, piles: Path, folder: Path) -> Path:
    """Train, going on from the folder's last checkpoint if there is one.

    Args:
        plan: what to do.
        piles: folder of the material, as :func:`lorat.data.synthetic.material.prepare` makes it.
        folder: receives the checkpoints.

    Returns:
        The folder with the mean of the weights, a checkpoint of the full model.

    Raises:
        UserError: if there is no material.
    """
    Material.open(piles)
    folder.mkdir(parents=True, exist_ok=True)
    learner, average, elapsed = _begin(plan, folder)
    while elapsed < 60 * plan.minutes:
        coarse = elapsed < 60 * plan.minutes * plan.coarse_share
        name = COARSE if coarse else plan.variant
        if learner.model.variant.name != name:
            learner, average = _regrid(plan, learner, average, name)
        end = 60 * plan.minutes * (plan.coarse_share if coarse else 1.0)
        elapsed = _train(learner, average, plan, piles, folder, elapsed, end)
    return folder / MEAN


def _train(
    learner: PretrainingLearner,
    average: MovingAverage,
    plan: PretrainConfig,
    piles: Path,
    folder: Path,
    elapsed: float,
    end: float,
) -> float:
    """Train at one grid until that time is used up; return the time that is."""
    variant = learner.model.variant.name
    sums, saved = np.zeros(4), elapsed
    batches = draw_beside(piles, variant, plan.batch_size, plan.drawers, learner.step)
    try:
        batch = next(batches)
        began = time.monotonic() - elapsed
        while elapsed < end:
            learner.share = elapsed / (60 * plan.minutes)
            result = learner.train_step(learner.to_device(batch))
            average.add()
            sums += [*result.losses.tolist(), 1]
            batch = next(batches)
            elapsed = time.monotonic() - began
            if learner.step % 100 == 0:
                log.info(
                    "%5.1f min  step %d  %s  loss %.3f (scores %.3f, boxes %.3f)  lr %.2e",
                    elapsed / 60, learner.step, variant, *(sums[:3] / sums[3]), learner.lr,
                )  # fmt: skip
                sums[:] = 0
            if elapsed - saved > 60 * plan.checkpoint_minutes or elapsed >= end:
                saved = elapsed
                _save(learner, average, folder, elapsed)
    finally:
        batches.close()
    return elapsed


def _config(plan: PretrainConfig, variant: str) -> TrainConfig:
    return resolve(
        TrainConfig(
            variant=variant,
            adaptation="full",
            backbone=plan.start or str(SHIPPED[COARSE]),
            lr=plan.lr,
            batch_size=plan.batch_size,
            weight_decay=0.05,
            compile="off",
            nonfinite="skip",
        )
    )


def _begin(plan: PretrainConfig, folder: Path) -> tuple[PretrainingLearner, MovingAverage, float]:
    last = folder / STATE
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not last.exists():
        variant = COARSE if plan.coarse_share else plan.variant
        learner = PretrainingLearner(_config(plan, variant), plan, world=world)
        return learner, MovingAverage(learner.parameters), 0.0
    config = read_config(last)
    learner = PretrainingLearner(config, plan, world=world, resume=last)
    extra = checkpoint.load_training_state(last, learner.model, learner.optimizer).extra
    learner.first_step = extra["first_step"]
    average = MovingAverage(learner.parameters)
    means = read_safetensors(last / AVERAGE)
    average.mean = [means[str(n)].to(learner.device) for n in range(len(means))]
    average._updates = learner.step
    log.info("Going on from step %d, after %.1f min.", learner.step, extra["elapsed"] / 60)
    return learner, average, extra["elapsed"]


def _regrid(
    plan: PretrainConfig, learner: PretrainingLearner, average: MovingAverage, variant: str
) -> tuple[PretrainingLearner, MovingAverage]:
    """Go on with the same weights at another grid, and with a new optimiser."""
    models = []
    for _ in range(2):
        models.append(_at_grid(learner.model, _config(plan, variant)))
        average.swap()
    new = PretrainingLearner(models[0].config, plan, world=learner.world, model=models[0])  # type: ignore[arg-type]
    new.step = new.first_step = learner.step
    mean = MovingAverage(models[1].to(new.device).trainable_parameters())
    again = MovingAverage(new.parameters)
    again.mean, again._updates = mean.mean, new.step
    log.info("Step %d: from %s to %s.", new.step, learner.model.variant.name, variant)
    return new, again


def _at_grid(model: LoRAT, config: TrainConfig) -> LoRAT:
    """Copy a model to another variant of the same width and depth, the positions resampled."""
    state = model.plain_state()
    backbone = {n.removeprefix("backbone."): v for n, v in state.items() if "backbone." in n}
    weights = {n: v.detach().cpu().clone() for n, v in backbone.items()}
    copy = assemble(config, config.model_variant, weights, source=model.backbone_source or "none")
    others = {n: v for n, v in state.items() if not n.startswith("backbone.")}
    copy.load_state_dict(copy.state_dict() | others)
    return copy


def _save(
    learner: PretrainingLearner, average: MovingAverage, folder: Path, elapsed: float
) -> None:
    """Write the state and, as a checkpoint of its own, the mean of the weights."""
    made = make_folder(f".{STATE}", folder)
    learner.save(made, elapsed=elapsed, first_step=learner.first_step)
    write_tensors({str(n): mean for n, mean in enumerate(average.mean)}, made / AVERAGE)
    _replace(made, folder / STATE)
    average.swap()
    try:
        made = make_folder(f".{MEAN}", folder)
        checkpoint.save(learner.model, learner.config, made)
    finally:
        average.swap()
    _replace(made, folder / MEAN)


def _replace(made: Path, target: Path) -> None:
    made.chmod(0o755)
    old = target.with_name(f".old-{target.name}")
    if target.exists():
        target.rename(old)
    made.rename(target)
    shutil.rmtree(old, ignore_errors=True)
