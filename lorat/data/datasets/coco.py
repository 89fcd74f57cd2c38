"""COCO 2017: images with many boxes; each box is a track of one frame."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

import numpy as np

from lorat.data.datasets.findings import Findings
from lorat.data.datasets.records import Entry, RawDataset, Recording
from lorat.errors import UserError, named

_MALFORMED = (
    ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError
)  # fmt: skip
_Object = tuple[int, str, list[float]]
"""Number, category and xywh box of an annotation."""


@dataclass(frozen=True, kw_only=True)
class Coco(RawDataset):
    """COCO 2017: still images; crowds are left out, images without boxes too.

    Each box is a track of its own and training deals tracks, so an image with many boxes is drawn
    more often than one with few.  The published training deals images and then draws one of the
    image's boxes.

    The include list names images by number or file name.
    """

    split: Literal["train", "val"] = "train"
    """Split to ingest."""

    label: ClassVar[str] = "coco"
    frames_hint: ClassVar[int] = 7

    def entries(self, findings: Findings) -> list[Entry]:
        """List the images that have a box, in the order of their numbers."""
        root = self.folder()
        file = root / "annotations" / f"instances_{self.split}2017.json"
        images = root / "images" / f"{self.split}2017"
        expected = f"annotations/{file.name} and images/{images.name}/000000000009.jpg, ..."
        if not images.is_dir() and (root / images.name).is_dir():
            images = root / images.name  # as the archives unpack
        if not file.is_file() or not images.is_dir():
            raise self.wrong_layout(expected, root)
        try:
            content = json.loads(file.read_bytes())  # may have 450 MB, which read_json refuses
            categories = {c["id"]: c["name"] for c in content["categories"]}
            names = {int(i["id"]): str(i["file_name"]) for i in content["images"]}
            notes = list(content["annotations"])
        except _MALFORMED as error:
            raise UserError(
                f"{named(file)} is not COCO's instances file ({error!r}); give it as published."
            ) from error
        objects: dict[int, list[_Object]] = {}
        num_crowds = 0
        for note in notes:
            try:
                if note.get("iscrowd"):
                    num_crowds += 1
                    continue
                image_id, item = _read_object(note, categories)
            except _MALFORMED:
                number = note.get("id") if isinstance(note, dict) else None
                why = "it needs id, image_id and a bbox of four finite numbers; not used"
                findings.add(f"annotation {number}", "dropped", why)
                continue
            if not item[1]:
                findings.add(f"annotation {item[0]}", "kept", "the box has no known category")
            objects.setdefault(image_id, []).append(item)
        num_empty = sum(1 for i in names if i not in objects)
        if num_crowds:
            findings.add("", "dropped", f"{num_crowds} crowd annotations")
        if num_empty:
            findings.add("", "dropped", f"{num_empty} images without boxes")
        entries = []
        for image_id in sorted(objects):
            if image_id not in names:
                findings.add(str(image_id), "dropped", "annotated image is not in the list")
                continue
            place = PurePosixPath(names[image_id])
            if place.is_absolute() or ".." in place.parts:
                why = (
                    f"its file {named(names[image_id])!r}, in {file.name}, is not in {images.name}"
                )
                findings.add(str(image_id), "dropped", why)
                continue
            boxes = {item[0]: item for item in objects[image_id]}
            if len(boxes) < len(objects[image_id]):
                why = "annotations of one id; only the last of each is taken"
                findings.add(str(image_id), "dropped", why)
            values = (str(images / place), sorted(boxes.values()))
            entries.append(Entry(name=_name(names[image_id]), values=values))
        return self.selected(_distinct(entries), findings, file)

    def wanted(self, lines: list[str], entries: list[Entry]) -> list[str]:
        """Read numbers or file names of images."""
        stems = [_name(line) if "." in line else line for line in lines]
        return [s.zfill(12) if s.isdigit() else s for s in stems]

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Make one track per box."""
        path, objects = entry.values
        tracks = []
        for number, category, (x, y, width, height) in objects:
            tracks.append(
                Recording(
                    name=f"{entry.name}-{number}",
                    category=category,
                    images=(path,),
                    frame_number=np.zeros(1, int),
                    box=np.array([[x, y, x + width, y + height]]),
                    visible=np.ones(1, bool),
                )
            )
        return tracks


def _read_object(note: dict[str, Any], categories: dict[int, str]) -> tuple[int, _Object]:
    x, y, width, height = (float(v) for v in note["bbox"])
    if not all(map(math.isfinite, (x, y, width, height))):
        raise ValueError("a number of the box is not finite")
    category = categories.get(note.get("category_id", -1), "")
    return int(note["image_id"]), (int(note["id"]), category, [x, y, width, height])


def _name(file_name: str) -> str:
    """Return the name of a sequence for an image: folders become a part of it, the ending goes."""
    stem = file_name.rpartition(".")[0] or file_name
    return stem.replace("/", "_").replace("\\", "_")


def _distinct(entries: list[Entry]) -> list[Entry]:
    """Tell images of one name (a/1.jpg and a_1.jpg, 1.jpg and 1.png) apart by their order."""
    counts = Counter(entry.name for entry in entries)
    return [
        entry if counts[entry.name] == 1
        else Entry(name=f"{entry.name}-{number}", values=entry.values)
        for number, entry in enumerate(entries)
    ]  # fmt: skip
