"""Synthetic videos: a function of the seed, new for every split, and not trivial."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lorat.data import synthetic
from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.verification import verify
from lorat.errors import UserError


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    areas = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b)]
    return shared / (areas[0] + areas[1] - shared)


def test_a_video_is_a_function_of_its_number() -> None:
    one, again = synthetic.render("val", 3, 5), synthetic.render("val", 3, 5)
    np.testing.assert_array_equal(one.images[4], again.images[4])
    np.testing.assert_array_equal(one.box, again.box)


def test_no_video_is_in_two_splits() -> None:
    first = [synthetic.render(s, 0, 1).images[0] for s in ("train", "val", "pretrain")]
    assert len({image.tobytes() for image in first}) == 3
    assert len({size.stream for size in synthetic.SPLITS.values()}) == 3


def test_the_box_that_never_moves_fails_and_the_target_is_mostly_seen() -> None:
    videos = [synthetic.render("val", n) for n in range(8)]
    still = [_overlap(v.box[1:], np.tile(v.box[:1], (len(v.box) - 1, 1))).mean() for v in videos]
    assert np.mean(still) < 0.35
    assert all(v.visible[0] > 0.9 for v in videos)
    assert np.mean([v.visible.mean() for v in videos]) > 0.8
    sides = np.sqrt(np.concatenate([(v.box[:, 2:] - v.box[:, :2]).prod(axis=1) for v in videos]))
    assert np.percentile(sides, 5) > 25
    assert np.percentile(sides, 95) < 90


def test_callers_at_the_same_time_share_one_sound_dataset(tmp_path: Path) -> None:
    code = (
        "import sys; from lorat.data import synthetic; print(synthetic.ensure(sys.argv[1], 'val'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).parents[4]
    callers = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    printed = {caller.communicate()[0].decode().strip() for caller in callers}
    assert len(printed) == 1
    uri = printed.pop()
    index = FrameIndex.open(uri)
    assert (index.storage, index.num_tracks) == ("full", 16)
    assert verify(uri) == []
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == [Path(uri).name]
    assert synthetic.ensure(tmp_path, "val") == uri


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train, val, pretrain"):
        synthetic.ensure(tmp_path, "test")  # type: ignore[arg-type]
