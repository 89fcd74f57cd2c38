"""Images as bytes and as arrays: decoding, damage, encoding, mean colour.

Arrays are RGB, uint8, (height, width, 3).  EXIF orientation is ignored everywhere, because the
boxes of all datasets belong to the pixels as stored.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

_READ_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
MAX_PIXELS = 100_000_000
"""Largest image that is taken: decoded it has 300 MB, in every task of an ingest."""
_PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"


class DamagedImage(ValueError):
    """Bytes that are no complete image; the message says where and why."""


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode an encoded image to RGB uint8 (H, W, 3).

    Raises:
        DamagedImage: if the bytes are empty or the decoder gives nothing.
    """
    if not data:
        raise DamagedImage("the image is empty")
    if data.startswith(_PNG_START):
        for _ in _png_chunks(data):  # OpenCV takes as much memory as a chunk says that it has
            pass
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _READ_FLAGS)
    except cv2.error as error:
        raise DamagedImage(f"the decoder failed ({error.err})") from error
    if image is None:
        raise DamagedImage("the decoder finds no image")
    return image


def is_jpeg(data: bytes) -> bool:
    """Tell whether the bytes begin as a JPEG does."""
    return data.startswith(_JPEG_START)


def ends_as_jpeg(data: bytes) -> bool:
    """Tell whether the bytes end as a whole JPEG does; what was cut off does not."""
    return data.rstrip(b"\0").endswith(_JPEG_END)


def decode_complete(data: bytes) -> np.ndarray:
    """Decode like :func:`decode_rgb`, but refuse an image that ends early or is damaged inside.

    OpenCV fills the missing part of a cut file with grey and says nothing, so a file that does
    not end as an image should is checked by a decoder that does not forgive.  Damage inside a
    JPEG is found where its code words do not fill the image exactly, which most damage leads to;
    bytes that are replaced by equally many valid code words cannot be told from a picture.

    Raises:
        DamagedImage: if the image is incomplete or damaged.
    """
    _check_size(data)
    image = decode_rgb(data)
    if is_jpeg(data) and _has_broken_code(data):
        raise DamagedImage("the image is damaged inside (its code does not fill it)")
    if data.startswith(_PNG_START):
        _check_png(data)
    elif not (is_jpeg(data) and ends_as_jpeg(data)):
        try:
            with _opened(data) as strict:
                strict.load()
        except Exception as error:  # decoders fail in many ways on bytes that are no image
            raise DamagedImage(f"the image is incomplete ({error})") from error
    return image


def _check_size(data: bytes) -> None:
    """Refuse what needs more memory than a machine has for each of its tasks.

    Raises:
        DamagedImage: for more than :data:`MAX_PIXELS`.
    """
    width, height = image_size(data) or (0, 0)  # what PIL does not know, OpenCV may
    if width * height > MAX_PIXELS:
        raise DamagedImage(
            f"the image has {width * height / 1e6:.1f} megapixels, more than the "
            f"{MAX_PIXELS / 1e6:.0f} that are taken; reduce it"
        )


def image_size(
    data: bytes | memoryview, formats: tuple[str, ...] | None = None
) -> tuple[int, int] | None:
    """Return width and height of an encoded image by its header, or none if it has none.

    Args:
        data: at least the beginning of the image.
        formats: PIL's names of those that may be; none means all that PIL knows.
    """
    if data[:8] == _PNG_START and (not formats or "PNG" in formats):
        width, height = struct.unpack(">II", bytes(data[16:24]).ljust(8, b"\0"))
        return width, height
    try:
        with _opened(data, formats) as header:
            return header.size
    except Exception:  # decoders fail in many ways on bytes that are no image
        return None


@contextlib.contextmanager
def _opened(data: bytes | memoryview, formats: tuple[str, ...] | None = None) -> Iterator[Any]:
    """Open an image with PIL, whose own limit of pixels is no fault of the image."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_png(data: bytes) -> None:
    """Check that all chunks of a PNG are there and whole; what they say does not matter.

    Raises:
        DamagedImage: if one is not.
    """
    for kind, start, end in _png_chunks(data):
        if zlib.crc32(data[start:end]) != int.from_bytes(data[end : end + 4], "big"):
            raise DamagedImage(f"the image is damaged inside (checksum of its chunk {kind!r})")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end, in bytes, of what each chunk's checksum is of.

    Source: PNG specification (third edition), section 5.3.

    Raises:
        DamagedImage: if one reaches beyond the end, or the last one is missing.
    """
    start, kind = len(_PNG_START), b""
    while kind != b"IEND":
        length = int.from_bytes(data[start : start + 4], "big")
        kind, end = data[start + 4 : start + 8], start + 8 + length
        if len(data) < end + 4:
            raise DamagedImage("the image is incomplete (its last chunk is missing)")
        yield kind, start + 4, end
        start = end + 4


def _has_broken_code(jpeg: bytes) -> bool:
    """Tell whether FFmpeg, told to be strict, refuses to decode a JPEG."""
    import av

    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.options = {"err_detect": "explode"}
    decoder.thread_count = 1
    try:
        decoder.decode(av.Packet(jpeg))
        decoder.decode(None)
    except av.error.InvalidDataError:
        return True
    except av.error.FFmpegError:  # a kind of JPEG that it does not know
        return False
    return False


def encode_jpeg(image_HWC: np.ndarray, quality: int, *, restart_interval: int = 0) -> bytes:
    """Encode an RGB uint8 image as a baseline JPEG.

    Args:
        quality: 1 to 100.
        restart_interval: blocks of 16x16 pixels between restart markers, 0 for none.
    """
    bgr = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, restart_interval]
    ok, encoded = cv2.imencode(".jpg", bgr, options)
    if not ok:
        raise ValueError(f"OpenCV cannot encode an image of shape {image_HWC.shape}.")
    return encoded.tobytes()


def mean_rgb(image_HWC: np.ndarray) -> tuple[float, float, float]:
    """Return the mean colour of an RGB image, each channel 0 to 255."""
    red, green, blue, _ = cv2.mean(image_HWC)
    return red, green, blue
