"""TNL2K: one folder per sequence with ``imgs`` (any names) and ``groundtruth.txt``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lorat.data.datasets.findings import Findings
from lorat.data.datasets.labels import (
    align_in_order,
    list_folders,
    list_images,
    xyxy_from_xywh,
)
from lorat.data.datasets.records import Entry, RawDataset, Recording
from lorat.data.datasets.text import read_rows


@dataclass(frozen=True, kw_only=True)
class Tnl2k(RawDataset):
    """TNL2K: 1,300 training and 700 test videos, each split in a folder of its own."""

    split: Literal["train", "test"] = "train"
    """Which split the folder is."""

    label: ClassVar[str] = "tnl2k"
    frames_hint: ClassVar[int] = 600

    def entries(self, findings: Findings) -> list[Entry]:
        """List the folders that have images."""
        root = self.folder()
        names = [n for n in list_folders(root) if (root / n / "imgs").is_dir()]
        if not names:
            raise self.wrong_layout("folders <sequence>/imgs and <sequence>/groundtruth.txt", root)
        return self.selected([Entry(name=n) for n in names], findings)

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read one sequence; an empty box means that the target is absent."""
        name = entry.name
        folder = self.source / name
        truth = folder / "groundtruth.txt"
        if not truth.is_file():
            findings.add(name, "dropped", "groundtruth.txt is missing")
            return []
        images = list_images(folder / "imgs")
        rows = read_rows(truth, 4, name, findings, num_images=len(images))
        aligned = align_in_order(images, len(rows), 1, name, findings)
        if aligned is None:
            return []
        paths, numbers = aligned
        rows = rows[: len(paths)]
        return [
            Recording(
                name=name,
                images=paths,
                frame_number=numbers,
                box=xyxy_from_xywh(rows),
                visible=(rows[:, 2:] != 0).any(axis=1) & np.isfinite(rows).all(axis=1),
            )
        ]
