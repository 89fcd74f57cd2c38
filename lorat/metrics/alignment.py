"""Which frame each row of a result file belongs to, where it is not the frame of its number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorat.metrics.conventions import rows_iou

NEARLY = 0.02
"""Gain of the mean overlap below which one reading is as good as another."""
CLEARLY = 0.05
"""The same where rows are too few or too many, for which the end is the first suspect."""
TOLD = 0.1
"""Loss of the mean overlap up to which what the rows themselves tell is believed."""
ROW_EVERY = "a row for every {} frames"
MAX_SHIFT = 3
MAX_STEP = 10


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Rows by frame."""

    kind: str = ""
    """Name of the cause; empty where each row is its own frame's."""
    text: str = ""
    is_told: bool = False
    """The rows themselves tell, so it need not lie better than the usual reading."""
    row: np.ndarray
    """int (n,): row of each frame, -1 where there is none."""


def align(
    boxes: np.ndarray,
    anchor: np.ndarray,
    given: np.ndarray,
    is_absent: np.ndarray,
    *,
    tolerance_px: float,
    told_shift: int = 0,
    told_text: str = "",
) -> Alignment:
    """Find the frames of rows.

    Args:
        boxes: (m, 4) xyxy, the rows as they are read.
        anchor: (n, 4) xyxy, where the target is about: another tracker's results, best of the
            same tracker, or the annotation; NaN where nobody knows.
        given: (4,) xyxy, the box that tracking began with.
        is_absent: bool (n,), frames without a target.
        tolerance_px: how far a first row may be from the given box and still be it.
        told_shift: what :func:`shift_of_all` says.
        told_text: of the alignment that most files of the set have.
    """
    num, rows = len(anchor), len(boxes)
    usual = np.where(np.arange(num) < rows, np.arange(num), -1)
    if not rows:
        return Alignment(row=usual)
    candidates: list[Alignment] = []

    def add(kind: str, text: str, row: np.ndarray, *, is_told: bool = False) -> None:
        told = is_told or text == told_text
        candidates.append(Alignment(kind=kind, text=text, row=row, is_told=told))

    first_is_given = bool(np.abs(boxes[0] - given).max() <= tolerance_px)
    frames, lost = np.arange(num), num - rows
    if lost == 0:
        for shift in (s for k in range(1, MAX_SHIFT + 1) for s in (-k, k)):
            row = frames - shift
            row = np.where((row >= 0) & (row < rows), row, -1)
            how = "late" if shift < 0 else "early"
            text = f"rows {abs(shift)} frame{'s' * (abs(shift) > 1)} too {how}"
            add("frame shift", text, row, is_told=shift == told_shift)
        moves = (boxes[1:] != boxes[:-1]).any(axis=1).mean() > 0.5
        last_is_given = bool(moves and np.abs(boxes[-1] - given).max() <= tolerance_px)
        add(
            "frame order", "rows from the last frame to the first", frames[::-1],
            is_told=last_is_given and not first_is_given,
        )  # fmt: skip
    elif lost > 0:
        if rows == int((~is_absent).sum()):
            row = np.where(is_absent, -1, np.cumsum(~is_absent) - 1)
            add("absent frames", "no rows for the frames without a target", row)
        for step in range(2, MAX_STEP + 1):
            if rows == -(-num // step):
                row = np.where(frames % step == 0, frames // step, -1)
                add("frame rate", ROW_EVERY.format(step), row)
        if lost <= num // 2:
            if not first_is_given:
                what = "the first frame has no row" if lost == 1 else f"the first {lost} have none"
                add("first frame", what, frames - lost, is_told=lost == 1)
            place = _cut(boxes, anchor, lost)
            row = np.where(
                frames < place, frames, np.where(frames < place + lost, -1, frames - lost)
            )
            if 0 < place < rows:
                add("rows missing", f"no row for frame {place}", row)
            elif place == 0:
                add("first frame", "the first frame has no row", row)
    else:
        for step in range(2, MAX_STEP + 1):
            if rows == step * num:
                add("frame rate", f"{step} rows for every frame", frames * step, is_told=True)
        again = np.flatnonzero((boxes[1:] == boxes[:-1]).all(axis=1)) + 1
        told = len(again) == -lost  # no others: it is not a tracker that stays where it was
        told |= lost == -1 and first_is_given and again[:1] == 1 and len(again) < rows // 2
        places = [int(again[0])] if told else []
        places += [0] if -lost <= MAX_SHIFT else []
        places += [_cut(anchor, boxes, -lost)]
        for place in places:
            kind, text = "rows twice", f"a row too many at frame {place}"
            if place == 0 or (told and place == 1):
                kind, text = "first frame", "a row before that of the first frame"
            if place < num:
                row = np.where(frames < place, frames, frames - lost)
                add(kind, text, row, is_told=told and place == again[0])
    return _best(boxes, anchor, usual, candidates, lost=lost)


def shift_of_all(tracks: list[np.ndarray], givens: list[np.ndarray], tolerance_px: float) -> int:
    """Return by how many frames the rows of most files are too early, less than 0 if too late.

    Rows moved back leave the given box twice at the beginning, rows moved on the last one twice at
    the end and no given box; whoever moved them kept the number of rows.

    Args:
        tracks: boxes (m, 4) of each file.
        givens: (4,) of each, the box that tracking began with.
        tolerance_px: how far a first row may be from it and still be it.
    """
    votes = []
    for boxes, given in zip(tracks, givens, strict=True):
        again = (boxes[1:] == boxes[:-1]).all(axis=1) if len(boxes) > 2 else np.ones(1, dtype=bool)
        if again.mean() > 0.2:
            continue  # it does not move, or only now and then
        is_given = bool(np.abs(boxes[0] - given).max() <= tolerance_px)
        votes.append(-1 if is_given and again[0] else 1 if not is_given and again[-1] else 0)
    for shift, share in ((-1, 0.8), (1, 0.6)):  # a slow target's box may be the same twice
        if len(votes) > 1 and votes.count(shift) >= share * len(votes):
            return shift
    return 0


def step_of_all(num_rows: list[int], num_frames: list[int]) -> int:
    """Return for every how many frames nearly all files have a row; 1 where they have not."""
    for step in range(2, MAX_STEP + 1):
        fits = [rows == -(-num // step) for rows, num in zip(num_rows, num_frames, strict=True)]
        if len(fits) > 1 and sum(fits) >= 0.8 * len(fits):
            return step
    return 1


def _best(
    boxes: np.ndarray,
    anchor: np.ndarray,
    usual: np.ndarray,
    candidates: list[Alignment],
    *,
    lost: int,
) -> Alignment:
    """Choose the reading whose boxes lie where the target is; the usual one where it is as good."""
    best, now = Alignment(row=usual), _fit(boxes, anchor, usual)
    plain = now
    for candidate in candidates:
        fit = _fit(boxes, anchor, candidate.row)
        gain = fit - now
        exact = 1 - fit < 1e-3 and 1 - now > 1e-6 and gain > 0
        # Of the same number of rows, another reading must halve what is left of the distance to
        # the anchor: one that lies just a little better explains nothing.
        halved = lost != 0 or 1 - fit < 0.5 * (1 - plain)
        if candidate.is_told and not best.is_told:
            better = gain > -TOLD
        else:
            better = halved and gain > (CLEARLY if lost else NEARLY)
        if exact or better:
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
