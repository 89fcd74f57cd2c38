"""Verify finds every kind of damage; reindex needs nothing but the shards."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.from_memory import write_dataset
from lorat.data.shards.manifest import MANIFEST
from lorat.data.shards.verification import rebuild_index, verify
from lorat.errors import UserError
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
    whats = {p.where: p.what for p in verify(index.uri)}
    assert whats.keys() == {"memory/track-2 frame 2 (shard-00001.parquet)", shard.name}
    assert "checksum" in whats[shard.name]  # of the page that has the image


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


def test_reindex_refuses_what_the_checksums_of_a_shard_refuse(tmp_path: Path) -> None:
    index = write_dataset(str(tmp_path / "set"), tracks(2, 4))
    file = Path(index.uri) / index.shard_files[0]
    written, rng = file.read_bytes(), random.Random(0)
    images = range(int(index.offset.min()) + 64, int((index.offset + index.length).max()) - 64)
    places = [n for n in range(len(written)) if n not in images]  # most bytes are those of images
    num_refused = 0
    for _ in range(400):
        place = rng.choice(places)
        flipped = bytes([written[place] ^ 1 << rng.randrange(8)])
        file.write_bytes(written[:place] + flipped + written[place + 1 :])
        try:
            again = rebuild_index(index.uri)
        except UserError:
            num_refused += 1
        else:
            # Parquet has bytes that nobody needs, such as the smallest value of a page.
            assert again.fingerprint == index.fingerprint
            assert again.manifest["window"] == index.manifest["window"]
    assert num_refused > 200


def test_verify_finds_a_damaged_column_and_a_damaged_image(index: FrameIndex) -> None:
    file = Path(index.uri) / index.shard_files[0]
    written = file.read_bytes()
    box = np.float32(index.box[5, 2]).tobytes()
    for place in (written.index(box), int(index.offset[4]) + 30):
        file.write_bytes(written[:place] + bytes([written[place] ^ 4]) + written[place + 1 :])
        assert any("CRC" in problem.what for problem in verify(index.uri))
        with pytest.raises(UserError, match=r"damaged.*CRC.*ingest the dataset again"):
            rebuild_index(index.uri)


def test_shards_of_an_earlier_version_are_read_and_known_to_carry_no_checksums(
    tmp_path: Path,
) -> None:
    index = write_dataset(str(tmp_path / "set"), tracks())
    assert index.unchecked_shards == []
    for name in index.shard_files:
        file = Path(index.uri) / name
        with open(file, "rb") as stream:
            table = pq.ParquetFile(stream).read()
        metadata = {k: v for k, v in table.schema.metadata.items() if k != b"lorat.sha256"}
        pq.write_table(
            table.replace_schema_metadata(metadata),
            file,
            compression="none",
            use_dictionary=["sequence", "category"],
            column_encoding={
                n: "PLAIN" for n in table.column_names if n not in ("sequence", "category")
            },
        )
    again = rebuild_index(index.uri)
    assert again.fingerprint == index.fingerprint
    assert again.unchecked_shards == again.shard_files
    assert verify(index.uri) == []
    entries = [{k: v for k, v in s.items() if k != "checksums"} for s in again.manifest["shards"]]
    text = json.dumps(again.manifest | {"shards": entries})
    (Path(index.uri) / MANIFEST).write_text(text)  # as the earlier version wrote it
    assert FrameIndex.open(index.uri).unchecked_shards == again.shard_files
