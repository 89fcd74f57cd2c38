"""The sizing table is computed, and what the README shows is what comes out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "infra"))

import sizing  # noqa: E402


def test_the_readme_shows_the_computed_tables() -> None:
    text = (ROOT / "infra" / "README.md").read_text()
    assert sizing.table() in text
    assert sizing.limits.table(sizing.CAPACITY) in text


def test_the_figures_follow_from_each_other() -> None:
    """B-224 by hand: 2,174 pairs/s as measured; 170 x 131,072 pairs on 8 GPUs."""
    row = sizing.size("B-224")
    assert row.pairs_per_s == 2174
    assert row.hours == pytest.approx(170 * 131_072 / (8 * row.pairs_per_s) / 3600)
    assert row.cores == pytest.approx(row.pairs_per_s / 467)
    assert row.read_bytes_per_s == pytest.approx(row.pairs_per_s * 110_000)


def test_decoding_can_be_measured_again(tmp_path: Path) -> None:
    from lorat.data.shards.from_memory import MemoryTrack, write_dataset
    from lorat.data.synthetic.videos import render

    video = render("val", 0, 24)
    track = MemoryTrack(name="0", images=video.images, box=video.box)
    write_dataset(str(tmp_path), [track], stored="window")
    measured = sizing.measure(str(tmp_path), "B-224", seconds=0.5)
    assert measured.pairs_per_s > 20
    assert measured.bytes_per_pair > 1_000
