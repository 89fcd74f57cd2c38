"""A training run on the cluster: workers, failures, checkpoints, validation, registration."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorat.config import TrainConfig, to_dict
from lorat.errors import UserError
from lorat.home import home
from lorat.storage import Location, locate
from lorat_platform import checkpoint_store, run_record
from lorat_platform.cluster import Cluster
from lorat_platform.command import user_message
from lorat_platform.console import Console, ConsolePrinter
from lorat_platform.run_record import RunRecord
from lorat_platform.sources import Source, fingerprints, open_indexes, resolve_sources
from lorat_platform.telemetry import duration
from lorat_platform.validation import CheckpointValidation, ValidationPlan

if TYPE_CHECKING:
    from lorat_platform.metric_sink import RemoteRun
    from lorat_platform.tracking import Recorder

log = logging.getLogger(__name__)

CONTROLLER_FAILURES = 3
"""Starts of the worker group that may time out before the run gives up."""
SCORE = "val/ao"
"""What the best checkpoints are kept by."""
UNSCORED = -1.0
RESUME_ONLY = ("optimizer.safetensors", "training_state.json", checkpoint_store.MANIFEST)
"""Files of a checkpoint that MLflow is not given."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how a training runs; nothing here changes what is learnt."""

    name: str | None = None
    """Name of the run; none makes one from the configuration. The same name goes on with it."""
    storage: str | None = None
    """Folder or s3:// address of all runs; none means runs in the home folder. Workers on several
    machines need one that all reach."""
    resume: run_record.Resume = "auto"
    """Go on with an unfinished run of the same configuration (auto), begin anew (never), or insist
    on going on (must)."""
    workers: str = "1"
    """Training workers: N, or MIN:MAX to grow and shrink with the cluster."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Auto uses one GPU per worker where the cluster has GPUs."""
    cpus_per_worker: int | None = None
    """CPUs of a worker, and its torch threads on a CPU; none shares those of the cluster."""
    decode_actors: int | None = None
    """Processes that read, decode and crop; none fits them into the CPUs that are left."""
    decode_threads: int | None = None
    """Threads in each of them."""
    max_failures: int = 3
    """Deaths of workers that are survived; -1 for any number."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; none means every epoch."""
    keep: int = 2
    """Best checkpoints that are kept, beside the last."""
    log_every: int | None = None
    """Steps between progress lines; none means about every 5 s on a small run, at most 50."""
    validate_every: int | None = None
    """Epochs between validations beside the training; none means four in a run, 0 none at all."""
    val_pairs: int = 512
    """Held-out pairs whose loss is taken in a validation."""
    val_sequences: int = 16
    """Sequences that are tracked in a validation; the evaluation at the end takes all."""
    val_gpus: float | None = None
    """GPU share of a validation; none means a whole one where one is left, else none."""
    final_evaluation: bool = True
    """Track all validation sequences at the end, beside the static and the MIL tracker."""
    register: bool = True
    """Register the trained model as lorat@candidate."""
    experiment: str = "train"
    """MLflow experiment."""
    address: str | None = None
    """Ray cluster, host:port; none means RAY_ADDRESS, or an embedded Ray."""

    def __post_init__(self) -> None:
        self.worker_range  # noqa: B018 (checks the text)
        for field in ("cpus_per_worker", "decode_actors", "decode_threads", "checkpoint_every",
                      "log_every", "keep"):  # fmt: skip
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"{field} is {value}; give 1 or more.")
        for field in ("validate_every", "val_pairs", "val_sequences"):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise UserError(f"{field} is {value}; give 0 or more.")
        if self.max_failures < -1:
            raise UserError(f"max_failures is {self.max_failures}; give 0 or more, or -1.")
        if self.name is not None and not re.fullmatch(r"[\w][\w.-]*", self.name):
            raise UserError(
                f"name is {self.name!r}; give letters, digits, dots, dashes and underscores."
            )

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        match = re.fullmatch(r"(\d+)(?::(\d+))?", self.workers)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            raise UserError(
                f"workers is {self.workers!r}; give N, or MIN:MAX with 1 <= MIN <= MAX."
            )
        return low, high


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """Everything that a training worker is told."""

    config: TrainConfig
    sources: tuple[Source, ...]
    run_folder: Location
    run_name: str
    start_weights: str | None
    threads: int | None
    """Torch threads; none on a GPU."""
    worker_cpus: float
    """CPUs that each worker asks for."""
    decode_actors: int | None
    decode_threads: int | None
    checkpoint_every: int
    log_every: int
    validate_steps: int | None
    """Steps between validations; none for none."""
    run: Recorder | None
    console: Console


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished training gave."""

    name: str
    folder: Location
    checkpoint: str
    """Name of the last checkpoint in the folder."""
    step: int
    metrics: dict[str, float]
    seconds: float
    mlflow_run_id: str | None = None
    model_version: str | None = None
    scores: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """What a training reads."""

    train: tuple[Source, ...]
    val: tuple[Source, ...]
    fingerprints: dict[str, str]
    """Of the training sets, by name."""


def open_datasets(config: TrainConfig) -> Datasets:
    """Find the datasets of a resolved configuration, making the synthetic ones if needed.

    Raises:
        UserError: if one is missing, damaged, or not fit for its purpose.
    """
    train = resolve_sources(config.data, "train")
    val = resolve_sources(config.val_data, "val") if config.val_data else ()
    for source, index in zip(val, open_indexes(val), strict=True):
        if index.storage == "window":
            raise UserError(
                f"val_data {source.uri} stores windows around the target, which a tracker may "
                "leave; ingest it again with --full-frame."
            )
    return Datasets(train=train, val=val, fingerprints=fingerprints(train))


# -- in a worker ---------------------------------------------------------------------------------


def train_worker(setup: WorkerSetup) -> None:
    """Do the work of one training worker; Ray Train calls this in every worker."""
    import ray.train
    import ray.train.torch
    import torch
    from ray.train.collective import broadcast_from_rank_zero

    from lorat_platform.learner import Learner, World
    from lorat_platform.train_loop import Hooks, run

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    setup.console.install(logging.INFO if rank == 0 else logging.WARNING)
    if setup.threads:
        torch.set_num_threads(setup.threads)
    device = ray.train.torch.get_device() if setup.threads is None else torch.device("cpu")
    world = World(rank=rank, size=size, device=device)

    folder, config = setup.run_folder, setup.config
    if not folder.exists(run_record.FILE):
        raise UserError(
            f"The run's folder {folder.uri} is not there on the machine of worker {rank}; give a "
            "--storage that all machines reach, such as s3://BUCKET/runs or a shared file system."
        )
    last = broadcast_from_rank_zero(checkpoint_store.newest(folder) if rank == 0 else None)
    start = 0 if last is None else checkpoint_store.step_of(last) or 0
    if last and rank == 0:
        log.info("going on from %s with %d worker%s", last, size, "s" if size > 1 else "")
    if start >= config.total_steps:
        return
    source = _open_stream(setup, world, start)
    with tempfile.TemporaryDirectory() as scratch:
        resume = checkpoint_store.download(folder, last, Path(scratch) / last) if last else None
        learner = Learner(config, world=world, resume=resume, start_weights=_start_weights(setup))
    if learner.step != start:
        raise UserError(
            f"The checkpoint {last} says step {learner.step}; remove it from {folder.uri} and give "
            "the same command again."
        )
    reporter = _Reporter(setup, world, learner.step)
    run(
        config,
        source,
        world=world,
        learner=learner,
        hooks=Hooks(
            log_every=setup.log_every,
            on_interval=reporter.interval,
            checkpoint_every=setup.checkpoint_every,
            on_checkpoint=reporter.checkpoint,
            on_step=reporter.preempted,
            dump_folder=_dump_folder(folder),
        ),
    )


def _start_weights(setup: WorkerSetup) -> Path | None:
    if setup.start_weights is None:
        return None
    from lorat_platform.registry import resolve

    return resolve(setup.start_weights)


def _dump_folder(folder: Location) -> Path:
    """Return where batches for replay go: beside the checkpoints, or the home folder."""
    return Path(folder.file("dumps")) if folder.is_local else home() / "dumps" / folder.path


def _open_stream(setup: WorkerSetup, world: Any, start: int) -> Any:
    """Start the pair stream in worker 0 and hand every worker its end."""
    import ray
    from ray.train.collective import broadcast_from_rank_zero

    from lorat_platform.stream import DecodePool, Layout, RayStream, split_stream

    layout = Layout.plan(setup.config, world.size, start, setup.config.total_steps)
    iterators = None
    if world.rank == 0:
        resources = ray.cluster_resources()
        pool = DecodePool.plan(
            worker_cpus=setup.worker_cpus * world.size,
            cluster_cpus=resources.get("CPU", 1.0),
            decode_nodes=resources.get("decode", 0.0),
            actors=setup.decode_actors,
            threads=setup.decode_threads,
        )
        iterators = split_stream(setup.config, setup.sources, layout, pool, setup.console)
    iterators = broadcast_from_rank_zero(iterators)
    return RayStream(iterators[world.rank], layout, world.rank)


class _Reporter:
    """The hooks of a worker under Ray Train; only worker 0 talks to people and to MLflow."""

    def __init__(self, setup: WorkerSetup, world: Any, start_step: int) -> None:
        from lorat_platform.telemetry import Gauges, peak_flops

        self._setup = setup
        self._rank = world.rank
        self._end = setup.config.total_steps
        self._rate: float | None = None
        self._last = (time.perf_counter(), start_step)
        self._gauges = Gauges(setup.run_name)
        self._preempted: set[str] = set()
        if self._rank == 0:
            peak, origin = peak_flops(world.device)
            known = (
                "no MFU" if peak != peak else f"MFU assumes {peak / 1e12:.3g} TFLOP/s per worker"
            )
            log.info("training on %s; %s (%s)", world.device, known, origin)

    def interval(self, step: int, metrics: dict[str, float]) -> None:
        """Show and record an interval."""
        from lorat_platform.train_loop import metrics_line

        if self._rank == 0:
            now, before = time.perf_counter(), self._last
            rate = (now - before[0]) / max(step - before[1], 1)
            self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
            self._last = (now, step)
            left = self._rate * (self._end - step)
            self._setup.console.line(metrics_line(step, self._end, metrics, left))
            if self._setup.run is not None:
                self._setup.run.log_metrics(metrics, step)
            self._gauges.set(metrics)

    def checkpoint(self, learner: Any, metrics: dict[str, float]) -> None:
        """Report metrics and a checkpoint; writing it to the storage goes on in the background."""
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        setup, step = self._setup, learner.step
        validate = bool(setup.validate_steps) and step % (setup.validate_steps or 1) == 0
        checkpoint = None
        if self._rank == 0:
            local = Path(tempfile.mkdtemp(prefix="lorat-checkpoint-"))
            try:
                learner.save(local)
            except OSError as error:
                raise UserError(
                    f"The checkpoint of step {step} cannot be written to {local}: "
                    f"{checkpoint_store.reason(error)}; make room, or set TMPDIR."
                ) from error
            checkpoint = Checkpoint.from_directory(str(local))
        ray.train.report(
            {SCORE: UNSCORED, "step": step, **metrics},
            checkpoint=checkpoint,
            checkpoint_dir_name=checkpoint_store.name_of(step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=_Upload(setup.run_folder),
            validation=validate and self._rank == 0,
        )

    def preempted(self, step: int) -> bool:
        """Ask for a checkpoint now when a node of a worker is about to be taken away."""
        import ray.train

        if step % self._setup.log_every:
            return False
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self._preempted if info else set()
        self._preempted |= new
        if new and self._rank == 0:
            log.warning("a node will be taken away: writing a checkpoint at step %d", step)
        return bool(new)


@dataclass(frozen=True)
class _Upload:
    """How Ray Train brings a checkpoint into the storage."""

    folder: Location

    def __call__(self, checkpoint: Any, name: str) -> Any:
        """Copy it there, complete or not at all."""
        from ray.train import Checkpoint

        checkpoint_store.upload(Path(checkpoint.path), self.folder, name)
        return Checkpoint(self.folder.file(name), filesystem=self.folder.filesystem)


# -- in the driver -------------------------------------------------------------------------------


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
        cluster: what :func:`lorat_platform.cluster.connect` gave.
        datasets: what :func:`open_datasets` gave, if it was called before.
        git_revision: of the code.

    Raises:
        UserError: for whatever the user can mend.
    """
    began = time.perf_counter()
    datasets = datasets or open_datasets(config)
    storage = locate(options.storage or str(home() / "runs"))
    folder, record, existed = run_record.choose(
        storage, options.name, config, datasets.fingerprints, options.resume, git_revision
    )
    record.write(folder)
    run_record.claim(folder)
    try:
        checkpoint_store.repair(folder)
        verb = "going on with" if existed else "beginning"
        log.info("%s run %s in %s on %s", verb, record.name, folder.uri, cluster)
        with ConsolePrinter() as console:
            run = _open_run(record, folder, options, datasets)
            try:
                result = _fit(config, options, cluster, record, folder, datasets, run, console)
                result = _finish(result, options, datasets, run, record, began)
            except BaseException as error:
                stopped = isinstance(error, KeyboardInterrupt)
                run.close("KILLED" if stopped else "FAILED", timeout_s=10.0)
                raise
            run.close("FINISHED")
    finally:
        run_record.release(folder)
    return result


