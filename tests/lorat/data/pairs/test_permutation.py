"""Keyed permutations: every element once, different keys differ, no visible structure."""

from __future__ import annotations

import numpy as np
import pytest

from lorat.data.pairs.permutation import mix, permute


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100, 1000, 4097])
def test_every_element_comes_once(size: int) -> None:
    for key in (0, 1, mix(3, 4)):
        assert sorted(permute(p, size, key) for p in range(size)) == list(range(size))


def test_order_depends_on_the_key_and_is_not_monotone() -> None:
    first, second = ([permute(p, 1000, mix(k)) for p in range(1000)] for k in (1, 2))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20
    steps = np.diff(first)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.1
    assert len(set(steps.tolist())) > 500


def test_positions_and_elements_are_independent_over_keys() -> None:
    size = 10
    counts = np.zeros((size, size))
    for key in range(4000):
        for position in range(size):
            counts[position, permute(position, size, mix(key))] += 1
    assert counts.min() > 300
    assert counts.max() < 500
