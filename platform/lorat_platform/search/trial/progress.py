"""What a trial is told, and how far it has come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorat.files import storage
from lorat_platform.search.rungs import BUDGET, Rungs
from lorat_platform.search.space import SearchSpace

if TYPE_CHECKING:
    from lorat.config.training import TrainConfig

SEQUENCES = "sequences"
"""What a rung measured of each sequence, by set; also the folder of a search that keeps it."""


def sequences_folder(search: storage.Location, trial_id: str) -> storage.Location:
    """Return where a search's folder keeps the scores of sequences of a trial, a file per rung."""
    return search.child(SEQUENCES).child(trial_id)


def sequences_file(rung: int) -> str:
    """Return the name of the file of a rung, from 0."""
    return f"rung-{rung}.json"


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
    """The search's identity, under which its trials share crops."""
    crop_cache_bytes: int
    sample_every_s: float | None = None
    """Seconds between samples of how busy the machine is; none for none."""
    save_every_s: float = 600.0
    """Longest training that an interruption may cost."""
    settings: tuple[dict[str, Any], ...] = ({},)
    """With which each trial's weights track at every rung: fields below ``tracking`` by path."""
    sum_every: int = 10
    """Steps between which the loss is added up; a trial is saved only where one such ends."""

    def steps(self, config: TrainConfig) -> tuple[int, ...]:
        """Return a trial's own steps at the rungs; with another batch size they are others."""
        return self.rungs.steps_of(config.total_steps, self.space.base.total_steps)

    def counted(self, config: TrainConfig, step: int) -> int:
        """Return a trial's step in those of the base configuration, in which searches count."""
        return step * self.space.base.total_steps // config.total_steps


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
        self, setup: TrialSetup, rung: int, measured: dict[str, Any], seconds: float
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
            "step": setup.rungs.steps[rung],  # of the base configuration, as everywhere
            "latency": self.latency_ms,
            "train_seconds": self.train_seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "total_seconds": self.total_seconds,
        }
        self.history.append({name: report[name] for name in (BUDGET, *setup.objectives)})
        self.loss_sum, self.loss_steps = 0.0, 0
        return report
