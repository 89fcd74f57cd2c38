"""How the rows of a result set are read: the convention of most files, and of each that differs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lorat.metrics.conventions import (
    FORMS,
    TRUSTED,
    USUAL,
    Convention,
    find_form,
    find_offset,
    find_scale,
    rows_iou,
)
from lorat.metrics.dialects import GroundTruth
from lorat.metrics.raw_results import RawFile

MOST = 0.6
"""Share of the sequences that makes something the set's own habit."""


def frame_size(truth: GroundTruth) -> np.ndarray:
    """Return width and height of the first frame; 1 where they are not known."""
    if truth.size_wh is None:
        return np.array([1.0, 1.0])
    return np.asarray(np.reshape(truth.size_wh, (-1, 2))[0], dtype=np.float64)


def first_row(file: RawFile) -> np.ndarray | None:
    """Return the first row that is a box, or none."""
    rows = file.rows[np.isfinite(file.rows).all(axis=1)]
    return rows[0] if len(file.rows) and len(rows) else None


def set_convention(
    files: Mapping[str, RawFile],
    truths: Mapping[str, GroundTruth],
    other: Mapping[str, np.ndarray],
    custom: float,
) -> dict[str, Convention]:
    """Find how the rows of most files are read; the scale may be each sequence's own."""
    rows = {name: row for name, file in files.items() if (row := first_row(file)) is not None}
    names = list(rows)
    givens = {name: truths[name].boxes[0] for name in names}
    sizes = {name: frame_size(truths[name]) for name in names}
    form, fit = find_form(
        [rows[n] for n in names], [givens[n] for n in names], [sizes[n] for n in names]
    )
    scales: dict[str, tuple[float, float]] = {}
    if fit < TRUSTED:
        scales = {n: s for n in names if (s := find_scale(rows[n], givens[n])) is not None}
        if len(scales) >= MOST * len(names) > 0:
            form = USUAL
            if all(abs(x / y - 1) < 0.02 for x, y in scales.values()):
                middle = float(np.median(list(scales.values())))
                if all(abs(x / middle - 1) < 0.05 for x, _ in scales.values()):
                    scales = dict.fromkeys(names, (middle, middle))
        else:
            scales = {}
            if fit < 0.5 or form != USUAL:
                form = _form_of_tracks(files, truths, other)
    plain = {
        name: Convention(form=form, scale_xy=scales.get(name, (1.0, 1.0)),
                         offset_xy=(custom, custom))
        for name in files
    }  # fmt: skip
    offset, sides = _set_offset(plain, rows, givens, sizes, files, other)
    enlarged = 1.0
    if offset is None and not sides and form == USUAL and not scales:
        enlarged = _set_enlargement(plain, rows, givens, sizes)
    x, y = (custom, custom) if offset is None else (custom + offset[0], custom + offset[1])
    return {
        name: Convention(
            form=form, scale_xy=convention.scale_xy, offset_xy=(x, y), sides=sides,
            enlarged=enlarged,
        )
        for name, convention in plain.items()
    }  # fmt: skip


def _form_of_tracks(
    files: Mapping[str, RawFile],
    truths: Mapping[str, GroundTruth],
    other: Mapping[str, np.ndarray],
) -> str:
    """Find the form by all rows, where the first ones are not the given boxes."""

    def fit(form: str) -> float:
        means = []
        for name, file in files.items():
            num = min(len(file.rows), len(truths[name].boxes))
            boxes = FORMS[form](file.rows[:num], frame_size(truths[name]))
            both = (truths[name].boxes, other[name])
            means += [rows_iou(boxes, anchor[:num]).mean() for anchor in both if num]
        return float(np.mean(means)) if means else 0.0

    fits = {form: fit(form) for form in FORMS}
    best = max(fits, key=lambda form: fits[form])
    return best if fits[best] > fits[USUAL] + 0.1 else USUAL


