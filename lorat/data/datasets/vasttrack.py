"""VastTrack: ``<root>/<Category Name>/<Category Name>-<n>/imgs``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lorat.data.datasets.findings import Findings
from lorat.data.datasets.labels import (
    align_numbered,
    list_folders,
    list_images,
    xyxy_from_xywh,
)
from lorat.data.datasets.records import Entry, RawDataset, Recording
from lorat.data.datasets.text import read_rows

_TRUTH_FILES = ("Groundtruth.txt", "groundtruth.txt")


@dataclass(frozen=True, kw_only=True)
class VastTrack(RawDataset):
    """VastTrack: 47,109 training and 3,500 test videos; boxes are 1-based, all zero if absent."""

    split: Literal["train", "test"] = "train"
    """Which split the folder (or the include list) is."""

    label: ClassVar[str] = "vasttrack"
    frames_hint: ClassVar[int] = 90

    def entries(self, findings: Findings) -> list[Entry]:
        """List the sequences of all categories."""
        root = self.folder()
        entries = [
            Entry(name=name, values=category)
            for category in list_folders(root)
            for name in list_folders(root / category)
            if (root / category / name / "imgs").is_dir()
        ]
        if not entries:
            expected = "folders <Category>/<Category>-<n>/imgs with Groundtruth.txt beside"
            raise self.wrong_layout(expected, root)
        return self.selected(entries, findings)

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read one sequence."""
        name = entry.name
        folder = self.source / entry.values / name
        truth = next((folder / t for t in _TRUTH_FILES if (folder / t).is_file()), None)
        if truth is None:
            findings.add(name, "dropped", "Groundtruth.txt is missing")
            return []
        images = list_images(folder / "imgs")
        rows = read_rows(truth, 4, name, findings, num_images=len(images))
        aligned = align_numbered(images, len(rows), 1, name, findings)
        if aligned is None:
            return []
        paths, numbers = aligned
        rows = rows[: len(paths)]
        if not (folder / "nlp.txt").is_file():
            findings.add(name, "kept", "nlp.txt is missing (not used here)")
        return [
            Recording(
                name=name,
                category=entry.values,
                images=paths,
                frame_number=numbers,
                box=xyxy_from_xywh(rows, one_based=True),
                visible=(rows != 0).any(axis=1),
            )
        ]
