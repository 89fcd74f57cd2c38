"""Pictures of a search, from its table: what was tried, what mattered, what it cost.

Optuna's own are drawn from a study, which random search has none of, and know no rungs; only the
importance is computed by it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lorat.metrics import METRICS
from lorat.metrics.plots import COLORS, DPI, GREY, new_axes, png
from lorat_platform.search.algorithms import distribution
from lorat_platform.search.dimension import Dimension
from lorat_platform.search.results.board import Leaderboard, TrialRow
from lorat_platform.search.settings import judge
from lorat_platform.search.space import SearchSpace

BLUE, RED, GREEN, ORANGE, *_ = COLORS
OF_STATUS = {
    "completed": BLUE, "stopped": GREY, "failed": RED, "running": ORANGE, "waiting": ORANGE,
}  # fmt: skip


def write_plots(board: Leaderboard, space: SearchSpace, folder: Path) -> list[Path]:
    """Draw every plot that the trials allow and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in board.ranked() if row.reports]
    drawings = {
        "history": lambda: draw_history(board, rows),
        "parallel_coordinates": lambda: draw_parallel_coordinates(board, space, rows),
        "importance": lambda: draw_importance(board, space, rows),
        "rank_lr_map": lambda: draw_rank_lr_map(board, rows),
        "pareto_front": lambda: draw_pareto_front(board, rows),
        "learning_curves": lambda: draw_learning_curves(board, rows),
        "tracking_settings": lambda: draw_settings(board, space, rows),
    }
    paths: list[Path] = []
    if not rows:
        return paths
    for name, draw in drawings.items():
        figure = draw()
        if figure is None:
            continue
        path = folder / f"{name}.png"
        path.write_bytes(png(figure))
        paths.append(path)
    return paths


def draw_history(board: Leaderboard, rows: list[TrialRow]) -> Figure:
    """Draw each trial's last objective in order of proposal, and the best so far."""
    name = board.objectives[0]
    figure, axes = _axes("Search history", "trial", METRICS[name].axis)
    for status in ("stopped", "failed", "running", "completed"):
        some = [row for row in rows if row.status == status]
        if some:
            axes.scatter(
                [r.number for r in some], [r.reports[-1][name] for r in some],
                color=OF_STATUS[status], label=status,
            )  # fmt: skip
    ordered = sorted(rows, key=lambda r: r.number)
    fold = np.maximum if METRICS[name].better == "max" else np.minimum
    best = fold.accumulate([r.reports[-1][name] for r in ordered])
    axes.step([r.number for r in ordered], best, where="post", color=GREEN, label="best so far")
    axes.legend()
    return figure


def draw_learning_curves(board: Leaderboard, rows: list[TrialRow]) -> Figure:
    """Draw the objective of every trial over its rungs."""
    name = board.objectives[0]
    figure, axes = _axes("Trials over their rungs", "optimisation step", METRICS[name].axis)
    for row in rows:
        axes.plot(
            [r["step"] for r in row.reports], [r[name] for r in row.reports],
            marker="o", color=OF_STATUS[row.status], alpha=0.7,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(board.rungs.steps, [str(step) for step in board.rungs.steps])
    axes.minorticks_off()
    return figure


def draw_parallel_coordinates(
    board: Leaderboard, space: SearchSpace, rows: list[TrialRow]
) -> Figure:
    """Draw one line per trial through its values to its objective."""
    name = board.objectives[0]
    dimensions = list(space.trained.values())
    objective = np.array([row.reports[-1][name] for row in rows], dtype=float)
    low, high = float(objective.min()), float(objective.max())
    figure, axes = _axes("Parallel coordinates", "", "")
    scale = Normalize(low, high)
    for row, value in zip(rows, objective, strict=True):
        line = [_position(d, row.values[d.path]) for d in dimensions]
        line.append((value - low) / (high - low) if high > low else 0.5)
        axes.plot(line, color=matplotlib.colormaps["viridis"](scale(value)), alpha=0.8)
    for i, dimension in enumerate(dimensions):
        axes.axvline(i, color="0.7", lw=0.8)
        for position, label in _ticks(dimension):
            axes.annotate(
                label, (i, position), fontsize=8, textcoords="offset points", xytext=(3, 2)
            )
    axes.axvline(len(dimensions), color="0.7", lw=0.8)
    axes.set_xticks(range(len(dimensions) + 1), [*(d.path for d in dimensions), name])
    axes.set_yticks([])
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, label=METRICS[name].axis)
    return figure


