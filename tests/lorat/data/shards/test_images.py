"""Shards: plain Parquet for everybody, exact byte ranges for us."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lorat.data.shards import images as shards
from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.from_memory import write_dataset
from lorat.data.shards.images import ImageReader
from lorat.data.shards.manifest import dataset_info
from lorat.errors import UserError
from lorat.files import storage
from lorat.image.codec import DamagedImage, decode_rgb
from tests.lorat.small_sets import tracks


@pytest.fixture
def index(tmp_path: Path) -> FrameIndex:
    return write_dataset(str(tmp_path / "set"), tracks(), tracks_per_shard=3)


def test_the_image_column_is_plain_uncompressed_and_never_null(index: FrameIndex) -> None:
    file = pq.ParquetFile(Path(index.uri) / index.shard_files[0])
    assert not file.schema_arrow.field("jpeg").nullable
    chunk = file.metadata.row_group(0).column(file.schema_arrow.get_field_index("jpeg"))
    assert chunk.compression == "UNCOMPRESSED"
    assert not chunk.has_dictionary_page
    assert set(chunk.encodings) <= {"PLAIN", "RLE"}
    assert not chunk.is_stats_set


def test_any_parquet_reader_gets_one_row_per_frame(index: FrameIndex) -> None:
    table = pq.read_table(Path(index.uri) / index.shard_files[1])
    rows = np.flatnonzero(index.shard == 1)
    assert table.num_rows == len(rows)
    assert table["sequence"].unique().to_pylist() == ["track-3"]
    assert table["frame_number"].to_pylist() == index.frame_number[rows].tolist()
    np.testing.assert_array_equal(table["box_x2"].to_numpy(), index.box[rows, 2])
    image = decode_rgb(table["jpeg"][0].as_py())
    assert image.shape == (120, 160, 3)


def test_every_byte_range_holds_exactly_its_image(tmp_path: Path) -> None:
    """Images of a row group are spread over many pages, some of them are equal."""
    location = storage.locate(tmp_path)
    rng = np.random.default_rng(0)
    images = [rng.bytes(int(n)) for n in rng.integers(1, 60_000, 1500)]
    images[7:9] = [images[6]] * 2
    info = dataset_info(name="bytes", split="train", law=None)
    with shards.ShardWriter(location, "shard-00000.parquet", info) as writer:
        writer.begin_track("a", "")
        for number, jpeg in enumerate(images):
            writer.append(
                shards.Frame(
                    jpeg=jpeg, frame_number=number, box=(0, 0, 1, 1), valid=True, visible=True,
                    size_wh=(1, 1), mean_rgb=(0, 0, 0), window=(0, 0, 1, 1), stored_wh=(1, 1),
                )
            )  # fmt: skip
        rows = writer.close()
    data = (tmp_path / "shard-00000.parquet").read_bytes()
    places = zip(rows["offset"].to_pylist(), rows["length"].to_pylist(), strict=True)
    assert [data[o : o + n] for o, n in places] == images
    assert pq.ParquetFile(tmp_path / "shard-00000.parquet").num_row_groups > 1


def test_an_image_is_read_by_its_bytes_alone_and_counted(index: FrameIndex) -> None:
    reader = ImageReader(index)
    data = reader.read(9)
    assert reader.bytes_read == len(data) == index.length[9]
    assert reader.decode(9).shape == (120, 160, 3)


def test_a_reader_is_safe_between_threads_and_travels(
    index: FrameIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageReader, "MAX_OPEN", 1)
    reader = ImageReader(index)
    alone = [reader.read(row) for row in range(index.num_frames)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(reader.read, list(range(index.num_frames)) * 20))
    assert together == alone * 20
    assert pickle.loads(pickle.dumps(reader)).read(3) == alone[3]


def test_a_damaged_image_is_named(index: FrameIndex) -> None:
    shard = Path(index.uri) / index.shard_files[0]
    data = bytearray(shard.read_bytes())
    middle = int(index.offset[4] + index.length[4] // 2)
    data[middle : middle + 4] = b"\0\0\0\0"
    shard.write_bytes(data)
    reader = ImageReader(index)
    reader.decode(3)
    with pytest.raises(DamagedImage, match=r"memory/track-0 frame 4 \(shard-00000"):
        reader.decode(4)


def test_a_missing_shard_is_a_user_error(index: FrameIndex) -> None:
    (Path(index.uri) / index.shard_files[1]).unlink()
    with pytest.raises(UserError, match=index.shard_files[1]):
        ImageReader(index).read(index.num_frames - 1)


def test_a_shard_that_is_not_finished_is_never_in_view(tmp_path: Path) -> None:
    location = storage.locate(tmp_path)
    info = dataset_info(name="cut", split="train", law=None)
    with shards.ShardWriter(location, "shard-00000.parquet", info) as writer:
        writer.begin_track("a", "")
        assert not (tmp_path / "shard-00000.parquet").exists()
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_region_of_a_window_has_the_pixels_of_the_whole(tmp_path: Path) -> None:
    made = tracks(3, 6, size_wh=(900, 700))
    index = write_dataset(str(tmp_path / "window"), made, stored="window")
    assert (index.stored_wh[index.valid] < [900, 700]).any()
    reader = ImageReader(index)
    num_partial = 0
    for row in index.valid_rows:
        whole = reader.decode(row)
        x1, y1, x2, y2 = index.box[row].tolist()
        part, window = reader.decode_region(row, (x1 - 20, y1 - 20, x2 + 20, y2 + 20))
        num_partial += part.size < whole.size
        left, top, right, bottom = index.window[row].tolist()
        scale_x = whole.shape[1] / (right - left)
        scale_y = whole.shape[0] / (bottom - top)
        assert max(left, x1 - 20) >= window[0] - 1e-6
        assert min(right, x2 + 20) <= window[2] + 1e-6
        x, y = round((window[0] - left) * scale_x), round((window[1] - top) * scale_y)
        expected = whole[y : y + part.shape[0], x : x + part.shape[1]]
        inner = np.abs(expected.astype(int) - part)[2:-2, 2:-2]
        assert inner.max(initial=0) == 0
    assert num_partial > len(index.valid_rows) // 2
