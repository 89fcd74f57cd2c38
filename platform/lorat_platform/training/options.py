"""Where and how a training runs, as it is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from lorat.config.bounds import Bounds, Count, Few, check_bounds
from lorat.config.fields import flag, shown
from lorat.errors import UserError
from lorat.tracking.baselines import baseline
from lorat_platform.runs.record import Resume

MAX_WORKERS = 4096
MANY_SEQUENCES = 50
"""More than these take MIL a quarter of an hour."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how a training runs; nothing here changes what is learnt."""

    name: str | None = None
    """Name of the run; none makes one from the configuration. The same name goes on with it."""
    storage: str | None = None
    """Folder or s3:// address of all runs; none means LORAT_STORAGE of the environment, or runs in
    the home folder. Workers on several machines need one that all reach."""
    resume: Resume = "auto"
    """Go on with an unfinished run of the same configuration (auto), begin anew (never), or insist
    on going on (must)."""
    workers: str = "1"
    """Training workers, 1 to 4096: N, or MIN:MAX to grow and shrink with the cluster."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Auto uses one GPU per worker where the cluster has GPUs."""
    cpus_per_worker: Few | None = None
    """CPUs of a worker, and its torch threads on a CPU, 1 to 1024; none shares those of the
    cluster."""
    decode_actors: Few | None = None
    """Processes that read, decode and crop, 1 to 1024; none fits them into the CPUs that are
    left."""
    decode_threads: Few | None = None
    """Threads in each of them, 1 to 1024."""
    max_failures: Annotated[int, Bounds(-1, 1_000_000)] = 3
    """Failures of workers in a row, without a new checkpoint in between, that are survived, -1 to
    1,000,000; -1 for any number."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints, 1 to 1,000,000,000; none means every epoch."""
    keep: Annotated[int, Bounds(1, 10_000)] = 2
    """Best checkpoints that are kept, beside the last, 1 to 10,000."""
    log_every: Count | None = None
    """Steps between progress lines, 1 to 1,000,000,000; none means about every 5 s on a small run,
    at most 50."""
    validate_every: Annotated[int, Bounds(0, 100_000)] | None = None
    """Epochs between validations beside the training, 0 to 100,000; none means four in a run, 0
    none at all. The workers go on meanwhile: they only wait until worker 0 has written the
    checkpoint to its local disk (N-112: 20 ms, below 0.3 s on a busy machine)."""
    val_pairs: Annotated[int, Bounds(0, 1_000_000)] = 512
    """Held-out pairs whose loss is taken in a validation, 0 to 1,000,000."""
    val_sequences: Annotated[int, Bounds(0, 1_000_000)] = 16
    """Sequences that are tracked in a validation, 0 to 1,000,000; the evaluation at the end takes
    all."""
    val_gpus: Annotated[float, Bounds(0, 64)] | None = None
    """GPU share of a validation, 0 to 64; none means a whole one where one is left, else the
    CPU."""
    final_evaluation: bool = True
    """Track all validation sequences at the end, beside the baselines."""
    baselines: tuple[Literal["none", "static", "mil", "csrt"], ...] = ()
    """Trackers to compare with at the end, or none alone; nothing given means static and mil, and
    static alone above 50 sequences, since mil tracks some 10 frames a second."""
    register: bool = True
    """Register the trained model as lorat@candidate."""
    experiment: str = "train"
    """MLflow experiment."""
    address: str | None = None
    """Ray cluster, host:port; none means RAY_ADDRESS, or an embedded Ray."""

    def __post_init__(self) -> None:
        self.worker_range  # noqa: B018 (checks the text)
        check_bounds(self, flag)
        if self.val_gpus is not None and self.val_gpus > 1 and self.val_gpus % 1:
            raise UserError(
                f"--val-gpus is {self.val_gpus}; give a part of one GPU, or whole ones."
            )
        if "none" in self.baselines and len(self.baselines) > 1:
            raise UserError(
                f"--baselines is {' '.join(self.baselines)}; give none alone, or some of static, "
                "mil and csrt."
            )
        for name in self.chosen_baselines(1):
            baseline(name)  # OpenCV may have been built without it
        if self.name is not None and not re.fullmatch(r"[\w][\w.-]*", self.name):
            raise UserError(
                f"--name is {self.name!r}; give letters, digits, dots, dashes and underscores."
            )

    def chosen_baselines(self, num_sequences: int) -> tuple[str, ...]:
        """Return the trackers to compare with on so many sequences."""
        if self.baselines:
            return tuple(name for name in self.baselines if name != "none")
        return ("static", "mil") if num_sequences <= MANY_SEQUENCES else ("static",)

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        match = re.fullmatch(r"([0-9]{1,9})(?::([0-9]{1,9}))?", self.workers)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= MAX_WORKERS:
            raise UserError(
                f"--workers is {shown(self.workers)}; give N, or MIN:MAX with 1 <= MIN <= MAX <= "
                f"{MAX_WORKERS}."
            )
        return low, high

    def workers_for(self, batch_size: int) -> tuple[int, int]:
        """Return the fewest and most workers that share a global batch.

        Raises:
            UserError: if there are more workers than pairs.
        """
        low, high = self.worker_range
        if high > batch_size:
            raise UserError(
                f"--workers is {self.workers} but a global batch has {batch_size} pairs; give at "
                "most one worker per pair."
            )
        return low, high
