"""Damaged images are told from whole ones, of every kind that datasets have."""

from __future__ import annotations

import struct
import time
import zlib

import cv2
import numpy as np
import pytest

from lorat.image.codec import DamagedImage, decode_complete, decode_rgb
from tests.lorat.layouts import picture

KINDS = {
    "baseline": [],
    "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    "restarts": [cv2.IMWRITE_JPEG_RST_INTERVAL, 4],
    "4:4:4": [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444],
    "optimised": [cv2.IMWRITE_JPEG_OPTIMIZE, 1],
}


def jpeg(*options: int, grey: bool = False) -> bytes:
    noise = np.random.default_rng(0).integers(-20, 20, (300, 400, 3))
    image = np.clip(picture(1, (400, 300)) + noise, 0, 255).astype(np.uint8)
    ok, encoded = cv2.imencode(".jpg", image[..., 0] if grey else image, options)
    assert ok
    return encoded.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("tail", [b"", bytes(64), b"a camera's own notes"])
def test_a_whole_image_is_taken(kind: str, grey: bool, tail: bytes) -> None:
    data = jpeg(*KINDS[kind], grey=grey) + tail
    np.testing.assert_array_equal(decode_complete(data), decode_rgb(data))


@pytest.mark.parametrize("kind", ["baseline", "restarts", "optimised"])
def test_a_cut_body_with_a_proper_end_is_found(kind: str) -> None:
    data = jpeg(*KINDS[kind])
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(DamagedImage, match="damaged inside"):
            decode_complete(data[: int(share * len(data))] + b"\xff\xd9")


def test_a_zeroed_middle_is_found() -> None:
    data = bytearray(jpeg())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)
    decode_rgb(bytes(data))  # which says nothing
    with pytest.raises(DamagedImage, match="damaged inside"):
        decode_complete(bytes(data))


def png(*, text: bytes = b"", size_wh: tuple[int, int] | None = None) -> bytes:
    """Return a PNG with a compressed text, or with another size in its header than it has."""
    ok, encoded = cv2.imencode(".png", picture(1))
    assert ok
    data = encoded.tobytes()
    header = data[16:24] if size_wh is None else struct.pack(">II", *size_wh)
    chunk = b"IHDR" + header + data[24:29]
    data = data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    if text:
        body = b"zTXtworkflow\0\0" + zlib.compress(text)
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        data = data[:33] + chunk + data[33:]
    return data


def test_what_a_png_says_beside_its_picture_does_not_matter() -> None:
    data = png(text=bytes(100_000_000))  # more than PIL takes, 100 kB packed
    np.testing.assert_array_equal(decode_complete(data), picture(1)[..., ::-1])


def test_a_png_gets_no_more_memory_than_it_has_bytes() -> None:
    data = bytearray(png())
    data[33] = 0xCD  # length of the second chunk: 3.4 GB
    began = time.monotonic()
    with pytest.raises(DamagedImage, match="incomplete"):
        decode_rgb(bytes(data))
    assert time.monotonic() - began < 1


def test_a_damaged_png_is_found() -> None:
    data = bytearray(png())
    for end in (40, len(data) // 2, len(data) - 1):
        with pytest.raises(DamagedImage):
            decode_complete(bytes(data[:end]))
    data[len(data) // 2] ^= 1
    with pytest.raises(DamagedImage):
        decode_complete(bytes(data))


def test_an_image_beyond_the_limit_is_told_by_its_size() -> None:
    with pytest.raises(DamagedImage, match=r"187\.5 megapixels, more than the 100"):
        decode_complete(png(size_wh=(15000, 12500)))


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".tif", ".webp"])
def test_an_image_larger_than_pil_likes_is_taken(
    suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
    _, encoded = cv2.imencode(suffix, picture(1))
    assert decode_complete(encoded.tobytes()).shape == picture(1).shape
