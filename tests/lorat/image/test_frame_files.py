"""One rule says which files of a folder are frames, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorat.image.frame_files import list_images, missing_numbers, tell_frames


def names(paths: object) -> list[str]:
    return [os.path.basename(path) for path in paths]  # type: ignore[attr-defined]


def test_hidden_files_folders_and_other_files_are_no_images(tmp_path: Path) -> None:
    for name in ("10.jpg", "9.JPG", "1.png", "2.Tiff", "3.webp", "4.bmp"):
        (tmp_path / name).touch()
    for name in ("._1.png", ".hidden.jpg", "Thumbs.db", ".DS_Store", "groundtruth.txt", "a.jpg~"):
        (tmp_path / name).touch()
    (tmp_path / "5.jpg").mkdir()
    (tmp_path / "6.jpg").symlink_to(tmp_path)
    (tmp_path / "8.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "²7.jpg").touch()
    odd = os.fsdecode(b"11\xfc.jpg")
    (tmp_path / odd).touch()
    assert names(list_images(tmp_path)) == [
        "1.png", "2.Tiff", "3.webp", "4.bmp", "8.jpg", "9.JPG", "10.jpg", odd, "²7.jpg",
    ]  # fmt: skip
    assert list_images(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("frames", "others"),
    [
        ("1.jpg 2.jpg 10.jpg", "cover.png"),
        ("00000001.jpg 2.jpg 0010.png", "cover1.png folder.jpg"),
        ("img_1.jpg IMG_2.JPG", "2023_preview.jpg"),
        ("1.jpg 2.jpg 3.jpg", "2-copy.jpg"),
        ("1.png 2.png 3.png", "1_mask.png"),
        ("1.jpg 2.jpg 3.jpg", "3.png"),
        ("frame_0001_jpg.rf.3a5.jpg frame_0002_jpg.rf.b7.jpg frame_0003_jpg.rf.c.jpg", ""),
        ("2024-05-01_12-30-05.jpg 2024-05-01_12-30-06.jpg 2024-05-02_00-00-00.jpg", ""),
        ("7.jpg 9.jpg 30.jpg", ""),
        ("a.jpg b.jpg c.png", ""),
        ("only.jpg", ""),
        ("1.jpg", ""),
        ("", ""),
    ],
)
def test_frames_are_the_images_of_one_name(frames: str, others: str, tmp_path: Path) -> None:
    for name in f"{frames} {others}".split():
        (tmp_path / name).touch()
    told = tell_frames(list_images(tmp_path))
    assert told is not None
    assert names(told.frames) == frames.split()
    assert sorted(names(told.others)) == sorted(others.split())


@pytest.mark.parametrize(
    "images",
    [
        "left_1.jpg left_2.jpg right_1.jpg right_2.jpg",
        "1.jpg 2.jpg 1_mask.png 2_mask.png",
        "1.jpg 2.jpg 1.png 2.png",
        "1.jpg 01.jpg 2.jpg",
        "1.jpg cover.png",
        "a1b.jpg c2.jpg 7f.jpg",
    ],
)
def test_names_that_tell_nothing_are_not_guessed(images: str) -> None:
    assert tell_frames(images.split()) is None


@pytest.mark.parametrize(
    ("frames", "missing"),
    [
        ("1.jpg 2.jpg 3.jpg 7.jpg 8.jpg", (3, 4)),
        ("1.jpg 2.jpg 3.jpg 99999999999.jpg", (99999999995, 4)),
        ("000.jpg 010.jpg 020.jpg 040.jpg", (1, 30)),
        ("7.jpg 8.jpg 9.jpg", (0, 0)),
        ("3.jpg 11.jpg 40.jpg 90.jpg", (0, 0)),
        ("2024-05-01_1.jpg 2024-05-01_2.jpg 2024-05-01_9.jpg", (0, 0)),
        ("a.jpg b.jpg c.jpg", (0, 0)),
        ("1.jpg 9.jpg", (0, 0)),
    ],
)
def test_gaps_in_the_numbers_are_known(frames: str, missing: tuple[int, int]) -> None:
    assert missing_numbers(frames.split()) == missing
