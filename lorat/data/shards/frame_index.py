"""The frame index: what is known of every frame, memory-mapped.

Beside the Parquet shards of a dataset lies one folder of Arrow IPC files.  ``frames.arrow`` has a
row per frame, ``tracks.arrow`` a row per track, ``valid.arrow`` the rows of frames with a usable
box.  Each file is one record batch, so every column is one contiguous array that NumPy can view
without a copy: opening costs the same for ten frames and for ten million.

``dataset.json`` is written last and names the index folder, so a dataset is either absent or
whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lorat.data.shards.manifest import (
    _FILES,
    MANIFEST,
    SCHEMA_VERSION,
    Storage,
    previous_manifest,
    read_manifest,
)
from lorat.errors import UserError, cannot_read
from lorat.files import storage
from lorat.files.scratch import make_public_folder

FRAME_COLUMNS: dict[str, tuple[str, int]] = {
    "frame_number": ("int32", 1),
    "box": ("float32", 4),
    "valid": ("bool", 1),
    "visible": ("bool", 1),
    "cover": ("int8", 1),
    "size_wh": ("int32", 2),
    "mean_rgb": ("float32", 3),
    "window": ("float32", 4),
    "stored_wh": ("int32", 2),
    "shard": ("int32", 1),
    "offset": ("int64", 1),
    "length": ("int32", 1),
    "crc32": ("uint32", 1),
}
"""Columns of ``frames.arrow``: element type and width."""
_PLACE_COLUMNS = ("shard", "offset")
_ODD_SEQUENCE = r"[/\\\x00-\x1f\x7f]|^\.{0,2}$"
"""Names of sequences become file names of results."""


class FrameIndex:
    """All frames of one dataset, as NumPy views on memory-mapped files.

    Attributes:
        uri: where the dataset lies.
        name, split: such as ``got10k`` and ``train``.
        storage: ``window`` (part of the frame around the target, maybe reduced) or ``full``.
        fingerprint: hash of the content: names, boxes, flags, geometry and image check sums.
        num_tracks, num_frames: counts.
        unchecked_shards: files that carry no checksums, since an earlier version wrote them.
        track_start: int64 (num_tracks + 1); rows of track t are [track_start[t], track_start[t+1]).
        valid_start: int64 (num_tracks + 1); positions of track t in ``valid_rows``.
        valid_rows: int64; rows with a usable box, ascending, grouped by track.
        frame_number: int32 (n); number of the frame in its video.
        box: float32 (n, 4); xyxy in pixels of the full frame, NaN where none is annotated.
        valid: bool (n); the box can be trained on.
        visible: bool (n); the target is neither absent nor fully occluded, as annotated.
        cover: int8 (n); GOT-10k's cover label 0 to 8, or -1 where there is none.
        size_wh: int32 (n, 2); size of the full frame.
        mean_rgb: float32 (n, 3); mean colour of the full frame, 0 to 255.
        window: float32 (n, 4); the stored part, xyxy in pixels of the full frame.
        stored_wh: int32 (n, 2); size of the stored image.
        shard: int32 (n); number of the shard in ``shard_files``.
        offset, length: int64, int32 (n); byte range of the JPEG in its shard.
        crc32: uint32 (n); check sum of the JPEG.
    """

    frame_number: np.ndarray
    box: np.ndarray
    valid: np.ndarray
    visible: np.ndarray
    cover: np.ndarray
    size_wh: np.ndarray
    mean_rgb: np.ndarray
    window: np.ndarray
    stored_wh: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc32: np.ndarray

    def __init__(self, location: storage.Location, manifest: dict[str, Any], folder: Path):
        self.uri = location.uri
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.split: str = manifest["split"]
        self.storage: Storage = manifest["storage"]
        self.fingerprint: str = manifest["fingerprint"]
        self.num_tracks: int = manifest["num_tracks"]
        self.num_frames: int = manifest["num_frames"]
        self.shard_files: list[str] = [s["file"] for s in manifest["shards"]]
        self.unchecked_shards: list[str] = [
            s["file"] for s in manifest["shards"] if not s.get("checksums")
        ]
        frames, tracks, valid = (_map_batch(folder / name) for name in _FILES)
        for name in FRAME_COLUMNS:
            setattr(self, name, _view(frames, name))
        self.track_start = _view(valid, "track_start")
        self.valid_start = _view(valid, "valid_start")
        self.valid_rows = _view(valid, "valid_rows")
        tracks.validate(full=True)
        lengths = (frames.num_rows, tracks.num_rows, len(self.track_start), len(self.valid_start))
        wanted = (self.num_frames, self.num_tracks, self.num_tracks + 1, self.num_tracks + 1)
        if lengths != wanted:
            raise ValueError(f"columns of {lengths} rows, expected {wanted}")
        self._sequence = tracks.column("sequence")
        odd = pc.index(pc.match_substring_regex(self._sequence, _ODD_SEQUENCE), True).as_py()
        if odd >= 0:
            storage.check_plain_name(self._sequence[odd].as_py(), f"the dataset {self.uri}")
        self._category = tracks.column("category")

    @classmethod
    def open(cls, uri: str | os.PathLike[str]) -> FrameIndex:
        """Open the index of the dataset at ``uri``; a remote one is copied to the cache once.

        Raises:
            UserError: if there is no whole dataset, one of another schema version, one whose
                index is damaged, or one whose names lead out of its folder.
        """
        location = storage.locate(uri)
        manifest = read_manifest(location)
        folder_name = manifest["index"]["folder"]
        if location.is_local:
            folder = Path(location.file(folder_name))
        else:
            folder = _cached_copy(location, folder_name, manifest["fingerprint"])
        for name, size in manifest["index"]["bytes"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise UserError(
                    f"The frame index of {location.uri} is incomplete ({file.name} is missing or "
                    f"cut); rebuild it with: python jobs/ingest.py reindex {location.uri}"
                )
        try:
            return cls(location, manifest, folder)
        except UserError:
            raise
        except PermissionError as error:
            raise cannot_read(folder, error) from error
        except (pa.ArrowException, ValueError, LookupError, OSError) as error:
            raise UserError(
                f"The frame index of {location.uri} is damaged ({error}); rebuild it with: "
                f"python jobs/ingest.py reindex {location.uri}"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.uri, self.fingerprint)

    def sequence(self, track: int) -> str:
        """Return the name of a track's sequence."""
        return self._sequence[track].as_py()

    def category(self, track: int) -> str:
        """Return the category of a track; empty if none is known."""
        return self._category[track].as_py()

    def track_of(self, row: int) -> int:
        """Return the track that a row belongs to."""
        return int(np.searchsorted(self.track_start, row, side="right")) - 1

    def describe_row(self, row: int) -> str:
        """Name a frame for a message: dataset, sequence, frame number and shard."""
        return (
            f"{self.name}/{self.sequence(self.track_of(row))} frame {self.frame_number[row]} "
            f"({self.shard_files[self.shard[row]]})"
        )


