"""Own data: a folder of frames, or video files, with an annotation file beside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import cv2
import numpy as np

from lorat.data.datasets.labels import (
    align_in_order,
    align_numbered,
    list_images,
    natural_key,
    read_rows,
    xyxy_from_xywh,
)
from lorat.data.datasets.records import Entry, Findings, RawDataset, Recording
from lorat.errors import UserError

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v"})
_TRUTH_NAMES = ("groundtruth.txt", "groundtruth_rect.txt", "annotation.txt", "boxes.txt")


@dataclass(frozen=True, kw_only=True)
class _OwnData(RawDataset):
    annotation: Path | None = None
    """File with one box per frame and line, numbers separated by comma, tab or spaces, below a line
    with the columns' names if there is one; none means the file beside that has the usual or the
    same name."""
    box_format: Literal["xywh", "xyxy"] = "xywh"
    """Left, top, width, height; or left, top, right, bottom."""
    one_based: bool = False
    """The first pixel has the coordinate 1."""
    split: Literal["train", "val", "test"] = "train"
    """What the data is for: train is cleaned and windowed, val and test are kept whole."""
    name: str = "own"
    """Name of the dataset in the shards."""

    label: ClassVar[str] = "own"

    def read_box(self, file: Path, sequence: str, findings: Findings) -> np.ndarray:
        """Read the boxes as xyxy, 0-based; a row of zeros means that the target is absent."""
        if not file.is_file():
            raise UserError(f"There is no annotation file {file}; give it with --annotation.")
        rows = read_rows(file, 4, sequence, findings, header=True)
        absent = (rows == 0).all(axis=1)
        if self.box_format == "xywh":
            box = xyxy_from_xywh(rows, one_based=self.one_based)
        else:
            box = rows - (1.0 if self.one_based else 0.0)
        box[absent] = np.nan
        return box


@dataclass(frozen=True, kw_only=True)
class Folder(_OwnData):
    """A folder of frames and one annotation file."""

    label: ClassVar[str] = "folder"

    def entries(self, findings: Findings) -> list[Entry]:
        """Return the folder as one sequence."""
        root = self.folder()
        if not list_images(root):
            raise self.wrong_layout("image files (.jpg, .png, .bmp), one per frame", root)
        truth = self.annotation or next(
            (root / n for n in _TRUTH_NAMES if (root / n).is_file()), root / _TRUTH_NAMES[0]
        )
        if not truth.is_file():
            raise UserError(
                f"There is no annotation file {truth}; give the file with one box per frame "
                "with --annotation."
            )
        entry = Entry(name=root.resolve().name, values=str(truth))
        return self.selected([entry], findings)

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read the sequence."""
        box = self.read_box(Path(entry.values), entry.name, findings)
        aligned = _align(list_images(self.source), len(box), entry.name, findings)
        if aligned is None:
            return []
        paths, numbers = aligned
        box = box[: len(paths)]
        return [
            Recording(
                name=entry.name,
                images=paths,
                frame_number=numbers,
                box=box,
                visible=np.isfinite(box).all(axis=1),
            )
        ]


def _align(
    images: list[str], num_rows: int, sequence: str, findings: Findings
) -> tuple[tuple[str, ...], np.ndarray] | None:
    """Match images to rows: in order if there are as many, else by the images' numbers.

    Numbers are taken only where they leave no doubt whether they count from 0 or from 1, since a
    row too early or too late is a wrong box that nobody sees.

    Raises:
        UserError: if the numbers do not tell which image a row belongs to.
    """
    if not images or not all(Path(p).stem.isdecimal() for p in images):
        return align_in_order(images, num_rows, 1, sequence, findings)
    numbers = np.array([int(Path(p).stem) for p in images])
    if len(images) == num_rows:
        distinct = bool((np.diff(numbers) > 0).all())
        return tuple(images), numbers if distinct else np.arange(num_rows)
    if numbers[0] == 0 and numbers[-1] == num_rows - 1:
        first = 0
    elif numbers[0] > 0 and numbers[-1] == num_rows:
        first = 1
    else:
        raise UserError(
            f"{Path(images[0]).parent} has {len(images)} images, numbered {numbers[0]} to "
            f"{numbers[-1]}, and the annotation {num_rows} rows, which leaves open what a row "
            f"belongs to; give one row per image, or name the images by their rows, 0 to "
            f"{num_rows - 1} or 1 to {num_rows}."
        )
    return align_numbered(images, num_rows, first, sequence, findings)


@dataclass(frozen=True, kw_only=True)
class Video(_OwnData):
    """A video file and its annotation file, or a folder of such pairs with equal names."""

    label: ClassVar[str] = "video"

    def entries(self, findings: Findings) -> list[Entry]:
        """List the video files."""
        if self.source.is_file():
            files = [self.source]
        else:
            folder = self.folder()
            files = sorted(
                (
                    p
                    for p in folder.iterdir()
                    if p.suffix.lower() in VIDEO_SUFFIXES and not p.name.startswith(".")
                ),
                key=lambda p: natural_key(p.name),
            )
            if not files:
                raise self.wrong_layout("video files and an annotation .txt beside each", folder)
            if self.annotation is not None and len(files) > 1:
                raise UserError(
                    f"--annotation is one file, but {folder} has {len(files)} videos; "
                    "put a .txt of the same name beside each video instead."
                )
        entries = []
        for file in files:
            truth = self.annotation or file.with_suffix(".txt")
            if truth.is_file():
                entries.append(Entry(name=file.stem, values=(str(file), str(truth))))
            else:
                findings.add(file.stem, "dropped", f"there is no annotation {truth.name} beside")
        if not entries:
            raise UserError(
                f"There is no annotation for {files[0]}: expected {files[0].with_suffix('.txt')}; "
                "put it there or give it with --annotation."
            )
        return self.selected(entries, findings)

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read the annotation; frames are decoded when they are converted."""
        file, truth = entry.values
        capture = cv2.VideoCapture(file)
        opened = capture.isOpened()
        capture.release()
        if not opened:
            findings.add(entry.name, "dropped", "the video cannot be opened")
            return []
        box = self.read_box(Path(truth), entry.name, findings)
        return [
            Recording(
                name=entry.name,
                images=(file,),
                is_video=True,
                frame_number=np.arange(len(box)),
                box=box,
                visible=np.isfinite(box).all(axis=1),
            )
        ]
