"""Videos, folders and cameras give frames in order, or one clear sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest

from lorat.errors import UserError
from lorat.tracking.baselines import StaticTracker, baseline
from lorat.tracking.clips import ClipWriter
from lorat.tracking.first_box import FirstBox
from lorat.tracking.trajectory import Trajectory
from lorat.tracking.video_source import VideoSource


def test_folder_is_sorted_by_number_not_by_text(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((8, 8, 3), number, np.uint8))
    (tmp_path / "groundtruth.txt").touch()
    source = VideoSource(str(tmp_path))
    assert source.num_frames == 3
    assert [int(frame.image[0, 0, 0]) for frame in source] == [1, 9, 10]


def test_video_file_gives_rgb_frames_and_its_rate(tmp_path: Path) -> None:
    with ClipWriter(tmp_path / "v.mp4", fps=10) as clip:
        for _ in range(5):
            clip.write(np.tile(np.array([200, 30, 30], np.uint8), (32, 48, 1)))
    source = VideoSource(str(tmp_path / "v.mp4"))
    frames = [frame.image for frame in source]
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
    assert len([frame for frame in source if frame.image.shape == (32, 48, 3)]) == 5
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
    assert source.num_damaged
    assert "cut.avi is damaged or cut: " in caplog.text
    assert "it announces 20 frames, but only" in caplog.text


def frames_in(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for number in range(1, count + 1):
        image = np.full((24, 32, 3), 20 * number, np.uint8)
        cv2.imwrite(str(folder / f"{number:08d}.jpg"), image)
    return folder


def test_pictures_of_other_names_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = frames_in(tmp_path / "frames")
    (folder / "._00000001.jpg").write_bytes(b"Mac OS X")
    assert len(list(VideoSource(str(folder)))) == 6
    assert not caplog.records
    cv2.imwrite(str(folder / "cover.png"), np.zeros((24, 32, 3), np.uint8))
    shown = [int(frame.image[0, 0, 0]) for frame in VideoSource(str(folder))]
    assert shown == [20, 40, 60, 80, 100, 120]
    assert "left out, since not named as the frames (00000001.jpg, ...): cover.png" in caplog.text
    for number in range(1, 7):
        (folder / f"mask_{number}.png").touch()
    with pytest.raises(UserError, match=r"names of the 13 images .* do not tell which"):
        VideoSource(str(folder))


@pytest.mark.parametrize("damage", ["dangling", "cut", "empty"])
def test_a_damaged_frame_ends_nothing_and_is_named(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = frames_in(tmp_path / "frames")
    for number in (3, 6):
        file = folder / f"{number:08d}.jpg"
        data = file.read_bytes()
        file.unlink()
        if damage == "dangling":
            file.symlink_to("nowhere.jpg")
        else:
            file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    source = VideoSource(str(folder))
    frames = list(source)
    assert [frame.damaged for frame in frames] == [False, False, True, False, False, True]
    assert np.array_equal(frames[2].image, frames[1].image)
    assert [frame.time_s for frame in frames] == [t / 25 for t in range(6)]
    assert source.num_damaged == 2
    assert "00000003.jpg cannot be read" in caplog.text
    assert "00000006.jpg cannot be read" in caplog.text


def test_a_target_stays_where_it_was_while_frames_are_damaged(tmp_path: Path) -> None:
    folder = frames_in(tmp_path / "frames", 4)
    (folder / "00000003.jpg").write_bytes(b"")
    frames = iter(VideoSource(str(folder)))
    target = FirstBox(box=np.array([3.0, 4.0, 9.0, 12.0]))
    trajectory = Trajectory(baseline("static"), next(frames), [target])
    assert len(list(trajectory.follow(frames))) == 3
    assert np.ravel(trajectory.scores).tolist() == [1, 1, 0, 1]
    assert trajectory.times_s == [0, 0.04, 0.08, 0.12]
    assert all(tuple(box) == (3, 4, 9, 12) for (box,) in trajectory.boxes)


def test_targets_begin_in_their_own_frames_and_share_a_batch(tmp_path: Path) -> None:
    """One whose first frame is damaged begins at the next one."""

    class Batches(StaticTracker):
        sizes: ClassVar[list[int]] = []

        def step(self, targets: Any, frames: Any) -> tuple[np.ndarray, np.ndarray]:
            self.sizes.append(len(targets))
            return super().step(targets, frames)

    folder = frames_in(tmp_path / "frames", 6)
    (folder / "00000003.jpg").write_bytes(b"")
    frames = iter(VideoSource(str(folder)))
    boxes = [np.array([k, k, k + 9.0, k + 9.0]) for k in range(3)]
    objects = [FirstBox(box=box, frame=frame) for box, frame in zip(boxes, (0, 0, 2), strict=True)]
    trajectory = Trajectory(Batches(), next(frames), objects)
    assert len(list(trajectory.follow(frames))) == 5
    assert Batches.sizes == [2, 2, 3, 3]
    found = np.array(trajectory.boxes)
    for number, box in enumerate(boxes):
        begin = 3 if number == 2 else 0
        assert np.isnan(found[:begin, number]).all()
        assert (found[begin:, number] == box).all()
    scores = np.array(trajectory.scores)
    np.testing.assert_array_equal(scores[:, 0], [1, 1, 0, 1, 1, 1])
    np.testing.assert_array_equal(scores[:, 2], [np.nan, np.nan, np.nan, 1, 1, 1])


@pytest.mark.parametrize(
    "name", ["12:30.mp4", "file:a.mp4", "a#b?c%20d %03d.webm", "~nobody.mp4", "-a.mp4", "a\nb.webm",
             os.fsdecode(b"M\xfcnchen.mp4"), "u\u0308.mp4", "n" * 251 + ".mp4", "camera"],
)  # fmt: skip
def test_any_name_of_a_file_is_written_and_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = name if "." in name else f"{name}.mp4"
    with ClipWriter(written) as clip:
        for _ in range(3):
            clip.write(np.zeros((32, 48, 3), np.uint8))
    Path(written).rename(name)
    assert os.listdir() == [name]
    for path in (tmp_path / name, f"./{name}", *([] if name == "camera" else [name])):
        assert len(list(VideoSource(str(path)))) == 3
