"""Verify finds every kind of damage; reindex needs nothing but the shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorat.conversion import write_dataset
from lorat.errors import UserError
from lorat.frame_index import MANIFEST, FrameIndex
from lorat.verification import rebuild_index, verify
from tests.lorat.small_sets import tracks


@pytest.fixture
def index(tmp_path: Path) -> FrameIndex:
    return write_dataset(str(tmp_path / "set"), tracks(), stored="window", tracks_per_shard=2)


def test_a_sound_dataset_has_no_problems(index: FrameIndex) -> None:
    assert verify(index.uri) == []


def test_a_changed_byte_is_found_and_named(index: FrameIndex) -> None:
    shard = Path(index.uri) / index.shard_files[1]
    data = bytearray(shard.read_bytes())
    data[int(index.offset[14]) + 60] ^= 0xFF
    shard.write_bytes(data)
    problems = verify(index.uri)
    assert {p.where for p in problems} == {"memory/track-2 frame 2 (shard-00001.parquet)"}


def test_a_cut_and_a_missing_shard_are_found(index: FrameIndex) -> None:
    first, second = (Path(index.uri) / name for name in index.shard_files)
    first.write_bytes(first.read_bytes()[:-100])
    second.unlink()
    whats = {p.where: p.what for p in verify(index.uri)}
    assert "bytes" in whats[first.name]
    assert "missing" in whats[second.name]


@pytest.mark.parametrize("column", ["box", "offset", "window", "valid"])
def test_an_index_that_differs_from_its_shards_is_found(index: FrameIndex, column: str) -> None:
    frames = next(Path(index.uri).glob("index-*/frames.arrow"))
    data = bytearray(frames.read_bytes())
    view = getattr(index, column)
    needle = view[:8].tobytes()
    position = bytes(data).find(needle)
    assert position > 0
    data[position + 2] ^= 0x41
    frames.write_bytes(data)
    assert verify(index.uri)


@pytest.mark.parametrize("name", ["valid_rows", "valid_start"])
def test_a_list_of_usable_frames_that_fits_nothing_is_found(index: FrameIndex, name: str) -> None:
    file = next(Path(index.uri).glob("index-*/valid.arrow"))
    listed = getattr(index, name)
    changed = listed.copy()
    changed[2] += 1
    data = file.read_bytes()
    assert data.count(listed.tobytes()) == 1
    file.write_bytes(data.replace(listed.tobytes(), changed.tobytes()))
    (problem,) = verify(index.uri)
    assert problem.where == "index"
    assert name in problem.what
    assert "reindex" in problem.what
    rebuild_index(index.uri)
    assert verify(index.uri) == []


def test_reindex_restores_the_same_dataset_from_its_shards(index: FrameIndex) -> None:
    folder = Path(index.uri)
    window = index.manifest["window"]
    (folder / MANIFEST).unlink()
    shutil.rmtree(next(folder.glob("index-*")))
    again = rebuild_index(str(folder))
    assert again.fingerprint == index.fingerprint
    assert (again.name, again.split, again.storage) == (index.name, index.split, "window")
    assert again.manifest["window"] == window
    assert verify(str(folder)) == []


def test_reindex_refuses_what_it_cannot_use(index: FrameIndex, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shards"):
        rebuild_index(str(tmp_path))
    other = write_dataset(str(tmp_path / "other"), tracks(), name="other")
    shutil.copy(Path(other.uri) / other.shard_files[0], Path(index.uri) / "shard-00009.parquet")
    with pytest.raises(UserError, match="another dataset"):
        rebuild_index(index.uri)
    (Path(index.uri) / "shard-00009.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(UserError, match="no Parquet file"):
        rebuild_index(index.uri)
