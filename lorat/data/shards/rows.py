"""The rows of a shard: its columns, where its images lie, and how they become an index.

The column ``jpeg`` is not null, uncompressed, plain-encoded and without dictionary, so that any
reader of Parquet reads it and every image lies in the file as its own bytes.  Where those bytes
are is found by walking the raw column chunk: a plain byte array is stored as its length (4 bytes,
little-endian) and its bytes, so searching for both finds the value, and comparing proves it.

Every page carries a CRC-32, as Parquet defines it, and the metadata a SHA-256 of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorat.config.json_files import check_shape, parse_json
from lorat.data.shards.frame_index import FRAME_COLUMNS
from lorat.data.shards.manifest import Storage, check_schema_version
from lorat.errors import UserError

METADATA_PREFIX = "lorat."
"""Prefix of our keys in the metadata of a Parquet file."""
_BOX = ("x1", "y1", "x2", "y2")
SPREAD: dict[str, tuple[str, ...]] = {
    "box": tuple(f"box_{c}" for c in _BOX),
    "size_wh": ("width", "height"),
    "mean_rgb": ("mean_r", "mean_g", "mean_b"),
    "window": tuple(f"window_{c}" for c in _BOX),
    "stored_wh": ("stored_width", "stored_height"),
}
"""Index columns that are several plain columns in a shard."""
INFO_CHECKSUM = "sha256"
"""Key of the checksum of the others in the metadata; shards without it have no checksums at all."""
_REMEDY = "ingest the dataset again"
_INFO_SHAPE = {"name": str, "split": str, "storage": Storage, "window": dict | str}
INDEX_ONLY = ("shard", "offset", "length")
"""Columns of the index that no shard has."""


def _shard_schema() -> pa.Schema:
    fields = [
        pa.field("track", pa.int32(), nullable=False),
        pa.field("sequence", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
    ]
    for name, (dtype, _) in FRAME_COLUMNS.items():
        if name not in INDEX_ONLY:
            kind = pa.from_numpy_dtype(np.dtype(dtype))
            fields += [pa.field(n, kind, nullable=False) for n in SPREAD.get(name, (name,))]
    return pa.schema([*fields, pa.field("jpeg", pa.binary(), nullable=False)])


SHARD_SCHEMA = _shard_schema()


def iterate_images(handle: pa.NativeFile) -> Iterator[tuple[int, bytes]]:
    """Yield byte offset and bytes of every image of a shard, in row order.

    Raises:
        ValueError: if the column is not stored plainly, a value is not where it must be, or a page
            is not as its checksum says.
    """
    parquet = _open(handle)
    column_number = parquet.schema_arrow.get_field_index("jpeg")
    for group in range(parquet.num_row_groups):
        chunk = parquet.metadata.row_group(group).column(column_number)
        if chunk.compression != "UNCOMPRESSED" or chunk.dictionary_page_offset is not None:
            raise ValueError("the column jpeg is compressed or has a dictionary")
        start = chunk.data_page_offset
        values = parquet.read_row_group(group, columns=["jpeg"], use_threads=False).column(0)
        raw = handle.read_at(chunk.total_compressed_size, start)
        view = memoryview(raw)
        position = 0
        for value in itertools.chain.from_iterable(c for c in values.chunks):
            data = value.as_buffer()
            needle = struct.pack("<I", data.size)
            end = position + 4 + data.size
            if view[position : position + 4] != needle or view[position + 4 : end] != memoryview(
                data
            ):
                whole = data.to_pybytes()
                position = raw.find(needle + whole, position)
                if position < 0:
                    raise ValueError(f"an image of row group {group} is not stored plainly")
                end = position + 4 + data.size
            yield start + position + 4, raw[position + 4 : end]
            position = end


def read_rows(handle: pa.NativeFile) -> pa.Table:
    """Read all columns of a shard but the images, and add ``offset`` and ``length``.

    Raises:
        ValueError, OSError, LookupError: if a page is not as its checksum says, the columns are not
            those of a shard, or the images as :func:`iterate_images`.
    """
    schema = _open(handle).schema_arrow
    if not schema.equals(SHARD_SCHEMA):
        raise ValueError("its columns are not those of a shard")
    places = [(offset, len(data)) for offset, data in iterate_images(handle)]
    columns = [n for n in SHARD_SCHEMA.names if n != "jpeg"]
    table = _open(handle).read(columns=columns, use_threads=False)
    offsets, lengths = zip(*places, strict=True) if places else ((), ())
    table = table.append_column("offset", pa.array(offsets, pa.int64()))
    return table.append_column("length", pa.array(lengths, pa.int32()))


def _open(handle: pa.NativeFile) -> pq.ParquetFile:
    """Open a shard; what is read of it is compared with the checksums of its pages, if any."""
    return pq.ParquetFile(handle, page_checksum_verification=True)


def info_checksum(info: dict[str, Any]) -> str:
    """Return the SHA-256 of what a shard says of its dataset."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def shard_info(handle: pa.NativeFile, where: str) -> tuple[dict[str, Any], bool]:
    """Return what a shard says of its dataset, and whether the shard carries checksums.

    Raises:
        UserError: if it is no shard of ours, of another schema version or damaged.
    """
    try:
        metadata = _open(handle).schema_arrow.metadata or {}
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise UserError(f"{where} is no Parquet file: {error}.") from error
    info = {
        k.decode(errors="replace").removeprefix(METADATA_PREFIX): parse_json(
            v, f"{where}, metadata {k!r},", _REMEDY, shape=Any
        )
        for k, v in metadata.items()
        if k.startswith(METADATA_PREFIX.encode())
    }
    check_schema_version(info.pop("schema_version", "none"), where)
    checksum = info.pop(INFO_CHECKSUM, None)
    check_shape(info, where, _REMEDY, _INFO_SHAPE)
    if set(info) != set(_INFO_SHAPE) or checksum not in (None, info_checksum(info)):
        raise UserError(
            f"{where} is damaged: what it says of its dataset is not what was written; {_REMEDY}."
        )
    return info, checksum is not None


