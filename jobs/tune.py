"""Search over LoRA rank, learning rate, head depth and any other field of the configuration.

python jobs/tune.py --trials 32
python jobs/tune.py --variant B-224 --data lasot=URI,got10k=URI --val-data URI --address HOST:PORT
python jobs/tune.py --resume NAME
"""

from __future__ import annotations

import bootstrap

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Annotated

import command
import flags
import tyro

from lorat.config.training import TrainConfig
from lorat_platform import cluster
from lorat_platform.cluster.phases import Phases
from lorat_platform.search.driver import resume_search, run_search
from lorat_platform.search.plan import (
    SearchOptions,
    check_data,
    check_unchanged,
    default_config,
    make_plan,
    read_plan,
)
from lorat_platform.search.results.final import train_winner
from lorat_platform.search.results.outcome import SearchOutcome, say_where_it_is, search_description

log = logging.getLogger(__name__)

FLAT = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Search for a good configuration and write it to a file that jobs/train.py takes."""

    config: Annotated[TrainConfig, FLAT] = field(default_factory=default_config)
    search: Annotated[SearchOptions, FLAT] = field(default_factory=SearchOptions)
    resume: str | None = None
    """Go on with the search of this name, up to --trials, also with trials that failed through no
    fault of theirs; --storage, --trust-search-folder, --final, --dry-run and --address count, too,
    all else is as it was. It runs code that Ray Tune has put into the
    search's folder: a local one must be yours alone to write, up to the storage; an object store
    must be the one that LORAT_STORAGE names, or where you began the search from this machine."""
    trust_search_folder: bool = False
    """Go on also where others may have written the folder, as with a --storage in an object store
    that somebody gave you with the name; whoever wrote it runs code with your rights."""
    final: bool = False
    """Train the winner in full afterwards and register it as lorat@candidate."""
    dry_run: bool = False
    """Check everything, print the plan and exit."""
    address: str | None = None
    """Ray cluster, host:port; none means RAY_ADDRESS, or an embedded Ray."""


def main() -> int:
    """Run the job."""
    options = flags.parse(Options, description=__doc__)
    if options.resume is not None:
        plan = read_plan(
            options.resume, options.search.storage, trust_folder=options.trust_search_folder
        )
        # What is not given is as it was.
        was = Options(config=plan.space.base, search=plan.options)
        options = flags.parse(Options, default=was, description=__doc__)
        check_unchanged(plan, options.config, options.search)
        plan = dataclasses.replace(plan, options=options.search)
    else:
        plan = make_plan(options.config, options.search)
    log.info("%s", plan.text())
    if options.dry_run:
        return 0
    with Phases() as phases:
        phases.begin("opening the data")
        check_data(plan)
    revision = command.git_revision(bootstrap.ROOT)
    with cluster.connected(options.address) as ray_cluster:
        log.info("Searching with %s.", ray_cluster)
        if options.resume is not None:
            outcome = resume_search(
                plan.name,
                options.search.storage,
                trials=options.search.trials,
                trust_folder=options.trust_search_folder,
                git_revision=revision,
            )
        else:
            outcome = run_search(plan, git_revision=revision)
        code = _conclude(outcome)
        if options.final and code == 0:
            train_winner(outcome, ray_cluster, git_revision=revision)
    return code


def _conclude(outcome: SearchOutcome) -> int:
    log.info("\n%s\n", search_description(outcome.plan, outcome.board).replace("\n\n", "\n"))
    log.info("table   %s", outcome.plan.folder / "results" / "trials.csv")
    if outcome.best_config_file is not None:
        log.info("best    python jobs/train.py --config %s", outcome.best_config_file)
    say_where_it_is(outcome)
    if outcome.interrupted:
        storage = outcome.plan.options.storage
        where = f" --storage {storage}" if storage else ""
        log.info("go on   python jobs/tune.py --resume %s%s", outcome.plan.name, where)
        return command.EXIT_INTERRUPTED
    if outcome.best is None:
        reasons = [row.reason for row in outcome.board.rows.values() if row.reason]
        log.error(
            "No trial finished, so there is no best configuration; the first one failed with: %s",
            reasons[0] if reasons else "unknown",
        )
        return command.EXIT_FAILURE
    return 0


if __name__ == "__main__":
    command.run(main)
