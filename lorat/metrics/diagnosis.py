"""A diagnosis: what was found unusual about a result set, and its boxes as it is mended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lorat.image.boxes import xywh_from_xyxy, xyxy_from_xywh
from lorat.metrics.dialects import GroundTruth
from lorat.metrics.raw_results import RawResults

KINDS = (
    "sequence names", "missing files", "text of the files", "sequences mixed up",
    "boxes' convention", "first frame", "frame shift", "frame order", "frame rate",
    "absent frames", "rows missing", "rows twice", "short files", "long files",
    "rows without a box", "same box again", "rounding",
)  # fmt: skip
"""Kinds of causes, in the order in which they are mended."""
NOWHERE = np.array([-9999.0, -9999.0, -9998.0, -9998.0])
"""A box that overlaps with nothing: of a frame without a row."""


@dataclass(kw_only=True)
class Cause:
    """Something unusual, and where."""

    kind: str
    """Of :data:`KINDS`."""
    text: str
    sequences: list[str]


@dataclass(kw_only=True)
class Diagnosis:
    """A result set as the toolkits would take it, and mended step by step."""

    naive: dict[str, np.ndarray]
    """(n, 4) xyxy of each sequence, 0-based by the data set's custom."""
    causes: list[Cause] = field(default_factory=list)
    mended: dict[str, list[tuple[str, np.ndarray]]] = field(default_factory=dict)
    """By sequence, the boxes (n, 4) after each kind of cause was mended."""

    def note(self, kind: str, text: str, sequence: str) -> None:
        """Add a sequence to a cause."""
        for cause in self.causes:
            if (cause.kind, cause.text) == (kind, text):
                if sequence and sequence not in cause.sequences:
                    cause.sequences.append(sequence)
                return
        self.causes.append(Cause(kind=kind, text=text, sequences=[sequence] if sequence else []))

    def mend(self, sequence: str, kind: str, boxes: np.ndarray) -> None:
        """Note the boxes of a sequence once a kind of cause is mended."""
        self.mended.setdefault(sequence, []).append((kind, boxes))

    def after(self, kind: str | None) -> dict[str, np.ndarray]:
        """Return the boxes once all kinds up to this one are mended; none means no kind."""
        last = -1 if kind is None else KINDS.index(kind)
        boxes = dict(self.naive)
        for sequence, steps in self.mended.items():
            for step, mended in steps:
                if KINDS.index(step) <= last:
                    boxes[sequence] = mended
        return boxes

    def final(self) -> dict[str, np.ndarray]:
        """Return the boxes with everything mended."""
        return self.after(KINDS[-1])


def in_frames(boxes: np.ndarray, num: int) -> np.ndarray:
    """Return boxes (n, 4) of n frames: cut, or :data:`NOWHERE` where there is none."""
    whole = np.tile(NOWHERE, (num, 1))
    whole[: min(num, len(boxes))] = boxes[:num]
    return whole


def naive_boxes(
    raw: RawResults, truths: Mapping[str, GroundTruth], custom: float
) -> dict[str, np.ndarray]:
    """Return the boxes (n, 4) xyxy that a toolkit finds in files: by name, row by row.

    Args:
        raw: the files.
        truths: annotation of the sequences.
        custom: coordinate of the first pixel in the files of this data set.
    """
    boxes = {}
    for name, truth in truths.items():
        usual = name in raw.files and name not in raw.other_names
        rows = raw.files[name].rows[~raw.files[name].is_empty] if usual else np.empty((0, 4))
        boxes[name] = in_frames(xyxy_from_xywh(rows) - custom, len(truth.boxes))
    return boxes


def rounded(boxes: np.ndarray, decimals: int) -> np.ndarray:
    """Return xyxy boxes as they are in files of so many decimals; the first stays."""
    ltwh = xywh_from_xyxy(boxes)
    ltwh[1:] = np.round(ltwh[1:], decimals)
    return xyxy_from_xywh(ltwh)
