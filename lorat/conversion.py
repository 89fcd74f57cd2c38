"""Conversion: tracks of frames to rows of shards, and whole small datasets from memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lorat import shards, storage
from lorat.frame_index import FrameIndex, Storage, write_index
from lorat.images import encode_jpeg, mean_rgb
from lorat.windows import WindowLaw, cut_window


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


def usable(box_px: np.ndarray, size_wh: Sequence[int] | np.ndarray) -> np.ndarray:
    """Tell which boxes (n, 4) are finite, not empty and meet the image of size (w, h)."""
    x1, y1, x2, y2 = np.moveaxis(np.asarray(box_px, np.float64), -1, 0)
    width, height = np.moveaxis(np.asarray(size_wh), -1, 0)
    with np.errstate(invalid="ignore"):
        return (x2 > x1) & (y2 > y1) & (x1 < width) & (y1 < height) & (x2 > 0) & (y2 > 0)


def encode_frame(
    image_HWC: np.ndarray,
    *,
    raw: bytes | None,
    frame_number: int,
    box: np.ndarray,
    valid: bool,
    visible: bool,
    cover: int = -1,
    law: WindowLaw | None,
    quality: int = 92,
) -> shards.Frame:
    """Make the row of one frame.

    Args:
        image_HWC: the decoded full frame.
        raw: its JPEG bytes, kept as they are if the whole frame is stored in its own size.
        box: xyxy in pixels of the full frame.
        law: how much around the box is stored; none stores the full frame.
        quality: JPEG quality where the image is encoded.
    """
    height, width = image_HWC.shape[:2]
    if law is None:
        window, stored = (0, 0, width, height), image_HWC
    else:
        window, stored = cut_window(image_HWC, box if valid else None, law)
    whole = window == (0, 0, width, height) and stored.shape == image_HWC.shape
    jpeg = raw if raw is not None and whole else encode_jpeg(stored, quality)
    x1, y1, x2, y2 = (float(v) for v in box)
    return shards.Frame(
        jpeg=jpeg,
        frame_number=frame_number,
        box=(x1, y1, x2, y2),
        valid=valid,
        visible=visible,
        cover=cover,
        size_wh=(width, height),
        mean_rgb=mean_rgb(image_HWC),
        window=(float(window[0]), float(window[1]), float(window[2]), float(window[3])),
        stored_wh=(stored.shape[1], stored.shape[0]),
    )


def write_dataset(
    uri: str,
    tracks: Iterable[MemoryTrack],
    *,
    name: str = "memory",
    split: str = "train",
    stored: Storage = "full",
    law: WindowLaw | None = None,
    tracks_per_shard: int = 16,
    quality: int = 92,
) -> FrameIndex:
    """Write a whole dataset from tracks in memory and open it.

    Args:
        law: window geometry when ``stored`` is ``window``; none means the 224 default.
    """
    location = storage.locate(uri)
    location.make()
    if stored == "window":
        law = law or WindowLaw()
    info = dataset_info(name=name, split=split, law=law if stored == "window" else None)
    tables: list[pa.Table] = []
    listed: list[dict[str, Any]] = []
    pending: list[MemoryTrack] = []

    def flush() -> None:
        file = shard_name(len(tables))
        with shards.ShardWriter(location, file, info) as writer:
            for track in pending:
                _append(writer, track, law if stored == "window" else None, quality)
            tables.append(writer.close())
        size = location.filesystem.get_file_info(location.file(file)).size
        listed.append({"file": file, "bytes": size, "rows": tables[-1].num_rows})
        pending.clear()

    for track in tracks:
        pending.append(track)
        if len(pending) == tracks_per_shard:
            flush()
    if pending:
        flush()
    columns, track_start, sequences, categories = shards.index_columns(tables)
    return write_index(
        location,
        columns=columns,
        track_start=track_start,
        sequences=sequences,
        categories=categories,
        shards=listed,
        info=info,
    )


def dataset_info(*, name: str, split: str, law: WindowLaw | None) -> dict[str, Any]:
    """Return what the manifest and every shard say of the dataset."""
    info: dict[str, Any] = {"name": name, "split": split, "storage": "window" if law else "full"}
    return info | {"window": law.describe() if law else ""}


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.parquet"


def _append(
    writer: shards.ShardWriter, track: MemoryTrack, law: WindowLaw | None, quality: int
) -> None:
    box = np.asarray(track.box, np.float64)
    visible: np.ndarray = np.logical_and.reduce(np.isfinite(box), axis=1)
    if track.visible is not None:
        visible = np.asarray(track.visible, bool)
    writer.begin_track(track.name, track.category)
    for number, image in enumerate(track.images):
        size_wh = (image.shape[1], image.shape[0])
        valid = bool(visible[number] and usable(box[number], size_wh))
        writer.append(
            encode_frame(
                image,
                raw=None,
                frame_number=number,
                box=box[number],
                valid=valid,
                visible=bool(visible[number]),
                law=law,
                quality=quality,
            )
        )
