"""What makes a sequence hard: as its dataset says, or computed from its annotation alone.

The definitions of what is computed are those of OTB-100 (Wu et al., PAMI 2015) and LaSOT (Fan et
al., CVPR 2019) as far as they need no human: they compare boxes with the first frame's or with the
frame before.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lorat.data.shards.frame_index import FrameIndex
from lorat.errors import UserError

ATTRIBUTES = {
    "scale variation": "the box area leaves [1/2, 2] of the first frame's",
    "aspect change": "the aspect ratio leaves [1/2, 2] of the first frame's",
    "fast motion": "the centre moves by more than the box's mean side within a frame",
    "low resolution": "the box is smaller than 1,000 pixels in at least one frame",
    "partial occlusion": "the visible share is labelled below 1 but above 0 in at least one frame",
    "absence": "the target is fully occluded or out of view in at least one frame",
    "partial exit": "the box touches the border of the frame in at least one frame",
    "distant": "the box covers less than 1 % of the frame on average",
}
"""Computed attributes and what they mean."""
FULL_COVER = 8
"""GOT-10k's label of a target that is seen as a whole; a frame without label has -1."""
_BORDER_PX = 1.0


def read_attributes(file: Path) -> dict[str, list[str]]:
    """Read lines of a sequence and its attributes: ``bike1,fast motion,camera motion``.

    Returns:
        The attributes of each sequence.

    Raises:
        UserError: if the file cannot be read, or a line has a sequence alone.
    """
    found: dict[str, list[str]] = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            for row in csv.reader(lines):
                cells = [cell.strip() for cell in row if cell.strip()]
                if len(cells) == 1:
                    raise UserError(
                        f"{file} has the line {cells[0]!r}; give a sequence and its attributes in "
                        "each line, between commas."
                    )
                if cells:
                    found.setdefault(cells[0], []).extend(cells[1:])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"Cannot read the attributes in {file} ({error}).") from error
    return found


def by_attribute(of_sequence: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Return the sequences of each attribute, sorted by name."""
    gathered: dict[str, list[str]] = {}
    for sequence in sorted(of_sequence):
        for name in dict.fromkeys(of_sequence[sequence]):
            gathered.setdefault(name, []).append(sequence)
    return gathered


def attributes_of(index: FrameIndex, track: int) -> set[str]:
    """Return the computed attributes of a sequence."""
    rows = slice(int(index.track_start[track]), int(index.track_start[track + 1]))
    box, size_wh = index.box[rows].astype(np.float64), index.size_wh[rows].astype(np.float64)
    usable = index.valid[rows]
    found = set()
    if not index.visible[rows].all():
        found.add("absence")
    if ((index.cover[rows] > 0) & (index.cover[rows] < FULL_COVER)).any():
        found.add("partial occlusion")
    if usable.sum() < 2:
        return found
    side_wh = box[:, 2:] - box[:, :2]
    centre = 0.5 * (box[:, 2:] + box[:, :2])
    area, aspect = side_wh.prod(axis=1), side_wh[:, 0] / np.maximum(side_wh[:, 1], 1e-9)
    first = int(np.flatnonzero(usable)[0])
    for name, value in (("scale variation", area), ("aspect change", aspect)):
        ratio = value[usable] / max(value[first], 1e-9)
        if ((ratio < 0.5) | (ratio > 2)).any():
            found.add(name)
    both = usable[1:] & usable[:-1]
    step = np.linalg.norm(np.diff(centre, axis=0), axis=1)[both]
    if (step > side_wh[1:].mean(axis=1)[both]).any():
        found.add("fast motion")
    if (area[usable] < 1000).any():
        found.add("low resolution")
    low, high = box[usable, :2], size_wh[usable] - box[usable, 2:]
    if (np.minimum(low, high) <= _BORDER_PX).any():
        found.add("partial exit")
    if (area[usable] / size_wh[usable].prod(axis=1)).mean() < 0.01:
        found.add("distant")
    return found


def sequences_by_attribute(index: FrameIndex) -> dict[str, list[str]]:
    """Return the sequences that have each attribute, annotated ones of the dataset first."""
    given: dict[str, list[str]] = dict(index.manifest.get("attributes") or {})
    computed: dict[str, list[str]] = {name: [] for name in ATTRIBUTES}
    for track in range(index.num_tracks):
        for name in attributes_of(index, track):
            computed[name].append(index.sequence(track))
    return given | {name: names for name, names in computed.items() if names and name not in given}
