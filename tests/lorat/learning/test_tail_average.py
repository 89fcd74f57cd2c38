"""The mean of the weights over the last steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorat.learning.tail_average import TailAverage


def train(average: TailAverage, weight: torch.nn.Parameter, steps: range) -> None:
    """Set the weight to the square of the step, as steps would."""
    for step in steps:
        with torch.no_grad():
            weight.fill_(float(step**2))
        average.add(step)


@pytest.fixture
def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(3))


def test_it_is_the_mean_over_the_steps_after_the_given_one(weight: torch.nn.Parameter) -> None:
    average = TailAverage([weight], after=4)
    train(average, weight, range(1, 9))
    with average.in_place():
        torch.testing.assert_close(weight.detach(), torch.full((3,), (25 + 36 + 49 + 64) / 4.0))
    torch.testing.assert_close(weight.detach(), torch.full((3,), 64.0))


def test_without_a_step_the_weights_stay(weight: torch.nn.Parameter) -> None:
    average = TailAverage([weight], after=8)
    train(average, weight, range(1, 9))
    with average.in_place():
        torch.testing.assert_close(weight.detach(), torch.full((3,), 64.0))


def test_weights_come_back_after_an_error(weight: torch.nn.Parameter) -> None:
    average = TailAverage([weight], after=0)
    train(average, weight, range(1, 3))
    with pytest.raises(KeyError), average.in_place():
        raise KeyError
    torch.testing.assert_close(weight.detach(), torch.full((3,), 4.0))


@pytest.mark.parametrize("saved_at", [3, 6])
def test_it_goes_on_where_it_was_saved(
    weight: torch.nn.Parameter, tmp_path: Path, saved_at: int
) -> None:
    first = TailAverage([weight], after=4)
    train(first, weight, range(1, saved_at + 1))
    first.save(tmp_path)
    second = TailAverage([weight], after=4)
    second.load(tmp_path)
    train(second, weight, range(saved_at + 1, 9))
    assert second.num_steps == 4
    with second.in_place():
        torch.testing.assert_close(weight.detach(), torch.full((3,), (25 + 36 + 49 + 64) / 4.0))
