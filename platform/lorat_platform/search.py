"""Search over configuration fields with Ray Tune: plan, run, resume, and write the outcome.

Everything that a search needs to go on after any crash lies in its folder ``STORAGE/NAME``: the
request (``search.json``), Ray Tune's snapshot, and the checkpoints of the trials.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from lorat import storage
from lorat.config import TrainConfig, from_dict, to_dict
from lorat.errors import UserError
from lorat.home import home
from lorat_platform.crop_cache import cache_root, remove_cache
from lorat_platform.leaderboard import Leaderboard, TrialRow
from lorat_platform.scheduling import (
    OBJECTIVES,
    Rungs,
    SchedulerName,
    SearcherName,
    build_scheduler,
    build_searcher,
)
from lorat_platform.search_plots import write_plots
from lorat_platform.search_session import SearchCallback, SearchSession
from lorat_platform.sources import parse_sources
from lorat_platform.space import SearchSpace, build_space
from lorat_platform.tracking import Run, open_run
from lorat_platform.training import open_datasets
from lorat_platform.trial import BETWEEN_RUNGS, run_trial
from lorat_platform.trial_group import run_group_trial
from lorat_platform.trial_work import TrialSetup

log = logging.getLogger(__name__)

REQUEST_FILE = "search.json"
PARENT_FILE = "mlflow-run-id"
BEST_FILE = "best_config.json"
SMALL_SCHEDULE = {"epochs": 16, "pairs_per_epoch": 512, "batch_size": 16}
"""Full schedule of a trial of a small variant where none is given: 512 steps, 16 of warm-up.  After
a sixteenth of it, the first rung, good and bad configurations already track differently."""
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


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What to search, how, and with which resources."""

    trials: int = 32
    """Configurations to try."""
    space: tuple[str, ...] = ()
    """Entries that add or replace fields, such as lora.dropout=uniform(0,0.2) or head.depth=3."""
    objective: str = "ao"
    """What to optimise, or several by commas for the Pareto front: ao, auc, sr50, sr75, loss,
    latency (ms per frame), parameters (trained ones)."""
    searcher: SearcherName = "tpe"
    """Who proposes configurations: tpe (Optuna), random, or bohb (with hyperband)."""
    scheduler: SchedulerName = "asha"
    """Who stops trials early: asha, median, hyperband, or none."""
    reduction: int = 4
    """About one trial in so many goes on from a rung; rungs grow by the same factor."""
    rungs: int = 3
    """Comparisons in a trial's life; the last is its end."""
    max_steps: int | None = None
    """Steps after which every trial ends; none means the full schedule, which the learning rate
    follows in any case."""
    val_sequences: int | None = None
    """Validation sequences per evaluation; none means all."""
    search_seed: int = 0
    """Seed of the searcher; the trials' own is --seed."""

    workers_per_trial: int = 1
    """Training processes of one trial."""
    cpus_per_trial: float = 1.0
    """CPUs of every training process."""
    gpus_per_trial: float | None = None
    """GPUs of every training process, such as 0.5; none means 1 where there are any."""
    concurrent: int | None = None
    """Most trials at once; none means as many as fit."""
    crop_cache_gb: float = 2.0
    """Bound of the decoded crops that trials on a node share; 0 means none."""

    name: str | None = None
    """Name of the search; none means search- and the time."""
    storage: str | None = None
    """Folder or s3:// / gs:// address for snapshots and checkpoints; none means runs/ at home."""
    experiment: str = "lorat-search"
    """MLflow experiment."""

    def __post_init__(self) -> None:
        for name, low in (
            ("trials", 1), ("reduction", 2), ("rungs", 1), ("max_steps", 1), ("val_sequences", 1),
            ("workers_per_trial", 1), ("cpus_per_trial", 0), ("gpus_per_trial", 0),
            ("concurrent", 1), ("crop_cache_gb", 0), ("search_seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name.replace('_', '-')} is {value}; give {low} or more.")
        unknown = [o for o in self.objectives if o not in OBJECTIVES]
        if unknown or len(set(self.objectives)) != len(self.objectives):
            raise UserError(
                f"--objective is {self.objective}; give one or more of {', '.join(OBJECTIVES)}, "
                "each once."
            )
        if self.scheduler == "hyperband" and self.concurrent is not None:
            raise UserError(
                "--concurrent does not work with --scheduler hyperband, which pauses trials; "
                "leave it out, or use asha."
            )
        if self.name is not None and (not self.name or "/" in self.name):
            raise UserError(f"--name is {self.name!r}; give a name without a slash.")

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives, the first first."""
        return tuple(name.strip() for name in self.objective.split(","))


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """A request that was checked: nothing of it can fail for a reason known beforehand."""

    name: str
    options: SearchOptions
    space: SearchSpace
    rungs: Rungs

    @property
    def folder(self) -> Path:
        """The search's folder on this machine."""
        return home() / "runs" / self.name

    @property
    def storage(self) -> str:
        """Where Ray Tune keeps searches, this one in a folder of its name."""
        return self.options.storage or str(home() / "runs")

    def text(self) -> str:
        """Say what will be done."""
        options, base = self.options, self.space.base
        stops = ", ".join(str(step) for step in self.rungs.steps)
        return "\n".join(
            [
                f"Search {self.name}: {options.trials} trials of {base.variant} on {base.data} for "
                f"{' and '.join(options.objectives)} on {base.val_data}",
                *(f"  {line}" for line in self.space.describe()),
                f"  {options.searcher} proposes, {options.scheduler} compares at steps {stops} of "
                f"the {base.total_steps}-step schedule (batch {base.batch_size})",
            ]
        )


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """What a search ended with."""

    plan: SearchPlan
    board: Leaderboard
    best: TrialRow | None
    best_config: TrainConfig | None
    best_config_file: Path | None
    run_id: str | None
    interrupted: bool


def make_plan(config: TrainConfig, options: SearchOptions) -> SearchPlan:
    """Check a request and fill in what it leaves open.

    Raises:
        UserError: if anything in it cannot be.
    """
    if config.model_variant.recipe == "small" and config.recipe in ("auto", "small"):
        missing: dict[str, Any] = {
            k: v for k, v in SMALL_SCHEDULE.items() if getattr(config, k) is None
        }
        config = dataclasses.replace(config, **missing)
    space = build_space(whole_paths(config), options.space)
    if space.base.val_data is None:
        raise UserError("A search needs validation sequences with full frames; give --val-data.")
    total = space.base.total_steps
    max_steps = min(options.max_steps or total, total)
    num_rungs = 1 if options.scheduler == "none" else options.rungs
    rungs = Rungs(max_steps=max_steps, reduction=options.reduction, num_rungs=num_rungs)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    plan = SearchPlan(
        name=options.name or f"search-{stamp}", options=options, space=space, rungs=rungs
    )
    _algorithms(plan, max_concurrent=1)
    return plan


def run_search(
    plan: SearchPlan,
    *,
    points: Sequence[Mapping[str, Any]] | None = None,
    git_revision: str | None = None,
) -> SearchOutcome:
    """Run a search on the connected cluster.

    Args:
        plan: the checked request.
        points: configurations to try, instead of the searcher's proposals.
        git_revision: of the code.

    Raises:
        UserError: if a search of that name exists, or no node can hold a trial.
    """
    location = storage.locate(plan.storage).child(plan.name)
    if location.exists(REQUEST_FILE):
        raise UserError(
            f"There is a search {plan.name} in {plan.storage}; go on with --resume {plan.name}, "
            "or give another --name."
        )
    open_datasets(plan.space.base)
    slots = count_slots(plan.options)
    location.make()
    request = {"options": dataclasses.asdict(plan.options), "config": to_dict(plan.space.base)}
    location.write_bytes(REQUEST_FILE, json.dumps(request, indent=2).encode())
    # Hyperband pauses trials, which a limit would count as running.
    limit = 0 if plan.options.scheduler == "hyperband" else slots
    searcher, scheduler = _algorithms(plan, max_concurrent=limit)
    by_itself = plan.options.searcher == "random" or points is not None
    if points is not None:
        searcher = BasicVariantGenerator(
            points_to_evaluate=[dict(point) for point in points], max_concurrent=limit
        )

    def make_tuner() -> tune.Tuner:
        return tune.Tuner(
            _trainable(plan),
            param_space=plan.space.to_tune() if by_itself else {},
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=plan.options.trials,
                # Random search counts for itself.
                max_concurrent_trials=None if by_itself else limit,
                reuse_actors=True,
                trial_dirname_creator=_trial_name,
                trial_name_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=plan.name,
                storage_path=storage.locate(plan.storage).path,
                storage_filesystem=_filesystem(plan),
                callbacks=[SearchCallback(plan.name)],
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
                failure_config=tune.FailureConfig(max_failures=0),
                verbose=0,
            ),
        )

    return _drive(plan, make_tuner, tags={"git_revision": git_revision or "unknown"})


