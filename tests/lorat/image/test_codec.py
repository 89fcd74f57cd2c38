"""Damaged images are told from whole ones, of every kind that datasets have."""

from __future__ import annotations

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