def manifest_entry(file: str, size: int, num_rows: int, *, checked: bool) -> dict[str, Any]:
    """Return what the manifest says of a shard.

    Args:
        file, size, num_rows: its name, bytes and rows.
        checked: it carries checksums.
    """
    return {"file": file, "bytes": size, "rows": num_rows, "checksums": checked}


def index_columns(
    tables: list[pa.Table],
) -> tuple[dict[str, np.ndarray], np.ndarray, list[str], list[str]]:
    """Turn the rows of all shards, in shard order, into the arrays of the index.

    Returns:
        Columns, ``track_start``, sequence and category of each track.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in FRAME_COLUMNS}
    starts: list[np.ndarray] = []
    sequences: list[str] = []
    categories: list[str] = []
    total = 0
    for shard, table in enumerate(tables):
        count = table.num_rows
        for name, (dtype, _) in FRAME_COLUMNS.items():
            if name == "shard":
                values = np.full(count, shard, dtype)
            elif name in SPREAD:
                values = np.stack([_column(table, n, dtype) for n in SPREAD[name]], axis=1)
            else:
                values = _column(table, name, dtype)
            parts[name].append(values)
        track = _column(table, "track", "int32")
        first = np.flatnonzero(np.diff(track, prepend=-1))
        starts.append(first + total)
        sequences += table.column("sequence").take(pa.array(first)).to_pylist()
        categories += table.column("category").take(pa.array(first)).to_pylist()
        total += count
    columns = {
        name: np.concatenate(values) if values else np.zeros(0, FRAME_COLUMNS[name][0])
        for name, values in parts.items()
    }
    track_start = np.concatenate([*starts, [total]]).astype(np.int64)
    return columns, track_start, sequences, categories


def _column(table: pa.Table, name: str, dtype: str) -> np.ndarray:
    return table.column(name).to_numpy().astype(dtype)