def resume_search(name: str, storage_path: str | None = None) -> SearchOutcome:
    """Go on with a search whose driver or machine died, on the connected cluster.

    Finished trials stay as they are, half-finished ones go on from their last rung, failed ones
    stay failed.

    Raises:
        UserError: if there is no such search, or it never began.
    """
    plan = read_plan(name, storage_path)
    location = storage.locate(plan.storage).child(name)
    count_slots(plan.options)
    if not tune.Tuner.can_restore(location.path, storage_filesystem=_filesystem(plan)):
        raise UserError(f"The search {name} had not begun; start it again under another --name.")

    def make_tuner() -> tune.Tuner:
        return tune.Tuner.restore(
            location.path,
            trainable=_trainable(plan),
            resume_unfinished=True,
            storage_filesystem=_filesystem(plan),
        )

    return _drive(plan, make_tuner)


def read_plan(name: str, storage_path: str | None = None) -> SearchPlan:
    """Read the request of a search back.

    Raises:
        UserError: if there is none of that name.
    """
    root = storage.locate(storage_path or str(home() / "runs"))
    location = root.child(name)
    if not location.exists(REQUEST_FILE):
        raise UserError(f"There is no search {name} in {root.uri}; give its --name or --storage.")
    request = json.loads(location.read_bytes(REQUEST_FILE))
    options = request["options"] | {"name": name, "storage": storage_path}
    options["space"] = tuple(options["space"])
    return make_plan(from_dict(TrainConfig, request["config"]), SearchOptions(**options))


