"""NfS (Need for Speed): the original layout with VATIC annotations, or pytracking's repack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from lorat.data.datasets.findings import Findings
from lorat.data.datasets.labels import (
    align_in_order,
    align_numbered,
    list_folders,
    list_images,
    xyxy_from_xywh,
)
from lorat.data.datasets.records import Entry, RawDataset, Recording
from lorat.data.datasets.text import read_lines, read_number, read_rows

_RATIO = 8
"""Frames of the 240 fps video per frame of the 30 fps video."""
UNUSABLE_FROM = {"pingpong_2": 263}
"""First frame at 30 fps (from 1) whose annotation is known to be wrong."""
_VATIC_COLUMNS = 9
_MAX_FRAMES = 1_000_000
"""More than any video has; a larger number of a frame is no number of a frame."""


@dataclass(frozen=True, kw_only=True)
class Nfs(RawDataset):
    """NfS: 100 videos for evaluation, at 30 fps as usually reported or at 240 fps."""

    fps: Literal["30", "240"] = "30"
    """Frame rate; the repacked layout has 30 only."""

    label: ClassVar[str] = "nfs"
    frames_hint: ClassVar[int] = 480

    def entries(self, findings: Findings) -> list[Entry]:
        """List the sequences of whichever layout is there."""
        root = self.folder()
        repacked = sorted((root / "anno").glob("nfs_*.txt"), key=lambda p: p.name)
        if repacked and (root / "sequences").is_dir():
            names = [f.stem.removeprefix("nfs_") for f in repacked]
        else:
            names = [n for n in list_folders(root) if (root / n / self.fps / f"{n}.txt").is_file()]
            repacked = []
        if not names:
            expected = (
                f"<sequence>/{self.fps}/<sequence>.txt with <sequence>/{self.fps}/<sequence>/"
                "00001.jpg, or anno/nfs_<sequence>.txt with sequences/<sequence>/00001.jpg"
            )
            raise self.wrong_layout(expected, root)
        return self.selected([Entry(name=n, values=bool(repacked)) for n in names], findings)

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read one sequence."""
        name = entry.name
        if entry.values:
            images = list_images(self.source / "sequences" / name)
            truth = self.source / "anno" / f"nfs_{name}.txt"
            rows = read_rows(truth, 4, name, findings, num_images=len(images))
            box = xyxy_from_xywh(rows)
            visible = np.isfinite(box).all(axis=1)
        else:
            images = list_images(self.source / name / self.fps / name)
            truth = self.source / name / self.fps / f"{name}.txt"
            every = _RATIO if self.fps == "30" else 1
            box, visible = _read_vatic(truth, every, name, findings)
            if name in UNUSABLE_FROM:
                first = (UNUSABLE_FROM[name] - 1) * (_RATIO // every) + 1
                wrong = np.arange(first, len(box) + 1)
                box[first - 1 :], visible[first - 1 :] = np.nan, False
                if len(wrong):
                    findings.add(name, "dropped", "known to be annotated wrongly", wrong)
        counts_differ_by_one = abs(len(images) - len(box)) == 1  # as they do in some sequences
        align = align_in_order if counts_differ_by_one else align_numbered
        aligned = align(images, len(box), 1, name, findings)
        if aligned is None:
            return []
        paths, numbers = aligned
        return [
            Recording(
                name=name,
                images=paths,
                frame_number=numbers,
                box=box[: len(paths)],
                visible=visible[: len(paths)],
            )
        ]


def _read_vatic(
    file: Path, every: int, name: str, findings: Findings
) -> tuple[np.ndarray, np.ndarray]:
    """Read ``track xmin ymin xmax ymax frame lost occluded generated "label"`` lines.

    Keeps every ``every``-th frame, beginning with frame 1.

    Returns:
        Boxes xyxy (n, 4), NaN for frames without a line, and whether the target is not lost.
    """
    found: dict[int, tuple[list[float], bool]] = {}
    unreadable = []
    for number, line in enumerate(read_lines(file), start=1):
        if not line:
            continue
        values = [read_number(field) for field in line.split()[:_VATIC_COLUMNS]]
        frame = values[5] if len(values) == _VATIC_COLUMNS else None
        if None in values or frame is None or not 0 < frame <= _MAX_FRAMES:
            unreadable.append(number)
        elif (int(frame) - 1) % every == 0:
            box_xyxy = [math.nan if v is None else v for v in values[1:5]]
            found[(int(frame) - 1) // every] = (box_xyxy, not values[6])
    if unreadable:
        findings.add(name, "repaired", f"{file.name}: row is no VATIC row, ignored", unreadable)
    count = max(found, default=-1) + 1
    box, visible = np.full((count, 4), math.nan), np.zeros(count, bool)
    for index, (xyxy, seen) in found.items():
        box[index], visible[index] = xyxy, seen
    return box, visible
