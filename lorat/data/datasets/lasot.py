"""LaSOT and LaSOT_ext: ``<root>/<category>/<category>-<n>/``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from lorat.data.datasets.findings import Findings
from lorat.data.datasets.labels import (
    align_numbered,
    list_folders,
    list_images,
    xyxy_from_xywh,
)
from lorat.data.datasets.records import Entry, RawDataset, Recording
from lorat.data.datasets.text import read_flags, read_names, read_rows


def _load(folder: Path, name: str, *, one_based: bool, findings: Findings) -> list[Recording]:
    truth = folder / "groundtruth.txt"
    if not truth.is_file():
        findings.add(name, "dropped", "groundtruth.txt is missing")
        return []
    images = list_images(folder / "img")
    rows = read_rows(truth, 4, name, findings, num_images=len(images))
    box = xyxy_from_xywh(rows, one_based=one_based)
    aligned = align_numbered(images, len(box), 1, name, findings)
    if aligned is None:
        return []
    paths, numbers = aligned
    count = len(paths)
    visible = np.ones(count, bool)
    for flag in ("full_occlusion.txt", "out_of_view.txt"):
        values = read_flags(folder / flag, len(box), name, findings, default=0)
        if values is None:
            findings.add(name, "repaired", f"{flag} is missing; taken as all visible")
        else:
            visible &= values[:count] == 0
    return [
        Recording(
            name=name,
            category=name.rpartition("-")[0],
            images=paths,
            frame_number=numbers,
            box=box[:count],
            visible=visible,
        )
    ]


def _find(root: Path, name: str) -> Path:
    nested = root / name.rpartition("-")[0] / name
    return nested if nested.is_dir() else root / name


def _walk(root: Path) -> list[str]:
    """List the sequences of all categories."""
    return [
        name
        for category in list_folders(root)
        for name in list_folders(root / category)
        if (root / category / name / "groundtruth.txt").is_file()
    ]


@dataclass(frozen=True, kw_only=True)
class Lasot(RawDataset):
    """LaSOT: 1,120 training and 280 test videos; boxes are 1-based."""

    split: Literal["train", "test"] = "train"
    """Split to ingest, as listed in training_set.txt or testing_set.txt."""

    label: ClassVar[str] = "lasot"
    frames_hint: ClassVar[int] = 2500

    def entries(self, findings: Findings) -> list[Entry]:
        """List the sequences of the split's file."""
        root = self.folder()
        list_file = root / ("training_set.txt" if self.split == "train" else "testing_set.txt")
        expected = f"{list_file.name} and folders <category>/<category>-<n>/img"
        if not list_file.is_file():
            raise self.wrong_layout(expected, root)
        names = read_names(list_file)
        if not any(_find(root, n).is_dir() for n in names):
            raise self.wrong_layout(expected, root)
        return self.selected([Entry(name=n) for n in names], findings, list_file)

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read one sequence."""
        folder = _find(self.source, entry.name)
        return _load(folder, entry.name, one_based=True, findings=findings)


@dataclass(frozen=True, kw_only=True)
class LasotExt(RawDataset):
    """LaSOT_ext: 150 test videos; boxes are taken as 0-based, as the tracker's authors do."""

    label: ClassVar[str] = "lasot_ext"
    frames_hint: ClassVar[int] = 2500

    def entries(self, findings: Findings) -> list[Entry]:
        """List the sequences of all categories."""
        names = _walk(self.folder())
        if not names:
            raise self.wrong_layout("folders <category>/<category>-<n>/img", self.source)
        return self.selected([Entry(name=n) for n in names], findings)

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read one sequence."""
        folder = _find(self.source, entry.name)
        return _load(folder, entry.name, one_based=False, findings=findings)
