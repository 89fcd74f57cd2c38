"""What the four numbers of a row mean: the forms of boxes, and which one result files have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lorat.image.boxes import xyxy_from_xywh
from lorat.metrics.overlap import iou

Form = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Turns rows (m, 4) and the frame's size (2,), or those of m frames (m, 2), into xyxy."""


def _centred(rows: np.ndarray, size_wh: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[:, :2] - rows[:, 2:] / 2, rows[:, :2] + rows[:, 2:] / 2], axis=1)


def _mirrored(rows: np.ndarray, size_wh: np.ndarray) -> np.ndarray:
    left = size_wh[..., :1] - rows[:, :1] - rows[:, 2:3]
    return xyxy_from_xywh(np.concatenate([left, rows[:, 1:]], axis=1))


def _normalized(form: Form) -> Form:
    return lambda rows, size_wh: form(rows * np.tile(size_wh, 2), size_wh)


def _ltwh(rows: np.ndarray, size_wh: np.ndarray) -> np.ndarray:
    return xyxy_from_xywh(rows)


def _corners(rows: np.ndarray, size_wh: np.ndarray) -> np.ndarray:
    return rows


FORMS: dict[str, Form] = {
    "left, top, width, height": _ltwh,
    "corners (left, top, right, bottom)": _corners,
    "centre, width, height": _centred,
    "top, left, height, width (axes swapped)": lambda r, s: xyxy_from_xywh(r[:, [1, 0, 3, 2]]),
    "left, top, height, width (sides swapped)": lambda r, s: xyxy_from_xywh(r[:, [0, 1, 3, 2]]),
    "corners (top, left, bottom, right)": lambda r, s: r[:, [1, 0, 3, 2]],
    "mirrored left and right": _mirrored,
    "normalised left, top, width, height": _normalized(_ltwh),
    "normalised corners": _normalized(_corners),
    "normalised centre, width, height": _normalized(_centred),
}
"""The forms of boxes that result files are met in; the first is everybody's."""
USUAL = next(iter(FORMS))
TRUSTED = 0.9
"""Overlap of a file's first box with the given one from which its form is believed."""


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How the rows of a result file are read."""

    form: str = USUAL
    scale_xy: tuple[float, float] = (1.0, 1.0)
    """Coordinates are multiplied by these: the frames had been resized."""
    offset_xy: tuple[float, float] = (0.0, 0.0)
    """What is taken off the coordinates: 1 of 1-based files."""
    sides: float = 0.0
    """What is added to the sides: 1 where they are last minus first pixel."""
    enlarged: float = 1.0
    """What the sides are divided by, about the centre."""

    def read(self, rows: np.ndarray, size_wh: np.ndarray) -> np.ndarray:
        """Return rows (m, 4) as xyxy, 0-based."""
        boxes = FORMS[self.form](rows, size_wh) * np.tile(self.scale_xy, 2)
        boxes = boxes - np.tile(self.offset_xy, 2)
        boxes[:, 2:] += self.sides
        if self.enlarged != 1:
            centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
            half = half / self.enlarged
            boxes = np.concatenate([centre - half, centre + half], axis=1)
        return boxes

    def described(self, custom: float) -> list[str]:
        """Return in words what differs from left, top, width, height.

        Args:
            custom: coordinate of the first pixel by the data set's custom.
        """
        words = [] if self.form == USUAL else [self.form]
        if self.scale_xy != (1.0, 1.0):
            scales = " × ".join(f"{1 / scale:.3g}" for scale in dict.fromkeys(self.scale_xy))
            words.append(f"scaled image: coordinates are {scales} of the frame's")
        x, y = self.offset_xy
        if (x, y) != (custom, custom):
            if (x, y) == (1.0, 1.0):
                words.append("off by one: 1-based, where 0-based is the custom")
            elif (x, y) == (0.0, 0.0):
                words.append("off by one: 0-based, where 1-based is the custom")
            elif x - custom == y - custom == -1.0:
                words.append("off by one: one pixel too small")
            else:
                words.append(f"shifted by {x - custom:+.3g}, {y - custom:+.3g} pixels")
        if self.sides:
            words.append(f"sides of {-self.sides:+.3g} pixel (last minus first pixel)")
        if self.enlarged != 1:
            words.append(f"sides {self.enlarged:.3g} times as long")
        return words


def rows_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the overlap of xyxy boxes (m, 4) row by row; 0 where one is no box."""
    a, b = (np.concatenate([x[:, :2], x[:, 2:] - x[:, :2]], axis=1) for x in (first, second))
    fits = (a[:, 2:] > 0).all(axis=1) & (b[:, 2:] > 0).all(axis=1)
    return np.where(fits, np.nan_to_num(iou(a, b)), 0.0)


def find_form(
    firsts: list[np.ndarray], givens: list[np.ndarray], sizes: list[np.ndarray]
) -> tuple[str, float]:
    """Return the form in which first rows (4,) are the given boxes (4,) xyxy, and how well.

    How well is the median overlap, where files may be 1-based: a pixel is much of a small box.  The
    usual form is taken where it is as good.
    """
    if not firsts:
        return USUAL, 0.0
    best, best_fit = USUAL, -1.0
    rows, boxes, sizes_wh = np.array(firsts), np.array(givens), np.array(sizes)
    for name, form in FORMS.items():
        read = form(rows, sizes_wh)
        fit = max(float(np.median(rows_iou(read - origin, boxes))) for origin in (0.0, 1.0, -1.0))
        if fit > best_fit + (0.02 if best_fit >= 0 else 0):
            best, best_fit = name, fit
    return best, best_fit


def find_scale(rows: np.ndarray, given: np.ndarray) -> tuple[float, float] | None:
    """Return what to multiply x and y by so that a first row is the given box, or none.

    The position tells as much as the size, so a box of another place has no scale.

    Args:
        rows: (4,) left, top, width, height.
        given: (4,) xyxy.
    """
    ends = xyxy_from_xywh(rows)
    if not (np.isfinite(ends).all() and (ends[2:] > 1e-6).all()):
        return None
    scale = given[2:] / ends[2:]
    off_px = np.abs(ends * np.tile(scale, 2) - given).max()
    allowed_px = 0.01 * (given[2:] - given[:2]).min() + 0.3 * scale.max()
    if off_px > allowed_px or np.abs(scale - 1).max() < 0.02:
        return None
    return float(scale[0]), float(scale[1])


def find_offset(boxes: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the median steps of corner (2,) and sides (2,) from given boxes to boxes (k, 4)."""
    step = boxes - given
    corner = np.median(step[:, :2], axis=0)
    sides = np.median(step[:, 2:] - step[:, :2], axis=0)
    return corner, sides