def write_index(
    location: storage.Location,
    *,
    columns: dict[str, np.ndarray],
    track_start: np.ndarray,
    sequences: list[str],
    categories: list[str],
    shards: list[dict[str, Any]],
    info: dict[str, Any],
) -> FrameIndex:
    """Write the index and, last of all, ``dataset.json``; open the result.

    Args:
        location: folder of the dataset.
        columns: one array per name in :data:`FRAME_COLUMNS`, (n) or (n, width).
        track_start: int64 (num_tracks + 1), ascending from 0 to n.
        sequences, categories: one text per track.
        shards: entry of each shard in the manifest, in the order of column ``shard``.
        info: ``name``, ``split``, ``storage`` and whatever else the manifest shall say.

    Raises:
        UserError: if there is no frame, or a sequence has a name that no file can have.
    """
    num_frames = len(columns["frame_number"])
    if num_frames == 0:
        raise UserError(f"No usable frame is left for the dataset at {location.uri}.")
    for sequence in sequences:
        storage.check_plain_name(sequence, f"the dataset {location.uri}")
    track_start = np.asarray(track_start, np.int64)
    valid_rows = np.flatnonzero(columns["valid"]).astype(np.int64)
    fingerprint = content_fingerprint(columns, track_start, sequences, categories, info)
    location.make()
    scratch = make_public_folder(".index", storage.scratch_folder(location))
    try:
        frame_arrays = [_to_arrow(columns[name], *FRAME_COLUMNS[name]) for name in FRAME_COLUMNS]
        _write_batch(scratch / _FILES[0], dict(zip(FRAME_COLUMNS, frame_arrays, strict=True)))
        _write_batch(
            scratch / _FILES[1], {"sequence": pa.array(sequences), "category": pa.array(categories)}
        )
        # Where the usable rows of each track begin among all usable rows: a track's are a slice.
        one_row = {
            "track_start": track_start,
            "valid_start": np.searchsorted(valid_rows, track_start).astype(np.int64),
            "valid_rows": valid_rows,
        }
        # Columns of several lengths in one record batch: one row, each cell a list.
        lists = {
            k: pa.LargeListArray.from_arrays(pa.array([0, len(v)], pa.int64()), pa.array(v))
            for k, v in one_row.items()
        }
        _write_batch(scratch / _FILES[2], lists)
        folder = f"index-{fingerprint[:12]}-{os.urandom(3).hex()}"
        sizes = {name: (scratch / name).stat().st_size for name in _FILES}
        if location.is_local:
            os.rename(scratch, location.file(folder))
        else:
            for name in _FILES:
                storage.publish(scratch / name, location.child(folder), name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    manifest = {
        "format": "lorat-frames",
        "schema_version": SCHEMA_VERSION,
        **info,
        "fingerprint": fingerprint,
        "num_tracks": len(sequences),
        "num_frames": num_frames,
        "num_valid": len(valid_rows),
        "shards": shards,
        "index": {"folder": folder, "bytes": sizes},
    }
    old = previous_manifest(location).get("index", {}).get("folder")
    # Readers find the folder by the manifest: until it is replaced they have the old index.
    location.write_bytes(MANIFEST, json.dumps(manifest, indent=1).encode())
    if old and old != folder:
        location.delete_folder(old)
    return FrameIndex.open(location.uri)


def content_fingerprint(
    columns: dict[str, np.ndarray],
    track_start: np.ndarray,
    sequences: list[str],
    categories: list[str],
    info: dict[str, Any],
) -> str:
    """Hash what the dataset contains, whatever shards it is spread over (SHA-256, hex)."""
    digest = hashlib.sha256()
    identity = [SCHEMA_VERSION, info["name"], info["split"], info["storage"]]
    digest.update(json.dumps([identity, sequences, categories]).encode())
    digest.update(np.ascontiguousarray(track_start, "<i8").tobytes())
    for name, (dtype, _) in FRAME_COLUMNS.items():
        if name not in _PLACE_COLUMNS:
            digest.update(np.ascontiguousarray(columns[name], dtype).tobytes())
    return digest.hexdigest()


def _reopen(uri: str, fingerprint: str) -> FrameIndex:
    index = FrameIndex.open(uri)
    if index.fingerprint != fingerprint:
        raise UserError(
            f"The dataset at {uri} was changed while it was in use; start the job again."
        )
    return index


def _cached_copy(location: storage.Location, folder: str, fingerprint: str) -> Path:
    key = hashlib.sha256(f"{location.uri}|{folder}|{fingerprint}".encode()).hexdigest()[:24]
    target = storage.cache_folder() / "index" / key
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = make_public_folder(".part-", target.parent)
        remote = location.child(folder)
        try:
            for name in _FILES:
                with (
                    remote.filesystem.open_input_stream(remote.file(name)) as source,
                    open(scratch / name, "wb") as sink,
                ):
                    shutil.copyfileobj(source, sink, length=1 << 22)
            os.rename(scratch, target)
        except FileNotFoundError as error:
            raise UserError(
                f"The frame index of {location.uri} is missing; rebuild it with: "
                f"python jobs/ingest.py reindex {location.uri}"
            ) from error
        except OSError:
            if not target.is_dir():  # else another process has just made the same copy
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _to_arrow(values: np.ndarray, dtype: str, width: int) -> pa.Array:
    flat = np.ascontiguousarray(values, dtype).reshape(-1)
    if dtype == "bool":
        flat = flat.view(np.uint8)
    array = pa.array(flat)
    return array if width == 1 else pa.FixedSizeListArray.from_arrays(array, width)


def _write_batch(file: Path, arrays: dict[str, pa.Array]) -> None:
    batch = pa.record_batch(list(arrays.values()), names=list(arrays))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _map_batch(file: Path) -> pa.RecordBatch:
    batch = pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)
    batch.validate()
    return batch


def _view(batch: pa.RecordBatch, name: str) -> np.ndarray:
    column = batch.column(name)
    width = FRAME_COLUMNS.get(name, ("int64", 1))[1]
    if isinstance(column, pa.FixedSizeListArray | pa.LargeListArray):
        column = column.flatten()
    values = column.to_numpy(zero_copy_only=True)
    if FRAME_COLUMNS.get(name, ("", 1))[0] == "bool":
        values = values.view(np.bool_)
    return values.reshape(-1, width) if width > 1 else values


def summary(index: FrameIndex) -> str:
    """Summarise a dataset in some lines, the last one on shards that cannot be checked, if any."""
    lines = [
        f"{index.name} {index.split} ({index.storage}): {index.num_tracks:,} tracks, "
        f"{index.num_frames:,} frames, {len(index.valid_rows):,} with a usable box, "
        f"{len(index.shard_files)} shards",
        f"fingerprint {index.fingerprint}",
        f"dataset     {index.uri}",
    ]
    if index.unchecked_shards:
        lines.append(
            f"{len(index.unchecked_shards)} of {len(index.shard_files)} shards carry no checksums "
            f"({index.unchecked_shards[0]}, ...): damage of their boxes cannot be told; ingest the "
            "dataset again for shards that carry them."
        )
    return "\n".join(lines)
