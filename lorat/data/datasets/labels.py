"""Annotations: boxes as datasets store them, and their alignment with images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorat.data.datasets.findings import Findings
from lorat.image import boxes
from lorat.image.frame_files import list_images as list_images
from lorat.image.frame_files import natural_key, tell_frames

_MAX_MISSING = 0.1
"""Share of annotated frames without image above which a sequence is not believed."""


def list_folders(folder: Path) -> list[str]:
    """List the names of the folders in a folder, by their numbers."""
    with os.scandir(folder) as items:
        return sorted((i.name for i in items if i.is_dir()), key=natural_key)


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
