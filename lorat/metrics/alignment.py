"""Which frame each row of a result file belongs to, where it is not the frame of its number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorat.metrics.conventions import rows_iou

NEARLY = 0.02
"""Gain of the mean overlap below which one reading is as good as another."""
MAX_SHIFT = 3
MAX_STEP = 10


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Rows by frame."""

    kind: str = ""
    """Name of the cause; empty where each row is its own frame's."""
    text: str = ""
    row: np.ndarray
    """int (n,): row of each frame, -1 where there is none."""


def align(
    boxes: np.ndarray,
    anchor: np.ndarray,
    given: np.ndarray,
    is_absent: np.ndarray,
    *,
    tolerance_px: float,
) -> Alignment:
    """Find the frames of rows.

    Args:
        boxes: (m, 4) xyxy, the rows as they are read.
        anchor: (n, 4) xyxy, where the target is about: another tracker's results, best of the
            same tracker, or the annotation; NaN where nobody knows.
        given: (4,) xyxy, the box that tracking began with.
        is_absent: bool (n,), frames without a target.
        tolerance_px: how far a first row may be from the given box and still be it.
    """
    num, rows = len(anchor), len(boxes)
    usual = np.where(np.arange(num) < rows, np.arange(num), -1)
    if not rows:
        return Alignment(row=usual)
    candidates: list[Alignment] = []

    def add(kind: str, text: str, row: np.ndarray) -> None:
        candidates.append(Alignment(kind=kind, text=text, row=row))

    first_is_given = bool(np.abs(boxes[0] - given).max() <= tolerance_px)
    frames, lost = np.arange(num), num - rows
    if lost == 0:
        for shift in (s for k in range(1, MAX_SHIFT + 1) for s in (-k, k)):
            row = frames - shift
            row = np.where((row >= 0) & (row < rows), row, -1)
            how = "late" if shift < 0 else "early"
            text = f"rows {abs(shift)} frame{'s' * (abs(shift) > 1)} too {how}"
            add("frame shift", text, row)
        add("frame order", "rows from the last frame to the first", frames[::-1])
    elif lost > 0:
        if rows == int((~is_absent).sum()):
            row = np.where(is_absent, -1, np.cumsum(~is_absent) - 1)
            add("absent frames", "no rows for the frames without a target", row)
        for step in range(2, MAX_STEP + 1):
            if rows == -(-num // step):
                row = np.where(frames % step == 0, frames // step, -1)
                add("frame rate", f"a row for every {step} frames", row)
        if lost <= num // 2:
            if not first_is_given:
                what = "the first frame has no row" if lost == 1 else f"the first {lost} have none"
                add("first frame", what, frames - lost)
            place = _cut(boxes, anchor, lost)
            row = np.where(
                frames < place, frames, np.where(frames < place + lost, -1, frames - lost)
            )
            if 0 < place < rows:
                add("rows missing", f"no row for frame {place}", row)
            elif place == 0:
                add("first frame", "the first frame has no row", row)
    else:
        if -lost <= 3:
            add("first frame", "a row before that of the first frame", frames - lost)
        place = _cut(anchor, boxes, -lost)
        if 0 < place < num:
            add("rows twice", f"a row too many at frame {place}",
                np.where(frames < place, frames, frames - lost))  # fmt: skip
    return _best(boxes, anchor, usual, candidates, first_is_given=first_is_given, lost=lost)


def _best(
    boxes: np.ndarray,
    anchor: np.ndarray,
    usual: np.ndarray,
    candidates: list[Alignment],
    *,
    first_is_given: bool,
    lost: int,
) -> Alignment:
    """Choose the reading whose boxes lie where the target is; the usual one where it is as good."""
    best, now = Alignment(row=usual), _fit(boxes, anchor, usual)
    plain = now
    for candidate in candidates:
        fit = _fit(boxes, anchor, candidate.row)
        # Another reading must explain the rows as they are, not just lie a little better: of the
        # same number of rows, it must halve what is left of the distance to the anchor.
        gain = fit - now
        enough = NEARLY if lost == 0 or first_is_given or best.kind else 0.0
        if lost == 0 and not (1 - fit < 0.5 * (1 - plain)):
            continue
        if gain > enough or (1 - now > 1e-6 and 1 - fit < 1e-3 and gain > 0):
            best, now = candidate, fit
    return best


def _fit(boxes: np.ndarray, anchor: np.ndarray, row: np.ndarray) -> float:
    """Return the mean overlap with the anchor over the frames where both have a box."""
    frames = np.flatnonzero((row >= 0) & (row < len(boxes)) & np.isfinite(anchor).all(axis=1))
    if not len(frames):
        return 0.0
    return float(rows_iou(boxes[row[frames]], anchor[frames]).mean())


def _cut(short: np.ndarray, long: np.ndarray, lost: int) -> int:
    """Return before which row of the shorter list rows of the longer one have no partner."""
    before = rows_iou(short, long[: len(short)])
    after = rows_iou(short, long[lost:])
    total = np.concatenate([[0.0], np.cumsum(before)])
    rest = np.concatenate([np.cumsum(after[::-1])[::-1], [0.0]])
    return int(np.argmax(total + rest))
