"""Boxes: conventions, clipping, and which are usable.

A box is ``(x1, y1, x2, y2)``: xyxy, 0-based, continuous pixels.  Functions on the sampling path
take and return Python scalars, since tiny NumPy arrays cost ten times as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Box = tuple[float, float, float, float]
"""One box as Python floats, xyxy."""


RASTER_EPSILON = 1e-4
"""Overlap, in pixels, below which a box does not touch the next pixel."""


def xyxy_from_xywh(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes (..., 4) from left, top, width, height to corners."""
    boxes = np.asarray(boxes)
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def xywh_from_xyxy(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes (..., 4) from corners to left, top, width, height."""
    boxes = np.asarray(boxes)
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def clip_box(box: Box, width: float, height: float) -> Box:
    """Clip a box to ``[0, width] x [0, height]``."""
    x1, y1, x2, y2 = box
    # Comparisons take a fifth of the time of min and max.
    x1, y1 = 0.0 if x1 < 0.0 else x1, 0.0 if y1 < 0.0 else y1
    x2, y2 = 0.0 if x2 < 0.0 else x2, 0.0 if y2 < 0.0 else y2
    return (
        width if x1 > width else x1,
        height if y1 > height else y1,
        width if x2 > width else x2,
        height if y2 > height else y2,
    )


def intersects(box: Box, width: float, height: float) -> bool:
    """Tell whether a box shares area with ``[0, width] x [0, height]``."""
    x1, y1, x2, y2 = box
    return min(x2, width) > max(x1, 0.0) and min(y2, height) > max(y1, 0.0)


def rasterize(box: Box) -> tuple[int, int, int, int]:
    """Return the pixels that a box touches, as integers with an exclusive end.

    A pixel counts once the box covers more than 1e-4 of its side.
    """
    return (
        math.floor(box[0]),
        math.floor(box[1]),
        math.floor(box[2] + 1 - RASTER_EPSILON),
        math.floor(box[3] + 1 - RASTER_EPSILON),
    )


def enlarge_to_minimum(box: Box, minimum: float) -> Box:
    """Raise the sides of a box to at least ``minimum`` pixels, about its centre."""
    x1, y1, x2, y2 = box
    if x2 - x1 < minimum:
        centre = 0.5 * (x1 + x2)
        x1, x2 = centre - 0.5 * minimum, centre + 0.5 * minimum
    if y2 - y1 < minimum:
        centre = 0.5 * (y1 + y2)
        y1, y2 = centre - 0.5 * minimum, centre + 0.5 * minimum
    return (x1, y1, x2, y2)


def usable(box_px: np.ndarray, size_wh: Sequence[int] | np.ndarray) -> np.ndarray:
    """Tell which boxes (n, 4) are finite, not empty and meet the image of size (w, h)."""
    x1, y1, x2, y2 = np.moveaxis(np.asarray(box_px, np.float64), -1, 0)
    width, height = np.moveaxis(np.asarray(size_wh), -1, 0)
    with np.errstate(invalid="ignore"):
        return (x2 > x1) & (y2 > y1) & (x1 < width) & (y1 < height) & (x2 > 0) & (y2 > 0)
