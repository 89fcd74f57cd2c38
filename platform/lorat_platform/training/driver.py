"""A training run on the cluster, from the driver's side: Ray Train, failures, MLflow."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.files.home import home, storage_address
from lorat.files.storage import Location, locate
from lorat_platform.cluster import ray_internals
from lorat_platform.cluster.connection import Cluster, describe
from lorat_platform.cluster.console import Console, ConsolePrinter
from lorat_platform.cluster.phases import Phases
from lorat_platform.cluster.places import Reminder
from lorat_platform.data.sources import Datasets, inputs_of, open_datasets
from lorat_platform.failures import user_message
from lorat_platform.recording.console_log import written_to
from lorat_platform.recording.system_metrics import interval_s
from lorat_platform.registry import versions
from lorat_platform.runs import checkpoints
from lorat_platform.runs.claim import Lease
from lorat_platform.runs.record import FILE, RunRecord, choose
from lorat_platform.training.after import AfterLastStep
from lorat_platform.training.callback import STARTING, watch_workers
from lorat_platform.training.finish import TrainingResult, finish
from lorat_platform.training.options import RunOptions
from lorat_platform.training.resources import Placement
from lorat_platform.training.validation import CheckpointValidation, ValidationPlan
from lorat_platform.training.worker import SCORE, WorkerSetup, train_worker

if TYPE_CHECKING:
    from lorat_platform.recording.remote import RemoteRun

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300
"""Longest wait for the nodes of the training workers, by default; embedded, Ray's own minute."""
VALIDATION_TIMEOUT_S = 3600.0
"""Longest validation; the end of the training waits for the last one."""
STOP_S = 10.0
"""Longest wait for the workers to end after an interrupt."""
CONTROLLER_FAILURES = 3
"""Starts of the worker group that may fail or time out before the run gives up."""


def train(
    config: TrainConfig,
    options: RunOptions,
    cluster: Cluster,
    *,
    datasets: Datasets | None = None,
    git_revision: str | None = None,
) -> TrainingResult:
    """Train, evaluate and register a tracker on the cluster that this process is connected to.

    Args:
        config: resolved.
        options: where and how.
        cluster: what :func:`lorat_platform.cluster.connection.connect` gave.
        datasets: what :func:`open_datasets` gave, if it was called before.
        git_revision: of the code.

    Raises:
        UserError: for whatever the user can mend.
    """
    began = time.perf_counter()
    datasets = datasets or open_datasets(config)
    storage = locate(storage_address(options.storage))
    lease, folder, record, existed = choose(
        storage, options.name, config, datasets.fingerprints, options.resume, git_revision
    )
    with lease, Phases() as phases:
        if config.init_from and not record.start_weights:
            # Workers that start anew before the first checkpoint must start from the same weights.
            record = dataclasses.replace(record, start_weights=versions.pinned(config.init_from))
        lease.confirm()
        record.write(folder)
        checkpoints.repair(folder)
        verb = "going on with" if existed else "beginning"
        log.info("%s run %s in %s on %s", verb, record.name, folder.uri, cluster)
        log.info("its configuration: %s, which --config takes", folder.child(FILE).uri)
        phases.begin("opening the run in MLflow")
        with ConsolePrinter(phases) as console:
            run, id_kept = _open_run(record, folder, options, datasets, lease, console)
            try:
                with written_to(run):
                    result = _fit(
                        config, options, cluster, record, folder, datasets, run, console, lease,
                        phases,
                    )  # fmt: skip
                    result = finish(result, options, cluster, datasets, run, record, began, phases)
                    id_kept.join(10.0)
                    lease.confirm()
                    _write_finished(record, result)
            except BaseException as error:
                if lease.is_lost_now():
                    run.abandon()  # it is another driver's to close
                    raise
                phases.begin("ending the run in MLflow", quiet=True)
                stopped = isinstance(error, KeyboardInterrupt)
                if stopped:
                    name = checkpoints.newest(folder)
                    kept = folder.child(name).uri if name else "no checkpoint yet"
                    log.info("stopped; kept: %s", kept)
                run.close("KILLED" if stopped else "FAILED", timeout_s=10.0)
                raise
            phases.begin("ending the run in MLflow", quiet=True)
            run.close("FINISHED")
    return result


