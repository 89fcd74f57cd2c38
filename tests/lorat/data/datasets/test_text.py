"""Text files of every layout: rows as many hands write them are read right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lorat.data import datasets
from lorat.data.datasets import Findings
from lorat.data.datasets.text import read_flags, read_names, read_number, read_rows
from lorat.errors import UserError
from tests.lorat import layouts

TRUTHS = {
    "got10k": ("GOT-10k_Train_000001", "train/GOT-10k_Train_000001/groundtruth.txt"),
    "lasot": ("cat-1", "cat/cat-1/groundtruth.txt"),
    "trackingnet": ("video-0", "TRAIN_0/anno/video-0.txt"),
    "tnl2k": ("Sord_video_Q01_done", "Sord_video_Q01_done/groundtruth.txt"),
    "vasttrack": ("Ant-2", "Ant/Ant-2/Groundtruth.txt"),
    "otb100": ("Board", "Board/groundtruth_rect.txt"),
    "uav123": ("car1_s", "anno/UAV123/car1_s.txt"),
    "folder": ("frames", "frames/groundtruth.txt"),
}
"""A sequence of each layout without a fault, and the file of its boxes."""

Rewrite = Callable[[list[list[str]]], bytes]


def joined(separator: str, *, end: str = "\n", before: str = "", behind: str = "") -> Rewrite:
    return lambda rows: (
        before + "".join(separator.join(row) + behind + end for row in rows)
    ).encode()


EQUAL: dict[str, Rewrite] = {
    "semicolons": joined(";"),
    "comma and spaces": joined(" , "),
    "tabs and spaces": joined("\t "),
    "a comma behind": joined(",", behind=","),
    "quotes": lambda rows: joined(",")([[f'"{v}"' for v in row] for row in rows]),
    "exponents": lambda rows: joined(",")([[f"{float(v):.8e}" for v in row] for row in rows]),
    "lines end as in Windows": joined(",", end="\r\n"),
    "lines end as in old Macs": joined(",", end="\r"),
    "no end": lambda rows: joined(",")(rows).rstrip(),
    "many ends": lambda rows: joined(",")(rows) + b"\n \n\n",
    "UTF-8 with its mark": lambda rows: b"\xef\xbb\xbf" + joined(",")(rows),
    "UTF-16": lambda rows: joined(",")(rows).decode().encode("utf-16"),
    "UTF-16, big end first": lambda rows: (
        b"\xfe\xff" + joined(",")(rows).decode().encode("utf-16-be")
    ),
    "names of columns": joined(",", before="x,y,w,h\n"),
    "names of columns behind #": joined(",", before="# left top width height\n"),
    "a remark": joined(",", before="# by hand, checked\n"),
    "empty lines between": lambda rows: joined(",")(rows).replace(b"\n", b"\n\n", 2),
}
REFUSED: dict[str, Rewrite] = {
    "corners of a polygon": lambda rows: joined(",")([[*row, *row] for row in rows]),
    "a number first": lambda rows: joined(",")([[str(t), *row] for t, row in enumerate(rows)]),
    "a score behind": lambda rows: joined(",")([[*row, "0.5"] for row in rows]),
    "decimal commas": lambda rows: joined(";")([[f"{v},5" for v in row] for row in rows]),
    "points": lambda rows: "".join(f"{a},{b} {c},{d}\n" for a, b, c, d in rows).encode(),
    "names of other columns": joined(",", before="w,h,x,y\n"),
    "names of corners": joined(",", before="x1,y1,x2,y2\n"),
    "a title": joined(",", before="boxes of the car\n"),
    "not text": lambda rows: b"\x00\x01" + joined(",")(rows),
}


def rewritten(layout: str, rewrite: Rewrite, root: Path) -> tuple[np.ndarray, np.ndarray | str]:
    """Return the boxes of a sequence as it was, and as it is read from its rewritten file."""
    sequence, truth = TRUTHS[layout]
    getattr(layouts, f"make_{layout}")(root)
    options = {"split": "test"} if layout == "lasot" else {}
    if layout == "folder":
        layouts.write_rows(root / truth, layouts.boxes(8))
    place = root / "frames" if layout == "folder" else root
    source = datasets.DATASETS[layout](source=place, **options)  # type: ignore[arg-type]

    def load() -> np.ndarray | str:
        entry = next(e for e in source.entries(Findings()) if e.name == sequence)
        try:
            (recording,) = source.load(entry, Findings())
        except UserError as error:
            return str(error)
        return recording.box

    before = load()
    assert not isinstance(before, str)
    lines = (root / truth).read_text().splitlines()
    rows = [line.replace(",", " ").split() for line in lines]
    (root / truth).write_bytes(rewrite(rows))
    return before, load()


@pytest.mark.parametrize("layout", TRUTHS)
@pytest.mark.parametrize("form", EQUAL)
def test_rows_of_any_form_are_the_same_boxes(layout: str, form: str, tmp_path: Path) -> None:
    before, after = rewritten(layout, EQUAL[form], tmp_path)
    assert not isinstance(after, str), after
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("layout", TRUTHS)
@pytest.mark.parametrize("form", REFUSED)
def test_rows_of_another_meaning_are_refused(layout: str, form: str, tmp_path: Path) -> None:
    _, after = rewritten(layout, REFUSED[form], tmp_path)
    assert isinstance(after, str), after
    assert Path(TRUTHS[layout][1]).name in after
    assert len(after.splitlines()) == 1


@pytest.mark.parametrize(
    "row", ["inf,1,2,3", "1,2,,3", "1,2,3", "1,2,3,4,5", "١,2,3,4", "1_0,2,3,4", "0x1,2,3,4", "a"]
)
def test_a_row_that_is_no_box_keeps_its_place_and_is_named(row: str, tmp_path: Path) -> None:
    file = tmp_path / "groundtruth.txt"
    file.write_text(f"1,2,3,4\n1,2,3,4\n{row}\n5,6,7,8\n")
    findings = Findings()
    rows = read_rows(file, 4, "car", findings, num_images=4)
    np.testing.assert_array_equal(rows[[0, 3]], [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert np.isnan(rows[2]).all()
    (finding,) = findings
    assert (finding.sequence, finding.frames) == ("car", (3,))


@pytest.mark.parametrize("word", ["nan", "NaN", "none", "N/A"])
def test_a_row_may_say_that_there_is_no_box(word: str, tmp_path: Path) -> None:
    file = tmp_path / "groundtruth.txt"
    file.write_text(",".join([word] * 4) + "\n1,2,3,4\n")
    findings = Findings()
    rows = read_rows(file, 4, "car", findings)
    assert np.isnan(rows[0]).all()
    np.testing.assert_array_equal(rows[1], [1, 2, 3, 4])
    assert len(findings) == 0


def test_empty_lines_hold_places_where_the_images_say_so(tmp_path: Path) -> None:
    file = tmp_path / "groundtruth.txt"
    file.write_text("1,2,3,4\n\n5,6,7,8\n")
    for num_images, expected in ((3, [1, None, 5]), (2, [1, 5])):
        rows = read_rows(file, 4, "car", Findings(), num_images=num_images)
        assert [None if np.isnan(row[0]) else row[0] for row in rows] == expected
    for nothing_told in (None, 5):
        with pytest.raises(UserError, match="1 empty lines among 3"):
            read_rows(file, 4, "car", Findings(), num_images=nothing_told)


def test_flags_are_whole_numbers_below_a_name_or_not(tmp_path: Path) -> None:
    file, findings = tmp_path / "absence.label", Findings()
    for text in ("0\n1\n0\n", "absence\r\n0\r\n1\r\n0", "0,1,0,", "\ufeff0\t1\t0\n\n", "0.0;1.0;0"):
        file.write_text(text, encoding="utf-8")
        flags = read_flags(file, 3, "car", findings, default=0)
        assert flags is not None
        assert flags.tolist() == [0, 1, 0]
    for text in ("0\ninf\n0\n", "0\n1e400\n0", "0\n0.5\n1\n", "0\nyes\n0\n"):
        file.write_text(text)
        assert read_flags(file, 3, "car", findings, default=0) is None
    assert "cannot be read and is ignored" in [f.why for f in findings][-1]


def test_names_are_lines_without_a_slash_behind(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes("a/\r\n\r\n./b\r\nM\u00fcnchen\r\n".encode("utf-16"))
    assert read_names(file) == ["a", "b", "M\u00fcnchen"]


def test_numbers_are_decimal_and_finite() -> None:
    assert [read_number(text) for text in ("1", "-1.5", ".5", "5.", "1e2")] == [
        1,
        -1.5,
        0.5,
        5,
        100,
    ]
    assert all(read_number(text) is None for text in ("", "1,5", "inf", "1e999", "\uff11", "0x1"))
