"""Videos are read with the times of their frames, as players show them."""

from __future__ import annotations

import re
import struct
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from lorat.image.video_file import Clock, VideoFile
from lorat.tracking.clips import ClipWriter


@pytest.mark.parametrize(
    ("stamps", "times", "num_odd"),
    [
        ([0, 0.04, 0.08], [0, 0.04, 0.08], 0),
        ([1.4, 1.44, 3.0], [0, 0.04, 1.6], 0),
        ([-0.08, -0.04, 0], [0, 0.04, 0.08], 0),
        ([None, None, None], [0, 0.1, 0.2], 3),
        ([0, 0, 0, 0], [0, 0.1, 0.2, 0.3], 3),
        ([0, 0.3, None, 0.5], [0, 0.3, 0.4, 0.5], 1),
        ([0, 0.04, 0.02, 0.08], [0, 0.04, 0.0401, 0.08], 1),
        ([0, 0.04, 0.04, 0.08], [0, 0.04, 0.14, 0.1401], 1),
        ([7, 8, 9, 0, 1], [0, 1, 2, 2.1, 3.1], 1),
    ],
)
def test_times_ascend_whatever_the_stamps(
    stamps: list[float | None], times: list[float], num_odd: int
) -> None:
    clock = Clock(0.1)
    assert [clock.tell(stamp) for stamp in stamps] == pytest.approx(times)
    assert clock.num_odd == num_odd


def write(path: Path, stamps_ms: list[int]) -> None:
    """Write frames with times, and a rate that is the grain of the clock, as browsers do."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libvpx", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for stamp in stamps_ms:
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_variable_rate_is_read_and_kept(suffix: str, tmp_path: Path) -> None:
    stamps_ms = [0, 33, 433, 466, 506, 3000]
    write(tmp_path / "saved.webm", stamps_ms)
    video = VideoFile(tmp_path / "saved.webm")
    assert video.fps == 25, "1000 frames a second are no rate"
    with ClipWriter(tmp_path / f"kept{suffix}", fps=video.fps) as clip:
        for image, time_s in video:
            clip.write(image, time_s)
    assert not video.damage
    again = VideoFile(tmp_path / f"kept{suffix}")
    assert [time_s for _, time_s in again] == pytest.approx([ms / 1000 for ms in stamps_ms])
    assert not again.damage
    with av.open(str(tmp_path / f"kept{suffix}")) as kept:
        assert kept.duration is not None
        assert kept.duration / 1e6 == pytest.approx(3.04, abs=0.002), "the last one as the median"


@pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.ts", "a.h264"])
def test_frames_that_refer_to_later_ones_are_shown_in_order(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / name), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(20, 220, 10):
            image = np.full((48, 64, 3), shade, np.uint8)
            image[::8] += rng.integers(0, 9, (6, 64, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    frames = list(VideoFile(tmp_path / name))
    assert [time_s for _, time_s in frames] == pytest.approx([t / 25 for t in range(20)], abs=0.002)
    assert np.all(np.diff([image[4, 4, 0].astype(int) for image, _ in frames]) > 0)


def test_a_turned_video_is_shown_upright(tmp_path: Path) -> None:
    """A phone held upright writes how its pictures are to be turned."""
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :32] = (250, 20, 20)
    with ClipWriter(tmp_path / "a.mp4") as clip:
        clip.write(image)
    data = (tmp_path / "a.mp4").read_bytes()
    place, one = data.index(b"tkhd") + 44, 1 << 16
    assert struct.unpack(">9i", data[place : place + 36]) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    quarter = struct.pack(">9i", 0, one, 0, -one, 0, 0, 32 * one, 0, 1 << 30)
    (tmp_path / "b.mp4").write_bytes(data[:place] + quarter + data[place + 36 :])
    ((shown, _),) = VideoFile(tmp_path / "b.mp4")
    there, expected = cv2.VideoCapture(str(tmp_path / "b.mp4")).read()
    assert there and shown.shape == expected.shape == (64, 32, 3)
    assert np.abs(shown.astype(int) - expected[..., ::-1]).max() <= 2


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        ("mp4", "cut", "announces 40 frames, but only"),
        ("webm", "cut", "announces 4.00 s, but only"),
        ("mp4", "hole", "after .* frames, at .* s cannot be decoded"),
    ],
)
def test_damage_is_noted_where_it_is_and_ends_nothing(
    suffix: str, damage: str, message: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{suffix}"
    with ClipWriter(path, fps=10) as clip:
        for _ in range(40):
            clip.write(cv2.resize(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8), (160, 120)))
    data = path.read_bytes()
    middle = len(data) // 2
    holed = data[:middle] + bytes(2000) + data[middle + 2000 :]
    path.write_bytes(data[: len(data) * 6 // 10] if damage == "cut" else holed)
    video = VideoFile(path)
    times = [time_s for _, time_s in video]
    assert 20 < len(times) < 40
    assert any(map(re.compile(message).search, video.damage)), video.damage
    if damage == "hole":
        assert times[-1] == pytest.approx(3.9), "the others keep their times"