def _open_run(
    record: RunRecord,
    folder: Location,
    options: RunOptions,
    datasets: Datasets,
    lease: Lease,
    console: Console,
) -> tuple[RemoteRun, threading.Thread]:
    """Open the MLflow run, the same one for a run that goes on; a thread records its id."""
    from lorat_platform.recording.remote import open_remote_run

    # Runs of one name in several storages are different runs.
    place = hashlib.sha256(folder.uri.encode()).hexdigest()[:8]
    journal = folder.path if folder.is_local else str(home() / "runs" / f"{record.name}-{place}")
    run = open_remote_run(
        options.experiment,
        record.name,
        console=console,
        folder=journal,
        run_id=record.mlflow_run_id,
        tags={"job": "train", "git_revision": record.git_revision or "unknown"}
        | {f"dataset.{name}": value for name, value in record.data.items()},
    )
    # A field of the configuration has the same name here as in the trials of a search.
    run.log_params(record.config | {"run": dataclasses.asdict(options)})
    run.log_inputs(inputs_of(datasets.train, datasets.val))
    run.log_bytes(json.dumps(record.config, indent=2).encode(), "config.json")
    keeper = threading.Thread(target=_keep_run_id, args=(run, record, folder, lease), daemon=True)
    keeper.start()
    return run, keeper


def _keep_run_id(run: RemoteRun, record: RunRecord, folder: Location, lease: Lease) -> None:
    """Write MLflow's id into the run's record as soon as MLflow has given one."""
    if record.mlflow_run_id:
        return
    while True:
        try:
            run_id = run.wait_for_id(600.0)
        except TimeoutError:
            continue
        except Exception:  # the actor is gone with the run; its journal has the id
            return
        if not lease.is_lost_now():
            dataclasses.replace(record, mlflow_run_id=run_id).write(folder)
        return


def _write_finished(record: RunRecord, result: TrainingResult) -> None:
    """Mark the run as finished, so that the same command begins another."""
    results = {"checkpoint": result.checkpoint, "model_version": result.model_version}
    dataclasses.replace(
        record,
        finished=True,
        mlflow_run_id=result.mlflow_run_id,
        results=results | result.scores,
    ).write(result.folder)


