"""Conversion: recordings of published datasets to rows of shards."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lorat.data.datasets.findings import Findings
from lorat.data.datasets.records import Recording
from lorat.data.shards import images
from lorat.data.shards.windows import WindowLaw, cut_window
from lorat.errors import without_surrogates
from lorat.image.boxes import usable
from lorat.image.codec import DamagedImage, decode_complete, encode_jpeg, is_jpeg, mean_rgb
from lorat.image.jpeg_regions import restart_interval
from lorat.image.video_file import VideoFile

WINDOW_QUALITY = 88
"""JPEG quality of windows that are cut out or reduced."""
FULL_QUALITY = 95
"""JPEG quality of full frames that come as something else than JPEG."""
_CLIP_TOLERANCE_PX = 1.0
"""Boxes that leave the image by no more are clipped without a word."""


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
    quality: int | None = None,
) -> images.Frame:
    """Make the row of one frame.

    Args:
        image_HWC: the decoded full frame.
        raw: its JPEG bytes, kept as they are if the whole frame is stored in its own size.
        box: xyxy in pixels of the full frame.
        law: how much around the box is stored; none stores the full frame.
        quality: JPEG quality where the image is encoded; none means the usual one.
    """
    height, width = image_HWC.shape[:2]
    if law is None:
        window, stored = (0, 0, width, height), image_HWC
    else:
        window, stored = cut_window(image_HWC, box if valid else None, law)
    whole = window == (0, 0, width, height) and stored.shape == image_HWC.shape
    if raw is not None and whole:
        jpeg = raw
    else:
        jpeg = encode_jpeg(
            stored,
            quality or (WINDOW_QUALITY if law else FULL_QUALITY),
            restart_interval=restart_interval(stored.shape[1]) if law else 0,
        )
    x1, y1, x2, y2 = (float(v) for v in box)
    return images.Frame(
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


def convert(
    recording: Recording,
    writer: images.ShardWriter,
    *,
    for_training: bool,
    law: WindowLaw | None,
    findings: Findings,
) -> int:
    """Clean one recording and write it as a track.

    Boxes that are empty or do not meet the image are never valid.  For training, boxes are
    clipped to the image, damaged images and frames before the first and after the last usable
    box are left out, and so is a track without any usable box.  For evaluation every frame
    keeps its place and its box: the picture before takes the place of a damaged one.

    Returns:
        The number of rows written.
    """
    name = recording.name
    box, reasons = _clean_boxes(recording, findings)
    has_box = np.isfinite(box).all(axis=1)
    used = recording.visible & has_box
    first, last = 0, len(box) - 1
    if for_training:
        where = np.flatnonzero(used)
        if len(where) == 0:
            if not reasons:
                findings.add(name, "dropped", "no frame has a usable box")
            else:
                findings.add(name, "dropped", f"no frame has a usable box ({'; '.join(reasons)})")
            return 0
        first, last = int(where[0]), int(where[-1])
    held: list[images.Frame] = []  # frames without usable box, kept if one with a box follows
    previous: tuple[np.ndarray, bytes | None] | None = None
    sizes: list[tuple[int, int]] = []
    num_written, not_jpeg = 0, 0
    for t, picture in _pictures(recording, first, last, findings):
        number = int(recording.frame_number[t])
        if isinstance(picture, str):
            if for_training or previous is None:
                findings.add(name, "dropped", picture, [number])
                continue
            findings.add(name, "repaired", f"{picture}; the picture before is repeated", [number])
            picture = previous
        image, raw = previous = picture
        not_jpeg += raw is None and not recording.is_video
        size_wh = (image.shape[1], image.shape[0])
        if not sizes or sizes[-1] != size_wh:
            sizes.append(size_wh)
        frame_box = box[t]
        meets = bool(usable(frame_box, size_wh))
        if has_box[t] and recording.visible[t] and not meets:
            why = "the box does not meet the image; not used"
            findings.add(name, "dropped" if for_training else "kept", why, [number])
        valid = bool(recording.visible[t] and meets)
        if for_training and valid:
            clipped = np.clip(frame_box, 0, [*size_wh, *size_wh])
            if np.abs(clipped - frame_box).max() > _CLIP_TOLERANCE_PX:
                findings.add(name, "repaired", "the box leaves the image; clipped", [number])
            frame_box = clipped
        frame = encode_frame(
            image,
            raw=raw,
            frame_number=number,
            box=frame_box,
            valid=valid,
            visible=bool(recording.visible[t]),
            cover=-1 if recording.cover is None else int(recording.cover[t]),
            law=law,
        )
        if for_training and not valid:
            if num_written:
                held.append(frame)
            continue
        if num_written == 0:
            writer.begin_track(name, without_surrogates(recording.category))
        for kept in (*held, frame):
            writer.append(kept)
            num_written += 1
        held.clear()
    if len(sizes) > 1:
        text = ", ".join(f"{w}x{h}" for w, h in dict.fromkeys(sizes))
        findings.add(name, "kept", f"the frame size changes: {text}")
    if not_jpeg and law is None:
        why = f"{not_jpeg} images are no JPEG, stored as JPEG of quality {FULL_QUALITY}"
        findings.add(name, "kept", why)
    if num_written == 0:
        findings.add(name, "dropped", "no usable frame is left")
    return num_written


def _clean_boxes(recording: Recording, findings: Findings) -> tuple[np.ndarray, list[str]]:
    """Return the boxes with NaN for those that are none, and report the odd ones."""
    box = np.asarray(recording.box, np.float64).copy()
    numbers = recording.frame_number
    with np.errstate(invalid="ignore"):
        size = box[:, 2:] - box[:, :2]
        unknown = ~np.isfinite(box).all(axis=1)
        negative = ~unknown & (size < 0).any(axis=1)
        empty = ~unknown & ~negative & (size == 0).any(axis=1)
    unexpected = np.array(unknown)
    if recording.first_box_only:
        unexpected[1:] = False
    reasons = []
    for mask, why in (
        (negative, "the box has a negative size; not used"),
        (empty & recording.visible, "the box is empty though not marked absent; not used"),
        (unexpected, "no box (NaN); not used"),
    ):
        if mask.any():
            findings.add(recording.name, "kept", why, numbers[mask])
            reasons.append(why.partition(";")[0])
    box[unknown | negative | empty] = np.nan
    return box, reasons


def _pictures(
    recording: Recording, first: int, last: int, findings: Findings
) -> Iterator[tuple[int, tuple[np.ndarray, bytes | None] | str]]:
    """Yield position and decoded picture with its JPEG bytes, or what is wrong with it."""
    if recording.is_video:
        yield from _video_pictures(recording, first, last, findings)
        return
    for t in range(first, last + 1):
        path = recording.images[t]
        if not path:
            yield t, "the image is missing"
            continue
        try:
            state = os.stat(path)
            yield t, _read_picture(path, state.st_mtime_ns, state.st_size)
        except DamagedImage as error:
            yield t, f"the image cannot be used: {error}"
        except OSError as error:
            yield t, f"the image cannot be read: {error.strerror}"


@functools.lru_cache(maxsize=1)  # several targets of one image follow each other
def _read_picture(path: str, mtime_ns: int, size: int) -> tuple[np.ndarray, bytes | None]:
    data = Path(path).read_bytes()
    return decode_complete(data), data if is_jpeg(data) else None


def _video_pictures(
    recording: Recording, first: int, last: int, findings: Findings
) -> Iterator[tuple[int, tuple[np.ndarray, bytes | None] | str]]:
    num_frames = len(recording.frame_number)
    num_given = 0
    with contextlib.closing(VideoFile(recording.images[0])) as video:
        for t, (image, _) in enumerate(video):
            if video.damage:  # what was left out would give the rows after it to other frames
                why = f"the video is damaged ({video.damage[0]}); not used from there on"
                findings.add(recording.name, "dropped", why)
                return
            num_given = t + 1
            if t == num_frames:
                findings.add(
                    recording.name, "repaired", "the video has frames beyond its annotation"
                )
                return
            if t > last:
                break
            if t >= first:
                yield t, (image, None)
    if num_given <= last:
        why = f"the video ends {num_frames - num_given} frames before its annotation"
        findings.add(recording.name, "repaired", why)
