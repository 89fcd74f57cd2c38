"""The boxes of objects where their tracking begins, as they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorat.data.datasets.text import read_lines, read_number, split_fields
from lorat.errors import UserError, named
from lorat.image.boxes import xywh_from_xyxy, xyxy_from_xywh


@dataclass(frozen=True, kw_only=True)
class FirstBox:
    """An object to track, and the frame in which it is first seen."""

    box: np.ndarray
    """xyxy (4,) in pixels."""
    frame: int = 0
    """Number of that frame, from 0."""


def given_objects(boxes: Sequence[str], file: Path | None) -> list[FirstBox]:
    """Return the objects that a command line gives, as boxes or as a file of them.

    Raises:
        UserError: as :func:`parse_box` and :func:`read_boxes`.
    """
    if file is not None:
        return read_boxes(file)
    return [FirstBox(box=parse_box(text)) for text in boxes]


def read_boxes(file: Path) -> list[FirstBox]:
    """Read objects, one per line: ``left,top,width,height`` and, behind it, the first frame.

    Empty lines, lines that begin with #, and a first line that names columns are no objects.

    Raises:
        UserError: if the file cannot be read, holds no object, or a line is something else.
    """
    objects = []
    for number, line in enumerate(read_lines(file), start=1):
        names_columns = number == 1 and line[:1].isalpha()
        if not line or line.startswith("#") or names_columns:
            continue
        values = [read_number(field) for field in split_fields(line)]
        box, frame = np.array(values[:4], dtype=np.float64), (values[4:] or [0.0])[0]
        fits = len(values) in (4, 5) and bool(np.isfinite(box).all() and (box[2:] > 0).all())
        if not fits or frame is None or frame < 0 or frame != int(frame):
            raise UserError(
                f"Line {number} of {named(file)} is {named(line[:60])}; give "
                "left,top,width,height in pixels and, if the object is not there from the "
                "beginning, the number of its first frame, counted from 0."
            )
        objects.append(FirstBox(box=xyxy_from_xywh(box), frame=int(frame)))
    if not objects:
        raise UserError(f"{named(file)} holds no object; give left,top,width,height in each line.")
    if min(each.frame for each in objects) > 0:
        raise UserError(
            f"No object of {named(file)} is there from the beginning; let at least one begin at "
            "frame 0, or cut the video."
        )
    return objects


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


def check_inside(objects: Sequence[FirstBox], frame: np.ndarray) -> None:
    """Refuse a box that does not lie in the first frame of the video.

    Raises:
        UserError: if less than a pixel of it does, or it sticks out.
    """
    height, width = frame.shape[:2]
    for box in (each.box for each in objects):
        if (box[:2] < 0).any() or box[2] > width or box[3] > height:
            given = ",".join(f"{value:g}" for value in xywh_from_xyxy(box))
            raise UserError(
                f"The box {given} does not lie inside the first frame of {width}x{height} pixels; "
                "give left,top,width,height within it."
            )
