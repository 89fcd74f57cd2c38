"""Does early stopping find what full training finds, for how many steps, at what overhead?

The same configurations are trained twice: as the search stops them, and all to the end.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.metrics import METRICS
from lorat_platform import cluster
from lorat_platform.search.driver import resume_search, run_search
from lorat_platform.search.plan import (
    SearchOptions,
    SearchPlan,
    check_data,
    check_unchanged,
    default_config,
    make_plan,
    read_plan,
)
from lorat_platform.search.results.board import Leaderboard
from lorat_platform.search.results.outcome import SearchOutcome, say_where_it_is

log = logging.getLogger(__name__)

FLAT = tyro.conf.arg(name="")
WANTED_QUALITY = 0.98
"""Share of full training's best objective that the search is to reach."""
WANTED_COST = 0.35
"""Share of full training's steps that it may take."""
WANTED_OVERHEAD_S = 3.0
"""Seconds per trial beside training and evaluation."""


@dataclass(frozen=True, kw_only=True)
class SearchBenchmark:
    """Compare a search with full training of all its trials."""

    config: Annotated[TrainConfig, FLAT] = field(default_factory=default_config)
    search: Annotated[SearchOptions, FLAT] = field(default_factory=lambda: SearchOptions(trials=16))
    output: Path | None = None
    """Folder for the table and the figures; none means the search's own."""
    address: str | None = None
    """Ray cluster, host:port; none means RAY_ADDRESS, or an embedded Ray."""


def benchmark_search(benchmark: SearchBenchmark) -> dict[str, Any]:
    """Run the benchmark, print its table and return its figures; goes on with one of its name.

    Raises:
        UserError: if the request cannot be.
    """
    plan = make_plan(benchmark.config, benchmark.search)
    everything = dataclasses.replace(
        plan.options, scheduler="none", rungs=1, name=f"{plan.name}-full"
    )
    full_plan = make_plan(benchmark.config, everything)
    log.info("%s", plan.text())
    check_data(plan)
    with cluster.connected(benchmark.address) as ray_cluster:
        log.info("Searching with %s.", ray_cluster)
        began = time.perf_counter()
        searched = run_or_go_on(plan)
        search_seconds = time.perf_counter() - began
        points = [row.values for row in in_order(searched.board)]
        began = time.perf_counter()
        full = run_or_go_on(full_plan, points)
        full_seconds = time.perf_counter() - began
    figures = compare(searched.board, full.board) | {
        "search_seconds": search_seconds,
        "full_seconds": full_seconds,
    }
    text = table(searched.board, full.board) + "\n\n" + verdict(figures)
    log.info("%s", text)
    folder = benchmark.output or searched.plan.folder / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.md").write_text(text + "\n")
    (folder / "benchmark.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def run_or_go_on(
    plan: SearchPlan, points: Sequence[Mapping[str, Any]] | None = None
) -> SearchOutcome:
    """Run a part of the benchmark, or go on with it after an interruption.

    Raises:
        UserError: if it is gone on with and anything asked for differs.
    """
    try:
        begun = read_plan(plan.name, plan.options.storage)
    except UserError:
        outcome = run_search(plan, points=points)
    else:
        check_unchanged(begun, plan.space.base, plan.options, also=("trials",))
        outcome = resume_search(plan.name, plan.options.storage)
    say_where_it_is(outcome)
    if outcome.interrupted:
        raise KeyboardInterrupt
    return outcome


def in_order(board: Leaderboard) -> list[Any]:
    """Return the rows in the order of proposal."""
    return sorted(board.rows.values(), key=lambda row: row.number)


