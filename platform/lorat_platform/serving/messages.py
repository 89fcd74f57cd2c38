"""The messages of a session, as they go over a WebSocket.

A client sends text, JSON objects, and frames, binary; the server answers every frame with text.

===========================================  ====================================================
``{"add": "a", "box": [l, t, w, h]}``        follow a target; the box is in the next frame
``{"add": "a", "box": [...], "at": [...]}``  the same, but look for it at another place next: a
                                             target is taken up again where it was lost
``{"drop": "a"}``                            follow it no longer, from the next frame on
``{"order": "newest"}``                      before the first frame: a frame that waits gives way
                                             to a newer one (``strict``, the default: all tracked)
``{"raw": [width, height]}``                 the next frames are RGB bytes; ``null``: encoded again
binary                                       8 bytes, two big-endian integers: the frame's number,
                                             which grows, and how many answers were read; then JPEG,
                                             PNG, WebP or RGB bytes
===========================================  ====================================================

The server begins with ``{"session": ID, "model": "lorat/3", "window": 32}``, where a Ray is of one
machine also ``"direct": {"port": 45678, "ticket": "..."}``: a client on it may go on at
``ws://127.0.0.1:45678/direct`` with the ticket as bearer token, where the server begins with
``{"session": ID}``; the first connection stays open and is not used until the session ends.

The answer is ``{"frame": 7, "targets": {"a": {"box": [l, t, w, h], "score": 0.9}}, "model":
"lorat/3", "skipped": 0, "ms": 4.2}``: ``skipped`` counts the frames before it that gave way, ``ms``
is the time since the frame came.  ``{"error": "..."}`` is the last message of a session, with
``"again": true`` beside it where the client did nothing wrong and may begin again where it was; a
message of more than 16 MiB ends it with the code 1009 instead.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np

from lorat.errors import UserError
from lorat.image.boxes import Box
from lorat.image.codec import DamagedImage, decode_rgb, ends_as_jpeg, image_size, is_jpeg

HEADER = struct.Struct("!II")
"""Number of the frame, answers read."""
MAX_MESSAGE = 2**24
"""Bytes of a message that uvicorn takes, and so Ray Serve: its ``ws_max_size``."""
MAX_TEXT = 4096
"""Longest command, in characters."""
MAX_SCANS = 50
"""Passes over the pixels of a progressive JPEG; encoders make some ten, each costs the time of all
pixels and can be written in a few bytes."""
MAX_NAME = 64
"""Longest name of a target."""
FORMATS = ("JPEG", "PNG", "WEBP")
JPEG_SCAN = b"\xff\xda"
"""Begins a scan, and is nowhere else in code.  Source: ITU-T T.81, table B.1."""
Order = Literal["strict", "newest"]


@dataclass(frozen=True)
class Add:
    """Follow a target."""

    name: str
    box: Box
    """In the next frame, xyxy pixels."""
    at: Box | None = None
    """Where to look for it after that frame, if not there."""


@dataclass(frozen=True)
class Drop:
    """Follow a target no longer."""

    name: str


@dataclass(frozen=True)
class SetOrder:
    """Choose what happens to frames that wait."""

    order: Order


@dataclass(frozen=True)
class SetRaw:
    """Choose the form of the frames."""

    size: tuple[int, int] | None
    """Width and height of RGB frames; none means encoded ones."""


def parse_command(text: str) -> Add | Drop | SetOrder | SetRaw:
    """Read a command.

    Raises:
        UserError: if it is none.
    """
    if len(text) > MAX_TEXT:
        raise UserError(f"The message has {len(text)} characters; give at most {MAX_TEXT}.")
    try:
        return command_of(json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"The message is no JSON ({error}); give an object.") from error


def command_of(given: Any) -> Add | Drop | SetOrder | SetRaw:
    """Read a command that was JSON.

    Raises:
        UserError: if it is none.
    """
    keys = set(given) if isinstance(given, dict) else set()
    if "add" in keys and "box" in keys and keys <= {"add", "box", "at"}:
        at = given.get("at")
        return Add(
            _name(given["add"]),
            _box(given["box"], "box"),
            # A target at the border of a frame may have been answered without width or height.
            None if at is None else _box(at, "at", may_be_empty=True),
        )
    if keys == {"drop"}:
        return Drop(_name(given["drop"]))
    if keys == {"order"} and given["order"] in ("strict", "newest"):
        return SetOrder(given["order"])
    if keys == {"raw"}:
        return SetRaw(_size(given["raw"]))
    shown = json.dumps(given)[:100]
    raise UserError(
        f"The message is {shown}; give add with box (and at), drop, order (strict or newest) or "
        "raw."
    )


def _name(given: Any) -> str:
    if isinstance(given, str) and 0 < len(given) <= MAX_NAME and given.isprintable():
        return given
    raise UserError(
        f"The target's name is {json.dumps(given)[:100]}; give 1 to {MAX_NAME} printable "
        "characters."
    )


def _box(given: Any, what: str, *, may_be_empty: bool = False) -> Box:
    numbers = given if isinstance(given, list) and len(given) == 4 else []
    if not all(type(n) in (int, float) and abs(n) < 1e9 and math.isfinite(n) for n in numbers):
        numbers = []
    shortest = min(numbers[2:], default=-1)
    if shortest < 0 or (shortest == 0 and not may_be_empty):
        least = "0 or more" if may_be_empty else "more than 0"
        raise UserError(
            f"The {what} is {json.dumps(given)[:100]}; give [left, top, width, height] in pixels, "
            f"width and height {least}."
        )
    left, top, width, height = map(float, numbers)
    return (left, top, left + width, top + height)


def _size(given: Any) -> tuple[int, int] | None:
    if given is None:
        return None
    if isinstance(given, list) and len(given) == 2 and all(type(n) is int for n in given):
        width, height = given
        if 0 < width < 100_000 and 0 < height < 100_000:
            return width, height
    raise UserError(f"raw is {json.dumps(given)[:100]}; give [width, height] in pixels, or null.")


def parse_frame(data: bytes) -> tuple[int, int, memoryview]:
    """Split a binary message.

    Returns:
        Number of the frame, answers read, and the image as it was sent.

    Raises:
        UserError: if it is too short.
    """
    if len(data) <= HEADER.size:
        raise UserError(
            f"The binary message has {len(data)} bytes; give {HEADER.size} bytes (frame number, "
            "answers read) and then the image."
        )
    number, read = HEADER.unpack_from(data)
    return number, read, memoryview(data)[HEADER.size :]


def check_image(data: memoryview, raw: tuple[int, int] | None, max_pixels: int) -> None:
    """Refuse an image by its header, before memory is taken for it.

    Raises:
        UserError: if it is none, or too large.
    """
    size = raw or image_size(data, FORMATS)
    if size is None or 0 in size:
        raise UserError(
            "The frame is no image that is known; send JPEG, PNG or WebP, or say raw before."
        )
    width, height = size
    if width * height > max_pixels:
        raise UserError(
            f"The frame has {width}x{height} pixels; give at most {max_pixels:,}, or ask for a "
            "server with a larger --max-frame-pixels."
        )
    if raw and len(data) != width * height * 3:
        raise UserError(
            f"The frame has {len(data)} bytes, but RGB of {width}x{height} pixels has "
            f"{width * height * 3}; give one byte per channel."
        )


def decode(data: memoryview, raw: tuple[int, int] | None) -> np.ndarray:
    """Return a frame as RGB uint8 (H, W, 3).

    Raises:
        UserError: if it is damaged.
    """
    if raw:
        width, height = raw
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    encoded = bytes(data)
    if is_jpeg(encoded):
        if not ends_as_jpeg(encoded):  # OpenCV would paint the rest grey
            raise UserError("The frame is a JPEG without its end; send whole images.")
        if (scans := encoded.count(JPEG_SCAN)) > MAX_SCANS:
            raise UserError(
                f"The frame is a JPEG of {scans} scans; give at most {MAX_SCANS}, or one that is "
                "not progressive."
            )
    try:
        return decode_rgb(encoded)
    except (DamagedImage, cv2.error) as error:
        raise UserError(f"The frame is damaged ({error}); send whole images.") from error


def ltwh(box: Box) -> list[float]:
    """Return a box as it is answered, rounded to hundredths of a pixel."""
    x1, y1, x2, y2 = box
    return [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
