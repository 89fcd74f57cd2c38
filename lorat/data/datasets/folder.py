"""Own data: a folder of frames, or video files, with an annotation file beside."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from lorat.data.datasets.findings import Findings
from lorat.data.datasets.labels import (
    align_in_order,
    align_numbered,
    list_images,
    natural_key,
    xyxy_from_xywh,
)
from lorat.data.datasets.records import Entry, RawDataset, Recording
from lorat.data.datasets.text import read_rows
from lorat.errors import UserError, named
from lorat.image.frame_files import is_image_name
from lorat.image.video_file import VideoFile

_VIDEO_SUFFIXES = frozenset(
    {".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v", ".wmv", ".ts", ".flv"}
)
"""Videos by their names; others are looked into where an annotation lies beside."""
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

    def read_box(
        self, file: Path, sequence: str, findings: Findings, num_images: int | None = None
    ) -> np.ndarray:
        """Read the boxes as xyxy, 0-based; a row of zeros means that the target is absent."""
        if not file.is_file():
            raise UserError(
                f"There is no annotation file {named(file)}; give it with --annotation."
            )
        rows = read_rows(
            file, 4, sequence, findings, num_images=num_images,
            corners=self.box_format == "xyxy", other_columns=True,
        )  # fmt: skip
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
        images = list_images(self.source)
        box = self.read_box(Path(entry.values), entry.name, findings, len(images))
        aligned = _align(images, len(box), entry.name, findings)
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
        """List the videos that have an annotation; what else lies there with one is reported."""
        source = self.source
        files = [source] if source.is_file() else self._videos(self.folder(), findings)
        stems = Counter(file.stem for file in files)
        entries = []
        for file in files:
            # a.mp4 and a.mov beside each other are two sequences.
            name = file.stem if stems[file.stem] == 1 else file.name
            truth = self.annotation or file.with_suffix(".txt")
            if truth.is_file():
                entries.append(Entry(name=name, values=(str(file), str(truth))))
            else:
                why = f"there is no annotation {named(truth.name)} beside"
                findings.add(named(name), "dropped", why)
        if not entries:
            expected = named(files[0].with_suffix(".txt"))
            raise UserError(
                f"There is no annotation for {named(files[0])}: expected {expected}; "
                "put it there or give it with --annotation."
            )
        return self.selected(entries, findings)

    def _videos(self, folder: Path, findings: Findings) -> list[Path]:
        """List the files of a folder that are videos, by their numbers.

        Raises:
            UserError: if there is none, or one annotation is given for several.
        """
        present = sorted(
            (p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")),
            key=lambda path: natural_key(path.name),
        )
        beside = {p.stem for p in present if p.suffix.lower() == ".txt"}
        files = []
        for file in present:
            if file.suffix.lower() in _VIDEO_SUFFIXES:
                files.append(file)
            elif file.stem in beside and file.suffix.lower() != ".txt":
                if fault := _no_video(file):
                    findings.add(named(file.name), "dropped", fault)
                else:
                    files.append(file)
        if not files:
            noted = [f"{finding.sequence}: {finding.why}" for finding in findings]
            found = f" ({'; '.join(noted[:3])})" if noted else ""
            raise UserError(
                f"{named(folder)} has no video that can be decoded{found}; give a folder with "
                "video files and an annotation .txt of the same name beside each."
            )
        if self.annotation is not None and len(files) > 1:
            raise UserError(
                f"--annotation is one file, but {named(folder)} has {len(files)} videos; "
                "put a .txt of the same name beside each video instead."
            )
        return files

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read the annotation; frames are decoded when they are converted."""
        file, truth = entry.values
        VideoFile(file).close()  # says why it cannot be decoded
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


def _no_video(file: Path) -> str:
    """Return why a file is not taken as a video, else nothing."""
    if is_image_name(file.name):
        return "an image, not a video"
    try:
        VideoFile(file).close()
    except UserError as error:
        return str(error)
    return ""
