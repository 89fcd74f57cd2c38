"""Tiny copies of the public datasets' layouts, with the faults that the real ones have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

SIZE_WH = (96, 72)


def picture(seed: int, size_wh: tuple[int, int] = SIZE_WH) -> np.ndarray:
    """Return a smooth random RGB image."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, size_wh, interpolation=cv2.INTER_CUBIC)


def write_image(file: Path, seed: int, size_wh: tuple[int, int] = SIZE_WH) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), picture(seed, size_wh))


def cut_short(file: Path) -> None:
    """Damage an image as an interrupted download does."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 2 // 3])


def write_rows(file: Path, rows: Sequence[Sequence[float]], delimiter: str = ",") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(delimiter.join(f"{v:g}" for v in row) + "\n" for row in rows))


def boxes(count: int) -> list[list[float]]:
    """Return xywh rows of a box that moves by 2 pixels per frame."""
    return [[10 + 2 * t, 12 + t, 30, 24] for t in range(count)]


def make_got10k(root: Path) -> None:
    """Sequence 2 has absences and changes its size; 3 damaged images; 4 no folder."""
    names = [f"GOT-10k_Train_{n:06d}" for n in (1, 2, 3, 4)]
    (root / "train").mkdir(parents=True)
    (root / "train" / "list.txt").write_text("\n".join(names))  # no newline at the end
    for number, name in enumerate(names[:3]):
        folder = root / "train" / name
        for t in range(6):
            size = (64, 96) if number == 1 and t >= 4 else SIZE_WH
            write_image(folder / f"{t + 1:08d}.jpg", number * 10 + t, size)
        write_rows(folder / "groundtruth.txt", boxes(6))
        (folder / "absence.label").write_text("0\n0\n1\n0\n0\n0\n" if number == 1 else "0\n" * 6)
        (folder / "cover.label").write_text("8\n8\n0\n5\n8\n8\n" if number == 1 else "8\n" * 6)
        (folder / "cut_by_image.label").write_text("0\n" * 5 + f"{int(number == 1)}\n")
        (folder / "meta_info.ini").write_text(
            "[METAINFO]\nurl: https://example.org/?a=b:c\nobject_class: lesser panda\n"
            "anno_fps: 10Hz\nresolution: (96, 72)\n"
        )
    cut_short(root / "train" / names[2] / "00000003.jpg")
    (root / "train" / names[2] / "00000005.jpg").write_bytes(b"")
    test = root / "test" / "GOT-10k_Test_000001"
    for t in range(4):
        write_image(test / f"{t + 1:08d}.jpg", 50 + t)
    write_rows(test / "groundtruth.txt", boxes(1))
    (root / "test" / "list.txt").write_text(test.name + "\n")


def make_lasot(root: Path, *, split_files: bool = True) -> None:
    """monkey-17 has extra images and a negative box, bus-4 a row too many, its flags short."""
    for name, num_images, num_rows in (("monkey-17", 8, 6), ("bus-4", 5, 6), ("cat-1", 4, 4)):
        folder = root / name.split("-")[0] / name
        for t in range(num_images):
            write_image(folder / "img" / f"{t + 1:08d}.jpg", t)
        rows = boxes(num_rows)
        if name == "monkey-17":
            rows[3] = [61, 73, 24, -11]
            rows[4] = [0, 0, 0, 0]
        write_rows(folder / "groundtruth.txt", rows)
        flags = [0] * num_rows
        if name == "monkey-17":
            flags[4] = 1
        if name == "bus-4":
            flags = flags[:-1]
        (folder / "full_occlusion.txt").write_text(",".join(map(str, flags)) + "\n")
        out = [0] * num_rows
        out[2] = int(name == "cat-1")
        (folder / "out_of_view.txt").write_text(",".join(map(str, out)))
        (folder / "nlp.txt").write_text("a thing\n")
    if split_files:
        (root / "training_set.txt").write_text("monkey-17\nbus-4\n")
        (root / "testing_set.txt").write_text("cat-1\n")


def make_trackingnet(root: Path) -> None:
    """Unpadded names, a box beyond the image, one beside it, and a part that is not there."""
    for part in ("TRAIN_0", "TRAIN_3"):
        name = f"video-{part[-1]}"
        for t in range(12):
            write_image(root / part / "frames" / name / f"{t}.jpg", t)
        rows = boxes(12)
        rows[5] = [80, 50, 40, 40]
        rows[7] = [200, 200, 10, 10]
        rows[8] = [20, 20, 0, 10]
        write_rows(root / part / "anno" / f"{name}.txt", rows)
    for t in range(11):
        write_image(root / "TEST" / "frames" / "held-out" / f"{t}.jpg", t)
    write_rows(root / "TEST" / "anno" / "held-out.txt", boxes(1))
    (root / "trackingnet_classmap.txt").write_text("video-0\tCar\nvideo-3\tDog")


def make_coco(root: Path) -> None:
    """A crowd, an image without boxes, a box of no width, and categories with gaps."""
    ids = (9, 25, 30)
    for n in ids:
        write_image(root / "images" / "train2017" / f"{n:012d}.jpg", n)
    notes = [
        {"id": 1, "image_id": 9, "category_id": 90, "bbox": [5.5, 6.25, 30, 20], "iscrowd": 0},
        {"id": 2, "image_id": 9, "category_id": 1, "bbox": [40, 30, 20.5, 30], "iscrowd": 0},
        {"id": 3, "image_id": 9, "category_id": 1, "bbox": [0, 0, 96, 72], "iscrowd": 1},
        {"id": 4, "image_id": 25, "category_id": 1, "bbox": [10, 10, 0, 12], "iscrowd": 0},
    ]
    content = {
        "images": [{"id": n, "file_name": f"{n:012d}.jpg"} for n in ids],
        "annotations": notes,
        "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
    }
    file = root / "annotations" / "instances_train2017.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))


def make_tnl2k(root: Path) -> None:
    """Any names, PNG among them, one damaged; a sequence with the rows of other frames."""
    good = root / "Sord_video_Q01_done"
    for t in range(12):
        write_image(good / "imgs" / f"shot {t + 1}.{'png' if t % 2 else 'jpg'}", t)
    rows = boxes(12)
    rows[3] = [0, 0, 0, 0]
    write_rows(good / "groundtruth.txt", rows)
    (good / "language.txt").write_text("the sword")
    cut_short(good / "imgs" / "shot 8.png")
    wrong = root / "catNight_video_B04_done"
    for t in range(3):
        write_image(wrong / "imgs" / f"{t + 1:05d}.png", t)
    write_rows(wrong / "groundtruth.txt", boxes(30))


def make_vasttrack(root: Path) -> None:
    """Names with spaces, both spellings of the annotation, zeros for absence, no nlp.txt."""
    for name, truth in (("Crossbody Backpack-31", "groundtruth.txt"), ("Ant-2", "Groundtruth.txt")):
        folder = root / name.rpartition("-")[0] / name
        for t in range(4):
            write_image(folder / "imgs" / f"{t + 1:05d}.jpg", t)
        rows = boxes(4)
        rows[2] = [0, 0, 0, 0]
        write_rows(folder / truth, rows)
        if "Ant" in name:
            (folder / "nlp.txt").write_text("an ant")


def make_otb100(root: Path) -> None:
    """Three delimiters, frame windows, two targets, five digits, PNG, and omitted rows."""

    def video(name: str, numbers: range, digits: int = 4, suffix: str = "jpg") -> None:
        for n in numbers:
            write_image(root / name / "img" / f"{n:0{digits}d}.{suffix}", n)

    video("David", range(295, 306))
    write_rows(root / "David" / "groundtruth_rect.txt", boxes(5), "\t")
    video("Board", range(1, 5), digits=5)
    write_rows(root / "Board" / "groundtruth_rect.txt", boxes(4), "  ")
    video("KiteSurf", range(1, 4), suffix="png")
    write_rows(root / "KiteSurf" / "groundtruth_rect.txt", boxes(3))
    video("Jogging", range(1, 5))
    write_rows(root / "Jogging" / "groundtruth_rect.1.txt", boxes(4))
    write_rows(root / "Jogging" / "groundtruth_rect.2.txt", boxes(4), " ")
    video("Human4", range(1, 4))
    write_rows(root / "Human4" / "groundtruth_rect.1.txt", boxes(3))
    write_rows(root / "Human4" / "groundtruth_rect.2.txt", boxes(3))
    video("Tiger1", range(1, 10))
    write_rows(root / "Tiger1" / "groundtruth_rect.txt", boxes(9))


def make_uav123(root: Path) -> None:
    """bird1 is cut into windows; absent rows are NaN."""
    for n in (*range(1, 254), *range(775, 781)):
        if n <= 5 or n >= 250:
            write_image(root / "data_seq" / "UAV123" / "bird1" / f"{n:06d}.jpg", n)
    for n in range(1, 5):
        write_image(root / "data_seq" / "UAV123" / "car1_s" / f"{n:06d}.jpg", n)
    write_rows(root / "anno" / "UAV123" / "bird1_2.txt", boxes(6))
    rows = boxes(4)
    rows[1] = [float("nan")] * 4
    write_rows(root / "anno" / "UAV123" / "car1_s.txt", rows)
    flags = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    write_rows(root / "anno" / "UAV123" / "att" / "car1_s.txt", [flags])


def make_nfs(root: Path) -> None:
    """The original layout: VATIC rows at 240 fps, a video at 30 fps with one frame less."""
    for name in ("airboard_1", "pingpong_2"):
        num_frames = 270 if name == "pingpong_2" else 4
        for t in range(min(num_frames, 4) if name == "airboard_1" else num_frames):
            write_image(root / name / "30" / name / f"{t + 1:05d}.jpg", t % 7, (32, 24))
        lines = []
        for frame in range(1, num_frames * 8 + 2 if name == "airboard_1" else num_frames * 8 + 1):
            lost = int(name == "airboard_1" and frame == 9)
            lines.append(f'0 {4 + frame % 3} 5 14 15 {frame} {lost} 0 1 "board game"')
        (root / name / "30" / f"{name}.txt").write_text("\n".join(lines) + "\n")


def make_nfs_repacked(root: Path) -> None:
    """pytracking's layout."""
    for t in range(4):
        write_image(root / "sequences" / "bee" / f"{t + 1:05d}.jpg", t)
    write_rows(root / "anno" / "nfs_bee.txt", boxes(4), "\t")


def make_folder(root: Path) -> None:
    """Frames with unpadded numbers from 5 on and an annotation of another name."""
    for t in range(8):
        write_image(root / "frames" / f"{t + 5}.png", t)
    write_rows(root / "track.csv", [[x, y, x + w, y + h] for x, y, w, h in boxes(8)], ";")


def make_videos(root: Path) -> None:
    """Two videos with annotations, one of them longer than its video, and one without."""
    root.mkdir(parents=True)
    for name, num_rows in (("one", 6), ("two", 9), ("three", 0)):
        size = (SIZE_WH[0], SIZE_WH[1])
        codec = cv2.VideoWriter.fourcc(*"MJPG")
        writer = cv2.VideoWriter(str(root / f"{name}.avi"), codec, 10, size)
        assert writer.isOpened()
        for t in range(6):
            writer.write(picture(t))
        writer.release()
        if num_rows:
            write_rows(root / f"{name}.txt", boxes(num_rows))
