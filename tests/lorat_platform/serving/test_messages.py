"""Messages of a session: what is understood, and what is refused in one sentence."""

from __future__ import annotations

import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from lorat.errors import UserError
from lorat.image.codec import encode_jpeg
from lorat_platform.serving import messages
from lorat_platform.serving.messages import Add, Drop, SetOrder, SetRaw

FRAME = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ('{"add": "a", "box": [1, 2, 3, 4]}', Add("a", (1.0, 2.0, 4.0, 6.0))),
        (
            '{"add": "ü", "box": [1, 2, 3, 4], "at": [5, 5.5, 1, 1]}',
            Add("ü", (1.0, 2.0, 4.0, 6.0), (5.0, 5.5, 6.0, 6.5)),
        ),
        (
            '{"add": "a", "box": [1, 2, 3, 4], "at": [9, 9, 0, 0]}',
            Add("a", (1.0, 2.0, 4.0, 6.0), (9.0, 9.0, 9.0, 9.0)),
        ),
        ('{"drop": "a"}', Drop("a")),
        ('{"order": "newest"}', SetOrder("newest")),
        ('{"raw": [640, 480]}', SetRaw((640, 480))),
        ('{"raw": null}', SetRaw(None)),
    ],
)
def test_commands(text: str, meaning: object) -> None:
    assert messages.parse_command(text) == meaning


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 4000, "no JSON|The message is"),
        ("x" * 5000, "5000 characters"),
        ("null", "The message is null"),
        ("[1, 2]", "give add"),
        ('{"add": "a"}', "give add"),
        ('{"add": "a", "box": [1, 2, 3, 4], "colour": 1}', "give add"),
        ('{"add": "", "box": [1, 2, 3, 4]}', "name"),
        ('{"add": 7, "box": [1, 2, 3, 4]}', "name"),
        ('{"add": "a\\nb", "box": [1, 2, 3, 4]}', "printable"),
        ('{"add": "a", "box": [1, 2, 3]}', "The box is"),
        ('{"add": "a", "box": [1, 2, 0, 4]}', "more than 0"),
        ('{"add": "a", "box": [1, 2, NaN, 4]}', "The box is"),
        ('{"add": "a", "box": [1, 2, 1e999, 4]}', "The box is"),
        ('{"add": "a", "box": [true, 2, 3, 4]}', "The box is"),
        ('{"add": "a", "box": "1,2,3,4"}', "The box is"),
        ('{"add": "a", "box": [1, 2, 3, 4], "at": [1]}', "The at is"),
        ('{"add": "a", "box": [1, 2, 3, 4], "at": [1, 2, -1, 4]}', "0 or more"),
        ('{"add": "\\ud800", "box": [1, 2, 3, 4]}', "printable"),
        ('{"add": {"a": 1}, "box": [1, 2, 3, 4]}', "name"),
        ('{"add": "a", "box": [' + "9" * 4000 + ", 2, 3, 4]}", "The box is"),
        ('{"raw": [' + "9" * 4000 + ", 5]}", "raw is"),
        ('{"order": ["newest"]}', "give add"),
        ('{"drop": null}', "name"),
        ('{"order": "random"}', "give add"),
        ('{"raw": [0, 5]}', "raw is"),
        ('{"raw": [1.5, 5]}', "raw is"),
    ],
)
def test_what_is_no_command(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        messages.parse_command(text)


def test_lists_in_lists_are_no_command_however_deep() -> None:
    """Some can be read, but not be shown."""
    for depth in range(1, 1100):
        with pytest.raises(UserError, match=r"The message is"):
            messages.parse_command(depth * "[" + depth * "]")


def test_frame() -> None:
    number, read, image = messages.parse_frame(messages.HEADER.pack(7, 3) + b"abc")
    assert (number, read, bytes(image)) == (7, 3, b"abc")
    for short in (b"", b"1234567", b"12345678"):
        with pytest.raises(UserError, match="binary message has"):
            messages.parse_frame(short)


@pytest.mark.parametrize("kind", [".png", ".webp", "raw"])
def test_images_are_decoded(kind: str) -> None:
    if kind == "raw":
        data, raw = FRAME.tobytes(), (40, 30)
    else:
        options = [cv2.IMWRITE_WEBP_QUALITY, 101] if kind == ".webp" else []
        data, raw = cv2.imencode(kind, FRAME[..., ::-1], options)[1].tobytes(), None
    messages.check_image(memoryview(data), raw, 1200)
    np.testing.assert_array_equal(messages.decode(memoryview(data), raw), FRAME)


def test_images_are_refused_by_their_header() -> None:
    jpeg = memoryview(encode_jpeg(FRAME, 90))
    with pytest.raises(UserError, match="40x30 pixels; give at most 1,199"):
        messages.check_image(jpeg, None, 1199)
    with pytest.raises(UserError, match="RGB of 40x30 pixels has 3600"):
        messages.check_image(memoryview(FRAME.tobytes()[:-1]), (40, 30), 1200)
    tiff = cv2.imencode(".tiff", FRAME)[1].tobytes()
    for other in (
        b"\0" * 100,
        b"GIF89a" + b"\0" * 100,
        tiff,
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
    ):
        with pytest.raises(UserError, match="no image"):
            messages.check_image(memoryview(other), None, 1200)
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\1\0\0" * 2
    with pytest.raises(UserError, match="65536x65536"):
        messages.check_image(memoryview(bomb), None, 10**6)


def test_damaged_image_is_refused() -> None:
    jpeg, png = encode_jpeg(FRAME, 90), cv2.imencode(".png", FRAME)[1].tobytes()
    for data, says in (
        (jpeg[:-10], "without its end"),
        (b"\xff\xd8\xff\xe0abc\xff\xd9", "damaged"),
        (png[:60], "damaged"),
    ):
        with pytest.raises(UserError, match=says):
            messages.decode(memoryview(data), None)


def test_jpeg_of_many_passes_is_refused() -> None:
    """A scan of a few bytes costs the time of all pixels."""
    picture = io.BytesIO()
    Image.fromarray(FRAME).save(picture, "JPEG", progressive=True)
    jpeg = picture.getvalue()
    assert messages.decode(memoryview(jpeg), None).shape == FRAME.shape
    last = jpeg[jpeg.rfind(messages.JPEG_SCAN) : -2]
    bomb = jpeg[:-2] + 100 * last + jpeg[-2:]
    with pytest.raises(UserError, match="JPEG of 110 scans; give at most 50"):
        messages.decode(memoryview(bomb), None)


def test_answered_box_is_json() -> None:
    assert json.dumps(messages.ltwh((1.234, 2.0, 3.005, 4.0))) == "[1.23, 2.0, 1.77, 2.0]"
