"""TrackingNet: ``TRAIN_{0..11}`` and ``TEST``, each with ``frames/<seq>/<i>.jpg`` and ``anno``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np

from lorat.config.bounds import Bounds, check_bounds
from lorat.data.datasets.findings import Findings
from lorat.data.datasets.labels import (
    align_numbered,
    first_box_only,
    list_images,
    xyxy_from_xywh,
)
from lorat.data.datasets.records import Entry, RawDataset, Recording
from lorat.data.datasets.text import read_lines, read_rows
from lorat.errors import UserError

_NUM_PARTS = 12


@dataclass(frozen=True, kw_only=True)
class TrackingNet(RawDataset):
    """TrackingNet: 30,132 training and 511 test videos; image names start at 0, without padding.

    The test split has only the first box of each video.
    """

    split: Literal["train", "test"] = "train"
    """Split to ingest."""
    parts: tuple[Annotated[int, Bounds(0, 11)], ...] = ()
    """Numbers of the TRAIN_k folders to ingest, 0 to 11; none means all that are there."""

    label: ClassVar[str] = "trackingnet"
    frames_hint: ClassVar[int] = 470

    def __post_init__(self) -> None:
        check_bounds(self)

    def entries(self, findings: Findings) -> list[Entry]:
        """List the annotated sequences of the chosen parts."""
        root = self.folder()
        if self.split == "test":
            folders = ["TEST"]
        else:
            folders = [f"TRAIN_{k}" for k in self.parts or range(_NUM_PARTS)]
        expected = f"{folders[0]}/anno/<sequence>.txt and {folders[0]}/frames/<sequence>/0.jpg"
        present = [f for f in folders if (root / f / "anno").is_dir()]
        missing = [f for f in folders if f not in present]
        if not present:
            raise self.wrong_layout(expected, root)
        if missing and self.parts:
            raise UserError(
                f"{root} has no {', '.join(missing)}; give --parts only folders that are there."
            )
        if missing:
            findings.add("", "dropped", f"not there: {', '.join(missing)}")
        entries = []
        for part in present:
            files = sorted((root / part / "anno").glob("*.txt"), key=lambda p: p.name)
            entries += [Entry(name=f.stem, values=part) for f in files]
        if not entries:
            raise self.wrong_layout(expected, root)
        classes = _classes(root / "trackingnet_classmap.txt")
        entries = [Entry(name=e.name, values=(e.values, classes.get(e.name, ""))) for e in entries]
        return self.selected(entries, findings)

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read one sequence."""
        name = entry.name
        part, category = entry.values
        truth = self.source / part / "anno" / f"{name}.txt"
        images = list_images(self.source / part / "frames" / name)
        box = xyxy_from_xywh(read_rows(truth, 4, name, findings, num_images=len(images)))
        one_box = self.split == "test" and len(box) <= 1
        if one_box:
            box = first_box_only(box, len(images))
        aligned = align_numbered(images, len(box), 0, name, findings)
        if aligned is None:
            return []
        paths, numbers = aligned
        return [
            Recording(
                name=name,
                category=category,
                images=paths,
                frame_number=numbers,
                box=box[: len(paths)],
                visible=np.ones(len(paths), bool),
                first_box_only=one_box,
            )
        ]


def _classes(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    pairs = (line.partition("\t") for line in read_lines(file))
    return {name.strip(): category.strip() for name, _, category in pairs}
