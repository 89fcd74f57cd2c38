"""Clips are videos that other programs read, whole or not there."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from lorat.errors import UserError
from lorat.tracking.clips import (
    OBJECTS_RGB,
    PREDICTED_RGB,
    TRUTH_RGB,
    ClipWriter,
    annotate,
    annotate_objects,
)


def frames(count: int = 12, size_wh: tuple[int, int] = (96, 64)) -> list[np.ndarray]:
    ramp = np.linspace(0, 200, size_wh[0]).astype(np.uint8)
    image = np.repeat(np.tile(ramp, (size_wh[1], 1))[..., None], 3, axis=2)
    return [np.roll(image, 3 * t, axis=1) for t in range(count)]


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "h264"), (".webm", "vp8")])
def test_frames_come_back(suffix: str, codec: str, tmp_path: Path) -> None:
    written = frames()
    with ClipWriter(tmp_path / f"clip{suffix}", fps=12.5) as clip:
        for frame in written:
            clip.write(frame)
    with av.open(str(tmp_path / f"clip{suffix}")) as video:
        stream = video.streams.video[0]
        assert stream.codec_context.name.startswith(codec)
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 12.5
        found = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(found) == len(written)
    for a, b in zip(found, written, strict=True):
        assert np.abs(a.astype(int) - b).mean() < 12


def test_index_of_an_mp4_is_at_its_start_so_that_it_plays_while_loading(tmp_path: Path) -> None:
    with ClipWriter(tmp_path / "clip.mp4") as clip:
        for frame in frames():
            clip.write(frame)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_odd_and_changing_sizes_are_fitted(tmp_path: Path) -> None:
    with ClipWriter(tmp_path / "clip.mp4", max_side=60) as clip:
        for size in ((97, 63), (97, 63), (63, 97), (20, 10)):
            clip.write(frames(1, size)[0])
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 60
    assert capture.get(cv2.CAP_PROP_FRAME_HEIGHT) % 2 == 0
    count = 0
    while capture.read()[0]:
        count += 1
    assert count == 4


def test_interrupted_clip_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(IndexError), ClipWriter(tmp_path / "clip.mp4") as clip:  # noqa: PT012
        for number in range(3):
            clip.write(frames(2)[number])
    assert list(tmp_path.iterdir()) == []


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.mp4 or \.webm"):
        ClipWriter(tmp_path / "clip.avi")


def test_boxes_are_drawn_on_a_copy() -> None:
    frame = np.zeros((100, 200, 3), np.uint8)
    drawn = annotate(frame, [20, 20, 60, 60], truth=[100, 20, 150, 60], text="a")
    assert not frame.any()
    assert tuple(drawn[40, 20]) == PREDICTED_RGB
    assert tuple(drawn[40, 100]) == TRUTH_RGB
    assert not annotate(frame, [np.nan] * 4).any()


def test_several_objects_have_a_colour_and_a_number_each() -> None:
    frame = np.zeros((100, 200, 3), np.uint8)
    boxes = np.array([[20, 20, 60, 60], [100, 20, 150, 60], [np.nan] * 4])
    drawn = annotate_objects(frame, boxes, np.array([0.5, 0.4, np.nan]))
    assert [tuple(drawn[60, x]) for x in (40, 120)] == list(OBJECTS_RGB[:2])
    assert {tuple(pixel) for pixel in drawn.reshape(-1, 3)} & set(OBJECTS_RGB[2:]) == set()
    alone = annotate_objects(frame, boxes[:1], np.array([0.5]))
    np.testing.assert_array_equal(alone, annotate(frame, boxes[0], text="0.50"))
