"""Folders of frames and video files with an annotation file of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import pytest

from lorat.data import datasets
from lorat.data.datasets import Findings
from lorat.data.shards import images
from lorat.errors import UserError
from tests.lorat import layouts
from tests.lorat.loading import load_all, to_shards


def test_a_plain_folder_of_frames(tmp_path: Path) -> None:
    layouts.make_folder(tmp_path)
    source = datasets.Folder(
        source=tmp_path / "frames", annotation=tmp_path / "track.csv", box_format="xyxy"
    )
    found, _ = load_all(source)
    recording = found["frames"]
    assert recording.frame_number.tolist() == list(range(5, 13))
    assert recording.images[5].endswith("10.png")
    np.testing.assert_array_equal(recording.box[0], [10, 12, 40, 36])
    with pytest.raises(UserError, match="--annotation"):
        datasets.Folder(source=tmp_path / "frames").entries(Findings())


def numbered_frames(folder: Path, numbers: Iterable[int], num_rows: int) -> datasets.Folder:
    for n in numbers:
        layouts.write_image(folder / f"{n:05d}.jpg", n)
    layouts.write_rows(folder / "groundtruth.txt", layouts.boxes(num_rows))
    return datasets.Folder(source=folder)


def test_a_folder_of_every_fifth_frame_has_one_row_per_image(tmp_path: Path) -> None:
    found, reasons = load_all(numbered_frames(tmp_path / "own", (0, 5, 10), 3))
    recording = found["own"]
    assert recording.frame_number.tolist() == [0, 5, 10]
    assert [Path(p).name for p in recording.images] == ["00000.jpg", "00005.jpg", "00010.jpg"]
    np.testing.assert_array_equal(recording.box[:, 0], [10, 12, 14])
    assert not reasons


@pytest.mark.parametrize(("first", "lost"), [(0, 4), (1, 0), (1, 4)])
def test_a_lost_frame_of_a_folder_shifts_no_box(tmp_path: Path, first: int, lost: int) -> None:
    numbers = [n + first for n in range(10) if n != lost]
    found, reasons = load_all(numbered_frames(tmp_path / "own", numbers, 10))
    recording = found["own"]
    for path, number, box in zip(
        recording.images, recording.frame_number, recording.box, strict=True
    ):
        assert number == first + (box[0] - 10) / 2
        assert path == "" or int(Path(path).stem) == number
    assert recording.images.count("") == 1
    assert "missing" in reasons[("own", "dropped")]


@pytest.mark.parametrize(
    "numbers", [range(1, 10), range(11), range(5, 12), (0, 5, 10), range(2, 10)]
)
def test_numbers_that_leave_the_rows_of_a_folder_open_are_refused(
    tmp_path: Path, numbers: Iterable[int]
) -> None:
    source = numbered_frames(tmp_path / "own", numbers, 10)
    with pytest.raises(UserError, match=r"images, numbered .* 10 rows.*one row per image"):
        load_all(source)


@pytest.mark.parametrize("row", ["3,10,12,30,24", "10,12,40,12,40,36,10,36"])
def test_rows_of_more_than_a_box_are_refused_unless_their_columns_are_named(
    tmp_path: Path, row: str
) -> None:
    layouts.make_folder(tmp_path)
    truth = tmp_path / "frames" / "groundtruth.txt"
    truth.write_text(f"{row}\n" * 8)
    source = datasets.Folder(source=tmp_path / "frames")
    with pytest.raises(
        UserError, match=rf"has {row.count(',') + 1} values.*the 4 numbers of a box"
    ):
        load_all(source)
    truth.write_text("frame,x,y,w,h\n" + "3,10,12,30,24\n" * 8)
    found, _ = load_all(source)
    np.testing.assert_array_equal(found["frames"].box[7], [10, 12, 40, 36])


@pytest.mark.parametrize("names", ["frame,id,x,y,w,h", "id,bb_left,bb_top,bb_width,bb_height"])
def test_named_columns_before_the_box_are_refused(tmp_path: Path, names: str) -> None:
    layouts.make_folder(tmp_path)
    truth = tmp_path / "frames" / "groundtruth.txt"
    truth.write_text(names + "\n" + "3,1,10,12,30,24\n" * 8)
    source = datasets.Folder(source=tmp_path / "frames")
    with pytest.raises(UserError, match=r"first line of .*\bid, .*beginning with x or left"):
        load_all(source)
    truth.write_text("frame,bb_left,bb_top,bb_width,bb_height,id\n" + "3,10,12,30,24,1\n" * 8)
    found, _ = load_all(source)
    np.testing.assert_array_equal(found["frames"].box[7], [10, 12, 40, 36])


HEADERS = ("x,y,w,h", "# left top width height", '"X";"Y";"W";"H"', "frame,x,y,w,h,score")


@pytest.mark.parametrize("header", HEADERS)
def test_a_line_of_column_names_is_no_box(tmp_path: Path, header: str) -> None:
    layouts.make_folder(tmp_path / "own")
    layouts.make_videos(tmp_path / "videos")
    rows = layouts.boxes(8)
    if header.startswith("frame"):
        rows = [[t, *row, 0.5] for t, row in enumerate(rows)]
    for file, count in (("own/frames/groundtruth.txt", 8), ("videos/one.txt", 6)):
        layouts.write_rows(tmp_path / file, rows[:count])
        (tmp_path / file).write_text(f"{header}\n{(tmp_path / file).read_text()}")
    for source, name in (
        (datasets.Folder(source=tmp_path / "own" / "frames"), "frames"),
        (datasets.Video(source=tmp_path / "videos"), "one"),
    ):
        found, reasons = load_all(source)
        count = len(found[name].box)
        assert count == {"frames": 8, "one": 6}[name]
        np.testing.assert_array_equal(found[name].box[0], [10, 12, 40, 36])
        np.testing.assert_array_equal(found[name].box[-1][0], 10 + 2 * (count - 1))
        assert "names columns" in reasons[(name, "repaired")]


@pytest.mark.parametrize("first", ["nan,nan,nan,nan", "", "-,-,-,-"])
def test_a_first_frame_without_box_is_no_line_of_column_names(tmp_path: Path, first: str) -> None:
    layouts.make_folder(tmp_path)
    truth = tmp_path / "frames" / "groundtruth.txt"
    layouts.write_rows(truth, layouts.boxes(7))
    truth.write_text(f"{first}\n{truth.read_text()}")
    found, _ = load_all(datasets.Folder(source=tmp_path / "frames"))
    assert found["frames"].visible.tolist() == [False] + [True] * 7


def test_video_files(tmp_path: Path) -> None:
    layouts.make_videos(tmp_path / "videos")
    index, findings = to_shards(datasets.Video(source=tmp_path / "videos"), tmp_path / "out")
    assert [index.sequence(t) for t in range(index.num_tracks)] == ["one", "two"]
    assert index.num_frames == 12
    image = images.ImageReader(index).decode(3)
    assert np.abs(image.astype(int) - layouts.picture(3)[..., ::-1]).mean() < 8
    whys = {f.sequence: f.why for f in findings}
    assert "ends 3 frames before" in whys["two"]
    assert "three.txt" in whys["three"]


def write_video(file: Path, codec: str, num: int = 6) -> None:
    with av.open(f"file:{file}", "w") as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height = layouts.SIZE_WH
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for t in range(num):
            frame = av.VideoFrame.from_ndarray(layouts.picture(t), format="bgr24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    layouts.write_rows(file.with_suffix(".txt"), layouts.boxes(num))


def test_every_video_that_can_be_decoded_is_taken_and_all_else_is_named(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    for name, codec in {
        "a.mp4": "libx264", "b.wmv": "wmv2", "c.ts": "libx264", "d.flv": "flv", "e.gif": "gif",
        "f.ogv": "libtheora", "g.mov": "mpeg4", "12:30.mp4": "mpeg4",
    }.items():  # fmt: skip
        if codec in av.codecs_available:
            write_video(root / name, codec)
    (root / "a.mov").write_bytes((root / "g.mov").read_bytes())
    layouts.write_image(root / "picture.jpg", 0)
    (root / "no.bin").write_bytes(b"no video")
    (root / "cut.mp4").write_bytes((root / "a.mp4").read_bytes()[:100])
    for name in ("picture", "no", "cut"):
        layouts.write_rows(root / f"{name}.txt", layouts.boxes(6))
    (root / "README.md").write_text("these are mine")
    findings = Findings()
    source = datasets.Video(source=root, split="val")
    entries = source.entries(findings)
    names = [entry.name for entry in entries]
    assert {"a.mp4", "a.mov", "b", "c", "d", "e", "g", "12:30"} <= set(names)
    said = {finding.sequence: finding.why for finding in findings}
    assert said["picture.jpg"] == "an image, not a video"
    assert "cannot be read as a video" in said["no.bin"]
    assert not any("README" in name for name in said)
    cut = next(entry for entry in entries if entry.name == "cut")
    with pytest.raises(UserError, match="cannot be read as a video"):
        source.load(cut, findings)
    cut_file = Path(cut.values[0])
    cut_file.unlink()
    index, _ = to_shards(source, tmp_path / "out")
    assert index.num_frames == 6 * index.num_tracks


def test_what_comes_behind_damage_in_a_video_is_not_used(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    write_video(root / "a.ts", "libx264", num=60)
    data = bytearray((root / "a.ts").read_bytes())
    middle = len(data) // 2 // 188 * 188
    data[middle : middle + 188 * 20] = b""
    (root / "a.ts").write_bytes(data)
    index, findings = to_shards(datasets.Video(source=root, split="val"), tmp_path / "out")
    assert 0 < index.num_frames < 60
    assert any("not used from there on" in finding.why for finding in findings)
    image = images.ImageReader(index).decode(index.num_frames - 1)
    truth = layouts.picture(index.num_frames - 1)[..., ::-1]
    assert np.abs(image.astype(int) - truth).mean() < 12
