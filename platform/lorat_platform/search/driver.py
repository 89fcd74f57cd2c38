"""Run and resume a search with Ray Tune.

Everything that a search needs to go on after any crash lies in its folder ``STORAGE/NAME``: the
request (``search.json``), Ray Tune's snapshot, and the checkpoints of the trials.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lorat.config.fields import to_dict
from lorat.errors import UserError
from lorat.files import storage
from lorat.metrics.catalogue import METRICS
from lorat_platform.cluster.interrupts import kept_handlers
from lorat_platform.data.sources import inputs_of, resolve_sources
from lorat_platform.recording.console_log import written_to
from lorat_platform.recording.pages import table_view
from lorat_platform.recording.run import Run, open_run
from lorat_platform.recording.system_metrics import interval_s
from lorat_platform.recording.trouble import say_what_is_left
from lorat_platform.runs.checkpoints import BETWEEN_RUNGS
from lorat_platform.runs.claim import Lease
from lorat_platform.search.algorithms import SLOTS, RandomSearch, SlotLimiter
from lorat_platform.search.attempts import judged
from lorat_platform.search.plan import (
    REQUEST_FILE,
    SearchPlan,
    algorithms,
    check_data,
    read_plan,
)
from lorat_platform.search.race.options import RaceOptions
from lorat_platform.search.results.board import Leaderboard
from lorat_platform.search.results.outcome import SearchOutcome, write_outcome
from lorat_platform.search.session import AboutTrial, SearchCallback, SearchSession, metric_name
from lorat_platform.search.slots import check_reach, count_slots, worker_resources
from lorat_platform.search.space import TRACKING
from lorat_platform.search.trial.crop_cache import driven_here, remove_cache
from lorat_platform.search.trial.group import run_group_trial
from lorat_platform.search.trial.progress import TrialSetup
from lorat_platform.search.trial.single import run_trial
from lorat_platform.search.trust import note_origin

log = logging.getLogger(__name__)

PARENT_FILE = "mlflow-run-id"
TUNE_ENVIRONMENT = {
    # The snapshot is what --resume starts from: at most this many seconds are redone.
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # Its CSV, JSON and TensorBoard copies of every result cost time and nobody reads them.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # The old output engine is the one that can be silenced; there is a table of our own.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Trials name every file by a full path.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@contextlib.contextmanager
def writable_only_here() -> Iterator[None]:
    """Let nobody else write to new files: a search is not gone on with where others can."""
    before = os.umask(0o077)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


@writable_only_here()
def run_search(
    plan: SearchPlan,
    *,
    points: Sequence[Mapping[str, Any]] | None = None,
    parent_run_id: str | None = None,
    git_revision: str | None = None,
) -> SearchOutcome:
    """Run a search on the connected cluster.

    A trial that fails by itself, as one whose loss is not finite, is failed for good, with its
    reason, and the others go on.  One whose surroundings fail, a machine, a process or a file, goes
    on from its last state, at most :data:`~lorat_platform.search.session.RETRIES` times; what
    belongs to which is in :func:`lorat_platform.failures.is_of_surroundings`.

    Args:
        plan: the checked request.
        points: configurations to try, instead of the searcher's proposals: values by path, also
            of fields that the space does not have.
        parent_run_id: of the MLflow run that the search belongs to, if any.
        git_revision: of the code.

    Raises:
        UserError: if a search of that name exists, data does not fit, or no node can hold a trial.
    """
    location = storage.locate(plan.storage).child(plan.name)
    if location.exists(REQUEST_FILE):
        with lease_of(plan.name, location).claim():  # or it is said who drives it
            raise _begun(plan)
    check_data(plan)
    slots = count_slots(plan.options)
    location.make()
    check_reach(location, plan.options)
    # Hyperband pauses trials, which a limit would count as running.
    limit = 0 if plan.options.scheduler == "hyperband" else slots
    SLOTS[plan.identity] = limit
    searcher, scheduler = algorithms(plan, max_concurrent=limit)
    param_space = plan.space.to_tune() if isinstance(searcher, RandomSearch) else {}
    if points is not None:
        param_space = _choices(points)
        searcher = RandomSearch(
            points_to_evaluate=[dict(point) for point in points], max_concurrent=limit
        )
    elif not isinstance(searcher, RandomSearch) and limit:
        searcher = SlotLimiter(searcher, max_concurrent=limit)
    searcher.search = plan.identity

    def make_tuner() -> tune.Tuner:
        return tune.Tuner(
            _trainable(plan),
            param_space=param_space,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=plan.options.trials,
                reuse_actors=True,
                trial_dirname_creator=_trial_name,
                trial_name_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=plan.name,
                storage_path=storage.locate(plan.storage).path,
                storage_filesystem=_filesystem(plan),
                callbacks=[SearchCallback(plan.identity)],
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
                failure_config=tune.FailureConfig(max_failures=0),
                verbose=0,
            ),
        )

    with lease_of(plan.name, location).claim() as lease:
        if location.exists(REQUEST_FILE):
            raise _begun(plan)
        note_origin(plan.name, location)
        _write_request(plan)
        return _drive(
            plan, make_tuner, lease, parent_run_id=parent_run_id, git_revision=git_revision
        )


def _choices(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what points may be in Ray Tune's terms: it takes nothing else."""
    return {path: tune.choice([point[path] for point in points]) for path in points[0]}


