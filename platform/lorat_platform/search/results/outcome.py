"""What a search ends with: table, plots, best configuration, cost."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorat.config.fields import to_dict
from lorat.config.training import TrainConfig
from lorat_platform.recording.pages import address, how_to_open
from lorat_platform.recording.run import Run
from lorat_platform.recording.store import tracking_uri
from lorat_platform.recording.trouble import Ending, say_what_is_left
from lorat_platform.search.plan import SearchPlan
from lorat_platform.search.results.board import Leaderboard, TrialRow
from lorat_platform.search.results.plots import write_plots

log = logging.getLogger(__name__)

BEST_FILE = "best_config.json"


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """What a search ended with."""

    plan: SearchPlan
    board: Leaderboard
    best: TrialRow | None
    best_config: TrainConfig | None
    best_config_file: Path | None
    run_id: str | None
    page: str | None
    """The search's page in MLflow."""
    table: str | None
    """The page with all trials, their values and scores."""
    interrupted: bool
    endings: tuple[Ending, ...]
    """What the runs of the search and of its trials left for MLflow."""


def write_outcome(
    plan: SearchPlan,
    board: Leaderboard,
    parent: Run,
    endings: Sequence[Ending],
    *,
    interrupted: bool,
) -> SearchOutcome:
    """Write table, plots, best configuration and cost, here and to the parent run.

    ``endings`` are what the trials' runs left behind.
    """
    cost = board.cost()
    best = board.best()
    files = board.write(plan.folder / "results")
    plots = write_plots(board, plan.space, plan.folder / "results" / "plots")
    best_config: TrainConfig | None = None
    best_file: Path | None = None
    if best is not None:
        best_config = plan.space.configure(best.found)
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
    # One number each is no curve: as metrics they would be the page's first charts.
    parent.set_tags(
        {
            "lorat.steps_spent": cost.steps,
            "lorat.steps_of_full_runs": cost.full_steps,
            "lorat.cost_saved": f"{cost.saved:.4f}",
            "lorat.trial_seconds": f"{cost.seconds:.0f}",
            "lorat.trials_completed": board.count("completed"),
            "lorat.trials_stopped": board.count("stopped"),
            "lorat.trials_failed": board.count("failed"),
        }
    )
    text, table = search_description(plan, board), parent.table(plan.identity)
    if table is not None:
        text += f"\n\n[All trials with their values and scores]({table})"
    parent.set_description(text)
    ending = parent.end("KILLED" if interrupted else "FINISHED")
    return SearchOutcome(
        plan=plan,
        board=board,
        best=best,
        best_config=best_config,
        best_config_file=best_file,
        run_id=parent.run_id,
        page=parent.page,
        table=table,
        interrupted=interrupted,
        endings=(*endings, ending),
    )


def say_how_it_ended(outcome: SearchOutcome) -> None:
    """Say what a search has found, where that is, and how to go on with one that was stopped."""
    log.info("\n%s\n", search_description(outcome.plan, outcome.board).replace("\n\n", "\n"))
    log.info("table   %s", outcome.plan.folder / "results" / "trials.csv")
    if outcome.best_config_file is not None:
        log.info("best    python jobs/train.py --config %s", outcome.best_config_file)
    say_where_it_is(outcome)
    if outcome.interrupted:
        say_how_to_go_on(outcome.plan)
    elif outcome.best is None:
        reasons = [row.reason for row in outcome.board.rows.values() if row.reason]
        log.error(
            "No trial finished, so there is no best configuration; the first one failed with: %s",
            reasons[0] if reasons else "unknown",
        )


def say_how_to_go_on(plan: SearchPlan) -> None:
    """Say which command goes on with a search, or its race, that was stopped."""
    where = f" --storage {plan.options.storage}" if plan.options.storage else ""
    log.info("go on   python jobs/tune.py --resume %s%s", plan.name, where)


def say_where_it_is(outcome: SearchOutcome) -> None:
    """Say where MLflow has the search, and what of it waits for MLflow."""
    if outcome.run_id is not None:  # else all of it waits
        log.info(
            "MLflow  %s, experiment %s, run %s",
            tracking_uri(), outcome.plan.options.experiment, outcome.run_id,
        )  # fmt: skip
    if outcome.page is not None:
        log.info("open it %s", how_to_open(outcome.page))
    if outcome.table is not None:
        log.info("trials  %s", address(outcome.table))
    say_what_is_left(outcome.endings)


def search_description(plan: SearchPlan, board: Leaderboard) -> str:
    """Say in Markdown what a search found and what it cost."""
    cost = board.cost()
    best = board.best()
    lines = [f"Search `{plan.name}` over " + ", ".join(f"`{d}`" for d in plan.space.to_lines())]
    if best is not None:
        found = ", ".join(f"{name} {best.last(name):.4f}" for name in plan.options.objectives)
        values = ", ".join(f"{path} = {value}" for path, value in best.found.items())
        lines.append(f"Best is trial {best.number}: {found} after {best.steps} steps ({values}).")
    saving = f"{cost.saved:.0%} saved by stopping early"
    if cost.saved < 0:
        saving = f"at most {-cost.saved:.0%} more, for what was trained again"
    lines.append(
        f"{len(board.rows)} trials: {board.count('completed')} completed, "
        f"{board.count('stopped')} stopped early, {board.count('failed')} failed. "
        f"{cost.steps} of the {cost.full_steps} steps of full runs: {saving}."
    )
    if "batch_size" in plan.space.dimensions:
        lines.append(
            f"A step is {plan.space.base.batch_size} pairs, the batch of the base configuration, "
            "whatever a trial's own."
        )
    if cost.lost_steps:
        lines.append(
            f"At most {cost.lost_steps} of these steps belong to no report: of trials that failed, "
            "and those that were trained again."
        )
    tried = [row for row in board.rows.values() if row.troubles]
    if tried:
        lines.append(
            "Tried again after failures that were not theirs, of machines, processes or files: "
            f"{'; '.join(_trouble(row) for row in tried)}."
        )
    again = [str(row.number) for row in board.rows.values() if row.can_be_tried_again]
    if again:
        lines.append(
            f"Failed so in every try: {', '.join(again)}; `--resume {plan.name}` tries them again."
        )
    if len(plan.options.objectives) > 1:
        front = ", ".join(str(row.number) for row in board.pareto())
        lines.append(f"Pareto front of {' and '.join(plan.options.objectives)}: trials {front}.")
    return "\n\n".join(lines)


def _trouble(row: TrialRow) -> str:
    times = f", {len(row.troubles)} times" if len(row.troubles) > 1 else ""
    return f"trial {row.number}{times} ({row.troubles[-1].partition('. ')[0]})"
