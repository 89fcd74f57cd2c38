"""Videos, folders and cameras give frames in order, or one clear sentence."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from lorat.errors import UserError
from lorat.tracking.clips import ClipWriter
from lorat.tracking.video_source import VideoSource


def test_folder_is_sorted_by_number_not_by_text(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((8, 8, 3), number, np.uint8))
    (tmp_path / "groundtruth.txt").touch()
    source = VideoSource(str(tmp_path))
    assert source.num_frames == 3
    assert [int(frame[0, 0, 0]) for frame in source] == [1, 9, 10]


def test_video_file_gives_rgb_frames_and_its_rate(tmp_path: Path) -> None:
    with ClipWriter(tmp_path / "v.mp4", fps=10) as clip:
        for _ in range(5):
            clip.write(np.tile(np.array([200, 30, 30], np.uint8), (32, 48, 1)))
    source = VideoSource(str(tmp_path / "v.mp4"))
    frames = list(source)
    assert source.fps == pytest.approx(10)
    assert len(frames) == source.num_frames == 5
    assert frames[0].shape == (32, 48, 3)
    assert frames[0][0, 0, 0] > 150 > frames[0][0, 0, 2]


def test_camera_gives_frames_as_long_as_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ClipWriter(tmp_path / "v.mp4", fps=10) as clip:
        for _ in range(5):
            clip.write(np.full((32, 48, 3), 90, np.uint8))
    opened = []

    open_file = cv2.VideoCapture

    class Device:
        """Stands in for the device with a file, and knows no number of frames, as a camera.

        Holds a capture and is none: OpenCV frees objects of Python's subclasses wrongly.
        """

        def __init__(self, number: int) -> None:
            opened.append(number)
            self._capture = open_file(str(tmp_path / "v.mp4"))

        def __getattr__(self, name: str) -> object:
            return getattr(self._capture, name)

        def get(self, what: int) -> float:
            return -1.0 if what == cv2.CAP_PROP_FRAME_COUNT else self._capture.get(what)

    monkeypatch.setattr(cv2, "VideoCapture", Device)
    source = VideoSource("camera:3")
    assert opened == [3]
    assert source.num_frames is None
    assert len([frame for frame in source if frame.shape == (32, 48, 3)]) == 5
    assert VideoSource("camera").fps == pytest.approx(10)
    assert opened == [3, 0]


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_bytes(b"no image")
    for source, message in (
        ("empty", "holds no image"),
        ("text.mp4", "cannot be read as a video"),
        ("nothing.mp4", "There is no"),
    ):
        with pytest.raises(UserError, match=message):
            VideoSource(str(tmp_path / source))
    with pytest.raises(UserError, match=r"1\.jpg cannot be read"):
        list(VideoSource(str(tmp_path / "bad")))
    with pytest.raises(UserError, match="camera cannot be opened"):
        VideoSource("camera:97")


def test_a_video_that_ends_early_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, cut = tmp_path / "whole.avi", tmp_path / "cut.avi"
    writer = cv2.VideoWriter(str(whole), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    rng = np.random.default_rng(0)
    for _ in range(20):
        writer.write(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    writer.release()
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert len(list(VideoSource(str(whole)))) == 20
    assert not caplog.records
    source = VideoSource(str(cut))
    assert 0 < len(list(source)) < 19
    assert "cut.avi announces 20 frames, but only" in caplog.text