def _fit(
    config: TrainConfig,
    options: RunOptions,
    cluster: Cluster,
    record: RunRecord,
    folder: Location,
    datasets: Datasets,
    run: RemoteRun,
    console: Console,
    lease: Lease,
    phases: Phases,
) -> TrainingResult:
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import (
        CheckpointConfig,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
    )
    from ray.train.v2.api.validation_config import ValidationConfig, ValidationTaskConfig

    from lorat_platform.cluster.process_group import PrivateTorchConfig

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if not cluster.embedded:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    assert config.batch_size is not None and config.epochs is not None
    place = Placement.plan(options, cluster, config.batch_size)
    phases.begin(STARTING)
    reminder = Reminder(phases, then=STARTING)
    reminder.tell(place.missing(cluster))
    every = options.validate_every
    if every is None:
        every = max(1, config.epochs // 4)
    validated = bool(datasets.val) and every > 0
    val_gpus = options.val_gpus if options.val_gpus is not None else min(1, place.spare_gpus)
    checkpoint_every = options.checkpoint_every or config.steps_per_epoch
    setup = WorkerSetup(
        config=config,
        sources=datasets.train,
        run_folder=folder,
        run_name=record.name,
        lease=lease.token,
        start_weights=record.start_weights,
        threads=place.threads,
        worker_cpus=place.cpus,
        decode_actors=options.decode_actors,
        decode_threads=options.decode_threads,
        checkpoint_every=checkpoint_every,
        log_every=options.log_every or min(50, max(1, config.steps_per_epoch // 4)),
        validate_steps=_validation_steps(every * config.steps_per_epoch, checkpoint_every)
        if validated
        else None,
        after=AfterLastStep.plan(
            config, options, datasets, cluster, place, validated=validated, val_gpus=val_gpus
        ),
        run=run,
        console=console,
        sample_every_s=interval_s(),
    )
    validation = None
    if validated:
        plan = ValidationPlan(
            config=config,
            sources=datasets.val,
            num_pairs=options.val_pairs,
            num_sequences=options.val_sequences,
            threads=place.validation_threads,
        )
        if place.use_gpu and not val_gpus:
            log.info(
                "validation runs on %d CPU threads, since no GPU is left; --val-gpus 1 with one "
                "more GPU is faster, --validate-every 0 leaves it to the end",
                place.validation_threads,
            )
        validation = ValidationConfig(
            fn=CheckpointValidation(plan=plan, run=run, console=console),
            # Ray Train ends the run when this task dies, so Ray starts it again for ever and it
            # gives up by itself.
            ray_remote_kwargs={"num_cpus": 0, "num_gpus": val_gpus, "max_retries": -1},
            task_config=ValidationTaskConfig(timeout_s=VALIDATION_TIMEOUT_S),
        )
    resources: dict[str, float] = {"CPU": place.cpus}
    if place.use_gpu:
        resources["GPU"] = 1
    make_trainer: Any = TorchTrainer  # its stub describes the version before
    trainer = make_trainer(
        train_worker,
        train_loop_config=setup,
        torch_config=PrivateTorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=place.low if place.low == place.high else (place.low, place.high),
            use_gpu=place.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=record.name,
            storage_path=str(Path(folder.path).parent)
            if folder.is_local
            else folder.path.rpartition("/")[0],
            storage_filesystem=None if folder.is_local else folder.filesystem,
            failure_config=FailureConfig(
                max_failures=-1,  # those without progress are counted by the callback
                controller_failure_limit=CONTROLLER_FAILURES,
            ),
            checkpoint_config=CheckpointConfig(
                num_to_keep=options.keep, checkpoint_score_attribute=SCORE
            )
            if validated
            else CheckpointConfig(num_to_keep=options.keep),
            callbacks=[watch_workers(console, options.max_failures)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        validation_config=validation,
    )
    began = time.perf_counter()

    def check() -> None:
        lease.check()
        if reminder.due():
            reminder.tell(place.missing(describe(embedded=cluster.embedded)))

    _run(trainer, place, check)
    lease.confirm()
    name = checkpoints.newest(folder)
    if name is None:
        raise UserError(f"The training ended without a checkpoint in {folder.uri}.")
    checkpoints.sweep(folder)
    metrics = checkpoints.registered(folder).get(name, {})
    return TrainingResult(
        name=record.name,
        folder=folder,
        checkpoint=name,
        step=checkpoints.step_of(name) or 0,
        metrics={k: v for k, v in metrics.items() if isinstance(v, int | float)},
        seconds=time.perf_counter() - began,
    )


def _validation_steps(wanted: int, checkpoint_every: int) -> int:
    """Return the steps between validations: a multiple of the steps between checkpoints."""
    return max(1, round(wanted / checkpoint_every)) * checkpoint_every


def _run(trainer: Any, place: Placement, check: Callable[[], None]) -> None:
    """Train to the end; an interrupt, and what ``check`` raises, end the workers before all else.

    Ray Train works beside the main thread, which stays free for both.
    """
    controllers: list[Any] = []
    failures: list[BaseException] = []
    ray_internals.hand_out_controller(trainer, controllers.append)

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # also one that would end only this thread
            failures.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(timeout=0.2)
            check()
    except BaseException:
        for controller in controllers:
            _abort(controller)
        raise
    for error in failures:
        message = user_message(error) or _start_message(error, place)
        if message is not None:
            raise UserError(message) from error
        raise error


def _abort(controller: Any) -> None:
    """End the workers of a training and, after them, its controller."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError):  # that it has ended is its only answer
        ray.get(controller.abort.remote(), timeout=STOP_S)


def _start_message(error: BaseException, place: Placement) -> str | None:
    """Return what to tell the user where the training workers could not be started."""
    if ray_internals.could_not_be_placed(error):
        return (
            f"The cluster did not give the {place.wanted()} of the training workers in time; "
            "add nodes or lower --workers, and the same command goes on."
        )
    reason = ray_internals.why_not_started(error)
    if reason is not None:
        return (
            f"The training workers could not be started, the last time because {reason}; look at "
            "the nodes with 'ray status' and at Ray's logs, and the same command goes on."
        )
    return None
