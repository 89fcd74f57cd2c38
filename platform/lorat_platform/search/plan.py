"""What a search is asked to do, checked before anything starts."""

from __future__ import annotations

import dataclasses
import datetime
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from lorat.config.bounds import Bounds, Count, Few, Seed, check_bounds
from lorat.config.fields import flag, from_dict, to_dict
from lorat.config.json_files import read_json_at
from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.files import storage
from lorat.files.home import home, storage_address
from lorat.metrics.catalogue import MAIN, METRICS, SCORES, listed
from lorat_platform.data.sources import open_datasets, with_whole_paths
from lorat_platform.search.algorithms import (
    SchedulerName,
    SearcherName,
    build_scheduler,
    build_searcher,
)
from lorat_platform.search.dimension import Dimension
from lorat_platform.search.race.options import RACE_FILE, RaceOptions
from lorat_platform.search.rungs import Rungs
from lorat_platform.search.settings import judge, settings_of
from lorat_platform.search.space import Coupling, SearchSpace, build_space
from lorat_platform.search.space_file import read_space_file
from lorat_platform.search.trust import check_trusted

REQUEST_FILE = "search.json"
"""Where a search's folder keeps the request."""
RACE = tuple(each.name for each in dataclasses.fields(RaceOptions))
"""Options of the race at a search's end."""
RESUMED_WITH = ("trials", "storage", *RACE)
"""Options that may differ when a search is gone on with; of a race that has begun, none may but
whether it goes on."""
SMALL_SCHEDULE = {"epochs": 32, "pairs_per_epoch": 512, "batch_size": 16}
"""Full schedule of a trial of a small variant where none is given: 1024 steps, 16 of warm-up.

After a sixteenth of it, the first rung, good and bad configurations already track differently.
"""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What to search, how, and with which resources."""

    trials: Annotated[int, Bounds(1, 100_000)] = 32
    """Configurations to try, 1 to 100,000."""
    space: tuple[str, ...] = ()
    """Entries that add or replace fields, such as lora.dropout=uniform(0,0.2) or head.depth=3."""
    space_file: str | None = None
    """YAML or JSON, with comments, that holds the whole space instead of the default one; --space
    adds to it. platform/lorat_platform/search/default-space.yaml is one to copy."""
    lr_with_batch: Coupling = "none"
    """How a trial's learning rates follow its batch size, where that is searched: none, linear (in
    proportion), or sqrt (with its root, usual for AdamW); lr is then for the base's batch size."""
    tracking_settings: Annotated[int, Bounds(1, 1000)] = 8
    """Settings of the searched tracking.* fields with which every trial's weights track at every
    rung, 1 to 1000; each costs an evaluation, none a training."""
    objective: Annotated[
        str,
        Doc(f"What to optimise, or several by commas for the Pareto front: {listed([*METRICS])}."),
    ] = MAIN
    searcher: SearcherName = "tpe"
    """Who proposes configurations: tpe (Optuna) or random."""
    scheduler: SchedulerName = "asha"
    """Who stops trials early: asha, median, hyperband, or none."""
    reduction: Annotated[int, Bounds(2, 1000)] = 4
    """About one trial in so many goes on from a rung, 2 to 1000; rungs grow by the same factor."""
    rungs: Annotated[int, Bounds(1, 32)] | None = None
    """Evaluations in a trial's life, 1 to 32; the last is at its end, the earlier ones judge the
    mean of the weights over the second half of the steps up to them. None means 3, or the end alone
    where no scheduler compares them."""
    max_steps: Count | None = None
    """Steps after which every trial ends, 1 to 1,000,000,000; none means the full schedule, which
    the learning rate follows in any case."""
    val_sequences: Count | None = None
    """Validation sequences per evaluation, 1 to 1,000,000,000; none means all."""
    search_seed: Seed = 0
    """Seed of the searcher, 0 to 4,294,967,295; the trials' own is --seed."""

    workers_per_trial: Few = 1
    """Training processes of one trial, 1 to 1024."""
    cpus_per_trial: Annotated[float, Bounds(0, 1024)] = 1.0
    """CPUs of every training process, 0 to 1024."""
    gpus_per_trial: Annotated[float, Bounds(0, 64)] | None = None
    """GPUs of every training process, 0 to 64, such as 0.5; none means 1 where there are any."""
    concurrent: Annotated[int, Bounds(1, 10_000)] | None = None
    """Most trials at once, 1 to 10,000; none means as many as fit."""
    crop_cache_gb: Annotated[float, Bounds(0, 100_000)] = 2.0
    """Bound of the decoded crops that trials on a node share, 0 to 100,000; 0 means none."""

    name: str | None = None
    """Name of the search; none means search-, the time, and four random digits."""
    storage: str | None = None
    """Folder or s3:// / gs:// address for snapshots and checkpoints; none means LORAT_STORAGE of
    the environment, or runs/ at home."""
    experiment: str = "lorat-search"
    """MLflow experiment."""

    def __post_init__(self) -> None:
        check_bounds(self, flag)
        unknown = [o for o in self.objectives if o not in METRICS]
        if unknown or len(set(self.objectives)) != len(self.objectives):
            raise UserError(
                f"--objective is {self.objective}; give one or more of {', '.join(METRICS)}, "
                "each once."
            )
        if self.scheduler == "hyperband" and self.concurrent is not None:
            raise UserError(
                "--concurrent does not work with --scheduler hyperband, which pauses trials; "
                "leave it out, or use asha."
            )
        if self.scheduler == "hyperband" and self.workers_per_trial > 1:
            raise UserError(
                f"--workers-per-trial is {self.workers_per_trial} with --scheduler hyperband, "
                "which cannot limit how many such trials run at once; give 1, or use asha."
            )
        if self.name is not None and not re.fullmatch(r"[\w][\w.-]*", self.name):
            raise UserError(
                f"--name is {self.name!r}; give letters, digits, dots, dashes and underscores."
            )

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives, the first first."""
        return tuple(name.strip() for name in self.objective.split(","))


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """A request that was checked: nothing of it can fail for a reason known beforehand."""

    name: str
    identity: str
    """16 hexadecimal digits that no other search has, whatever their names and home folders: what
    is shared on a node is called by them."""
    options: SearchOptions
    space: SearchSpace
    rungs: Rungs
    from_file: tuple[Dimension, ...] | None = None
    """What the file held that the space was read from, if any; going on needs no file."""
    race: RaceOptions = field(default_factory=RaceOptions)
    """What follows the trials."""

    def __post_init__(self) -> None:
        if self.race.certify and self.options.objectives[0] not in SCORES:
            raise UserError(
                f"--certify compares sequences, of which none has {self.options.objectives[0]}; "
                f"leave it out, or give one of {', '.join(SCORES)} as the first --objective."
            )

    @property
    def folder(self) -> Path:
        """The search's folder on this machine."""
        return home() / "runs" / self.name

    @property
    def storage(self) -> str:
        """Where Ray Tune keeps searches, this one in a folder of its name."""
        return storage_address(self.options.storage)

    def request(self) -> dict[str, Any]:
        """Return what a search's folder keeps, for :func:`read_plan`."""
        return {
            "identity": self.identity,
            "options": dataclasses.asdict(self.options),
            "race": dataclasses.asdict(self.race),
            "config": to_dict(self.space.base),
            "space": None
            if self.from_file is None
            else [{"path": d.path, "kind": d.kind, "values": d.values} for d in self.from_file],
        }

    def settings(self) -> tuple[dict[str, Any], ...]:
        """Return the tracking settings that every trial is evaluated with."""
        return settings_of(self.space, self.options.tracking_settings, self.options.search_seed)

    def text(self) -> str:
        """Say what will be done."""
        options, base = self.options, self.space.base
        stops = ", ".join(str(step) for step in self.rungs.steps)
        notes = []
        if "batch_size" in self.space.dimensions:
            rates = {
                "none": "",
                "linear": "; learning rates grow in proportion to the batch size",
                "sqrt": "; learning rates grow with the root of the batch size",
            }
            notes.append(
                f"  a step is {base.batch_size} pairs, also of a trial with another batch size"
                f"{rates[options.lr_with_batch]}"
            )
        if self.space.tracking:
            notes.append(
                f"  each trial's weights track with {len(self.settings())} settings of "
                f"{', '.join(self.space.tracking)} at every rung"
            )
        if self.race.certify:
            notes.append(
                f"  the best {self.race.certify_top} and the default then race, each trained for "
                f"{base.total_steps} steps with up to {self.race.certify_seeds} new seeds"
            )
        return "\n".join(
            [
                f"Search {self.name}: {options.trials} trials of {base.variant} on {base.data} for "
                f"{' and '.join(options.objectives)} on {base.val_data}",
                *(f"  {line}" for line in self.space.to_lines()),
                f"  {options.searcher} proposes, {options.scheduler} compares at steps {stops} of "
                f"the {base.total_steps}-step schedule (batch {base.batch_size})",
                *notes,
            ]
        )