def _open_run(
    record: RunRecord,
    folder: Location,
    options: RunOptions,
    datasets: Datasets,
) -> RemoteRun:
    """Open the MLflow run, the same one for a run that goes on."""
    from lorat_platform.metric_sink import open_remote_run

    journal = folder.path if folder.is_local else str(home() / "runs" / record.name)
    run = open_remote_run(
        options.experiment,
        record.name,
        folder=journal,
        run_id=record.mlflow_run_id,
        tags={"job": "train", "git_revision": record.git_revision or "unknown"}
        | {f"dataset.{name}": value for name, value in record.data.items()},
    )
    run.log_params(
        {
            "config": record.config,
            "run": dataclasses.asdict(options),
            "data": {s.name: dataclasses.asdict(s) for s in datasets.train},
            "val_data": {s.name: dataclasses.asdict(s) for s in datasets.val},
        }
    )
    run.log_bytes(json.dumps(record.config, indent=2).encode(), "config.json")
    threading.Thread(target=_keep_run_id, args=(run, record, folder), daemon=True).start()
    return run


def _keep_run_id(run: RemoteRun, record: RunRecord, folder: Location) -> None:
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
        dataclasses.replace(record, mlflow_run_id=run_id).write(folder)
        return


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Resources of the training workers."""

    low: int
    high: int
    use_gpu: bool
    cpus: float
    """CPUs per worker."""
    threads: int | None
    """Torch threads per worker; none on a GPU."""
    spare_gpus: float

    @classmethod
    def plan(cls, options: RunOptions, cluster: Cluster, batch_size: int) -> Placement:
        """Choose what each worker asks for.

        Raises:
            UserError: if the cluster can never give it, or there are more workers than pairs.
        """
        low, high = options.worker_range
        if high > batch_size:
            raise UserError(
                f"workers is {options.workers} but a global batch has {batch_size} pairs; give at "
                "most one worker per pair."
            )
        use_gpu = options.device == "gpu" or (options.device == "auto" and cluster.gpus >= 1)
        total = int(cluster.cpus)
        if use_gpu:
            cpus = options.cpus_per_worker or max(1, min(4, total // (2 * high)))
        else:
            cpus = options.cpus_per_worker or max(1, total // high)
        if cluster.embedded:
            if low * cpus > total:
                raise UserError(
                    f"{low} workers with {cpus} CPUs each do not fit into the {total} CPUs of this "
                    "machine; lower --workers or --cpus-per-worker, or give a cluster's --address."
                )
            if use_gpu and low > cluster.gpus:
                raise UserError(
                    f"{low} workers need a GPU each and this machine has {cluster.gpus:g}; lower "
                    "--workers, or give --device cpu."
                )
        return cls(
            low=low,
            high=high,
            use_gpu=use_gpu,
            cpus=cpus,
            threads=None if use_gpu else cpus,
            spare_gpus=max(0.0, cluster.gpus - high) if use_gpu else 0.0,
        )


def _fit(
    config: TrainConfig,
    options: RunOptions,
    cluster: Cluster,
    record: RunRecord,
    folder: Location,
    datasets: Datasets,
    run: RemoteRun,
    console: Console,
) -> TrainingResult:
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import (
        CheckpointConfig,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
    )
    from ray.train.v2.api.validation_config import ValidationConfig

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    assert config.batch_size is not None and config.epochs is not None
    place = Placement.plan(options, cluster, config.batch_size)
    every = options.validate_every
    if every is None:
        every = max(1, config.epochs // 4)
    validated = bool(datasets.val) and every > 0
    checkpoint_every = options.checkpoint_every or config.steps_per_epoch
    setup = WorkerSetup(
        config=config,
        sources=datasets.train,
        run_folder=folder,
        run_name=record.name,
        start_weights=config.init_from,
        threads=place.threads,
        worker_cpus=place.cpus,
        decode_actors=options.decode_actors,
        decode_threads=options.decode_threads,
        checkpoint_every=checkpoint_every,
        log_every=options.log_every or min(50, max(1, config.steps_per_epoch // 4)),
        validate_steps=_validation_steps(every * config.steps_per_epoch, checkpoint_every)
        if validated
        else None,
        run=run,
        console=console,
    )
    validation = None
    if validated:
        val_gpus = options.val_gpus if options.val_gpus is not None else min(1, place.spare_gpus)
        plan = ValidationPlan(
            config=config,
            sources=datasets.val,
            num_pairs=options.val_pairs,
            num_sequences=options.val_sequences,
        )
        validation = ValidationConfig(
            fn=CheckpointValidation(plan=plan, run=run, console=console),
            ray_remote_kwargs={"num_cpus": 0, "num_gpus": val_gpus, "max_retries": 1},
        )
    resources: dict[str, float] = {"CPU": place.cpus}
    if place.use_gpu:
        resources["GPU"] = 1
    make_trainer: Any = TorchTrainer  # its stub describes the version before
    trainer = make_trainer(
        train_worker,
        train_loop_config=setup,
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
                max_failures=options.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
            checkpoint_config=CheckpointConfig(
                num_to_keep=options.keep, checkpoint_score_attribute=SCORE
            )
            if validated
            else CheckpointConfig(num_to_keep=options.keep),
            callbacks=[_stop_at_user_errors(console)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        validation_config=validation,
    )
    began = time.perf_counter()
    _in_thread(trainer.fit)
    name = checkpoint_store.newest(folder)
    if name is None:
        raise UserError(f"The training ended without a checkpoint in {folder.uri}.")
    checkpoint_store.sweep(folder)
    metrics = checkpoint_store.registered(folder).get(name, {})
    return TrainingResult(
        name=record.name,
        folder=folder,
        checkpoint=name,
        step=checkpoint_store.step_of(name) or 0,
        metrics={k: v for k, v in metrics.items() if isinstance(v, int | float)},
        seconds=time.perf_counter() - began,
    )


def _validation_steps(wanted: int, checkpoint_every: int) -> int:
    """Return the steps between validations: a multiple of the steps between checkpoints."""
    return max(1, round(wanted / checkpoint_every)) * checkpoint_every


def _in_thread(fit: Callable[[], Any]) -> None:
    """Run ``fit`` beside the main thread, which stays free for Ctrl-C.

    Ray Train would install a handler of its own that ends the process with code 0.
    """
    failure: list[BaseException] = []

    def work() -> None:
        try:
            fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
    if failure:
        message = user_message(failure[0])
        if message is not None:
            raise UserError(message) from failure[0]
        raise failure[0]


def _stop_at_user_errors(console: Console) -> Any:
    """Return Ray Train's callback that looks at what workers raised."""
    from ray.train import UserCallback

    class StopAtUserErrors(UserCallback):
        """End the run at once, without a retry, when a worker says what the user can mend."""

        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            """Look at what the workers raised."""
            for rank, error in sorted(worker_exceptions.items()):
                message = user_message(error)
                if message is not None:
                    raise UserError(message)
                lines = str(error).strip().splitlines()
                console.line(f"worker {rank} failed: {lines[-1] if lines else repr(error)}")

    return StopAtUserErrors()


