"""The frame index: opens at once, is whole or absent, and knows its version."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lorat.data.shards.frame_index import FRAME_COLUMNS, FrameIndex, summary, write_index
from lorat.data.shards.from_memory import write_dataset
from lorat.data.shards.manifest import MANIFEST, WORK_FOLDER
from lorat.data.shards.verification import rebuild_index
from lorat.errors import UserError
from lorat.files import scratch, storage
from tests.lorat.small_sets import tracks


def test_rows_tracks_and_valid_rows_fit_together(tmp_path: Path) -> None:
    made = tracks(5, 7)
    index = write_dataset(str(tmp_path), made, tracks_per_shard=2)
    assert index.num_tracks == 5
    assert index.num_frames == 35
    assert index.track_start.tolist() == [0, 7, 14, 21, 28, 35]
    for track in range(5):
        rows = index.valid_rows[index.valid_start[track] : index.valid_start[track + 1]]
        assert (rows - index.track_start[track]).tolist() == [0, 1, 3, 4, 6]
        assert index.sequence(track) == f"track-{track}"
        assert index.category(track) == "thing"
        assert index.track_of(int(rows[0])) == track
    np.testing.assert_allclose(index.box[7], made[1].box[0].astype(np.float32))
    assert np.isnan(index.box[2]).all()
    for name, (dtype, width) in FRAME_COLUMNS.items():
        array = getattr(index, name)
        assert array.dtype == dtype
        assert array.shape == ((35, width) if width > 1 else (35,))
        assert not array.flags.writeable


def test_the_fingerprint_is_of_the_content_not_of_the_shards(tmp_path: Path) -> None:
    one = write_dataset(str(tmp_path / "one"), tracks(), tracks_per_shard=1)
    four = write_dataset(str(tmp_path / "four"), tracks(), tracks_per_shard=4)
    other = write_dataset(str(tmp_path / "other"), tracks(seed=1))
    assert one.fingerprint == four.fingerprint
    assert one.fingerprint != other.fingerprint


def test_ten_million_frames_open_in_2_seconds_and_200_megabytes(tmp_path: Path) -> None:
    num, length = 10_000_000, 500
    columns = {
        name: np.zeros((num, width) if width > 1 else num, dtype)
        for name, (dtype, width) in FRAME_COLUMNS.items()
    }
    columns["valid"][:] = True
    starts = np.arange(0, num + 1, length, dtype=np.int64)
    names = [f"sequence-{i}" for i in range(num // length)]
    write_index(
        storage.locate(tmp_path),
        columns=columns,
        track_start=starts,
        sequences=names,
        categories=[""] * len(names),
        shards=[{"file": "shard-00000.parquet", "bytes": 0, "rows": num}],
        info={"name": "large", "split": "train", "storage": "full", "window": ""},
    )
    code = """if True:
        import re, sys, time
        from pathlib import Path
        from lorat.data.shards.frame_index import FrameIndex
        def megabytes(of):
            text = Path("/proc/self/status").read_text()
            return int(re.search(of + r":\\s+(\\d+) kB", text)[1]) / 1024
        before = megabytes("VmRSS")
        start = time.perf_counter()
        index = FrameIndex.open(sys.argv[1])
        rows = [int(index.valid_rows[i]) for i in range(0, 10_000_000, 100_003)]
        boxes = [index.box[r] for r in rows]
        seconds = time.perf_counter() - start
        print(len(index.valid_rows), seconds, megabytes("VmHWM") - before)
    """
    root = str(Path(__file__).parents[4])
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert int(printed[0]) == num
    assert float(printed[1]) < 2.0
    # Beside Python and PyArrow, some 70 MB; how much of their files counts depends on the system.
    assert float(printed[2]) < 130.0


def test_another_schema_version_is_refused_clearly(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), tracks())
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(UserError, match="version 99, this program reads version 1"):
        FrameIndex.open(tmp_path)


def test_what_is_no_dataset_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset"):
        FrameIndex.open(tmp_path)
    (tmp_path / WORK_FOLDER).mkdir()
    with pytest.raises(UserError, match="not finished"):
        FrameIndex.open(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="reindex"):
        FrameIndex.open(tmp_path)
    with pytest.raises(UserError, match="Cannot use the address"):
        FrameIndex.open("gopher://somewhere/else")


def test_a_cut_index_is_refused(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), tracks())
    file = next(tmp_path.glob("index-*/frames.arrow"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="reindex"):
        FrameIndex.open(tmp_path)


@pytest.mark.parametrize("name", ["frames", "tracks", "valid"])
@pytest.mark.parametrize("part", [slice(-6, None), slice(-80, -10), slice(0, None)])
def test_a_damaged_index_of_the_right_size_is_refused(
    tmp_path: Path, name: str, part: slice
) -> None:
    write_dataset(str(tmp_path), tracks())
    file = next(tmp_path.glob(f"index-*/{name}.arrow"))
    data = bytearray(file.read_bytes())
    data[part] = b"\xff" * len(data[part])
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged.*reindex"):
        FrameIndex.open(tmp_path)
    assert rebuild_index(str(tmp_path)).num_frames == 24


def test_an_index_with_damaged_names_is_refused(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), tracks())
    file = next(tmp_path.glob("index-*/tracks.arrow"))
    file.write_bytes(file.read_bytes().replace(b"track-2", b"\xff" * 7))
    with pytest.raises(UserError, match=r"damaged.*reindex"):
        FrameIndex.open(tmp_path)


def test_an_index_of_another_dataset_is_refused(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), tracks())
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"num_frames": 25}))
    with pytest.raises(UserError, match="reindex"):
        FrameIndex.open(tmp_path)


def test_an_index_travels_as_its_address_and_notices_a_change(tmp_path: Path) -> None:
    packed = pickle.dumps(write_dataset(str(tmp_path), tracks()))
    assert len(packed) < 1000
    assert pickle.loads(packed).num_frames == 24
    write_dataset(str(tmp_path), tracks(seed=5))
    with pytest.raises(UserError, match="was changed"):
        pickle.loads(packed)


@pytest.mark.parametrize(
    "change",
    [
        {"index": {"folder": "../precious", "bytes": {}}},
        {"index": {"folder": "/precious", "bytes": {}}},
        {"index": {"folder": "index-1/../../precious", "bytes": {}}},
        {"shards": [{"file": "../precious/letter.txt", "bytes": 1, "rows": 24}]},
        {"index": None},
    ],
)
def test_a_foreign_manifest_cannot_name_what_lies_outside(
    tmp_path: Path, change: dict[str, object]
) -> None:
    precious = tmp_path / "precious" / "letter.txt"
    precious.parent.mkdir()
    precious.write_text("keep")
    folder = tmp_path / "set"
    write_dataset(str(folder), tracks())
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match="reindex"):
        FrameIndex.open(folder)
    assert rebuild_index(str(folder)).num_frames == 24
    assert precious.read_text() == "keep"


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "a/b", "a\\b", "a\nb", "a\0"])
def test_a_location_refuses_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    location = storage.locate(tmp_path)
    with pytest.raises(UserError, match="cannot be that of a file"):
        location.delete_folder(name)
    if name != "a/b":
        for use in (location.file, location.child, location.read_bytes, location.delete):
            with pytest.raises(UserError, match="cannot be that of a file"):
                use(name)
    assert location.file("a/b") == f"{tmp_path}/a/b"


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\\b", "..", "a\tb", ""])
def test_a_sequence_that_no_file_can_be_named_after_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tracks()
    made[2] = dataclasses.replace(made[2], name=name)
    with pytest.raises(UserError, match="cannot be that of a file"):
        write_dataset(str(tmp_path), made)
    with monkeypatch.context() as patch:  # as somebody else's program may have written it
        patch.setattr(storage, "check_plain_name", lambda *_: None)
        write_dataset(str(tmp_path), made)
    with pytest.raises(UserError, match="cannot be that of a file"):
        FrameIndex.open(tmp_path)


def test_what_killed_processes_were_uploading_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(tmp_path))
    monkeypatch.setattr(storage.Location, "is_local", False)
    upload = storage.scratch_folder(storage.locate(tmp_path))
    own = scratch.make_file(".part-", upload)
    gone = scratch.Process(scratch.machine(), os.getpid(), "1").mark()
    (upload / f".index{gone}abc").mkdir()
    for path in (upload / f".part-{gone}abc", upload / f".index{gone}abc" / "frames.arrow"):
        path.write_bytes(b"PAR1")
    storage.scratch_folder(storage.locate(tmp_path))
    assert list(upload.iterdir()) == [own]


def test_the_summary_says_which_shards_carry_no_checksums(tmp_path: Path) -> None:
    index = write_dataset(str(tmp_path / "set"), tracks())
    assert "checksums" not in summary(index)
    index.unchecked_shards = index.shard_files[:1]  # as if an earlier version had written it
    assert "1 of 1 shards carry no checksums (shard-00000.parquet, ...)" in summary(index)
    assert "ingest the dataset again" in summary(index)
