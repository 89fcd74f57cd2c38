"""Figures from arrays; whoever wants them as files asks :func:`png`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#4b5563")
LINES = ("-", "--", ":", "-.")
"""Line styles, which tell what has the same colour apart."""
GREY = "#6b7280"
DPI = 130


def png(figure: Figure) -> bytes:
    """Render a figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def new_axes(title: str, x: str, y: str, *, size: tuple[float, float] = (6.4, 4.4)) -> Axes:
    """Return axes in the common style, on a figure of their own."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def success_plot(curves: Mapping[str, tuple[np.ndarray, float]], title: str) -> Figure:
    """Draw the share of frames above each overlap threshold.

    Args:
        curves: name -> (rates at thresholds equally spaced in [0, 1], the score in the legend).
        title: what was evaluated.
    """
    return _curves(curves, title, "overlap threshold", "success rate", 1.0)


def precision_plot(
    curves: Mapping[str, tuple[np.ndarray, float]], title: str, *, normalized: bool = False
) -> Figure:
    """Draw the share of frames whose centre error is within each threshold.

    Args:
        curves: name -> (rates at equally spaced thresholds, the score in the legend).
        title: what was evaluated.
        normalized: thresholds in [0, 0.5] box sides, otherwise in [0, 50] pixels.
    """
    unit = "of the box's sides" if normalized else "px"
    end = 0.5 if normalized else 50.0
    return _curves(curves, title, f"centre error threshold, {unit}", "precision", end)


def _curves(
    curves: Mapping[str, tuple[np.ndarray, float]], title: str, x: str, y: str, end: float
) -> Figure:
    axes = new_axes(title, x, y)
    given = list(curves)  # a colour goes with the name, whatever its rank in this plot
    for name, (rates, score) in sorted(curves.items(), key=lambda item: -item[1][1]):
        thresholds, position = np.linspace(0, end, len(rates)), given.index(name)
        axes.plot(
            thresholds, rates, label=f"{name}  {score:.3f}", color=COLORS[position % len(COLORS)],
            linestyle=LINES[position // len(COLORS) % len(LINES)], linewidth=2,
        )  # fmt: skip
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    return _figure(axes)


def sequence_plot(scores: Mapping[str, float], title: str) -> Figure:
    """Draw the AO of every sequence, sorted; names where there is room for them."""
    names = sorted(scores, key=lambda name: scores[name])
    values = [scores[name] for name in names]
    height = min(12.0, max(2.4, 0.22 * len(names) + 1.2))
    axes = new_axes(title, "AO", "", size=(6.4, height))
    axes.barh(range(len(names)), values, color=COLORS[0], height=0.7)
    if values:
        axes.axvline(float(np.mean(values)), color=GREY, linestyle="--", linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(names) - 0.4)
    if len(names) <= 50:
        axes.set_yticks(range(len(names)), names, fontsize=7)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(names)} sequences")
    return _figure(axes)


def attribute_radar(scores: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Draw scores per attribute around a circle.

    Args:
        scores: tracker -> attribute -> score; all trackers have the same attributes.
        title: what was evaluated.
    """
    attributes = list(next(iter(scores.values())))
    angles = np.linspace(0, 2 * np.pi, len(attributes), endpoint=False)
    figure = Figure(figsize=(6.4, 5.6), dpi=DPI, layout="constrained")
    axes = figure.add_subplot(projection="polar")
    for position, (name, values) in enumerate(scores.items()):
        radii = [values[attribute] for attribute in attributes]
        color = COLORS[position % len(COLORS)]
        axes.plot(
            [*angles, angles[0]], [*radii, radii[0]], color=color, linewidth=2, label=name,
            marker="o", markersize=3,
        )  # fmt: skip
        axes.fill(angles, radii, color=color, alpha=0.12)
    axes.set_xticks(angles, attributes, fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75], ["0.25", "0.5", "0.75"], fontsize=7, color=GREY)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")
    figure.legend(loc="lower right", frameon=False)
    return figure


