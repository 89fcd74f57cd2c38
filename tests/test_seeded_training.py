"""A training with a fixed seed gives the same again, so that a difference means a change."""

from __future__ import annotations

from pathlib import Path

import torch

from tests import seeded_training


def test_a_seeded_training_gives_the_same_again(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first = list(seeded_training.results(tmp_path / "first", num_steps=2))
        assert [line.split()[0] for line in first[:3]] == ["step", "step", "weights"]
        assert list(seeded_training.results(tmp_path / "second", num_steps=2)) == first
    finally:
        torch.set_num_threads(threads)
