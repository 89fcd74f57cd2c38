"""The box of the object in the first frame, as it is given."""

from __future__ import annotations

import numpy as np

from lorat.errors import UserError
from lorat.image.boxes import xywh_from_xyxy, xyxy_from_xywh


def parse_box(text: str) -> np.ndarray:
    """Return xyxy of ``left,top,width,height``.

    Raises:
        UserError: if it is not four numbers with positive sides.
    """
    try:
        values = np.array([float(part) for part in text.split(",")])
    except ValueError:
        values = np.empty(0)
    if values.shape != (4,) or not np.isfinite(values).all() or not (values[2:] > 0).all():
        raise UserError(
            f"The box is {text}; give left,top,width,height in pixels, such as 100,80,60,90."
        )
    return xyxy_from_xywh(values)


def check_inside(box: np.ndarray, frame: np.ndarray) -> None:
    """Refuse a box that does not lie in the frame.

    Raises:
        UserError: if less than a pixel of it does, or it sticks out.
    """
    height, width = frame.shape[:2]
    if (box[:2] < 0).any() or box[2] > width or box[3] > height:
        given = ",".join(f"{value:g}" for value in xywh_from_xyxy(box))
        raise UserError(
            f"The box {given} does not lie inside the first frame of {width}x{height} pixels; "
            "give left,top,width,height within it."
        )
