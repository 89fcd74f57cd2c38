"""Attributes follow their definitions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorat.errors import UserError
from lorat.metrics.attributes import attributes_of, by_attribute, read_attributes


def index_of(boxes: list[tuple[float, ...]], visible: list[bool] | None = None) -> Any:
    box = np.array(boxes, dtype=np.float32)
    return SimpleNamespace(
        track_start=np.array([0, len(box)]),
        box=box,
        size_wh=np.tile([1000, 800], (len(box), 1)),
        valid=np.isfinite(box).all(axis=1),
        visible=np.array(visible or [True] * len(box)),
        cover=np.full(len(box), -1, np.int8),
    )


BASE = (400.0, 300.0, 520.0, 420.0)
NAN = (np.nan,) * 4


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([BASE, BASE, (405, 300, 525, 420)], set()),
        ([BASE, (400, 300, 580, 480)], {"scale variation"}),
        ([BASE, (400, 300, 520, 350)], {"scale variation", "aspect change"}),
        ([BASE, (530, 300, 650, 420)], {"fast motion"}),
        ([BASE, NAN, (530, 300, 650, 420)], set()),
        ([(400, 300, 420, 330), (400, 300, 420, 330)], {"low resolution", "distant"}),
        ([BASE, (0, 300, 120, 420), BASE], {"fast motion", "partial exit"}),
    ],
)
def test_definition(boxes: list[tuple[float, ...]], expected: set[str]) -> None:
    assert attributes_of(index_of(boxes), 0) == expected


def test_absence_is_taken_from_the_annotation() -> None:
    assert attributes_of(index_of([BASE, BASE], [True, False]), 0) == {"absence"}
    assert attributes_of(index_of([BASE]), 0) == set()


def test_partial_occlusion_is_taken_from_the_cover_labels() -> None:
    index = index_of([BASE, BASE, BASE])
    for cover, expected in (([8, 8, 8], set()), ([8, 3, 8], {"partial occlusion"})):
        index.cover = np.array(cover, np.int8)
        assert attributes_of(index, 0) == expected


def test_a_table_of_attributes_is_read_and_turned_around(tmp_path: Path) -> None:
    file = tmp_path / "attributes.csv"
    file.write_text("bike1, fast motion,camera motion\n\nCrossbody Bag-3,camera motion,,\n")
    of_sequence = read_attributes(file)
    assert by_attribute(of_sequence) == {
        "fast motion": ["bike1"], "camera motion": ["Crossbody Bag-3", "bike1"],
    }  # fmt: skip
    file.write_text("bike1\n")
    with pytest.raises(UserError, match="'bike1'; give a sequence and its attributes"):
        read_attributes(file)
    with pytest.raises(UserError, match="Cannot read the attributes"):
        read_attributes(tmp_path / "nowhere.csv")