def default_config() -> TrainConfig:
    """Return what is searched where nothing is given: a trial costs two fifths of one of T-168."""
    return TrainConfig(variant="T-112")


def make_plan(
    config: TrainConfig,
    options: SearchOptions,
    *,
    from_file: tuple[Dimension, ...] | None = None,
    race: RaceOptions | None = None,
) -> SearchPlan:
    """Check a request and fill in what it leaves open.

    Args:
        config: of the trials, but for what is searched.
        options: of the search.
        from_file: what its file held when the search began; none means that it is read now, if
            the options name one.
        race: what follows the trials; none means no race.

    Raises:
        UserError: if anything in it cannot be.
    """
    if config.model_variant.recipe == "small" and config.recipe in ("auto", "small"):
        missing: dict[str, Any] = {
            k: v for k, v in SMALL_SCHEDULE.items() if getattr(config, k) is None
        }
        config = dataclasses.replace(config, **missing)
    config = with_whole_paths(config)
    if from_file is None and options.space_file is not None:
        from_file = read_space_file(Path(options.space_file), config)
    space = build_space(
        config, options.space, instead=from_file, lr_with_batch=options.lr_with_batch
    )
    if space.base.val_data is None:
        raise UserError("A search needs validation sequences with full frames; give --val-data.")
    total = space.base.total_steps
    max_steps = min(options.max_steps or total, total)
    num_rungs = options.rungs or (1 if options.scheduler == "none" else 3)
    rungs = Rungs(max_steps=max_steps, reduction=options.reduction, num_rungs=num_rungs)
    # Two that start in the same second are two searches.
    stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    plan = SearchPlan(
        name=options.name or f"search-{stamp}",
        identity=secrets.token_hex(8),
        options=options,
        space=space,
        rungs=rungs,
        from_file=from_file,
        race=race or RaceOptions(),
    )
    _check_trials(plan)
    algorithms(plan, max_concurrent=1)
    return plan