def attribute_bars(
    scores: Mapping[str, Mapping[str, float]], counts: Mapping[str, int], title: str
) -> Figure:
    """Draw a score per attribute, the bars of all trackers side by side.

    Args:
        scores: tracker -> attribute -> score; all trackers have the same attributes.
        counts: sequences of each attribute.
        title: what was evaluated.
    """
    attributes = list(next(iter(scores.values())))
    height = min(16.0, 1.2 + len(attributes) * (0.16 * len(scores) + 0.14))
    axes = new_axes(title, "AO", "", size=(6.8, max(2.6, height)))
    thickness = 0.8 / len(scores)
    places = np.arange(len(attributes))
    for position, (name, values) in enumerate(scores.items()):
        axes.barh(
            places + (position - (len(scores) - 1) / 2) * thickness,
            [values[attribute] for attribute in attributes],
            height=thickness, color=COLORS[position % len(COLORS)], label=name,
            hatch=("", "//", "..")[position // len(COLORS) % 3],
        )  # fmt: skip
    axes.set_yticks(places, [f"{name} ({counts[name]})" for name in attributes], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, fontsize=8, loc="best")
    return _figure(axes)


def overlap_timeline(overlaps: Mapping[str, np.ndarray], title: str) -> Figure:
    """Draw the overlap over the frames of some sequences; negative values are left out."""
    axes = new_axes(title, "frame", "overlap (IoU)", size=(7.2, 3.6))
    for position, (name, overlap) in enumerate(overlaps.items()):
        shown = np.where(np.asarray(overlap) < 0, np.nan, overlap)
        axes.plot(shown, label=name, color=COLORS[position % len(COLORS)], linewidth=1.3)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8, ncols=3)
    return _figure(axes)


def comparison_plot(
    differences: np.ndarray,
    means: np.ndarray,
    interval: tuple[float, float],
    title: str,
    *,
    label: str = "AO",
) -> Figure:
    """Draw a paired comparison: difference per sequence, and its bootstrap distribution.

    Args:
        differences: candidate minus champion, per sequence.
        means: mean difference of each bootstrap sample.
        interval: of the mean, as decided on.
        title: who is compared on what.
        label: of the score.
    """
    figure = Figure(figsize=(8.4, 3.8), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    ordered = np.sort(differences)
    colors = [COLORS[2] if value >= 0 else COLORS[1] for value in ordered]
    left.bar(range(len(ordered)), ordered, color=colors, width=0.9)
    left.set_xlabel("sequences, sorted")
    left.set_ylabel(f"candidate − champion, {label}")
    right.hist(means, bins=min(60, max(10, len(means) // 50)), color=COLORS[0], alpha=0.75)
    right.axvline(0, color="black", linewidth=1)
    for end in interval:
        right.axvline(end, color=GREY, linestyle="--", linewidth=1.2)
    right.set_xlabel("mean difference, bootstrap")
    right.set_yticks([])
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def gap_plot(
    parts: Sequence[tuple[str, float]], differences: Sequence[float], title: str
) -> Figure:
    """Draw what a gap between two results is made of, and their differences per sequence.

    Args:
        parts: of the gap, with their shares; they are put end to end.
        differences: theirs less ours, AO per sequence.
        title: who is compared on what.
    """
    figure = Figure(
        figsize=(10.4, max(3.6, 1.4 + 0.34 * len(parts))), dpi=DPI, layout="constrained"
    )
    left, right = figure.subplots(1, 2)
    shares = np.array([share for _, share in parts])
    starts = np.concatenate([[0.0], np.cumsum(shares)[:-1]])
    colors = [COLORS[0] if share >= 0 else COLORS[1] for share in shares]
    places = range(len(parts) + 1)
    left.barh(places, [*shares, shares.sum()], left=[*starts, 0.0], color=[*colors, GREY])
    left.set_yticks(places, [*(name for name, _ in parts), "the gap"], fontsize=8)
    left.invert_yaxis()
    left.axvline(0, color="black", linewidth=1)
    left.set_xlabel("theirs − ours, AO")
    ordered = np.sort(np.asarray(differences, dtype=np.float64))[::-1]
    right.bar(
        range(len(ordered)), ordered, width=0.9,
        color=[COLORS[0] if value >= 0 else COLORS[1] for value in ordered],
    )  # fmt: skip
    right.axhline(0, color="black", linewidth=1)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("sequences, sorted")
    right.set_ylabel("theirs − ours, AO")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure
