"""Verification: rebuild the index from the shards, and check every range, image and box."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lorat.data.shards import rows as shard_rows
from lorat.data.shards.frame_index import (
    FRAME_COLUMNS,
    FrameIndex,
    content_fingerprint,
    write_index,
)
from lorat.data.shards.manifest import WORK_FOLDER, previous_manifest
from lorat.errors import UserError
from lorat.files import storage
from lorat.image.boxes import usable
from lorat.image.codec import DamagedImage, decode_complete

KEPT_FROM_INGEST = ("plan", "attributes")
"""What the manifest says that no shard does."""
_SHARD_NAME = re.compile(r"shard-\d+\.parquet")
MapShards = Callable[[Callable[..., Any], list[tuple[Any, ...]]], Iterable[Any]]
"""Applies a function to argument tuples, in order; the built-in one below does so in turn."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is not as it must be."""

    where: str
    """Shard, and sequence and frame where they are known."""
    what: str


def in_turn(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> Iterable[Any]:
    """Apply ``function`` to each argument tuple in this process."""
    return (function(*a) for a in arguments)


def read_shard(uri: str, file: str) -> tuple[dict[str, Any], dict[str, Any], pa.Table]:
    """Read what the index needs of one shard.

    Returns:
        The dataset's description, the shard's entry for the manifest, and its rows.

    Raises:
        UserError: if the file is no whole shard, or not what its checksums say.
    """
    location = storage.locate(uri)
    where = storage.join(location.uri, file)
    with location.filesystem.open_input_file(location.file(file)) as handle:
        info, checked = shard_rows.shard_info(handle, where)
        try:
            rows = shard_rows.read_rows(handle)
        except (ValueError, OSError, LookupError) as error:
            raise UserError(f"{where} is damaged: {error}; ingest the dataset again.") from error
        entry = shard_rows.manifest_entry(file, handle.size(), rows.num_rows, checked=checked)
    return info, entry, rows


def rebuild_index(uri: str, map_shards: MapShards = in_turn) -> FrameIndex:
    """Make the index of a dataset anew from nothing but its shards.

    How it was ingested and which attributes its sequences have is taken from the manifest, where
    that can still be read.

    Raises:
        UserError: if there are no shards, they belong to different datasets, the ingest is not
            finished, or the index cannot be written.
    """
    location = storage.locate(uri)
    if location.exists(WORK_FOLDER):
        raise UserError(
            f"The ingest into {location.uri} is not finished; run the same ingest command again, "
            f"or delete the folder {WORK_FOLDER} there to do with the shards that are there."
        )
    files = [n for n in location.names() if _SHARD_NAME.fullmatch(n)]
    if not files:
        raise UserError(f"There are no shards (shard-NNNNN.parquet) at {uri}; check the address.")
    parts = list(map_shards(read_shard, [(location.uri, file) for file in files]))
    info = parts[0][0]
    for other, entry, _ in parts:
        if other != info:
            raise UserError(
                f"{entry['file']} at {uri} is from another dataset than {files[0]} "
                f"({other} against {info}); keep one dataset per folder."
            )
    before = previous_manifest(location)
    if all(before.get(key) == value for key, value in info.items()):
        info = info | {key: before[key] for key in KEPT_FROM_INGEST if key in before}
    with storage.writing_to(location):
        return index_shards(location, info, [p[1] for p in parts], [p[2] for p in parts])


def index_shards(
    location: storage.Location,
    info: dict[str, Any],
    entries: list[dict[str, Any]],
    tables: list[pa.Table],
) -> FrameIndex:
    """Write the index of shards whose rows are known; the order is that of the shards."""
    columns, track_start, sequences, categories = shard_rows.index_columns(tables)
    return write_index(
        location,
        columns=columns,
        track_start=track_start,
        sequences=sequences,
        categories=categories,
        shards=entries,
        info=info,
    )


def verify(uri: str, map_shards: MapShards = in_turn) -> list[Problem]:
    """Check a dataset completely; an empty list means it is whole.

    Raises:
        UserError: if it cannot be opened at all.
    """
    index = FrameIndex.open(uri)
    problems = _check_fingerprint(index) + _check_valid_rows(index)
    arguments = [(index.uri, number) for number in range(len(index.shard_files))]
    for found in map_shards(verify_shard, arguments):
        problems += found
    return problems


def verify_shard(uri: str, number: int) -> list[Problem]:
    """Check one shard: its index entries, every image and every box."""
    index = FrameIndex.open(uri)
    location = storage.locate(uri)
    entry = index.manifest["shards"][number]
    file = entry["file"]
    rows = np.flatnonzero(index.shard == number)
    try:
        handle = location.filesystem.open_input_file(location.file(file))
    except FileNotFoundError:
        return [Problem(where=file, what="the shard is missing")]
    problems: list[Problem] = []
    with handle:
        if handle.size() != entry["bytes"]:
            what = f"the shard has {handle.size()} bytes, written were {entry['bytes']}"
            return [Problem(where=file, what=what)]
        for row in rows:
            problems += _check_image(index, int(row), handle)
        try:
            shard_rows.shard_info(handle, file)
            table = shard_rows.read_rows(handle)
        except (UserError, ValueError, OSError, LookupError) as error:
            return [*problems, Problem(where=file, what=f"Parquet cannot read it: {error}")]
    if table.num_rows != len(rows):
        what = f"the shard has {table.num_rows} rows, the index {len(rows)}"
        return [*problems, Problem(where=file, what=what)]
    columns = shard_rows.index_columns([table])[0]
    for name in FRAME_COLUMNS:
        if name == "shard":
            continue
        stored, indexed = columns[name], getattr(index, name)[rows]
        same = (stored == indexed) | ((stored != stored) & (indexed != indexed))
        for row in rows[~same.reshape(len(rows), -1).all(axis=1)]:
            what = f"column {name} of the index differs from the shard"
            problems.append(Problem(where=index.describe_row(int(row)), what=what))
    return problems


def _check_image(index: FrameIndex, row: int, handle: pa.NativeFile) -> list[Problem]:
    found: list[str] = []
    offset, length = int(index.offset[row]), int(index.length[row])
    width, height = (int(v) for v in index.stored_wh[row])
    if offset < 0 or length <= 0 or offset + length > handle.size():
        found.append("the byte range lies outside the shard")
    else:
        data = handle.read_at(length, offset)
        if zlib.crc32(data) != index.crc32[row]:
            found.append("the bytes of the image are not those once written")
        try:
            image = decode_complete(data)
            if image.shape != (height, width, 3):
                found.append(f"the image has shape {image.shape}, not {(height, width, 3)}")
        except DamagedImage as error:
            found.append(str(error))
    x1, y1, x2, y2 = index.window[row]
    full_width, full_height = index.size_wh[row]
    if not (0 <= x1 < x2 <= full_width and 0 <= y1 < y2 <= full_height):
        found.append(f"the stored window {index.window[row].tolist()} lies outside the frame")
    if index.valid[row] and not usable(index.box[row], index.size_wh[row]):
        found.append(f"the box {index.box[row].tolist()} is marked valid but is not usable")
    if not np.isfinite(index.mean_rgb[row]).all():
        found.append("the mean colour is not finite")
    return [Problem(where=index.describe_row(row), what=what) for what in found]


def _check_valid_rows(index: FrameIndex) -> list[Problem]:
    """Compare the list of usable frames, which no shard has, with the column it is made of."""
    rows = np.flatnonzero(index.valid)
    starts = np.searchsorted(rows, index.track_start)
    return [
        Problem(
            where="index",
            what=f"{name} does not fit the column valid; rebuild the index with: "
            f"python jobs/ingest.py reindex {index.uri}",
        )
        for name, expected in (("valid_rows", rows), ("valid_start", starts))
        if not np.array_equal(getattr(index, name), expected)
    ]


def _check_fingerprint(index: FrameIndex) -> list[Problem]:
    columns = {name: getattr(index, name) for name in FRAME_COLUMNS}
    sequences = [index.sequence(t) for t in range(index.num_tracks)]
    categories = [index.category(t) for t in range(index.num_tracks)]
    actual = content_fingerprint(columns, index.track_start, sequences, categories, index.manifest)
    if actual != index.fingerprint:
        what = f"the fingerprint is {actual[:12]}, the manifest says {index.fingerprint[:12]}"
        return [Problem(where="index", what=what)]
    return []
