"""Every number by which trackers are compared: one table, from which all else is derived.

Scores of evaluations, what trainings log, objectives of searches, criteria of promotions, columns,
axes and help texts follow from the rows, so that a metric is added by a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from lorat.config.bounds import Bounds
from lorat.errors import UserError
from lorat.metrics.dialects import Dialect, FrameErrors

SHARE = Bounds(0, 1)
PRECISION_AT_PX = 20.0
NORM_PRECISION_AT = 0.2


class Curves(NamedTuple):
    """Shares of frames at equally spaced thresholds."""

    success: np.ndarray
    """Overlap above thresholds in [0, 1]."""
    precision: np.ndarray
    """Centre error within thresholds in [0, 50] px."""
    norm_precision: np.ndarray
    """Centre error within thresholds in [0, 0.5] box sides."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a tracker; every one can be an objective of a search."""

    label: str
    """In tables and on axes."""
    meaning: str
    better: Literal["max", "min"] = "max"
    """Which way is better."""
    bounds: Bounds = SHARE
    """From where to where it may be."""
    unit: str = ""
    score: str | None = None
    """Its name in reports, as the toolkits call it; none for what is no score of tracked boxes."""
    value: Callable[[Curves, FrameErrors, Dialect], float] | None = None
    """The score of a sequence, from its curves, the errors of its frames and the toolkit's rules;
    given with ``score``."""
    headline: bool = False
    """Whether it stands in the table at the end of a training."""

    @property
    def sign(self) -> float:
        """1 or -1: more of the product is better."""
        return 1.0 if self.better == "max" else -1.0

    @property
    def axis(self) -> str:
        """The label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def is_criterion(self) -> bool:
        """Whether a promotion can decide by it: every sequence must have one of its own."""
        return self.score is not None


def _area(curve: np.ndarray) -> float:
    return float(np.trapezoid(curve, dx=1 / (len(curve) - 1)))


def _success(curves: Curves, errors: FrameErrors, rules: Dialect) -> float:
    return _area(curves.success) if rules.trapezoid else float(curves.success.mean())


def _precision(curves: Curves, errors: FrameErrors, rules: Dialect) -> float:
    at = round(PRECISION_AT_PX / 50 * (rules.num_precision - 1))
    return _area(curves.precision) if rules.trapezoid else float(curves.precision[at])


def _norm_precision(curves: Curves, errors: FrameErrors, rules: Dialect) -> float:
    at = round(NORM_PRECISION_AT / 0.5 * (rules.num_precision - 1))
    return _area(curves.norm_precision) if rules.trapezoid else float(curves.norm_precision[at])


def _average_overlap(curves: Curves, errors: FrameErrors, rules: Dialect) -> float:
    overlap = np.nan_to_num(errors.overlap).clip(0, None)
    return float(overlap.sum() / max(errors.num_frames, 1))


def success_rate(threshold: float) -> Callable[[Curves, FrameErrors, Dialect], float]:
    """Return what computes the share of frames with an overlap above ``threshold``, 0 to 1."""

    def value(curves: Curves, errors: FrameErrors, rules: Dialect) -> float:
        compare = np.greater if rules.strict else np.greater_equal
        return float(compare(errors.overlap, threshold).sum() / max(errors.num_frames, 1))

    return value


METRICS: dict[str, Metric] = {
    "auc": Metric(
        label="AUC",
        meaning="area under the success curve",
        score="SUC",
        value=_success,
    ),
    "precision": Metric(
        label="precision",
        meaning="share of frames with a centre error within 20 px",
        score="P",
        value=_precision,
    ),
    "norm_precision": Metric(
        label="normalised precision",
        meaning="share of frames with a centre error within 0.2 box sides",
        score="P_norm",
        value=_norm_precision,
    ),
    "ao": Metric(
        label="AO",
        meaning="average overlap of predicted and annotated boxes",
        score="AO",
        value=_average_overlap,
        headline=True,
    ),
    "sr50": Metric(
        label="SR50",
        meaning="share of frames with an overlap above 0.5",
        score="SR0.5",
        value=success_rate(0.5),
        headline=True,
    ),
    "sr75": Metric(
        label="SR75",
        meaning="share of frames with an overlap above 0.75",
        score="SR0.75",
        value=success_rate(0.75),
        headline=True,
    ),
    "loss": Metric(
        label="training loss",
        meaning="mean loss of the training pairs",
        better="min",
        bounds=Bounds(0, math.inf),
    ),
    "latency": Metric(
        label="latency",
        meaning="time that the network takes for a frame",
        better="min",
        bounds=Bounds(0, math.inf, above=True),
        unit="ms per frame",
    ),
    "parameters": Metric(
        label="parameters",
        meaning="numbers that training changes",
        better="min",
        bounds=Bounds(1, math.inf),
        unit="trained ones",
    ),
}
"""The metrics by name, in the order of columns."""

MAIN = "ao"
"""What decides where nothing else is said."""

SCORES: dict[str, str] = {name: m.score for name, m in METRICS.items() if m.score is not None}
"""The metrics that are scores of tracked boxes, with their names in reports."""

HEADLINE = {name: METRICS[name] for name in SCORES if METRICS[name].headline}
"""What stands in the table at the end of a training."""


def criterion(name: str) -> Metric:
    """Return the metric of that name, by which a promotion can decide.

    Raises:
        UserError: if there is none, or it belongs to no single sequence.
    """
    if name not in SCORES:
        what = "belongs to no single sequence" if name in METRICS else "is no metric"
        raise UserError(f"--metric is {name}, which {what}; give one of {', '.join(SCORES)}.")
    return METRICS[name]


def listed(names: list[str]) -> str:
    """Return the metrics for a help text: names, units, and which way is better unless more is."""

    def one(name: str) -> str:
        metric = METRICS[name]
        notes = [metric.unit] * bool(metric.unit) + ["less is better"] * (metric.better == "min")
        return f"{name} ({', '.join(notes)})" if notes else name

    return ", ".join(one(name) for name in names)


def table() -> str:
    """Return the metrics as a Markdown table, as the documentation has it."""
    lines = [
        "| Metric | Meaning | Range | Better | In reports | Promotion |",
        "|---|---|---|---|---|---|",
    ]
    for name, metric in METRICS.items():
        unit = f", {metric.unit}" if metric.unit else ""
        better = "more" if metric.better == "max" else "less"
        low, high = metric.bounds.low, metric.bounds.high
        span = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
        span = f"more than {low:g}" if metric.bounds.above else span
        lines.append(
            f"| `{name}` | {metric.meaning}{unit} | {span} | {better} | {metric.score or '-'} | "
            f"{'yes' if metric.is_criterion else 'no'} |"
        )
    return "\n".join(lines)
