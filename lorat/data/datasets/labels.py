"""Annotations: numbers, flags and images as datasets store them, and their alignment."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorat.data.datasets.records import Findings
from lorat.errors import UserError
from lorat.image import boxes
from lorat.image.frame_files import list_images as list_images
from lorat.image.frame_files import natural_key, tell_frames

_SEPARATORS = re.compile(r"[,;\s]+")
_LEFT = re.compile(r"(^|[_.])(x|left|min_?x)")
"""Names of the column that a box begins with: x, x1, xmin, left, bb_left, bbox_x, ..."""
_MAX_MISSING = 0.1
"""Share of annotated frames without image above which a sequence is not believed."""


def list_folders(folder: Path) -> list[str]:
    """List the names of the folders in a folder, by their numbers."""
    with os.scandir(folder) as items:
        return sorted((i.name for i in items if i.is_dir()), key=natural_key)


def read_rows(
    file: Path, num_columns: int, sequence: str, findings: Findings, *, header: bool = False
) -> np.ndarray:
    """Read rows of numbers, whatever separates them (comma, semicolon, tab, spaces).

    Rows that are no ``num_columns`` numbers become NaN and are reported.

    Args:
        header: the first line may name the columns; then it is no row, and neither is a first
            column with the number of the frame a part of one.  Without names nothing tells what
            further columns are, and they are refused; else they are ignored.

    Returns:
        float64 (n, num_columns).

    Raises:
        UserError: with ``header``, if there are more columns and nothing tells which the box is.
    """
    lines = file.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    left_out = 0
    names = _column_names(lines[0]) if header and lines else []
    if names:
        del lines[0]
        left_out = int(names[0].startswith("frame") and len(names) > num_columns)
        if len(names) - left_out > num_columns and not _LEFT.search(names[left_out]):
            raise UserError(
                f"The columns of {file} are {', '.join(names)}; allowed are those of the box, "
                "beginning with x or left, after a column frame if there is one: put the others "
                "behind the box or leave them out."
            )
        findings.add(sequence, "repaired", f"{file.name}: the first line names columns, not a box")
    rows, unreadable = [], []
    for number, line in enumerate(lines):
        fields = [f for f in _SEPARATORS.split(line.strip()) if f][left_out:]
        if header and not names and len(fields) > num_columns:
            raise UserError(
                f"Line {number + 1} of {file} has {len(fields)} values, allowed are the "
                f"{num_columns} of a box; leave the others out, or name the columns in the first "
                "line (a column frame before the box is left out, and so is what follows it)."
            )
        try:
            row = [float(f) for f in fields[:num_columns]]
        except ValueError:
            row = []
        if len(row) < num_columns:
            row = [math.nan] * num_columns
            unreadable.append(number + 1)
        rows.append(row)
    if unreadable:
        why = f"{file.name}: row is no {num_columns} numbers, taken as no box"
        findings.add(sequence, "repaired", why, unreadable)
    return np.array(rows, np.float64).reshape(-1, num_columns)


def _column_names(line: str) -> list[str]:
    """Return the words of a line that has no number at all, in lower case, else nothing."""
    words = [w for w in _SEPARATORS.split(line.strip().lower().strip("#")) if w]
    for word in words:
        try:
            float(word)
        except ValueError:
            continue
        return []
    named = any(character.isalpha() for word in words for character in word)
    return [word.strip("\"'") for word in words] if named else []


def read_flags(
    file: Path,
    count: int,
    sequence: str,
    findings: Findings,
    *,
    default: int,
    what: str = "frames",
) -> np.ndarray | None:
    """Read whole numbers, one per frame, on one line or many; none if there is no such file.

    Too few are filled with ``default``, too many are cut, and both are reported.
    """
    if not file.is_file():
        return None
    fields = _SEPARATORS.split(file.read_text(encoding="utf-8-sig", errors="replace").strip())
    try:
        values = [int(float(f)) for f in fields if f]
    except ValueError:
        findings.add(sequence, "repaired", f"{file.name} cannot be read and is ignored")
        return None
    if len(values) != count:
        why = f"{file.name} has {len(values)} values for {count} {what}"
        findings.add(sequence, "repaired", why)
    return np.array((values + [default] * count)[:count], np.int64)


def xyxy_from_xywh(box_xywh: np.ndarray, *, one_based: bool = False) -> np.ndarray:
    """Convert left, top, width, height to xyxy, 0-based.

    Args:
        one_based: the first pixel has the coordinate 1, as in MATLAB.
    """
    return boxes.xyxy_from_xywh(box_xywh) - (1.0 if one_based else 0.0)


def align_numbered(
    images: Sequence[str], num_rows: int, first: int, sequence: str, findings: Findings
) -> tuple[tuple[str, ...], np.ndarray] | None:
    """Match images named by number to annotation rows; row i belongs to number ``first + i``.

    Other files between the images are ignored if every row has its number; else all are taken in
    order.

    Returns:
        Path (empty where missing) and number of each frame, or none if the two cannot belong
        together; rows after the last image are cut off.
    """
    by_number = {int(stem): p for p in images if (stem := Path(p).stem).isdecimal()}
    num_others = len(images) - len(by_number)
    if num_others:
        if not num_rows or any(n not in by_number for n in range(first, first + num_rows)):
            return align_in_order(images, num_rows, first, sequence, findings)
        why = f"{num_others} images that are not named by a number of their own are ignored"
        findings.add(sequence, "repaired", why)
        images = list(by_number.values())
    numbers = sorted(by_number)
    if len(numbers) == num_rows and numbers and numbers[-1] - numbers[0] + 1 == num_rows:
        first = numbers[0]
    wanted = range(first, first + num_rows)
    paths = [by_number.get(n, "") for n in wanted]
    num_missing = paths.count("")
    if not images or num_missing > max(1, _MAX_MISSING * num_rows):
        _refuse(len(images), num_rows, sequence, findings)
        return None
    num_extra = len(images) - (num_rows - num_missing)
    if num_extra:
        findings.add(sequence, "repaired", f"{num_extra} images have no row and are ignored")
    if num_missing:
        absent = [n for n in wanted if n not in by_number]
        findings.add(sequence, "dropped", "the image of an annotated frame is missing", absent)
    while paths and not paths[-1]:
        paths.pop()
    return tuple(paths), np.arange(first, first + len(paths))


def align_in_order(
    images: Sequence[str], num_rows: int, first: int, sequence: str, findings: Findings
) -> tuple[tuple[str, ...], np.ndarray] | None:
    """Match images of any names to annotation rows, the n-th to the n-th.

    Counts that differ by one are cut to the smaller; more cannot be matched, since nothing tells
    which image a row belongs to.  Images of other names than the frames are left out.
    """
    told = tell_frames(images)
    if told is not None and told.others:
        example = os.path.basename(told.others[0])
        why = f"{len(told.others)} images of other names ({example}, ...) are no frames, left out"
        findings.add(sequence, "repaired", why)
        images = told.frames
    if not images or abs(len(images) - num_rows) > 1:
        _refuse(len(images), num_rows, sequence, findings)
        return None
    count = min(len(images), num_rows)
    if len(images) != num_rows:
        why = f"{len(images)} images for {num_rows} rows, cut to {count}"
        findings.add(sequence, "repaired", why)
    return tuple(images[:count]), np.arange(first, first + count)


def _refuse(num_images: int, num_rows: int, sequence: str, findings: Findings) -> None:
    if num_images == 0:
        findings.add(sequence, "dropped", "there are no images")
    else:
        why = f"{num_images} images for {num_rows} rows: the annotation is of other frames"
        findings.add(sequence, "dropped", why)


def first_box_only(box: np.ndarray, num_frames: int) -> np.ndarray:
    """Extend the box of the first frame by frames without annotation (NaN)."""
    extended = np.full((num_frames, 4), np.nan)
    extended[: len(box)] = box
    return extended