@writable_only_here()
def resume_search(
    name: str,
    storage_path: str | None = None,
    *,
    trials: int | None = None,
    race: RaceOptions | None = None,
    trust_folder: bool = False,
    parent_run_id: str | None = None,
    git_revision: str | None = None,
) -> SearchOutcome:
    """Go on with a search whose driver or machine died, on the connected cluster.

    Finished trials stay as they are, half-finished ones go on from their last rung, as do those
    that failed by their surroundings; others that failed stay failed.  Runs code from the search's
    folder, see :mod:`lorat_platform.search.trust`.

    Args:
        name: of the search.
        storage_path: where it is; none as in :class:`SearchOptions`.
        trials: configurations to try in all, with those that were; none means as many as before.
        race: what follows them; none means as it was.
        trust_folder: believe its folder whoever may have written it.
        parent_run_id: as of :func:`run_search`.
        git_revision: of the code.

    Raises:
        UserError: if there is no such search, it has more trials, it never began, its folder is
            not trusted, another process drives it, or its snapshot is damaged.
    """
    plan = read_plan(name, storage_path, trust_folder=trust_folder)
    if trials is not None:
        plan = dataclasses.replace(plan, options=dataclasses.replace(plan.options, trials=trials))
    plan = dataclasses.replace(plan, race=race or plan.race)
    location = storage.locate(plan.storage).child(name)
    with lease_of(name, location).claim() as lease:
        slots = count_slots(plan.options)
        check_reach(location, plan.options)
        SLOTS[plan.identity] = 0 if plan.options.scheduler == "hyperband" else slots
        if not tune.Tuner.can_restore(location.path, storage_filesystem=_filesystem(plan)):
            raise UserError(
                f"The search {name} had not begun; start it again under another --name."
            )

        def make_tuner() -> tune.Tuner:
            return tune.Tuner.restore(
                location.path,
                trainable=_trainable(plan),
                resume_unfinished=True,
                storage_filesystem=_filesystem(plan),
            )

        return _drive(
            plan,
            make_tuner,
            lease,
            parent_run_id=parent_run_id,
            git_revision=git_revision,
            resumes=True,
        )


def has_begun(plan: SearchPlan) -> bool:
    """Tell whether there is a snapshot of a search, so that it can be gone on with."""
    location = storage.locate(plan.storage).child(plan.name)
    return any(name.startswith("experiment_state-") for name in location.names())


def _write_request(plan: SearchPlan) -> None:
    location = storage.locate(plan.storage).child(plan.name)
    location.write_bytes(REQUEST_FILE, json.dumps(plan.request(), indent=2).encode())


def lease_of(name: str, location: storage.Location) -> Lease:
    """Return the right to drive a search, to be claimed."""
    return Lease(location, f"The search {name}", "give another --name")


def _begun(plan: SearchPlan) -> UserError:
    return UserError(
        f"There is a search {plan.name} in {plan.storage}; go on with --resume {plan.name}, or "
        "give another --name."
    )


def _trainable(plan: SearchPlan) -> Callable[[dict[str, Any]], None]:
    options = plan.options
    resources = worker_resources(options)
    setup = TrialSetup(
        space=plan.space,
        objectives=options.objectives,
        rungs=plan.rungs,
        folder=storage.join(plan.storage, plan.name),
        val_sequences=options.val_sequences,
        workers=options.workers_per_trial,
        worker_resources=resources,
        crop_cache=plan.identity,
        crop_cache_bytes=int(options.crop_cache_gb * 2**30),
        settings=plan.settings(),
        sample_every_s=interval_s(),
    )
    several = options.workers_per_trial > 1

    def trial(config: dict[str, Any]) -> None:
        (run_group_trial if several else run_trial)(config, setup)

    # Workers of a group bring their own resources: what the trial held besides would be lost, but
    # a bundle must hold something.
    bundle = {"memory": 1.0} if several else {k: v for k, v in resources.items() if v > 0}
    return tune.with_resources(trial, tune.PlacementGroupFactory([bundle]))


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.trial_id}"


def _filesystem(plan: SearchPlan) -> Any:
    location = storage.locate(plan.storage)
    return None if location.is_local else location.filesystem


def _drive(
    plan: SearchPlan,
    make_tuner: Callable[[], tune.Tuner],
    lease: Lease,
    *,
    parent_run_id: str | None,
    git_revision: str | None,
    resumes: bool = False,
) -> SearchOutcome:
    """Run or go on, and write the outcome, whatever happened."""
    os.environ |= TUNE_ENVIRONMENT
    board = Leaderboard(objectives=plan.options.objectives, rungs=plan.rungs)
    plan.folder.mkdir(parents=True, exist_ok=True)
    location = storage.locate(plan.storage).child(plan.name)
    parent = open_search_run(plan, parent_run_id=parent_run_id, git_revision=git_revision)
    parent.log_params(
        {f"search.{k}": v for k, v in dataclasses.asdict(plan.options).items() if v is not None}
        | {"search.space": plan.space.to_lines(), "search.rung_steps": list(plan.rungs.steps)}
        | {"base": to_dict(plan.space.base)}
    )
    session = SearchSession(
        plan.name,
        identity=plan.identity,
        folder=plan.folder,
        board=board,
        parent=parent,
        experiment=plan.options.experiment,
        num_trials=plan.options.trials,
        remember_parent=lambda run_id: location.write_bytes(PARENT_FILE, run_id.encode()),
        lease=lease,
        on_resume=(lambda: _write_request(plan)) if resumes else None,
        need=worker_resources(plan.options),
        about=_about_trials(plan),
        git_revision=git_revision,
    )
    parent.share_view(plan.identity, _table_of_trials(plan))
    parent.log_inputs(_inputs(plan.space.base.data, plan.space.base.val_data))
    _quieten_tune()
    finished = False
    try:
        with (
            written_to(parent),
            kept_handlers(),
            _cache_here(plan),
            judged(session),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", DeprecationWarning)
            results = make_tuner().fit()
        finished = True
    finally:
        interrupted = session.interrupted
        lost = lease.is_lost_now()
        endings = session.end(close=not lost)
        if not finished and not lost:
            stopped = isinstance(sys.exception(), KeyboardInterrupt)
            say_what_is_left([*endings, parent.end("KILLED" if stopped else "FAILED")])
    lease.check()
    _remove_caches(plan)
    if not interrupted:
        again = {row.trial_id for row in board.rows.values() if row.can_be_tried_again}
        for trial_id in set(location.child(BETWEEN_RUNGS).folders()) - again:
            location.child(BETWEEN_RUNGS).delete_folder(trial_id)
        if not again:
            location.delete_folder(BETWEEN_RUNGS)
        _sweep_trials(location, results)
    return write_outcome(plan, board, parent, endings, interrupted=interrupted)


def open_search_run(
    plan: SearchPlan, *, parent_run_id: str | None = None, git_revision: str | None = None
) -> Run:
    """Open the MLflow run of a search, or go on with it.

    Args:
        plan: of the search.
        parent_run_id: of the run that it belongs to, if any.
        git_revision: of the code.
    """
    location = storage.locate(plan.storage).child(plan.name)
    known = location.read_bytes(PARENT_FILE).decode() if location.exists(PARENT_FILE) else None
    return open_run(
        plan.options.experiment,
        plan.name,
        folder=plan.folder / "mlflow-parent",
        run_id=known,
        parent_run_id=parent_run_id,
        tags={
            "lorat.search": plan.name,
            "lorat.kind": "search",
            "git_revision": git_revision or "unknown",
        },
    )


def _about_trials(plan: SearchPlan) -> AboutTrial:
    """Return what gives the parameters, by the names of a training's, and the data of a trial."""

    def about(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, str]]]:
        config = plan.space.configure(values)
        about = to_dict(config)
        for path in plan.space.tracking:  # known when the trial's weights have tracked
            del about["tracking"][path.removeprefix(TRACKING)]
        return about, _inputs(config.data, config.val_data)

    return about


