"""Datasets written from tracks in memory, as tests and small sets need them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lorat.data.shards import images as shards
from lorat.data.shards import rows as shard_rows
from lorat.data.shards.conversion import encode_frame
from lorat.data.shards.frame_index import FrameIndex, write_index
from lorat.data.shards.manifest import Storage, dataset_info, shard_name
from lorat.data.shards.windows import WindowLaw
from lorat.files import storage
from lorat.image.boxes import usable

_QUALITY = 92


@dataclass(frozen=True, kw_only=True)
class MemoryTrack:
    """A track in memory.

    Attributes:
        images: RGB uint8 (H, W, 3) each; sizes may differ.
        box: float (n, 4), xyxy in pixels; NaN where the target is absent.
        visible: bool (n); none means wherever the box is finite.
    """

    name: str
    images: Sequence[np.ndarray]
    box: np.ndarray
    visible: np.ndarray | None = None
    category: str = ""


def write_dataset(
    uri: str,
    tracks: Iterable[MemoryTrack],
    *,
    name: str = "memory",
    split: str = "train",
    stored: Storage = "full",
    law: WindowLaw | None = None,
    tracks_per_shard: int = 16,
) -> FrameIndex:
    """Write a whole dataset from tracks in memory and open it.

    Args:
        law: window geometry when ``stored`` is ``window``; none means the 224 default.
    """
    location = storage.locate(uri)
    location.make()
    law = (law or WindowLaw()) if stored == "window" else None
    info = dataset_info(name=name, split=split, law=law)
    tables: list[pa.Table] = []
    listed: list[dict[str, Any]] = []
    pending: list[MemoryTrack] = []

    def flush() -> None:
        file = shard_name(len(tables))
        with shards.ShardWriter(location, file, info) as writer:
            for track in pending:
                _append(writer, track, law)
            tables.append(writer.close())
        size = location.filesystem.get_file_info(location.file(file)).size
        rows = tables[-1].num_rows
        listed.append(shard_rows.manifest_entry(file, size, rows, checked=True))
        pending.clear()

    for track in tracks:
        pending.append(track)
        if len(pending) == tracks_per_shard:
            flush()
    if pending:
        flush()
    columns, track_start, sequences, categories = shard_rows.index_columns(tables)
    return write_index(
        location,
        columns=columns,
        track_start=track_start,
        sequences=sequences,
        categories=categories,
        shards=listed,
        info=info,
    )


def _append(writer: shards.ShardWriter, track: MemoryTrack, law: WindowLaw | None) -> None:
    box = np.asarray(track.box, np.float64)
    visible: np.ndarray = np.logical_and.reduce(np.isfinite(box), axis=1)
    if track.visible is not None:
        visible = np.asarray(track.visible, bool)
    writer.begin_track(track.name, track.category)
    for number, image in enumerate(track.images):
        size_wh = (image.shape[1], image.shape[0])
        writer.append(
            encode_frame(
                image,
                raw=None,
                frame_number=number,
                box=box[number],
                valid=bool(visible[number] and usable(box[number], size_wh)),
                visible=bool(visible[number]),
                law=law,
                quality=_QUALITY,
            )
        )
