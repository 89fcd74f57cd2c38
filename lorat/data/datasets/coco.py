"""COCO 2017: images with many boxes; each box is a track of one frame."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from lorat.data.datasets.records import Entry, Findings, RawDataset, Recording
from lorat.errors import UserError

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
            content = json.loads(file.read_text())  # may have 450 MB, which read_json refuses
            categories = {c["id"]: c["name"] for c in content["categories"]}
            names = {int(i["id"]): str(i["file_name"]) for i in content["images"]}
            notes = list(content["annotations"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file} is not COCO's instances file ({error!r}).") from error
        objects: dict[int, list[_Object]] = {}
        num_crowds = 0
        for note in notes:
            try:
                if note.get("iscrowd"):
                    num_crowds += 1
                    continue
                image_id, item = _read_object(note, categories)
            except (ValueError, KeyError, TypeError, AttributeError):
                number = note.get("id") if isinstance(note, dict) else None
                why = "it needs id, image_id and a bbox of four numbers; not used"
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
            path = str(images / names[image_id])
            values = (path, sorted(objects[image_id]))
            entries.append(Entry(name=names[image_id].rpartition(".")[0], values=values))
        return self.selected(entries, findings)

    def wanted(self, lines: list[str], entries: list[Entry]) -> list[str]:
        """Read numbers or file names of images."""
        stems = [line.removesuffix(".jpg") for line in lines]
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
    category = categories.get(note.get("category_id", -1), "")
    return int(note["image_id"]), (int(note["id"]), category, [x, y, width, height])