def _set_offset(
    conventions: Mapping[str, Convention],
    rows: Mapping[str, np.ndarray],
    givens: Mapping[str, np.ndarray],
    sizes: Mapping[str, np.ndarray],
    files: Mapping[str, RawFile],
    other: Mapping[str, np.ndarray],
) -> tuple[tuple[float, float] | None, float]:
    """Return by how much most files are moved, none if by nothing, and what their sides lack."""
    if not rows:
        return None, 0.0
    read = {n: conventions[n].read(row[None], sizes[n])[0] for n, row in rows.items()}
    steps = [read[n] - givens[n] for n in rows]
    if np.median([rows_iou(read[n][None], givens[n][None])[0] for n in rows]) < 0.5:
        return _moved(steps) or (None, 0.0)
    if (found := _moved(steps)) is not None:
        return found
    steps = []  # the first boxes are others than the given ones
    for name in rows:
        num = min(len(files[name].rows), len(other[name]))
        boxes = conventions[name].read(files[name].rows[:num], sizes[name])
        step = boxes - other[name][:num]
        step = step[np.isfinite(step).all(axis=1)]
        if len(step) and np.abs(step - np.median(step, axis=0)).mean() < 0.3:
            steps.append(np.round(np.median(step, axis=0)))
    return (_moved(steps) if len(steps) >= MOST * len(rows) else None) or (None, 0.0)


def _moved(steps: list[np.ndarray]) -> tuple[tuple[float, float] | None, float] | None:
    """Return the common move of corners and sides, in half pixels; none if there is none."""
    if not steps:
        return None
    table = np.array(steps)
    corner, sides = find_offset(table, np.zeros_like(table))
    corner, sides = np.round(2 * corner) / 2, np.round(2 * sides) / 2
    middle = np.concatenate([corner, corner + sides])
    agreeing = (np.abs(table - middle).max(axis=1) < 0.3).mean()
    if agreeing < MOST or (not corner.any() and not sides.any()) or sides[0] != sides[1]:
        return None
    return ((float(corner[0]), float(corner[1])) if corner.any() else None), -float(sides[0])


def _set_enlargement(
    conventions: Mapping[str, Convention],
    rows: Mapping[str, np.ndarray],
    givens: Mapping[str, np.ndarray],
    sizes: Mapping[str, np.ndarray],
) -> float:
    """Return how many times too long the sides of most first boxes are, about their centres."""
    ratios = []
    for name, row in rows.items():
        box, given = conventions[name].read(row[None], sizes[name])[0], givens[name]
        ratio = (box[2:] - box[:2]) / (given[2:] - given[:2])
        centred = np.abs((box[:2] + box[2:]) - (given[:2] + given[2:])).max() < 2
        if centred and abs(ratio[0] / ratio[1] - 1) < 0.02:
            ratios.append(float(ratio.mean()))
    if len(ratios) < MOST * len(rows) or not ratios:
        return 1.0
    middle = float(np.median(ratios))
    alike = np.mean(np.abs(np.array(ratios) / middle - 1) < 0.02) > MOST
    return middle if alike and abs(middle - 1) > 0.02 else 1.0


def own_convention(
    file: RawFile, truth: GroundTruth, shared: Convention, custom: float
) -> Convention:
    """Return how the rows of one file are read, if it clearly differs from the others."""
    row, given, size = first_row(file), truth.boxes[0], frame_size(truth)
    if row is None:
        return shared
    box = shared.read(row[None], size)
    fit = rows_iou(box, given[None])[0]
    step = box[0] - given
    if fit >= 0.5 and (file.decimals or not (given % 1).any()):
        for offset in (-1.0, 1.0):
            if np.abs(step - offset).max() < 0.05:
                x, y = shared.offset_xy
                return Convention(
                    form=shared.form, scale_xy=shared.scale_xy,
                    offset_xy=(x + offset, y + offset), sides=shared.sides,
                    enlarged=shared.enlarged,
                )  # fmt: skip
    if fit >= TRUSTED:
        return shared
    form, own_fit = find_form([row], [given], [size])
    if own_fit >= 0.95 and own_fit > fit + 0.1:
        return Convention(form=form, offset_xy=shared.offset_xy if form == USUAL else (0.0, 0.0))
    scale = find_scale(row, given)
    if scale is not None and shared.scale_xy == (1.0, 1.0):
        return Convention(scale_xy=scale)
    return shared
