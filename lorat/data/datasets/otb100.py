"""OTB-100: ``<root>/<Sequence>/img`` and ``groundtruth_rect.txt``, 1-based, any delimiter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from lorat.data.datasets.findings import Findings
from lorat.data.datasets.labels import (
    align_numbered,
    list_folders,
    list_images,
    xyxy_from_xywh,
)
from lorat.data.datasets.records import Entry, RawDataset, Recording
from lorat.data.datasets.text import read_rows

FRAME_WINDOWS: dict[str, tuple[int, int]] = {
    "David": (300, 770),
    "Football1": (1, 74),
    "Freeman3": (1, 460),
    "Freeman4": (1, 283),
    "Diving": (1, 215),
    "BlurCar1": (247, 988),
    "BlurCar3": (3, 359),
    "BlurCar4": (18, 397),
}
"""First and last image number of the sequences that the benchmark evaluates in part."""
OMITTED_ROWS = {"Tiger1": 5}
"""Rows (and images) left out at the start, as the benchmark does."""
CHOSEN_TARGETS = {"Human4": ("2",)}
"""Targets that belong to the benchmark where not all annotated ones do."""


@dataclass(frozen=True, kw_only=True)
class Otb100(RawDataset):
    """OTB-100: 100 targets in 98 videos, for evaluation.

    Of videos with several targets each is a sequence: Jogging.1, Jogging.2, Skating2.1, ...
    """

    label: ClassVar[str] = "otb100"
    frames_hint: ClassVar[int] = 600

    def entries(self, findings: Findings) -> list[Entry]:
        """List the targets of all folders that have an annotation."""
        root = self.folder()
        entries = []
        for name in list_folders(root):
            files = sorted(p.name for p in (root / name).glob("groundtruth_rect*.txt"))
            for file in files:
                target = file.removeprefix("groundtruth_rect").removesuffix(".txt").lstrip(".")
                if name in CHOSEN_TARGETS and target not in CHOSEN_TARGETS[name]:
                    continue
                sequence = f"{name}.{target}" if target else name
                entries.append(Entry(name=sequence, values=(name, file)))
        if not entries:
            raise self.wrong_layout("folders <Sequence>/img and groundtruth_rect.txt beside", root)
        return self.selected(entries, findings)

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read one target."""
        folder, file = entry.values
        first, last = FRAME_WINDOWS.get(folder, (1, None))
        images = _frames(self.source / folder)
        if last is not None:
            in_window = [
                p for p in images if _number(p) is None or first <= (_number(p) or 0) <= last
            ]
            images = in_window or images
        truth = self.source / folder / file
        rows = read_rows(truth, 4, entry.name, findings, num_images=len(images))
        rows = rows if last is None else rows[: last - first + 1]
        aligned = align_numbered(images, len(rows), first, entry.name, findings)
        if aligned is None:
            return []
        paths, numbers = aligned
        box = xyxy_from_xywh(rows[: len(paths)], one_based=True)
        omitted = OMITTED_ROWS.get(folder, 0)
        return [
            Recording(
                name=entry.name,
                images=paths[omitted:],
                frame_number=numbers[omitted:],
                box=box[omitted:],
                visible=np.isfinite(box[omitted:]).all(axis=1),
            )
        ]


def _frames(folder: Path) -> list[str]:
    """List the images of a video: in ``img``, in ``jpg``, or in the only folder that has some."""
    for name in ("img", "jpg"):
        if images := list_images(folder / name):
            return images
    filled = [images for name in list_folders(folder) if (images := list_images(folder / name))]
    return filled[0] if len(filled) == 1 else []


def _number(path: str) -> int | None:
    stem = Path(path).stem
    return int(stem) if stem.isdigit() else None