def _finish(
    result: TrainingResult,
    options: RunOptions,
    datasets: Datasets,
    run: RemoteRun,
    record: RunRecord,
    began: float,
) -> TrainingResult:
    """Evaluate beside the baselines, register, and say where everything is."""
    from lorat import checkpoint
    from lorat_platform.mlflow_store import tracking_uri, without_password

    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint_store.download(
            result.folder, result.checkpoint, Path(scratch) / result.checkpoint
        )
        model = checkpoint.load(folder)
        weights = Path(scratch) / "checkpoint"
        shutil.copytree(folder, weights, ignore=shutil.ignore_patterns(*RESUME_ONLY))
        run.log_artifact(weights)
    scores: dict[str, float] = {}
    if datasets.val and options.final_evaluation:
        scores = evaluate_beside_baselines(model, datasets.val)
        run.log_metrics(scores, result.step)
    run_id, version = None, None
    try:
        run_id = run.wait_for_id(60.0)
    except TimeoutError as error:
        log.warning("%s The model is not registered; the run's folder has it.", error)
    if run_id and options.register:
        from lorat_platform.registry import register

        run.flush()
        version = register(
            model,
            run_id=run_id,
            datasets=datasets.fingerprints,
            scores={k: v for k, v in scores.items() if "/static_" not in k and "/mil_" not in k},
            git_revision=record.git_revision,
            tags={"run": record.name},
        )
    done = dataclasses.replace(
        record,
        finished=True,
        mlflow_run_id=run_id,
        results={"checkpoint": result.checkpoint, "model_version": version, **scores},
    )
    done.write(result.folder)
    log.info("trained %d steps, %s in all", result.step, duration(time.perf_counter() - began))
    log.info("checkpoint  %s", result.folder.child(result.checkpoint).uri)
    if version:
        log.info("model       models:/lorat/%s, alias candidate", version)
    log.info("MLflow      %s, experiment %s, run %s", without_password(tracking_uri()),
             options.experiment, run_id)  # fmt: skip
    log.info("open it     %s", ui_command())
    return dataclasses.replace(result, mlflow_run_id=run_id, model_version=version, scores=scores)