def compare(searched: Leaderboard, full: Leaderboard) -> dict[str, Any]:
    """Return quality, cost and overhead of a search against full training of its trials."""
    name = searched.objectives[0]
    best, best_full = searched.best(), full.best()
    assert best is not None and best_full is not None, "no trial finished"
    found, possible = best.reports[-1][name], best_full.reports[-1][name]
    by_values = {json.dumps(row.values): row for row in in_order(full)}
    twins = [(row, by_values[json.dumps(row.values)]) for row in in_order(searched)]
    repeated = [
        abs(row.reports[-1][name] - twin.reports[-1][name])
        for row, twin in twins
        if row.status == twin.status == "completed"
    ]
    higher = METRICS[name].better == "max"
    overheads, firsts = overhead_seconds(searched)
    spent = sum(row.spent for row in searched.rows.values())
    spent_full = sum(row.spent for row in full.rows.values())
    hits = [row.last("crop_cache_hit_rate") for row in searched.rows.values() if row.reports]
    return {
        "objective": name,
        "trials": len(searched.rows),
        "found": found,
        "possible": possible,
        "quality": found / possible if higher else possible / found,
        "steps": spent,
        "full_steps": spent_full,
        "cost": spent / spent_full,
        "overhead_median_s": statistics.median(overheads) if overheads else None,
        "overhead_max_s": max(overheads, default=None),
        "overhead_first_s": max(firsts, default=None),
        "crop_cache_hit_rate": statistics.mean(h for h in hits if h is not None),
        "largest_difference_of_repeated_trials": max(repeated, default=None),
    }


def overhead_seconds(board: Leaderboard) -> tuple[list[float], list[float]]:
    """Return the seconds that trials took beside training and evaluation.

    Returns:
        Of the trials that followed another one in their process, from its end to their own; and of
        the first trials of the processes, from their proposal, so that the start of the process
        and its imports are in them.
    """
    last_end: dict[str, float] = {}
    overheads: list[float] = []
    firsts: list[float] = []
    for row in sorted(board.rows.values(), key=lambda row: row.started_at or 0.0):
        if row.worker is None or row.ended_at is None:
            continue
        work = (row.last("train_seconds") or 0.0) + (row.last("evaluation_seconds") or 0.0)
        if row.starts == 1 and row.worker in last_end:
            overheads.append(row.ended_at - last_end[row.worker] - work)
        elif row.starts == 1 and row.proposed_at is not None:
            firsts.append(row.ended_at - row.proposed_at - work)
        last_end[row.worker] = row.ended_at
    return overheads, firsts


def table(searched: Leaderboard, full: Leaderboard) -> str:
    """Write one line per trial: what it was, where it stopped, what it was worth."""
    name = searched.objectives[0]
    by_values = {json.dumps(row.values): row for row in in_order(full)}
    paths = list(in_order(searched)[0].values)
    head = ["trial", *paths, "status", "steps", f"{name} in the search", f"{name} in full"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in in_order(searched):
        twin = by_values[json.dumps(row.values)]
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values.values()]
        scores = [f"{r.last(name):.4f}" if r.reports else "failed" for r in (row, twin)]
        cells = [str(row.number), *values, row.status, str(row.steps), *scores]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(figures: dict[str, Any]) -> str:
    """Say what was reached and what was wanted."""
    overhead = figures["overhead_median_s"]
    lines = [
        f"best {figures['objective']}: {figures['found']:.4f} found, {figures['possible']:.4f} in "
        f"full training of the same {figures['trials']} trials: {figures['quality']:.1%} "
        f"(wanted {WANTED_QUALITY:.0%})",
        f"steps: {figures['steps']} of {figures['full_steps']}: {figures['cost']:.1%} "
        f"(wanted at most {WANTED_COST:.0%}); {figures['search_seconds']:.0f} s against "
        f"{figures['full_seconds']:.0f} s",
        f"crops found in the shared cache: {figures['crop_cache_hit_rate']:.0%}",
    ]
    if overhead is not None:
        lines.append(
            f"overhead per trial: median {overhead:.2f} s, longest "
            f"{figures['overhead_max_s']:.2f} s (wanted at most {WANTED_OVERHEAD_S:.0f} s)"
        )
    if figures["overhead_first_s"] is not None:
        lines.append(
            "overhead of the first trial of a process, its start and imports included: longest "
            f"{figures['overhead_first_s']:.2f} s"
        )
    if figures["largest_difference_of_repeated_trials"] is not None:
        lines.append(
            "completed trials, trained again: largest difference "
            f"{figures['largest_difference_of_repeated_trials']:.1e}"
        )
    return "\n".join(lines)