def _table_of_trials(plan: SearchPlan) -> dict[str, Any]:
    """Return the view that has the trials, and the winner's training, with what they differ in."""
    objectives = plan.options.objectives
    return table_view(
        plan.space.dimensions,
        [metric_name(name) for name in dict.fromkeys((*objectives, "ao", "loss"))],
        f"tags.`lorat.search` = '{plan.name}' AND tags.`mlflow.parentRunId` != ''",
        descending=METRICS[objectives[0]].sign > 0,
    )


@functools.cache
def _inputs(data: str, val_data: str | None) -> list[dict[str, str]]:
    """Return the data sets of trials as inputs of their runs."""
    return inputs_of(
        resolve_sources(data, "train"), resolve_sources(val_data, "val") if val_data else ()
    )


def _sweep_trials(location: storage.Location, results: tune.ResultGrid) -> None:
    """Remove checkpoints of trials that Ray Tune does not know of: it was killed in between."""
    for result in (results[number] for number in range(len(results))):
        kept = {
            checkpoint.path.rpartition("/")[2] for checkpoint, _ in result.best_checkpoints or ()
        }
        trial = location.child(result.path.rpartition("/")[2])
        for name in trial.folders():
            if kept and name.startswith("checkpoint_") and name not in kept:
                trial.delete_folder(name)


def _quieten_tune() -> None:
    """Drop Tune's own remarks on failed trials, result files that are off, and resuming."""
    dropped = ("Trials did not", "Failed to fetch metrics", "Experiment has been interrupted")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(dropped)

    for name in ("ray.tune.tune", "ray.tune.analysis.experiment_analysis"):
        logging.getLogger(name).addFilter(keep)


def _cache_here(plan: SearchPlan) -> contextlib.AbstractContextManager[None]:
    """Keep the search's crop cache on this machine as long as this process lives."""
    max_bytes = int(plan.options.crop_cache_gb * 2**30)
    return driven_here(plan.identity, max_bytes) if max_bytes else contextlib.nullcontext()


def _remove_caches(plan: SearchPlan) -> None:
    """Remove the search's crop cache from every node."""
    if not plan.options.crop_cache_gb:
        return
    task = ray.remote(num_cpus=0)(remove_cache)
    pending = [
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        ).remote(plan.identity)
        for node in ray.nodes()
        if node["Alive"]
    ]
    ray.wait(pending, num_returns=len(pending), timeout=30)