def whole_paths(config: TrainConfig) -> TrainConfig:
    """Name local files and folders by their whole paths: trials have other working directories."""

    def whole(value: str) -> str:
        return str(Path(value).resolve()) if Path(value).exists() else value

    changes: dict[str, Any] = {}
    for name in ("backbone", "init_from"):
        if value := getattr(config, name):
            changes[name] = whole(value)
    for name in ("data", "val_data"):
        if value := getattr(config, name):
            changes[name] = ",".join(
                f"{source.name}={whole(source.uri)}*{source.weight:g}"
                if Path(source.uri).exists()
                else part
                for source, part in zip(parse_sources(value), value.split(","), strict=True)
            )
    return dataclasses.replace(config, **changes)


def count_slots(options: SearchOptions) -> int:
    """Return how many trials fit into the cluster at once, at most ``--concurrent``.

    Raises:
        UserError: if not even one fits.
    """
    need = _worker_resources(options)
    fits = 0
    for node in ray.nodes():
        if node["Alive"]:
            have = node["Resources"]
            counts = [math.floor(have.get(k, 0.0) / v + 1e-9) for k, v in need.items() if v > 0]
            fits += min(counts, default=options.trials)
    slots = fits // options.workers_per_trial
    if slots < 1:
        wanted = " and ".join(f"{v:g} {k}" for k, v in need.items() if v > 0)
        have = ray.cluster_resources()
        there = ", ".join(f"{have.get(k, 0):g} {k}" for k in need)
        raise UserError(
            f"A trial needs {options.workers_per_trial} × {wanted} but the cluster has {there}; "
            "lower --workers-per-trial, --cpus-per-trial or --gpus-per-trial, or add nodes."
        )
    return min(slots, options.trials, options.concurrent or slots)


def _worker_resources(options: SearchOptions) -> dict[str, float]:
    gpus = options.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
    return {"CPU": options.cpus_per_trial, "GPU": gpus}


def _algorithms(plan: SearchPlan, *, max_concurrent: int) -> tuple[Any, Any]:
    options = plan.options
    scheduler = build_scheduler(
        options.scheduler, options.objectives, plan.rungs, searcher=options.searcher
    )
    searcher = build_searcher(
        options.searcher,
        plan.space,
        options.objectives,
        num_trials=options.trials,
        seed=options.search_seed,
        max_concurrent=max_concurrent,
    )
    return searcher, scheduler


