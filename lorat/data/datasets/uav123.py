"""UAV123: ``data_seq/UAV123/<video>`` and ``anno/UAV123/<sequence>.txt``.

Many sequences are a window of a longer video; the table says which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lorat.data.datasets.findings import Findings
from lorat.data.datasets.labels import (
    align_numbered,
    list_images,
    natural_key,
    xyxy_from_xywh,
)
from lorat.data.datasets.records import Entry, RawDataset, Recording
from lorat.data.datasets.text import read_flags, read_rows

# First and last frame of each sequence; "car1_2" is a window of the video "car1", while names
# ending in "_s" are videos of their own.
_TABLE = """
bike1 1 3085, bike2 1 553, bike3 1 433, bird1_1 1 253, bird1_2 775 1477, bird1_3 1573 2437,
boat1 1 901, boat2 1 799, boat3 1 901, boat4 1 553, boat5 1 505, boat6 1 805, boat7 1 535,
boat8 1 685, boat9 1 1399, building1 1 469, building2 1 577, building3 1 829, building4 1 787,
building5 1 481, car1_1 1 751, car1_2 751 1627, car1_3 1627 2629, car10 1 1405, car11 1 337,
car12 1 499, car13 1 415, car14 1 1327, car15 1 469, car16_1 1 415, car16_2 415 1993,
car17 1 1057, car18 1 1207, car1_s 1 1475, car2 1 1321, car2_s 1 320, car3 1 1717, car3_s 1 1300,
car4 1 1345, car4_s 1 830, car5 1 745, car6_1 1 487, car6_2 487 1807, car6_3 1807 2953,
car6_4 2953 3925, car6_5 3925 4861, car7 1 1033, car8_1 1 1357, car8_2 1357 2575, car9 1 1879,
group1_1 1 1333, group1_2 1333 2515, group1_3 2515 3925, group1_4 3925 4873, group2_1 1 907,
group2_2 907 1771, group2_3 1771 2683, group3_1 1 1567, group3_2 1567 2827, group3_3 2827 4369,
group3_4 4369 5527, person1 1 799, person10 1 1021, person11 1 721, person12_1 1 601,
person12_2 601 1621, person13 1 883, person14_1 1 847, person14_2 847 1813, person14_3 1813 2923,
person15 1 1339, person16 1 1147, person17_1 1 1501, person17_2 1501 2347, person18 1 1393,
person19_1 1 1243, person19_2 1243 2791, person19_3 2791 4357, person1_s 1 1600,
person2_1 1 1189, person2_2 1189 2623, person20 1 1783, person21 1 487, person22 1 199,
person23 1 397, person2_s 1 250, person3 1 643, person3_s 1 505, person4_1 1 1501,
person4_2 1501 2743, person5_1 1 877, person5_2 877 2101, person6 1 901, person7_1 1 1249,
person7_2 1249 2065, person8_1 1 1075, person8_2 1075 1525, person9 1 661, truck1 1 463,
truck2 1 385, truck3 1 535, truck4_1 1 577, truck4_2 577 1261, uav1_1 1 1555, uav1_2 1555 2377,
uav1_3 2473 3469, uav2 1 133, uav3 1 265, uav4 1 157, uav5 1 139, uav6 1 109, uav7 1 373,
uav8 1 301, wakeboard1 1 421, wakeboard10 1 469, wakeboard2 1 733, wakeboard3 1 823,
wakeboard4 1 697, wakeboard5 1 1675, wakeboard6 1 1165, wakeboard7 1 199, wakeboard8 1 1543,
wakeboard9 1 355
"""


ATTRIBUTES = (
    "scale variation", "aspect change", "low resolution", "fast motion", "full occlusion",
    "partial occlusion", "out of view", "background clutter", "illumination variation",
    "viewpoint change", "camera motion", "similar object",
)  # fmt: skip
"""The flags of ``anno/UAV123/att/<sequence>.txt``, in the order of the benchmark's toolkit."""


def _parse_table() -> dict[str, tuple[str, int, int]]:
    rows = (row.split() for row in _TABLE.replace("\n", " ").split(","))
    return {n: (re.sub(r"_\d+$", "", n), int(first), int(last)) for n, first, last in rows}


SEQUENCES = _parse_table()
"""Video, first and last frame of each of the 123 sequences."""


@dataclass(frozen=True, kw_only=True)
class Uav123(RawDataset):
    """UAV123: 123 sequences for evaluation; rows of absent targets are NaN."""

    label: ClassVar[str] = "uav123"
    frames_hint: ClassVar[int] = 900

    def entries(self, findings: Findings) -> list[Entry]:
        """List the annotated sequences."""
        root = self.folder()
        notes = root / "anno" / "UAV123"
        expected = "anno/UAV123/<sequence>.txt and data_seq/UAV123/<video>/000001.jpg, ..."
        files = sorted(notes.glob("*.txt"), key=lambda p: natural_key(p.stem))
        if not files or not (root / "data_seq" / "UAV123").is_dir():
            raise self.wrong_layout(expected, root)
        return self.selected([Entry(name=f.stem) for f in files], findings)

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read one sequence."""
        name = entry.name
        video, first, last = SEQUENCES.get(name, (name, 1, None))
        if name not in SEQUENCES:
            findings.add(
                name, "kept", "not one of the 123 sequences; frames taken from the first on"
            )
        images = list_images(self.source / "data_seq" / "UAV123" / video)
        if last is not None:
            inside = {str(n) for n in range(first, last + 1)}
            images = [p for p in images if _stem_number(p) in inside]
        truth = self.source / "anno" / "UAV123" / f"{name}.txt"
        rows = read_rows(truth, 4, name, findings, num_images=len(images))
        if last is not None:
            rows = rows[: last - first + 1]
        aligned = align_numbered(images, len(rows), first, name, findings)
        if aligned is None:
            return []
        paths, numbers = aligned
        box = xyxy_from_xywh(rows[: len(paths)])
        notes = self.source / "anno" / "UAV123" / "att" / f"{name}.txt"
        flags = read_flags(notes, len(ATTRIBUTES), name, findings, default=0, what="attributes")
        return [
            Recording(
                name=name,
                category=re.sub(r"\d.*$", "", name),
                images=paths,
                frame_number=numbers,
                box=box,
                visible=np.isfinite(box).all(axis=1),
                attributes=()
                if flags is None
                else tuple(a for a, flag in zip(ATTRIBUTES, flags, strict=True) if flag),
            )
        ]


def _stem_number(path: str) -> str:
    stem = path.rpartition("/")[2].partition(".")[0]
    return str(int(stem)) if stem.isdigit() else ""
