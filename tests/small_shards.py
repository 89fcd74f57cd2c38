"""Small data sets of real shards, rendered once per test session and folder."""

from __future__ import annotations

from pathlib import Path

from lorat.data import synthetic
from lorat.data.shards.verification import rebuild_index


def make_shards(folder: Path, *, num_shards: int = 1, split: synthetic.Split = "val") -> str:
    """Render ``4 * num_shards`` synthetic videos (val: full frames, train: windows)."""
    folder.mkdir(parents=True)
    synthetic.write_shards(str(folder), split, list(range(num_shards)))
    rebuild_index(str(folder))
    return str(folder)