def _trainable(plan: SearchPlan) -> Callable[[dict[str, Any]], None]:
    options = plan.options
    resources = _worker_resources(options)
    setup = TrialSetup(
        space=plan.space,
        objectives=options.objectives,
        rungs=plan.rungs,
        folder=storage.join(plan.storage, plan.name),
        val_sequences=options.val_sequences,
        workers=options.workers_per_trial,
        worker_resources=resources,
        crop_cache=plan.name,
        crop_cache_bytes=int(options.crop_cache_gb * 2**30),
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
    plan: SearchPlan, make_tuner: Callable[[], tune.Tuner], *, tags: dict[str, str] | None = None
) -> SearchOutcome:
    """Run or go on, and write the outcome, whatever happened."""
    os.environ |= TUNE_ENVIRONMENT
    board = Leaderboard(objectives=plan.options.objectives, rungs=plan.rungs)
    plan.folder.mkdir(parents=True, exist_ok=True)
    location = storage.locate(plan.storage).child(plan.name)
    known = location.read_bytes(PARENT_FILE).decode() if location.exists(PARENT_FILE) else None
    parent = open_run(
        plan.options.experiment,
        plan.name,
        folder=plan.folder / "mlflow-parent",
        run_id=known,
        tags={"lorat.search": plan.name, "lorat.kind": "search", **(tags or {})},
    )
    parent.log_params(
        {f"search.{k}": v for k, v in dataclasses.asdict(plan.options).items() if v is not None}
        | {"search.space": plan.space.describe(), "search.rung_steps": list(plan.rungs.steps)}
        | {"base": to_dict(plan.space.base)}
    )
    session = SearchSession(
        plan.name,
        folder=plan.folder,
        board=board,
        parent=parent,
        experiment=plan.options.experiment,
        num_trials=plan.options.trials,
        remember_parent=lambda run_id: location.write_bytes(PARENT_FILE, run_id.encode()),
    )
    _quieten_tune()
    finished = False
    try:
        with _stopping_on_sigterm(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            make_tuner().fit()
        finished = True
    finally:
        interrupted = session.interrupted
        session.end()
        if not finished:
            parent.close("FAILED")
    _remove_caches(plan)
    if not interrupted:
        location.delete_folder(BETWEEN_RUNGS)
    return _write_outcome(plan, board, parent, interrupted=interrupted)


@contextlib.contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Let a request to end, as ``ray job stop`` sends it, leave a resumable search like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _quieten_tune() -> None:
    """Drop Tune's own remarks on failed trials and on the result files that are turned off."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("Trials did not", "Failed to fetch metrics"))

    for name in ("ray.tune.tune", "ray.tune.analysis.experiment_analysis"):
        logging.getLogger(name).addFilter(keep)


def _write_outcome(
    plan: SearchPlan, board: Leaderboard, parent: Run, *, interrupted: bool
) -> SearchOutcome:
    """Write table, plots, best configuration and cost, here and to the parent run."""
    cost = board.cost()
    best = board.best()
    files = board.write(plan.folder / "results")
    plots = write_plots(board, plan.space, plan.folder / "results" / "plots")
    best_config: TrainConfig | None = None
    best_file: Path | None = None
    if best is not None:
        best_config = plan.space.configure(best.values)
        best_file = plan.folder / "results" / BEST_FILE
        best_file.write_text(json.dumps(to_dict(best_config), indent=2) + "\n")
        files.append(best_file)
        objectives = {f"best_{name}": best.last(name) for name in plan.options.objectives}
        parent.log_metrics(objectives, cost.steps)
        parent.set_tags({"lorat.best_trial": best.number})
    for path in files:
        parent.log_artifact(path)
    for path in plots:
        parent.log_artifact(path, "plots")
    parent.log_metrics(
        {
            "steps_spent": cost.steps,
            "steps_of_full_runs": cost.full_steps,
            "cost_saved": cost.saved,
            "trial_seconds": cost.seconds,
            "trials_completed": board.count("completed"),
            "trials_stopped": board.count("stopped"),
            "trials_failed": board.count("failed"),
        },
        cost.steps,
    )
    parent.set_description(describe(plan, board))
    parent.close("KILLED" if interrupted else "FINISHED")
    return SearchOutcome(
        plan=plan,
        board=board,
        best=best,
        best_config=best_config,
        best_config_file=best_file,
        run_id=parent.run_id,
        interrupted=interrupted,
    )


def describe(plan: SearchPlan, board: Leaderboard) -> str:
    """Say in Markdown what a search found and what it cost."""
    cost = board.cost()
    best = board.best()
    lines = [f"Search `{plan.name}` over " + ", ".join(f"`{d}`" for d in plan.space.describe())]
    if best is not None:
        found = ", ".join(f"{name} {best.last(name):.4f}" for name in plan.options.objectives)
        values = ", ".join(f"{path} = {value}" for path, value in best.values.items())
        lines.append(f"Best is trial {best.number}: {found} after {best.steps} steps ({values}).")
    lines.append(
        f"{len(board.rows)} trials: {board.count('completed')} completed, "
        f"{board.count('stopped')} stopped early, {board.count('failed')} failed. "
        f"{cost.steps} of the {cost.full_steps} steps of full runs: {cost.saved:.0%} saved."
    )
    if len(plan.options.objectives) > 1:
        front = ", ".join(str(row.number) for row in board.pareto())
        lines.append(f"Pareto front of {' and '.join(plan.options.objectives)}: trials {front}.")
    return "\n\n".join(lines)


def _remove_caches(plan: SearchPlan) -> None:
    """Remove the search's crop cache from every node."""
    if not plan.options.crop_cache_gb:
        return
    name, limit = plan.name, int(plan.options.crop_cache_gb * 2**30)

    def remove() -> None:
        remove_cache(cache_root(limit) / name)

    task = ray.remote(num_cpus=0)(remove)
    pending = [
        task.options(
            scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                node["NodeID"], soft=True
            )
        ).remote()
        for node in ray.nodes()
        if node["Alive"]
    ]
    ray.wait(pending, num_returns=len(pending), timeout=30)