def _check_trials(plan: SearchPlan) -> None:
    """Refuse a space whose trials could not be compared at the rungs, or would be all alike.

    Raises:
        UserError: what does not fit, and what to change.
    """
    space, options, rungs = plan.space, plan.options, plan.rungs
    if space.tracking and judge(options.objectives) is None:
        raise UserError(
            f"--objective {options.objective} says nothing about how trials track, so it cannot "
            f"choose among {', '.join(space.tracking)}; add one of {', '.join(SCORES)}, or do not "
            "search these fields."
        )
    if not space.trained and options.trials > 1:
        raise UserError(
            f"--trials is {options.trials} but only {', '.join(space.tracking)} is searched, so "
            "all trainings would be the same; give --trials 1."
        )
    for path, dimension in space.trained.items():
        for value in dimension.values:
            config = space.configure({path: value})
            assert config.batch_size is not None
            steps = rungs.steps_of(config.total_steps, space.base.total_steps)
            if len({0, *steps}) <= rungs.num_rungs:
                raise UserError(
                    f"{dimension.said} has {value}, with which a trial takes {steps[-1]} steps, "
                    f"too few for {rungs.num_rungs} rungs that differ; give smaller ones, or fewer "
                    "--rungs."
                )
            if config.batch_size < options.workers_per_trial:
                raise UserError(
                    f"{dimension.said} has {value}, a batch of {config.batch_size} for "
                    f"{options.workers_per_trial} workers; give each of them a pair at least."
                )