def ui_command() -> str:
    """Return what opens the MLflow UI on the store in use."""
    from lorat_platform.mlflow_store import is_sqlite, tracking_uri, without_password

    uri = tracking_uri()
    if not is_sqlite(uri):
        return without_password(uri)
    return f"mlflow server --backend-store-uri {uri} --port 5000   then http://127.0.0.1:5000"


def evaluate_beside_baselines(model: Any, sources: tuple[Source, ...]) -> dict[str, float]:
    """Track every validation sequence with the model, a static box and OpenCV's MIL; print a table.

    Returns:
        ``eval/DATASET/ao`` and so on for the model, ``eval/DATASET/static_ao`` and ``mil_ao``.
    """
    from lorat_platform.evaluation import evaluate
    from lorat_platform.subject import load_subject, subject_of

    rows: list[str] = []
    metrics: dict[str, float] = {}
    for source in sources:
        for subject in (subject_of(model, "LoRAT"), load_subject("static"), load_subject("mil")):
            scores = evaluate(subject, source.uri, progress=False).scores
            ao, sr50, sr75 = (scores[k] for k in ("AO", "SR0.5", "SR0.75"))
            rows.append(f"{source.name:<16} {subject.name:<8} {ao:6.3f} {sr50:6.3f} {sr75:6.3f}")
            prefix = f"eval/{source.name}/" + (
                "" if subject.model is not None else subject.name + "_"
            )
            metrics |= {f"{prefix}ao": ao, f"{prefix}sr50": sr50, f"{prefix}sr75": sr75}
    log.info("%-16s %-8s %6s %6s %6s", "validation", "tracker", "AO", "SR50", "SR75")
    for row in rows:
        log.info("%s", row)
    return metrics


def resolved_text(config: TrainConfig) -> str:
    """Return the resolved configuration as JSON."""
    return json.dumps(to_dict(config), indent=2)
