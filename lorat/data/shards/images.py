"""Shards: plain Parquet, one row per frame, read by byte range.

A shard is written under another name and appears when it is whole.  Its images are read one by
one, by the byte range that the index knows, which costs exactly their bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorat.data.shards.frame_index import FRAME_COLUMNS, FrameIndex
from lorat.data.shards.manifest import SCHEMA_VERSION
from lorat.data.shards.rows import (
    INDEX_ONLY,
    INFO_CHECKSUM,
    METADATA_PREFIX,
    SHARD_SCHEMA,
    SPREAD,
    info_checksum,
    read_rows,
)
from lorat.errors import UserError
from lorat.files import storage
from lorat.files.scratch import make_file
from lorat.image.codec import DamagedImage, decode_rgb
from lorat.image.jpeg_regions import cut_region

_ROW_GROUP_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One row of a shard; :class:`lorat.data.shards.frame_index.FrameIndex` has the meanings."""

    jpeg: bytes
    frame_number: int
    box: tuple[float, float, float, float]
    valid: bool
    visible: bool
    cover: int = -1
    size_wh: tuple[int, int]
    mean_rgb: tuple[float, float, float]
    window: tuple[float, float, float, float]
    stored_wh: tuple[int, int]


class ShardWriter:
    """Write one shard; nothing is in view under its name before :meth:`close`.

    Use as a context manager: without :meth:`close` no file is left behind.
    """

    def __init__(self, location: storage.Location, file: str, info: dict[str, Any]):
        self._location = location
        self._file = file
        self._scratch = make_file(f".part-{file}", storage.scratch_folder(location))
        metadata = {"schema_version": SCHEMA_VERSION, **info}
        metadata[INFO_CHECKSUM] = info_checksum(info)
        schema = SHARD_SCHEMA.with_metadata(
            {METADATA_PREFIX + k: json.dumps(v) for k, v in metadata.items()}
        )
        small = [n for n in schema.names if n != "jpeg"]
        self._writer = pq.ParquetWriter(
            self._scratch,
            schema,
            compression="none",
            use_dictionary=["sequence", "category"],
            column_encoding={n: "PLAIN" for n in schema.names if n not in ("sequence", "category")},
            write_statistics=small,
            write_page_checksum=True,
        )
        self._rows: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._track = -1
        self.num_rows = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # The footer that closing writes may not fit on a full disk, and nobody will read it.
        try:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer.is_open = False
        finally:
            self._scratch.unlink(missing_ok=True)

    def begin_track(self, sequence: str, category: str) -> None:
        """Make the following frames a new track."""
        self._track += 1
        self._names = {"sequence": sequence, "category": category}

    def append(self, frame: Frame) -> None:
        """Add a frame to the current track."""
        row: dict[str, Any] = {"track": self._track, **self._names, "jpeg": frame.jpeg}
        row["crc32"] = zlib.crc32(frame.jpeg)
        for name in FRAME_COLUMNS:
            if name in SPREAD:
                row.update(zip(SPREAD[name], getattr(frame, name), strict=True))
            elif name not in row and name not in INDEX_ONLY:
                row[name] = getattr(frame, name)
        self._rows.append(row)
        self.num_rows += 1
        self._pending_bytes += len(frame.jpeg)
        if self._pending_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> pa.Table:
        """Finish the file, find and compare every image in it, and put it in its place.

        Returns:
            The rows without images, with columns ``offset`` and ``length`` added.
        """
        self._flush()
        self._writer.close()
        with pa.OSFile(str(self._scratch), "rb") as handle:
            rows = read_rows(handle)
        with open(self._scratch, "rb") as written:
            os.fsync(written.fileno())
        storage.publish(self._scratch, self._location, self._file)
        return rows

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SHARD_SCHEMA))
            self._rows, self._pending_bytes = [], 0