def check_data(plan: SearchPlan) -> None:
    """Open the datasets of the base configuration and of all values that others follow from.

    Raises:
        UserError: if one is missing, damaged, or not fit for its purpose.
    """
    space = plan.space
    open_datasets(space.base)
    for path, dimension in space.dimensions.items():
        if path not in ("variant", "data", "val_data") and not path.startswith("sampling."):
            continue
        for value in dimension.values:
            config = space.configure({path: value})
            if config.val_data is None:
                raise UserError(
                    f"{dimension.said} leaves out the validation sequences, which a search "
                    "needs; leave none out of the choice."
                )
            try:
                open_datasets(config)
            except UserError as error:
                raise UserError(f"{dimension.said} cannot be with {value}: {error}") from error


def read_plan(
    name: str, storage_path: str | None = None, *, trust_folder: bool = False
) -> SearchPlan:
    """Read the request of a search back, to go on with it.

    Args:
        name: of the search.
        storage_path: where it is; none as in :class:`SearchOptions`.
        trust_folder: believe its folder whoever may have written it.

    Raises:
        UserError: if there is none of that name, or its folder is not trusted.
    """
    root = storage.locate(storage_address(storage_path))
    if not storage.is_plain_name(name) or not root.child(name).exists(REQUEST_FILE):
        raise UserError(f"There is no search {name} in {root.uri}; give its --name or --storage.")
    location = root.child(name)
    if not trust_folder:
        check_trusted(name, location)
    request = read_json_at(
        location,
        REQUEST_FILE,
        "begin the search anew under another --name",
        shape={
            "identity": str,
            "options": dict,
            "race": dict,
            "config": dict,
            "space": list | None,
        },
    )
    if not re.fullmatch("[0-9a-f]{16}", request["identity"]):
        raise UserError(
            f"{location.child(REQUEST_FILE).uri} is damaged: the identity is no 16 hexadecimal "
            "digits; begin the search anew under another --name."
        )
    known = {"name": name, "storage": storage_path, "space_file": None}
    options = from_dict(SearchOptions, request["options"] | known)
    held = request["space"]
    from_file = None if held is None else tuple(from_dict(Dimension, each) for each in held)
    plan = make_plan(
        from_dict(TrainConfig, request["config"]),
        options,
        from_file=from_file,
        race=from_dict(RaceOptions, request["race"]),
    )
    return dataclasses.replace(plan, identity=request["identity"])


def check_unchanged(
    plan: SearchPlan,
    config: TrainConfig,
    options: SearchOptions,
    race: RaceOptions | None = None,
    *,
    also: tuple[str, ...] = (),
) -> None:
    """Refuse what cannot be changed when a search is gone on with: all but :data:`RESUMED_WITH`.

    Args:
        plan: of the search.
        config: of its trials, as asked for now.
        options: of the search, as asked for now.
        race: at its end, as asked for now; none means as it was.
        also: of :data:`RESUMED_WITH`, what may not differ either.

    Raises:
        UserError: with every option that differs, and what the search has.
    """
    base, options_were = to_dict(plan.space.base), dataclasses.asdict(plan.options)
    had = _flat({"": base | options_were | dataclasses.asdict(plan.race)})
    now = to_dict(with_whole_paths(config)) | dataclasses.asdict(options)
    asked = _flat({"": now | dataclasses.asdict(race or plan.race)})
    asked["name"] = asked["name"] or plan.name
    had["space_file"], file = "as it was", asked.pop("space_file")
    if file is None or read_space_file(Path(file), plan.space.base) == plan.from_file:
        asked["space_file"] = had["space_file"]
    free = set(RESUMED_WITH) - set(also)
    if storage.locate(plan.storage).child(plan.name).exists(RACE_FILE):
        free -= {"trials", *RACE} - {"certify"}
    changed = [name for name in had if asked.get(name) != had[name] and name not in free]
    if changed:
        what = ", ".join(f"{flag(name)} {had[name]}" for name in changed)
        raise UserError(
            f"{' and '.join(map(flag, changed))} cannot be changed when a search is gone on with; "
            f"leave out what is not as it was ({what}), or search again under another --name."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their paths."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}.{name}".strip(".")
        flat |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return flat


def algorithms(plan: SearchPlan, *, max_concurrent: int) -> tuple[Any, Any]:
    """Build searcher and scheduler.

    Raises:
        UserError: if they cannot do what is asked.
    """
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
