"""Search over LoRA rank, learning rate, head depth and any other field of the configuration.

python jobs/tune.py --trials 32
python jobs/tune.py --trials 32 --certify
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
from lorat.errors import UserError
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
from lorat_platform.search.race.certification import certify
from lorat_platform.search.race.options import RaceOptions
from lorat_platform.search.results.final import train_winner
from lorat_platform.search.results.outcome import say_how_it_ended

log = logging.getLogger(__name__)

FLAT = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Search for a good configuration and write it to a file that jobs/train.py takes."""

    config: Annotated[TrainConfig, FLAT] = field(default_factory=default_config)
    search: Annotated[SearchOptions, FLAT] = field(default_factory=SearchOptions)
    race: Annotated[RaceOptions, FLAT] = field(default_factory=RaceOptions)
    resume: str | None = None
    """Go on with the search of this name, up to --trials, also with trials that failed through no
    fault of theirs, and with its race, which --certify begins; --storage, --trust-search-folder,
    --final, --dry-run and --address count, too, all else is as it was. It runs code that Ray Tune
    has put into the search's folder: a local one must be yours alone to write, up to the storage;
    an object store must be the one that LORAT_STORAGE names, or where you began the search from
    this machine."""
    trust_search_folder: bool = False
    """Go on also where others may have written the folder, as with a --storage in an object store
    that somebody gave you with the name; whoever wrote it runs code with your rights."""
    final: bool = False
    """Train the winner in full afterwards and register it as lorat@candidate."""
    dry_run: bool = False
    """Check everything, print the plan and exit."""
    address: str | None = None
    """Ray cluster, host:port; none means RAY_ADDRESS, or an embedded Ray."""

    def __post_init__(self) -> None:
        if self.final and self.race.certify:
            raise UserError(
                "--final and --certify were both given; a race trains in full, leave --final out."
            )


def main() -> int:
    """Run the job."""
    options = flags.parse(Options, description=__doc__)
    if options.resume is not None:
        plan = read_plan(
            options.resume, options.search.storage, trust_folder=options.trust_search_folder
        )
        # What is not given is as it was.
        was = Options(config=plan.space.base, search=plan.options, race=plan.race)
        options = flags.parse(Options, default=was, description=__doc__)
        check_unchanged(plan, options.config, options.search, options.race)
        plan = dataclasses.replace(plan, options=options.search, race=options.race)
    else:
        plan = make_plan(options.config, options.search, race=options.race)
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
                race=plan.race,
                trust_folder=options.trust_search_folder,
                git_revision=revision,
            )
        else:
            outcome = run_search(plan, git_revision=revision)
        say_how_it_ended(outcome)
        if outcome.interrupted or outcome.best is None:
            return command.EXIT_INTERRUPTED if outcome.interrupted else command.EXIT_FAILURE
        if options.final:
            train_winner(outcome, ray_cluster, git_revision=revision)
        if not plan.race.certify:
            return 0
        trust = options.trust_search_folder
        certified = certify(outcome, trust_folder=trust, git_revision=revision)
    if certified.interrupted:
        return command.EXIT_INTERRUPTED
    return 0 if certified.race.version else command.EXIT_FAILURE


if __name__ == "__main__":
    command.run(main)