class _LocalShard:
    """A file descriptor that closes when its last user lets go of it."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # without it every random read drags in its neighbours
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class _RemoteShard:
    def __init__(self, location: storage.Location, file: str):
        self._file = location.filesystem.open_input_file(location.file(file))

    def read(self, offset: int, length: int) -> bytes:
        return self._file.read_at(length, offset)


class ImageReader:
    """Read single images of a dataset by their exact byte range.

    Safe to share between threads; pickles as the dataset's URI.

    Attributes:
        bytes_read: sum of the bytes read so far.
    """

    MAX_OPEN = 512

    def __init__(self, index: FrameIndex):
        self.index = index
        self.bytes_read = 0
        self._location = storage.locate(index.uri)
        self._open: OrderedDict[int, _LocalShard | _RemoteShard] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageReader, (self.index,)

    def read(self, row: int) -> bytes:
        """Read the JPEG of a row.

        Raises:
            DamagedImage: if the shard is cut, or the bytes differ from what was written.
            UserError: if the shard is missing.
        """
        index = self.index
        length = int(index.length[row])
        data = self._shard(int(index.shard[row])).read(int(index.offset[row]), length)
        with self._lock:
            self.bytes_read += len(data)
        if zlib.crc32(data) != index.crc32[row]:
            raise DamagedImage(f"{index.describe_row(row)}: the bytes are not those once written")
        return data

    def decode(self, row: int) -> np.ndarray:
        """Read and decode a row to RGB uint8 (H, W, 3) with H, W = ``stored_wh[row][::-1]``.

        Raises:
            DamagedImage: if the bytes are damaged or decode to another size.
        """
        return self._decode(self.read(row), row)

    def decode_region(
        self, row: int, region_px: tuple[float, float, float, float]
    ) -> tuple[np.ndarray, tuple[float, float, float, float]]:
        """Read a row and decode at least the part of it that a crop needs.

        Stored windows are encoded so that a part of them can be decoded alone, which costs a
        fraction; pixels are the same.  Other images are decoded whole.

        Args:
            region_px: xyxy in pixels of the full frame.

        Returns:
            RGB uint8 (H, W, 3), and the part of the frame it shows, xyxy in its pixels.

        Raises:
            DamagedImage: as :meth:`decode`.
        """
        index = self.index
        x1, y1, x2, y2 = index.window[row].tolist()
        width, height = index.stored_wh[row].tolist()
        if index.storage == "full":
            return self.decode(row), (x1, y1, x2, y2)
        data = self.read(row)
        scale_x, scale_y = width / (x2 - x1), height / (y2 - y1)
        stored_region = (
            (region_px[0] - x1) * scale_x,
            (region_px[1] - y1) * scale_y,
            (region_px[2] - x1) * scale_x,
            (region_px[3] - y1) * scale_y,
        )
        part = cut_region(data, (width, height), stored_region)
        if part is None:  # the bytes in hand are decoded, not read once more
            return self._decode(data, row), (x1, y1, x2, y2)
        data, (left, top, right, bottom) = part
        return self._decode(data, row, (right - left, bottom - top)), (
            x1 + left / scale_x,
            y1 + top / scale_y,
            x1 + right / scale_x,
            y1 + bottom / scale_y,
        )

    def _decode(self, data: bytes, row: int, part_wh: tuple[int, int] | None = None) -> np.ndarray:
        """Decode the bytes of a row, or of a part of it, and compare the size."""
        try:
            image = decode_rgb(data)
        except DamagedImage as error:
            raise DamagedImage(f"{self.index.describe_row(row)}: {error}") from error
        width, height = self.index.stored_wh[row] if part_wh is None else part_wh
        if image.shape != (height, width, 3):
            raise DamagedImage(
                f"{self.index.describe_row(row)}: the {'image' if part_wh is None else 'part'} "
                f"has shape {image.shape}, expected {width}x{height}"
            )
        return image

    def _shard(self, number: int) -> _LocalShard | _RemoteShard:
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                file = self.index.shard_files[number]
                try:
                    shard = (
                        _LocalShard(self._location.file(file))
                        if self._location.is_local
                        else _RemoteShard(self._location, file)
                    )
                except FileNotFoundError as error:
                    raise UserError(
                        f"The shard {file} of {self.index.uri} is missing; "
                        "ingest the dataset again."
                    ) from error
                self._open[number] = shard
                if len(self._open) > self.MAX_OPEN:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
        return shard