def draw_importance(board: Leaderboard, space: SearchSpace, rows: list[TrialRow]) -> Figure | None:
    """Draw the share of the objective's variance that each field explains (fANOVA)."""
    shares = importance(board, space, rows)
    if not shares:
        return None
    figure, axes = _axes("Parameter importance (fANOVA)", "share of the variance", "")
    names = list(reversed(shares))
    axes.barh(names, [shares[name] for name in names])
    return figure


def importance(board: Leaderboard, space: SearchSpace, rows: list[TrialRow]) -> dict[str, float]:
    """Return each field's importance for the first objective; empty if it cannot be said.

    Trials are compared at the first rung, which all of them reached.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name = board.objectives[0]
    study = optuna.create_study(
        direction="maximize" if METRICS[name].better == "max" else "minimize"
    )
    distributions = {path: distribution(d) for path, d in space.trained.items()}
    values = [row.reports[0][name] for row in rows]
    if len(rows) < 4 or max(values) == min(values):
        return {}
    for row, value in zip(rows, values, strict=True):
        study.add_trial(
            optuna.trial.create_trial(
                params={path: row.values[path] for path in distributions},
                distributions=distributions,
                value=float(value),
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


def draw_rank_lr_map(board: Leaderboard, rows: list[TrialRow]) -> Figure | None:
    """Draw the objective over LoRA rank and learning rate, if both were searched."""
    rows = [row for row in rows if {"lora.rank", "lr"} <= row.values.keys()]
    if not rows:
        return None
    name = board.objectives[0]
    title = "LoRA rank × learning rate (larger: trained further)"
    figure, axes = _axes(title, "LoRA rank", "peak learning rate")
    size = [40 + 60 * row.num_rungs for row in rows]
    points = axes.scatter(
        [row.values["lora.rank"] for row in rows], [row.values["lr"] for row in rows],
        c=[row.reports[-1][name] for row in rows], s=size, cmap="viridis", edgecolors="k",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ranks = sorted({row.values["lora.rank"] for row in rows})
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    figure.colorbar(points, ax=axes, label=METRICS[name].axis)
    return figure


def draw_pareto_front(board: Leaderboard, rows: list[TrialRow]) -> Figure:
    """Draw the first objective against the second one (or the parameters), and the front."""
    first = board.objectives[0]
    second = board.objectives[1] if len(board.objectives) > 1 else "parameters"
    figure, axes = _axes("Pareto front", METRICS[second].axis, METRICS[first].axis)
    axes.scatter(
        [r.reports[-1][second] for r in rows], [r.reports[-1][first] for r in rows],
        color=[OF_STATUS[r.status] for r in rows], alpha=0.7,
    )  # fmt: skip
    pair = Leaderboard(
        objectives=(first, second), rungs=board.rungs, rows={r.trial_id: r for r in rows}
    )
    front = sorted(pair.pareto(), key=lambda r: r.reports[-1][second])
    axes.step(
        [r.reports[-1][second] for r in front], [r.reports[-1][first] for r in front],
        where="post", color=GREEN, marker="o", label="not dominated, trained furthest",
    )  # fmt: skip
    axes.legend()
    return figure


def draw_settings(board: Leaderboard, space: SearchSpace, rows: list[TrialRow]) -> Figure | None:
    """Draw the score of the best trial's weights over each field that needs no training."""
    paths = list(space.tracking)
    name = judge(board.objectives)
    settings = rows[0].reports[-1].get("settings", [])
    if not settings or name is None:
        return None
    figure = Figure(figsize=(3.5 * len(paths) + 3.5, 4.2), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(paths), squeeze=False, sharey=True)[0]
    for axes, path in zip(panels, paths, strict=True):
        axes.scatter(
            [each["tracking"][path] for each in settings],
            [each["scores"][name] for each in settings],
            color=BLUE,
        )
        axes.set_xlabel(path)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(METRICS[name].axis)
    title = f"How the weights of trial {rows[0].number} track"
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")
    return figure


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    axes = new_axes(title, x, y, size=(7.0, 4.2))
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure, axes


def _position(dimension: Dimension, value: Any) -> float:
    """Place a value on an axis from 0 to 1."""
    if dimension.kind == "choice":
        return dimension.values.index(value) / max(len(dimension.values) - 1, 1)
    low, high = dimension.bounds
    if dimension.log:
        return float(np.log(value / low) / np.log(high / low))
    return float((value - low) / (high - low))


def _ticks(dimension: Dimension) -> list[tuple[float, str]]:
    if dimension.kind == "choice":
        return [(_position(dimension, v), str(v)) for v in dimension.values]
    low, high = dimension.bounds
    return [(0.0, f"{low:g}"), (1.0, f"{high:g}")]
