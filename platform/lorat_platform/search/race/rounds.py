"""A round of a race: a search of its own that trains every contender in full with one seed.

So its trainings run beside each other where slots are free, share decoded crops, are tried again
where their surroundings fail, and go on after any interruption, as those of any search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from lorat.config.json_files import read_json_at
from lorat.errors import UserError
from lorat.files import storage
from lorat_platform.recording.trouble import say_what_is_left
from lorat_platform.runs import checkpoints
from lorat_platform.search.driver import has_begun, resume_search, run_search
from lorat_platform.search.plan import REQUEST_FILE, SearchPlan, make_plan
from lorat_platform.search.race.contenders import Contender
from lorat_platform.search.race.race import Race, Round
from lorat_platform.search.results.board import Leaderboard, TrialRow
from lorat_platform.search.space import SearchSpace, default_dimensions
from lorat_platform.search.trial.progress import sequences_file, sequences_folder


def plan_of_round(
    plan: SearchPlan, number: int, seed: int, contenders: Sequence[Contender]
) -> SearchPlan:
    """Return the search that trains contenders of a search with another seed.

    Args:
        plan: of the search.
        number: of the round, from 1.
        seed: of the round.
        contenders: that it trains.
    """
    options = dataclasses.replace(
        plan.options,
        name=f"{plan.name}-race-{number}",
        trials=len(contenders),
        objective=plan.options.objectives[0],
        searcher="random",
        scheduler="none",
        rungs=1,
        max_steps=None,
        val_sequences=None,
        space=(),
        space_file=None,
    )
    base = dataclasses.replace(plan.space.base, seed=seed)
    # What a contender tracks with is its own: nothing below ``tracking`` is searched.
    trained = plan.space.trained or {each.path: each for each in default_dimensions(base)}
    own = SearchSpace(base=base, dimensions=trained).own_values()
    values = [own, *(each.values for each in contenders)]
    space = tuple(
        dimension.holding([each[path] for each in values if path in each])
        for path, dimension in trained.items()
    )
    return make_plan(base, options, from_file=space)


def run_round(
    plan: SearchPlan,
    number: int,
    seed: int,
    contenders: Sequence[Contender],
    *,
    parent_run_id: str | None = None,
    trust_folder: bool = False,
    git_revision: str | None = None,
) -> Round | None:
    """Train contenders with a seed, or go on with that; none if it was interrupted.

    Args:
        plan: of the search whose race it is.
        number: of the round, from 1.
        seed: of the round.
        contenders: that are left.
        parent_run_id: of the search's MLflow run.
        trust_folder: as of :func:`lorat_platform.search.driver.resume_search`.
        git_revision: of the code.

    Raises:
        UserError: if a contender's surroundings failed in every try.
    """
    of_seed = plan_of_round(plan, number, seed, contenders)
    root = storage.locate(of_seed.storage)
    if has_begun(of_seed):
        outcome = resume_search(
            of_seed.name,
            of_seed.options.storage,
            trust_folder=trust_folder,
            parent_run_id=parent_run_id,
            git_revision=git_revision,
        )
    else:
        if root.child(of_seed.name).exists(REQUEST_FILE):  # killed before there was a snapshot
            root.delete_folder(of_seed.name)
        outcome = run_search(
            of_seed,
            points=[of_seed.space.own_values() | each.values for each in contenders],
            parent_run_id=parent_run_id,
            git_revision=git_revision,
        )
    say_what_is_left(outcome.endings)
    if outcome.interrupted:
        return None
    return round_of(plan, outcome.plan, outcome.board, contenders)


def round_of(
    plan: SearchPlan, of_seed: SearchPlan, board: Leaderboard, contenders: Sequence[Contender]
) -> Round:
    """Gather what the trials of a round have left.

    Args:
        plan: of the search whose race it is.
        of_seed: of the round.
        board: of the round, a trial for each contender in their order.
        contenders: that it trained.

    Raises:
        UserError: if a contender's surroundings failed in every try.
    """
    seed, cost = of_seed.space.base.seed, board.cost()
    found = Round(seed=seed, search=of_seed.name, steps=cost.steps, seconds=cost.seconds)
    rows = sorted(board.rows.values(), key=lambda row: row.number)
    for contender, row in zip(contenders, rows, strict=True):
        if row.can_be_tried_again:
            raise UserError(
                f"The training of {contender.name} with seed {seed} failed by no fault of its own "
                f"({row.reason}); mend that and go on with --resume {plan.name}."
            )
        if row.status == "failed":
            found.failed[contender.name] = row.reason or "unknown"
            continue
        found.scores[contender.name] = _scores(of_seed, row)
        found.trials[contender.name] = row.trial_id
        found.checkpoints[contender.name] = _checkpoint(of_seed, row)
    return found


def _scores(of_seed: SearchPlan, row: TrialRow) -> dict[str, float]:
    """Return the scores of a trial's sequences, the number of their set in front."""
    folder = sequences_folder(storage.locate(of_seed.storage).child(of_seed.name), row.trial_id)
    remedy = "search again under another --name"
    sets = read_json_at(folder, sequences_file(of_seed.rungs.num_rungs - 1), remedy, shape=list)
    metric = of_seed.options.objectives[0]
    return {
        f"{number} {name}": each[metric]
        for number, of_set in enumerate(sets)
        for name, each in of_set.items()
    }


def _checkpoint(of_seed: SearchPlan, row: TrialRow) -> str:
    """Return the address of a trial's weights, which any job can load from there."""
    place = storage.locate(of_seed.storage).child(of_seed.name).child(f"trial-{row.trial_id}")
    name = [each for each in place.folders() if each.startswith("checkpoint_")][-1]
    checkpoints.complete(place, name)
    return place.child(name).uri


def prune(race: Race, root: storage.Location, keep: Collection[str]) -> None:
    """Remove the weights of contenders that nobody will ask for.

    Args:
        race: as far as it has come.
        root: storage of its searches.
        keep: names of those whose weights stay.
    """
    for each in race.rounds:
        for name in set(each.checkpoints) - set(keep):
            place = root.child(each.search).child(f"trial-{each.trials[name]}")
            for folder in place.folders():
                place.delete_folder(folder)
            del each.checkpoints[name]
