"""Attributes follow their definitions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorat.attributes import attributes_of


def index_of(boxes: list[tuple[float, ...]], visible: list[bool] | None = None) -> Any:
    box = np.array(boxes, dtype=np.float32)
    return SimpleNamespace(
        track_start=np.array([0, len(box)]),
        box=box,
        size_wh=np.tile([1000, 800], (len(box), 1)),
        valid=np.isfinite(box).all(axis=1),
        visible=np.array(visible or [True] * len(box)),
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
