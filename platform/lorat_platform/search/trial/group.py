"""A trial of several workers: one Ray Train run per rung, nothing in between.

Between two rungs no worker exists, so a trial that is stopped there, or paused, holds nothing; the
price is starting the workers once per rung.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from typing import Any

from ray import tune

from lorat.config.json_files import read_json_at
from lorat.config.training import TrainConfig
from lorat.files.scratch import temporary_folder
from lorat.files.storage import Location
from lorat.learning.learner import Learner, World
from lorat.learning.loop import run
from lorat_platform.cluster.process_group import PrivateTorchConfig
from lorat_platform.failures import (
    TrialFailed,
    is_of_surroundings,
    trial_failures,
    user_message,
)
from lorat_platform.recording.system_metrics import SystemMonitor
from lorat_platform.runs import checkpoints
from lorat_platform.search.trial.measure import measure
from lorat_platform.search.trial.process import (
    batch_source,
    open_cache,
    prepare_process,
    rung_average,
    start_weights,
)
from lorat_platform.search.trial.progress import Progress, TrialSetup
from lorat_platform.search.trial.single import (
    hand_over,
    read_progress,
    training_hooks,
    trial_folder,
)

_RESULT_SHAPE = {
    "measured": dict,
    "latency_ms": float | None,
    "train_seconds": float,
    "evaluation_seconds": float,
    "system": dict[str, float],
}
START_ATTEMPTS = 3
"""Starts of the worker group that may time out before the trial fails."""


@dataclass(frozen=True, kw_only=True)
class RungWork:
    """What the workers are told for one rung."""

    config: TrainConfig
    setup: TrialSetup
    rung: int
    folder: Location
    """Where checkpoints and the rung's result go."""
    progress: Progress

    @property
    def end_step(self) -> int:
        """Step of the rung."""
        return self.setup.steps(self.config)[self.rung]

    @property
    def result_file(self) -> str:
        """Name of the file that worker 0 writes at the end."""
        return f"rung-{self.rung}.json"


def run_group_trial(values: dict[str, Any], setup: TrialSetup) -> None:
    """Run a trial whose training takes several workers.

    Raises:
        TrialFailed: if the workers fail, with what the first of them said, or for other reasons.
    """
    with trial_failures(lambda: None):  # the workers know their steps
        _run_rungs(values, setup)


def _run_rungs(values: dict[str, Any], setup: TrialSetup) -> None:
    """Run what is left of a trial, rung after rung."""
    began = time.perf_counter()
    config = setup.space.configure(values)
    folder = trial_folder(setup)
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        progress = read_progress(None)
    else:
        with checkpoint.as_directory() as name:
            progress = read_progress(name)
    before = progress.total_seconds
    folder.make()
    for rung in range(len(progress.history), setup.rungs.num_rungs):
        work = RungWork(config=config, setup=setup, rung=rung, folder=folder, progress=progress)
        if not folder.exists(work.result_file):
            _fit(work)
        done = read_json_at(
            folder,
            work.result_file,
            "delete it and resume the search",
            shape=_RESULT_SHAPE,
            finite=False,
        )
        progress.latency_ms = done["latency_ms"]
        progress.train_seconds += done["train_seconds"]
        progress.evaluation_seconds += done["evaluation_seconds"]
        seconds = before + time.perf_counter() - began
        report = progress.report(setup, rung, done["measured"], seconds) | done["system"]
        with temporary_folder() as name:
            hand_over(report, progress, name, setup)


def _fit(work: RungWork) -> None:
    """Train to the rung with a group of workers."""
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    setup = work.setup
    resources = {k: v for k, v in setup.worker_resources.items() if v > 0}
    trial_id = tune.get_context().get_trial_id()
    with temporary_folder() as scratch:
        trainer = TorchTrainer(
            _worker,  # type: ignore[arg-type]  # is told its work, no dictionary
            train_loop_config=work,  # type: ignore[arg-type]
            torch_config=PrivateTorchConfig(),
            scaling_config=ScalingConfig(
                num_workers=setup.workers,
                use_gpu=resources.get("GPU", 0) > 0,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=f"{trial_id}-rung-{work.rung}-{time.time_ns()}",
                storage_path=str(scratch),
                failure_config=FailureConfig(
                    max_failures=0, controller_failure_limit=START_ATTEMPTS
                ),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            message = user_message(error)
            if message is None:
                lines = str(error).strip().splitlines()
                message = lines[-1] if lines else repr(error)
            raise TrialFailed(message, is_of_surroundings(error), None) from error


def _worker(work: RungWork) -> None:
    """Do one worker's part of a rung; worker 0 tracks, saves and writes the result."""
    import ray.train
    import torch.distributed as dist

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    context = ray.train.get_context()
    device = prepare_process(work.setup)
    world = World(rank=context.get_world_rank(), size=context.get_world_size(), device=device)
    config, folder, progress = work.config, work.folder, work.progress
    last = checkpoints.newest(folder)
    # Of the machine with worker 0; a trial's workers are alike.
    monitor = SystemMonitor(work.setup.sample_every_s if world.rank == 0 else None)
    with temporary_folder() as name, open_cache(config, work.setup) as cache, monitor:
        resume = checkpoints.download(folder, last, name) if last else None
        start_step = work.setup.steps(config)[work.rung - 1] if work.rung else 0
        if last and resume is not None and (checkpoints.step_of(last) or 0) > start_step:
            # Saved within this rung, or at its end, where there is nothing left to train.
            saved = read_progress(resume)
            progress.loss_sum, progress.loss_steps = saved.loss_sum, saved.loss_steps
        learner = Learner(
            config,
            world=world,
            resume=resume,
            start_weights=start_weights(config) if resume is None else None,
        )
        average = rung_average(learner, work.setup, work.rung, resume)
        began = time.perf_counter()
        run(
            config,
            batch_source(cache, config, work.setup, world, work.end_step),
            world=world,
            hooks=training_hooks(
                work.setup,
                folder,
                progress,
                learner,
                average,
                work.end_step,
                rank=world.rank,
                save_end=True,
            ),
            learner=learner,
            end_step=work.end_step,
        )
        seconds = time.perf_counter() - began
        if world.rank == 0:
            evaluated = progress.evaluation_seconds
            done = {
                "measured": measure(learner, config, work.setup, progress, cache, average),
                "latency_ms": progress.latency_ms,
                "train_seconds": seconds,
                "evaluation_seconds": progress.evaluation_seconds - evaluated,
                "system": monitor.take(),
            }
            folder.write_bytes(work.result_file, json.dumps(done).encode())
        dist.barrier()
