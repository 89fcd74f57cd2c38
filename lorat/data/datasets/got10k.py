"""GOT-10k: ``<root>/{train,val,test}/list.txt`` and one folder of frames per sequence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from lorat.data.datasets.findings import Findings
from lorat.data.datasets.labels import (
    align_numbered,
    first_box_only,
    list_folders,
    list_images,
    xyxy_from_xywh,
)
from lorat.data.datasets.records import Entry, RawDataset, Recording
from lorat.data.datasets.text import read_flags, read_lines, read_names, read_rows
from lorat.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Got10k(RawDataset):
    """GOT-10k: 9,335 training, 180 validation and 180 test videos.

    The include list may hold numbers instead of names: positions in list.txt, from 0.
    """

    split: Literal["train", "val", "test"] = "train"
    """Split to ingest; the test split has only the first box of each video."""

    label: ClassVar[str] = "got10k"
    frames_hint: ClassVar[int] = 150

    def entries(self, findings: Findings) -> list[Entry]:
        """List the sequences of list.txt, or the folders where that file is missing."""
        folder = self.folder() / self.split
        expected = f"{self.split}/list.txt and folders with groundtruth.txt and 00000001.jpg, ..."
        if not folder.is_dir():
            raise self.wrong_layout(expected, self.source)
        list_file = folder / "list.txt"
        if list_file.is_file():
            names = read_names(list_file)
        else:
            present = list_folders(folder)
            names = [n for n in present if (folder / n / "groundtruth.txt").is_file()]
            if names:
                findings.add("", "repaired", f"{self.split}/list.txt is missing; folders are used")
        if not any((folder / n).is_dir() for n in names):
            raise self.wrong_layout(expected, folder)
        where = list_file if list_file.is_file() else folder
        return self.selected([Entry(name=n) for n in names], findings, where)

    def wanted(self, lines: list[str], entries: list[Entry]) -> list[str]:
        """Read names, or positions in list.txt counted from 0."""
        if not all(line.isdigit() for line in lines):
            return lines
        if not (self.source / self.split / "list.txt").is_file():
            raise UserError(
                f"{self.include_list} has numbers, which are positions in {self.split}/list.txt, "
                f"but {self.source} has no such file; put it there or give names."
            )
        beyond = [line for line in lines if int(line) >= len(entries)]
        if beyond:
            raise UserError(
                f"{self.include_list} has the number {beyond[0]}, but list.txt of the split "
                f"{self.split} has {len(entries)} sequences, counted from 0."
            )
        return [entries[int(line)].name for line in lines]

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read one sequence."""
        name = entry.name
        folder = self.source / self.split / name
        truth = folder / "groundtruth.txt"
        if not folder.is_dir():
            findings.add(name, "dropped", "in list.txt, but there is no such folder")
            return []
        if not truth.is_file():
            findings.add(name, "dropped", "groundtruth.txt is missing")
            return []
        images = list_images(folder)
        box = xyxy_from_xywh(read_rows(truth, 4, name, findings, num_images=len(images)))
        one_box = self.split == "test" and len(box) <= 1
        if one_box:
            box = first_box_only(box, len(images))
        aligned = align_numbered(images, len(box), 1, name, findings)
        if aligned is None:
            return []
        paths, numbers = aligned
        count = len(paths)
        absent = read_flags(folder / "absence.label", len(box), name, findings, default=0)
        cover = read_flags(folder / "cover.label", len(box), name, findings, default=8)
        cut = read_flags(folder / "cut_by_image.label", len(box), name, findings, default=0)
        visible = np.ones(count, bool) if absent is None else absent[:count] == 0
        return [
            Recording(
                name=name,
                category=_category(folder / "meta_info.ini"),
                images=paths,
                frame_number=numbers,
                box=box[:count],
                visible=visible,
                first_box_only=one_box,
                cover=None if cover is None else cover[:count].astype(np.int8),
                attributes=("cut by image",) if cut is not None and cut[:count].any() else (),
            )
        ]


def _category(file: Path) -> str:
    if not file.is_file():
        return ""
    for line in read_lines(file):
        key, _, value = line.replace("=", ":", 1).partition(":")
        if key.strip() == "object_class":
            return value.strip()
    return ""
