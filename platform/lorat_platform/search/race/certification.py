"""The end of a search that certifies its winner: the race, what it says, and what is registered."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from lorat.config.fields import to_dict
from lorat.errors import UserError, named
from lorat.files import storage
from lorat.metrics.plots import png
from lorat_platform.recording import pages
from lorat_platform.recording.console_log import written_to
from lorat_platform.recording.run import Run, Status
from lorat_platform.registry.versions import MODEL_NAME
from lorat_platform.runs.claim import Lease
from lorat_platform.search.driver import lease_of, open_search_run, writable_only_here
from lorat_platform.search.race import report
from lorat_platform.search.race.contenders import Contender, contenders_of
from lorat_platform.search.race.options import RACE_FILE
from lorat_platform.search.race.race import Race, Round, read_race, run_race
from lorat_platform.search.race.rounds import prune, run_round
from lorat_platform.search.race.winner import register, winner_of
from lorat_platform.search.results.outcome import (
    SearchOutcome,
    say_how_to_go_on,
    search_description,
)
from lorat_platform.training.finish import next_steps

log = logging.getLogger(__name__)

CERTIFIED_FILE = "certified_config.json"


@dataclass(frozen=True, kw_only=True)
class Certified:
    """What came of a race."""

    race: Race
    interrupted: bool


@writable_only_here()
def certify(
    outcome: SearchOutcome, *, trust_folder: bool = False, git_revision: str | None = None
) -> Certified:
    """Let the best trials and the default race, and register what that shows to be best.

    A race that was begun goes on; one that is over is told again, and registered once.

    Args:
        outcome: of the search, which found something.
        trust_folder: as of :func:`lorat_platform.search.driver.resume_search`.
        git_revision: of the code.

    Raises:
        UserError: if another process drives it, a contender's surroundings failed in every try, or
            MLflow does not take the model.
    """
    plan = outcome.plan
    location = storage.locate(plan.storage).child(plan.name)
    with lease_of(plan.name, location).claim() as lease:
        race = _begun(outcome, location)
        run = open_search_run(plan, git_revision=git_revision)

        def train(seed: int, contenders: Sequence[Contender]) -> Round | None:
            lease.check()
            number = len(race.rounds) + 1
            names = (f"{each.name} as trial {n}" for n, each in enumerate(contenders))
            log.info("race: round %d trains with seed %d: %s", number, seed, ", ".join(names))
            return run_round(
                plan,
                number,
                seed,
                contenders,
                parent_run_id=run.reference,
                trust_folder=trust_folder,
                git_revision=git_revision,
            )

        def after_round(race: Race) -> None:
            lease.check()
            race.save(location)
            log.info("%s", report.after_round(race))

        status: Status = "FAILED"
        try:
            with written_to(run):
                finished = run_race(race, train, after_round)
                if finished:
                    _conclude(outcome, race, run, lease, git_revision)
            status = "FINISHED" if finished else "KILLED"
        except KeyboardInterrupt:
            finished, status = False, "KILLED"
        finally:
            if not lease.is_lost_now():  # else the run is another driver's
                run.close(status)
    if not finished:
        say_how_to_go_on(plan)
    return Certified(race=race, interrupted=not finished)


def _begun(outcome: SearchOutcome, location: storage.Location) -> Race:
    """Return the race of a search as far as it has come."""
    if location.exists(RACE_FILE):
        return read_race(location)
    plan = outcome.plan
    race = Race(
        metric=plan.options.objectives[0],
        seed=plan.space.base.seed,
        options=plan.race,
        contenders=contenders_of(plan.space, outcome.board, plan.race.certify_top),
    )
    race.save(location)
    return race


def _conclude(
    outcome: SearchOutcome, race: Race, run: Run, lease: Lease, git_revision: str | None
) -> None:
    """Say what the race has shown, and register what it has chosen if that was not done."""
    plan, board = outcome.plan, outcome.board
    location = storage.locate(plan.storage).child(plan.name)
    winner = winner_of(race, plan)
    text = f"{report.conclusion(race)}\n\n{report.account(race, board)}"
    log.info("\n%s\n", text.replace("\n\n", "\n"))
    run.log_bytes(report.scores_csv(race), "race/race.csv")
    run.log_bytes(png(report.draw_race(race, plan)), "race/race.png")
    run.set_tags(report.search_tags(race, board))
    told = [search_description(plan, board), text]
    if outcome.table is not None:
        told.append(f"[All trials with their values and scores]({outcome.table})")
    run.set_description("\n\n".join(told))
    if winner is None:
        log.error("No contender was trained to the end, so nothing is registered.")
        return
    file = plan.folder / "results" / CERTIFIED_FILE
    file.write_text(json.dumps(to_dict(winner.config), indent=2) + "\n")
    run.log_artifact(file)
    if race.version is None:
        lease.check()
        try:
            search_run_id = run.wait_for_id(60.0)
        except TimeoutError as error:
            raise UserError(
                f"The model is not registered: {str(error).rstrip('.')}; go on with --resume "
                f"{plan.name} when it does."
            ) from error
        race.version = register(
            race, winner, plan, search_run_id=search_run_id, git_revision=git_revision
        )
        race.save(location)
    keep = [winner.name, *(each.name for each in race.running)]
    prune(race, storage.locate(plan.storage), keep)
    race.save(location)
    told.insert(2, f"Version {race.version} of {MODEL_NAME} is {winner.said}.")
    run.set_description("\n\n".join(told))
    run.set_tags({"lorat.race.version": race.version})
    log.info(
        "model       models:/%s/%s, alias candidate: %s", MODEL_NAME, race.version, winner.said
    )
    log.info("certified   python jobs/train.py --config %s", named(file))
    log.info("model page  %s", pages.address(pages.version_page(MODEL_NAME, race.version)))
    for line in next_steps(winner.config, race.version, larger=False):
        log.info("%s", line)
