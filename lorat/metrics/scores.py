"""Scores of sequences and data sets in a chosen dialect."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lorat.errors import UserError
from lorat.metrics.catalogue import METRICS, SCORES, Curves
from lorat.metrics.dialects import DIALECTS, Dialect, FrameErrors, GroundTruth
from lorat.metrics.uncertainty import Interval, mean_intervals

SCORE_NAMES = tuple(SCORES.values())
"""Names of the scores in reports, each with its row in the catalogue."""


@dataclass(frozen=True, kw_only=True)
class SequenceScores:
    """Scores, curves and per-frame overlap of one sequence."""

    name: str
    scores: dict[str, float]
    """:data:`SCORE_NAMES`, and ``FPS`` where times are known."""
    success_curve: np.ndarray
    """Rates at thresholds equally spaced in [0, 1]."""
    precision_curve: np.ndarray
    """Rates at thresholds equally spaced in [0, 50] px."""
    norm_precision_curve: np.ndarray
    """Rates at thresholds equally spaced in [0, 0.5]."""
    frame_iou: np.ndarray
    """(n,) IoU per frame; -1 where the dialect gives it no meaning."""
    num_frames: int
    """Frames in the denominator."""
    coverage: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of a data set in one dialect."""

    dialect: str
    dataset: str
    scores: dict[str, float]
    """As of :class:`SequenceScores`; the mean over sequences unless the dialect pools frames."""
    success_curve: np.ndarray
    precision_curve: np.ndarray
    norm_precision_curve: np.ndarray
    sequences: dict[str, SequenceScores]
    attributes: dict[str, dict[str, float]] = field(default_factory=dict)
    """Scores over the sequences that have an attribute."""

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95 % interval of each of :data:`SCORE_NAMES` over sequences; empty for a single one."""
        sequences = list(self.sequences.values())
        if len(sequences) < 2:
            return {}
        values = np.array([[s.scores[name] for name in SCORE_NAMES] for s in sequences])
        pooled = DIALECTS[self.dialect].pooled
        weights = np.array([float(s.num_frames) for s in sequences]) if pooled else None
        return dict(zip(SCORE_NAMES, mean_intervals(values, weights), strict=True))


def evaluate(
    predictions: Mapping[str, np.ndarray],
    ground_truth: Mapping[str, GroundTruth],
    *,
    dialect: str = "compatible",
    dataset: str = "",
    seconds: Mapping[str, np.ndarray] | None = None,
    attributes: Mapping[str, Iterable[str]] | None = None,
) -> Evaluation:
    """Score a tracker on a data set.

    Args:
        predictions: xyxy boxes (n, 4) per sequence, 0-based pixels, the first frame included.
        ground_truth: annotation per sequence; these sequences are scored, all of them.
        dialect: name in :data:`lorat.metrics.DIALECTS`.
        dataset: such as ``LaSOT`` or ``got10k``; some dialects treat some data sets specially.
        seconds: tracking time per frame and sequence, for ``FPS``.
        attributes: sequences per attribute; adds the scores of each subset.

    Raises:
        UserError: for an unknown dialect, missing predictions, wrong lengths (all named), or an
            attribute that names an unknown sequence.
    """
    rules = _dialect(dialect)
    predictions = _checked(predictions, ground_truth, rules)
    sequences: dict[str, SequenceScores] = {}
    errors: dict[str, FrameErrors] = {}
    for name, truth in ground_truth.items():
        errors[name] = rules.frames(truth, predictions[name], dataset)
        times = None if seconds is None else seconds.get(name)
        sequences[name] = _score(name, errors[name], rules, times)
    scores, curves = _total(list(sequences), sequences, errors, rules)
    by_attribute = {}
    for attribute, names in (attributes or {}).items():
        chosen = list(names)
        unknown = sorted(set(chosen) - set(sequences))
        if unknown:
            raise UserError(f"Attribute {attribute} names unknown sequences: {', '.join(unknown)}.")
        if chosen:
            by_attribute[attribute] = _total(chosen, sequences, errors, rules)[0]
    return Evaluation(
        dialect=dialect,
        dataset=dataset,
        scores=scores,
        success_curve=curves[0],
        precision_curve=curves[1],
        norm_precision_curve=curves[2],
        sequences=sequences,
        attributes=by_attribute,
    )


def _dialect(name: str) -> Dialect:
    if name not in DIALECTS:
        raise UserError(f"There is no metric dialect {name}; choose from {', '.join(DIALECTS)}.")
    return DIALECTS[name]


def _checked(
    predictions: Mapping[str, np.ndarray], truths: Mapping[str, GroundTruth], rules: Dialect
) -> dict[str, np.ndarray]:
    """Return float64 boxes of the annotated lengths."""
    if not truths:
        raise UserError("There is no sequence to score; give at least one.")
    checked, faults = {}, []
    for name, truth in truths.items():
        num = len(truth.boxes)
        boxes = predictions.get(name)
        if boxes is None and rules.missing_allowed:
            checked[name] = np.zeros((num, 4))
            continue
        if boxes is None:
            faults.append(f"{name} (missing)")
            continue
        boxes = np.asarray(boxes, dtype=np.float64)
        if rules.missing_allowed and boxes.ndim == 2 and len(boxes) != num:
            rows = min(len(boxes), num)
            boxes = np.concatenate([boxes[:rows], np.full((num - rows, 4), np.nan)])
        if boxes.shape != (num, 4):
            faults.append(f"{name} (shape {boxes.shape}, {num} frames are annotated)")
        checked[name] = boxes
    if faults:
        raise UserError(f"Predictions do not fit the annotation: {'; '.join(faults)}.")
    return checked


def _score(
    name: str, errors: FrameErrors, rules: Dialect, seconds: np.ndarray | None
) -> SequenceScores:
    curves = _curves(errors, rules)
    scores = _read_scores(curves, errors, rules)
    if seconds is not None:
        scores["FPS"] = 1.0 / float(np.mean(seconds))
    return SequenceScores(
        name=name,
        scores=scores,
        success_curve=curves[0],
        precision_curve=curves[1],
        norm_precision_curve=curves[2],
        frame_iou=errors.frame_iou,
        num_frames=errors.num_frames,
        coverage=errors.coverage,
    )


def _curves(errors: FrameErrors, rules: Dialect) -> Curves:
    overlap = errors.overlap
    if rules.zero_fails:
        overlap = np.where(overlap == 0, -1.0, overlap)
    compare = np.greater if rules.strict else np.greater_equal
    hits = (
        compare(overlap[:, None], rules.success_thresholds).sum(axis=0),
        (errors.center_px[:, None] <= np.linspace(0, 50, rules.num_precision)).sum(axis=0),
        (errors.center_norm[:, None] <= rules.norm_thresholds).sum(axis=0),
    )
    dtype = np.float32 if rules.single else np.float64
    num_frames = max(errors.num_frames, 1)
    return Curves(*(count.astype(dtype) / dtype(num_frames) for count in hits))


def _read_scores(curves: Curves, errors: FrameErrors, rules: Dialect) -> dict[str, float]:
    return {
        metric.score: metric.value(curves, errors, rules)
        for metric in METRICS.values()
        if metric.score is not None and metric.value is not None
    }


def _total(
    names: list[str],
    sequences: Mapping[str, SequenceScores],
    errors: Mapping[str, FrameErrors],
    rules: Dialect,
) -> tuple[dict[str, float], Curves]:
    """Score a set of sequences together."""
    chosen = [sequences[name] for name in names]
    if rules.pooled:
        pooled = _pool([errors[name] for name in names])
        curves = _curves(pooled, rules)
        scores = _read_scores(curves, pooled, rules)
    else:
        scores = {
            key: math.fsum(s.scores[key] for s in chosen) / len(chosen) for key in SCORE_NAMES
        }
        curves = Curves(
            np.mean([s.success_curve for s in chosen], axis=0),
            np.mean([s.precision_curve for s in chosen], axis=0),
            np.mean([s.norm_precision_curve for s in chosen], axis=0),
        )
    rates = [s.scores["FPS"] for s in chosen if "FPS" in s.scores]
    if rates:
        scores["FPS"] = len(rates) / math.fsum(1 / rate for rate in rates)
    if rules.missing_allowed:
        frames = sum(s.num_frames for s in chosen)
        scores["coverage"] = math.fsum(s.coverage * s.num_frames for s in chosen) / frames
    return scores, curves


def _pool(errors: list[FrameErrors]) -> FrameErrors:
    return FrameErrors(
        overlap=np.concatenate([e.overlap for e in errors]),
        center_px=np.concatenate([e.center_px for e in errors]),
        center_norm=np.concatenate([e.center_norm for e in errors]),
        num_frames=sum(e.num_frames for e in errors),
        frame_iou=np.concatenate([e.frame_iou for e in errors]),
    )
