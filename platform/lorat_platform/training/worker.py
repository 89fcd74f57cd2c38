"""A worker of a Ray Train run: its stream, its learner, its reports and checkpoints."""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorat import errors
from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.files.scratch import make_folder, sweep, temporary_folder
from lorat.files.storage import Location
from lorat.metrics.catalogue import MAIN
from lorat_platform.cluster.console import Console
from lorat_platform.data.sources import Source
from lorat_platform.recording.system_metrics import recorded_in
from lorat_platform.runs import checkpoints, record
from lorat_platform.runs.claim import check_held

if TYPE_CHECKING:
    from lorat.learning.learner import Learner, World
    from lorat_platform.recording.recorder import Recorder
    from lorat_platform.training.after import AfterLastStep

log = logging.getLogger(__name__)

SCORE = f"val/{MAIN}"
"""What the best checkpoints are kept by."""
UNSCORED = -1.0
LOOK_EVERY_S = 1.0
"""Seconds between looks for nodes that are about to be taken away."""
RECORDS_S = 60.0
"""Longest wait of a checkpoint for the records before it, while their actor restarts."""
PARTS_EVERY_S = 60.0
"""Seconds between lines that split the time of a step."""
FIRST_STEPS = 10
"""Steps of which it is said when one of them lasts."""
LOCAL_FOLDER = "lorat-checkpoint"
"""Begin of the names of local folders from which checkpoints go to the storage."""


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """Everything that a training worker is told."""

    config: TrainConfig
    sources: tuple[Source, ...]
    run_folder: Location
    run_name: str
    lease: str
    """The driver's right over the folder (:mod:`lorat_platform.runs.claim`)."""
    start_weights: str | None
    """What a worker starts from where there is no checkpoint yet."""
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
    after: AfterLastStep
    """What the time left includes beside the steps."""
    sample_every_s: float | None = None
    """Seconds between samples of how busy the machines are; none for none."""


def train_worker(setup: WorkerSetup) -> None:
    """Do the work of one training worker; Ray Train calls this in every worker."""
    try:
        _train(setup)
    except UserError:
        raise
    except Exception as error:
        # The driver gets the exception without its traceback; a note goes with it.
        error.add_note(traceback.format_exc())
        raise


def _train(setup: WorkerSetup) -> None:
    import ray.train
    import ray.train.torch
    import torch
    from ray.train.collective import broadcast_from_rank_zero

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    setup.console.install(logging.INFO if rank == 0 else logging.WARNING)
    if setup.threads:
        torch.set_num_threads(setup.threads)
    folder, config = setup.run_folder, setup.config
    if not folder.exists(record.FILE):
        raise UserError(
            f"The run's folder {folder.uri} is not there on the machine of worker {rank}; give a "
            "--storage that all machines reach, such as s3://BUCKET/runs or a shared file system."
        )
    last = broadcast_from_rank_zero(checkpoints.newest(folder) if rank == 0 else None)
    start = 0 if last is None else checkpoints.step_of(last) or 0
    if last and rank == 0:
        log.info("going on from %s with %d worker%s", last, size, "s" if size > 1 else "")
    if start >= config.total_steps:
        return
    sweep(Path(tempfile.gettempdir()))  # what killed workers left on this machine
    # Before the imports for the model, which take seconds, as the processes that decode do.
    source = _open_stream(setup, rank, size, start)
    if rank == 0:
        setup.console.phase("building the model")
    from lorat.learning.learner import World
    from lorat.learning.loop import Hooks, run

    device = ray.train.torch.get_device() if setup.threads is None else torch.device("cpu")
    world = World(rank=rank, size=size, device=device)
    learner = make_learner(setup, world, last)
    if learner.step != start:
        raise UserError(
            f"The checkpoint {last} says step {learner.step}; remove it from {folder.uri} and give "
            "the same command again."
        )
    reporter = _Reporter(setup, world, learner)
    with _monitor(setup, context):
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
                on_step=reporter.step,
                dumps=folder.child("dumps"),
            ),
        )
    if rank == 0:
        checked = " and validating it" if reporter.is_validated(config.total_steps) else ""
        setup.console.phase(f"storing the last checkpoint{checked}")


def _monitor(setup: WorkerSetup, context: Any) -> AbstractContextManager[Any]:
    """Return what records how busy this machine is, in the first worker of each machine."""
    if setup.run is None or context.get_local_rank() != 0:
        return nullcontext()
    several = context.get_local_world_size() < context.get_world_size()
    node = context.get_node_rank() if several else None
    own = copy.copy(setup.run)  # it counts its calls, in one thread
    return recorded_in(own, setup.sample_every_s, node=node)


def make_learner(setup: WorkerSetup, world: World, last: str | None) -> Learner:
    """Make what learns in this worker.

    Args:
        setup: of the run.
        world: this worker's place.
        last: the checkpoint to go on from; with it the start weights are not asked for, which may
            be gone by then.
    """
    from lorat.learning.learner import Learner

    if last is not None:
        with temporary_folder() as scratch:
            resume = checkpoints.download(setup.run_folder, last, scratch / last)
            return Learner(setup.config, world=world, resume=resume)
    start_weights = None
    if setup.start_weights is not None:
        from lorat_platform.registry.versions import resolve

        start_weights = resolve(setup.start_weights)
    return Learner(setup.config, world=world, start_weights=start_weights)


def _open_stream(setup: WorkerSetup, rank: int, size: int, start: int) -> Any:
    """Start the pair stream in worker 0 and hand every worker its end."""
    import ray
    from ray.train.collective import broadcast_from_rank_zero

    from lorat_platform.data.layout import Layout
    from lorat_platform.data.stream import DecodePool, RayStream, split_stream

    layout = Layout.plan(setup.config, size, start, setup.config.total_steps)
    iterators = None
    if rank == 0:
        setup.console.phase("starting the stream of pairs")
        resources = ray.cluster_resources()
        pool = DecodePool.plan(
            worker_cpus=setup.worker_cpus * size,
            cluster_cpus=resources.get("CPU", 1.0),
            decode_nodes=resources.get("decode", 0.0),
            actors=setup.decode_actors,
            threads=setup.decode_threads,
        )
        iterators = split_stream(setup.config, setup.sources, layout, pool, setup.console)
    iterators = broadcast_from_rank_zero(iterators)
    return RayStream(iterators[rank], layout, rank)


class _Reporter:
    """The hooks of a worker under Ray Train; only worker 0 talks to people and to MLflow."""

    def __init__(self, setup: WorkerSetup, world: Any, learner: Learner) -> None:
        from lorat.learning.clock import peak_flops
        from lorat_platform.recording.gauges import Gauges

        self._setup = setup
        self._rank = world.rank
        assert setup.config.batch_size is not None
        self._pairs = setup.config.batch_size / world.size
        self._start, self._end = learner.step, setup.config.total_steps
        self._rate: float | None = None
        self._last = (time.perf_counter(), learner.step)
        self._parts_shown = float("-inf")
        self._gauges = Gauges(setup.run_name)
        self._preempted: set[str] = set()
        self._look_every = 1
        if self._rank == 0:
            peak, origin = peak_flops(world.device)
            known = (
                "no MFU" if peak != peak else f"MFU assumes {peak / 1e12:.3g} TFLOP/s per worker"
            )
            log.info("training on %s; %s (%s)", world.device, known, origin)
            compiling = "compiling the model and " if learner.compiled else ""
            setup.console.phase(f"{compiling}taking the first step")

    def interval(self, step: int, metrics: dict[str, float]) -> None:
        """Show and record an interval."""
        from lorat.learning.loop import metrics_line, parts_line

        # The same on every worker, since the metrics are: looking is a call of all of them.
        self._look_every = max(1, int(1e3 * LOOK_EVERY_S / metrics["system/step_ms"]))
        if self._rank == 0:
            now, before = time.perf_counter(), self._last
            rate = (now - before[0]) / max(step - before[1], 1)
            self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
            self._last = (now, step)
            forward_s = metrics["system/time_ms/forward"] / 1e3 / self._pairs
            left = self._rate * (self._end - step) + self._setup.after.seconds(forward_s)
            recorded: list[Any] = []
            if self._setup.run is not None:
                self._setup.run.log_metrics(metrics, step)
                recorded = self._setup.run.in_flight()[-1:]
            # A step that was shown is in the journal, whatever kills this process or the driver.
            self._setup.console.line(metrics_line(step, self._end, metrics, left), recorded)
            if now - self._parts_shown > PARTS_EVERY_S:
                self._parts_shown = now
                self._setup.console.line(parts_line(metrics))
            self._gauges.set(metrics)

    def checkpoint(self, learner: Any, metrics: dict[str, float]) -> None:
        """Report metrics and a checkpoint; writing it to the storage goes on in the background."""
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        setup, step = self._setup, learner.step
        checkpoint = None
        if self._rank == 0:
            local = make_folder(LOCAL_FOLDER)
            try:
                learner.save(local)
            except OSError as error:
                shutil.rmtree(local, ignore_errors=True)
                raise UserError(
                    f"The checkpoint of step {step} cannot be written to {local}: "
                    f"{errors.reason(error)}; make room, or set TMPDIR."
                ) from error
            checkpoint = Checkpoint.from_directory(str(local))
        ray.train.report(
            {SCORE: UNSCORED, "step": step, **metrics},
            checkpoint=checkpoint,
            checkpoint_dir_name=checkpoints.name_of(step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=_Upload(
                setup.run_folder,
                setup.lease,
                tuple(setup.run.in_flight()) if setup.run is not None else (),
            ),
            validation=self.is_validated(step) and self._rank == 0,
        )

    def step(self, step: int) -> bool:
        """Say what goes on; ask for a checkpoint now when a node is about to be taken away."""
        if self._rank == 0:
            last = min(self._start + FIRST_STEPS, self._end)
            if step < last:
                self._setup.console.phase(f"taking step {step + 1} of {self._end}", quiet=True)
            elif step == last:
                self._setup.console.phase()
        return self._preempted_now(step)

    def is_validated(self, step: int) -> bool:
        """Tell whether the checkpoint of a step is validated."""
        return bool(self._setup.validate_steps) and step % (self._setup.validate_steps or 1) == 0

    def _preempted_now(self, step: int) -> bool:
        import ray.train

        if step % self._look_every:
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
    lease: str
    records: tuple[Any, ...]
    """References of what was recorded before it and is still on its way."""

    def __call__(self, checkpoint: Any, name: str) -> Any:
        """Copy it there, complete or not at all, after the records of the steps before it.

        A training that goes on from it does not take those steps again, so that a record lost with
        this process would be missing for ever.
        """
        import ray
        from ray.train import Checkpoint

        if self.records:
            ray.wait(list(self.records), num_returns=len(self.records), timeout=RECORDS_S)
        check_held(self.folder, self.lease)
        checkpoints.upload(Path(checkpoint.path), self.folder, name)
        return Checkpoint(self.folder.file(name), filesystem=self.folder.filesystem)
