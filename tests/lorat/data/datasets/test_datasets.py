"""Every public layout, with its faults: what is taken, what is left out, and what is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lorat.data import datasets
from lorat.data.datasets import Findings
from lorat.data.shards import images
from lorat.errors import UserError
from tests.lorat import layouts
from tests.lorat.loading import load_all, to_shards


def frames_of(index, name: str) -> slice:
    track = [index.sequence(t) for t in range(index.num_tracks)].index(name)
    return slice(int(index.track_start[track]), int(index.track_start[track + 1]))


def test_got10k_takes_absence_cover_category_and_every_frame_size(tmp_path: Path) -> None:
    layouts.make_got10k(tmp_path / "got")
    source = datasets.Got10k(source=tmp_path / "got")
    index, findings = to_shards(source, tmp_path / "out")
    assert index.num_tracks == 3
    rows = frames_of(index, "GOT-10k_Train_000002")
    assert index.visible[rows].tolist() == [True, True, False, True, True, True]
    assert index.valid[rows].tolist() == [True, True, False, True, True, True]
    assert index.cover[rows].tolist() == [8, 8, 0, 5, 8, 8]
    assert index.size_wh[rows][[0, 5]].tolist() == [[96, 72], [64, 96]]
    assert index.category(0) == "lesser panda"
    np.testing.assert_array_equal(index.box[rows][1], [12, 13, 42, 37])
    damaged = frames_of(index, "GOT-10k_Train_000003")
    assert index.frame_number[damaged].tolist() == [1, 2, 4, 6]
    said = {(f.sequence, f.action) for f in findings}
    assert ("GOT-10k_Train_000002", "kept") in said  # the frame size changes
    assert ("GOT-10k_Train_000003", "dropped") in said
    assert ("GOT-10k_Train_000004", "dropped") in said


def test_got10k_test_split_has_one_box_and_all_frames(tmp_path: Path) -> None:
    layouts.make_got10k(tmp_path / "got")
    source = datasets.Got10k(source=tmp_path / "got", split="test")
    index, _ = to_shards(source, tmp_path / "out")
    assert index.num_frames == 4
    assert index.valid.tolist() == [True, False, False, False]
    assert np.isnan(index.box[1:]).all()


@pytest.mark.parametrize("name", ["got10k", "trackingnet"])
def test_boxes_that_a_test_split_keeps_to_itself_are_nothing_odd(name: str, tmp_path: Path) -> None:
    getattr(layouts, f"make_{name}")(tmp_path / "source")
    source = datasets.DATASETS[name](source=tmp_path / "source", split="test")  # type: ignore[call-arg]
    index, findings = to_shards(source, tmp_path / "out")
    assert index.num_frames > 1
    assert index.valid.sum() == 1
    assert findings == []


def test_the_one_box_of_a_test_split_is_missed(tmp_path: Path) -> None:
    layouts.make_got10k(tmp_path / "got")
    truth = tmp_path / "got" / "test" / "GOT-10k_Test_000001" / "groundtruth.txt"
    truth.write_text("nan,nan,nan,nan\n")
    _, findings = to_shards(
        datasets.Got10k(source=tmp_path / "got", split="test"), tmp_path / "out"
    )
    assert [(f.frames, "NaN" in f.why) for f in findings] == [((1,), True)]


@pytest.mark.parametrize("lines", ["2\n0", "GOT-10k_Train_000001\nGOT-10k_Train_000003\n"])
def test_an_include_list_holds_names_or_positions_from_0(tmp_path: Path, lines: str) -> None:
    layouts.make_got10k(tmp_path / "got")
    (tmp_path / "list.txt").write_text(lines)
    source = datasets.Got10k(source=tmp_path / "got", include_list=tmp_path / "list.txt")
    names = [e.name for e in source.entries(Findings())]
    assert names == ["GOT-10k_Train_000001", "GOT-10k_Train_000003"]


def test_an_include_list_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    layouts.make_got10k(tmp_path / "got")
    for lines in ("4\n", "nobody\n"):
        (tmp_path / "list.txt").write_text(lines)
        source = datasets.Got10k(source=tmp_path / "got", include_list=tmp_path / "list.txt")
        with pytest.raises(UserError, match=r"list\.txt"):
            source.entries(Findings())


def test_positions_are_refused_without_the_list_they_count_in(tmp_path: Path) -> None:
    layouts.make_got10k(tmp_path / "got")
    (tmp_path / "got" / "train" / "list.txt").unlink()
    (tmp_path / "names.txt").write_text("0\n")
    source = datasets.Got10k(source=tmp_path / "got", include_list=tmp_path / "names.txt")
    with pytest.raises(UserError, match=r"positions in train/list\.txt.*or give names"):
        source.entries(Findings())
    (tmp_path / "names.txt").write_text("GOT-10k_Train_000002\n")
    assert [e.name for e in source.entries(Findings())] == ["GOT-10k_Train_000002"]


def test_files_between_the_numbered_images_do_no_harm(tmp_path: Path) -> None:
    layouts.make_lasot(tmp_path)
    folder = tmp_path / "cat" / "cat-1" / "img"
    for name in ("00000001 (1).jpg", "cover.jpg", "._00000002.jpg"):
        layouts.write_image(folder / name, 9)
    found, reasons = load_all(datasets.Lasot(source=tmp_path, split="test"))
    assert [Path(p).name for p in found["cat-1"].images] == [f"0000000{n}.jpg" for n in range(1, 5)]
    assert found["cat-1"].frame_number.tolist() == [1, 2, 3, 4]
    assert "2 images that are not named by a number" in reasons[("cat-1", "repaired")]


def test_lasot_is_one_based_and_takes_as_many_frames_as_rows(tmp_path: Path) -> None:
    layouts.make_lasot(tmp_path / "lasot")
    index, findings = to_shards(datasets.Lasot(source=tmp_path / "lasot"), tmp_path / "out")
    monkey = frames_of(index, "monkey-17")
    # Row 4 is negative, row 5 absent; the last row is valid again.
    assert index.frame_number[monkey].tolist() == [1, 2, 3, 4, 5, 6]
    assert index.valid[monkey].tolist() == [True, True, True, False, False, True]
    assert index.visible[monkey].tolist() == [True, True, True, True, False, True]
    np.testing.assert_array_equal(index.box[monkey][0], [9, 11, 39, 35])
    assert np.isnan(index.box[monkey][3]).all()
    assert index.category(0) == "monkey"
    bus = frames_of(index, "bus-4")
    assert bus.stop - bus.start == 5
    reasons = {f.sequence: f.why for f in findings}
    whys = [f.why for f in findings if f.sequence == "monkey-17"]
    assert any("2 images have no row" in w for w in whys)
    assert any("negative" in w for w in whys)
    assert "bus-4" in reasons


def test_lasot_flags_of_occlusion_and_view_both_hide_the_target(tmp_path: Path) -> None:
    layouts.make_lasot(tmp_path)
    found, _ = load_all(datasets.Lasot(source=tmp_path, split="test"))
    assert found["cat-1"].visible.tolist() == [True, True, False, True]


def test_lasot_ext_boxes_are_not_shifted(tmp_path: Path) -> None:
    layouts.make_lasot(tmp_path, split_files=False)
    found, _ = load_all(datasets.LasotExt(source=tmp_path))
    assert set(found) == {"bus-4", "cat-1", "monkey-17"}
    np.testing.assert_array_equal(found["cat-1"].box[0], [10, 12, 40, 36])


def test_trackingnet_sorts_by_number_and_clips(tmp_path: Path) -> None:
    layouts.make_trackingnet(tmp_path / "tn")
    source = datasets.TrackingNet(source=tmp_path / "tn")
    index, findings = to_shards(source, tmp_path / "out")
    assert index.num_tracks == 2
    rows = frames_of(index, "video-0")
    assert index.frame_number[rows].tolist() == list(range(12))
    reader = images.ImageReader(index)
    data = (tmp_path / "tn" / "TRAIN_0" / "frames" / "video-0" / "10.jpg").read_bytes()
    assert reader.read(rows.start + 10) == data
    np.testing.assert_array_equal(index.box[rows][5], [80, 50, 96, 72])
    assert index.valid[rows].tolist() == [True] * 7 + [False] * 2 + [True] * 3
    assert index.category(0) == "Car"
    whys = {f.sequence: f.why for f in findings if f.action == "dropped"}
    assert "TRAIN_1" in whys[""]
    assert "video-0" in whys


def test_trackingnet_parts_can_be_chosen_but_must_be_there(tmp_path: Path) -> None:
    layouts.make_trackingnet(tmp_path)
    chosen = datasets.TrackingNet(source=tmp_path, parts=(3,))
    assert [e.name for e in chosen.entries(Findings())] == ["video-3"]
    with pytest.raises(UserError, match="TRAIN_1"):
        datasets.TrackingNet(source=tmp_path, parts=(1, 3)).entries(Findings())


def test_coco_makes_a_track_of_each_box_but_crowds(tmp_path: Path) -> None:
    layouts.make_coco(tmp_path / "coco")
    index, findings = to_shards(datasets.Coco(source=tmp_path / "coco"), tmp_path / "out")
    assert [index.sequence(t) for t in range(index.num_tracks)] == [
        "000000000009-1",
        "000000000009-2",
    ]
    np.testing.assert_array_equal(index.box[0], [5.5, 6.25, 35.5, 26.25])
    assert [index.category(t) for t in range(2)] == ["toothbrush", "person"]
    whys = [f.why for f in findings]
    assert "1 crowd annotations" in whys
    assert "1 images without boxes" in whys
    assert any(f.sequence == "000000000025-4" and f.action == "dropped" for f in findings)


def test_coco_annotations_without_box_or_category_cost_nothing_but_themselves(
    tmp_path: Path,
) -> None:
    layouts.make_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    good = {"image_id": 9, "category_id": 1, "bbox": [1, 2, 30, 40], "iscrowd": 0}
    content["annotations"] += [
        {"id": 11} | {k: v for k, v in good.items() if k != "bbox"},
        {"id": 12} | {k: v for k, v in good.items() if k != "category_id"},
        {"id": 13} | good | {"bbox": None},
        {"id": 14} | good | {"bbox": [1, 2, 30]},
        {"id": 15} | {k: v for k, v in good.items() if k != "image_id"},
        {"id": 16} | good,
    ]
    file.write_text(json.dumps(content))
    findings = Findings()
    source = datasets.Coco(source=tmp_path)
    found = [r for e in source.entries(findings) for r in source.load(e, findings)]
    names = {r.name: r.category for r in found if r.name.startswith("000000000009")}
    assert names == {
        "000000000009-1": "toothbrush", "000000000009-2": "person",
        "000000000009-12": "", "000000000009-16": "person",
    }  # fmt: skip
    odd = {f.sequence: f.action for f in findings if f.sequence.startswith("annotation")}
    assert odd == {f"annotation {n}": "dropped" for n in (11, 13, 14, 15)} | {
        "annotation 12": "kept"
    }


def test_tnl2k_rows_of_other_frames_drop_the_sequence(tmp_path: Path) -> None:
    layouts.make_tnl2k(tmp_path / "tnl2k")
    index, findings = to_shards(datasets.Tnl2k(source=tmp_path / "tnl2k"), tmp_path / "out")
    assert index.num_tracks == 1
    # "shot 10" comes after "shot 9"; the damaged "shot 8" is left out, absence is kept.
    assert index.frame_number.tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    assert index.visible.tolist() == [True] * 3 + [False] + [True] * 7
    dropped = {f.sequence: f.why for f in findings if f.action == "dropped"}
    assert "30 rows" in dropped["catNight_video_B04_done"]
    assert "cannot be used" in dropped["Sord_video_Q01_done"]


def test_a_damaged_image_of_an_evaluation_set_is_replaced_by_the_one_before(
    tmp_path: Path,
) -> None:
    layouts.make_tnl2k(tmp_path / "tnl2k")
    source = datasets.Tnl2k(source=tmp_path / "tnl2k", split="test")
    index, findings = to_shards(source, tmp_path / "out")
    assert index.frame_number.tolist() == list(range(1, 13))
    reader = images.ImageReader(index)
    np.testing.assert_array_equal(reader.decode(7), reader.decode(6))
    np.testing.assert_allclose(index.box[7], [24, 19, 54, 43])
    assert any(f.action == "repaired" and f.frames == (8,) for f in findings)


def test_vasttrack_has_spaces_zeros_for_absence_and_two_spellings(tmp_path: Path) -> None:
    layouts.make_vasttrack(tmp_path)
    found, reasons = load_all(datasets.VastTrack(source=tmp_path))
    assert set(found) == {"Ant-2", "Crossbody Backpack-31"}
    for recording in found.values():
        assert recording.visible.tolist() == [True, True, False, True]
        np.testing.assert_array_equal(recording.box[0], [9, 11, 39, 35])
    assert "nlp.txt" in reasons[("Crossbody Backpack-31", "kept")]


def test_otb100_delimiters_windows_targets_and_names(tmp_path: Path) -> None:
    layouts.make_otb100(tmp_path)
    found, _ = load_all(datasets.Otb100(source=tmp_path))
    assert set(found) == {
        "Board", "David", "Human4.2", "Jogging.1", "Jogging.2", "KiteSurf", "Tiger1",
    }  # fmt: skip
    assert found["David"].frame_number.tolist() == [300, 301, 302, 303, 304]
    assert found["David"].images[0].endswith("0300.jpg")
    assert found["Tiger1"].frame_number.tolist() == [6, 7, 8, 9]
    assert found["KiteSurf"].images[0].endswith("0001.png")
    for name in ("Board", "Jogging.2", "David"):
        np.testing.assert_array_equal(found[name].box[0], [9, 11, 39, 35])
    np.testing.assert_array_equal(found["Tiger1"].box[0], [19, 16, 49, 40])


@pytest.mark.parametrize("folder", ["jpg", "frames"])
def test_otb100_images_may_lie_in_another_folder(tmp_path: Path, folder: str) -> None:
    layouts.make_otb100(tmp_path)
    (tmp_path / "KiteSurf" / "img").rename(tmp_path / "KiteSurf" / folder)
    (tmp_path / "KiteSurf" / "notes").mkdir()
    found, _ = load_all(datasets.Otb100(source=tmp_path))
    assert found["KiteSurf"].images[0].endswith(f"{folder}/0001.png")
    layouts.write_image(tmp_path / "KiteSurf" / "masks" / "0001.png", 0)
    layouts.write_image(tmp_path / "KiteSurf" / "other" / "0001.png", 0)
    found, _ = load_all(datasets.Otb100(source=tmp_path))
    assert ("KiteSurf" in found) == (folder == "jpg")  # else nothing tells which folder it is


def test_uav123_sequences_are_windows_of_videos(tmp_path: Path) -> None:
    layouts.make_uav123(tmp_path)
    assert len(datasets.uav123.SEQUENCES) == 123
    found, reasons = load_all(datasets.Uav123(source=tmp_path))
    assert set(found) == {"bird1_2", "car1_s"}
    assert found["bird1_2"].frame_number.tolist() == [775, 776, 777, 778, 779, 780]
    assert found["bird1_2"].images[0].endswith("bird1/000775.jpg")
    assert found["bird1_2"].category == "bird"
    assert found["car1_s"].visible.tolist() == [True, False, True, True]
    assert found["car1_s"].attributes == ("scale variation", "camera motion")
    assert found["bird1_2"].attributes == ()
    assert not reasons


def test_nfs_vatic_rows_are_thinned_to_30_fps(tmp_path: Path) -> None:
    layouts.make_nfs(tmp_path)
    found, reasons = load_all(datasets.Nfs(source=tmp_path))
    board = found["airboard_1"]
    assert len(board.images) == 4
    # Frames 1, 9, 17, 25 of the 240 fps annotation; in frame 9 the target is lost.
    np.testing.assert_array_equal(board.box[:, 0], [5, 4, 6, 5])
    np.testing.assert_array_equal(board.box[0], [5, 5, 14, 15])
    assert board.visible.tolist() == [True, False, True, True]
    assert "cut to 4" in reasons[("airboard_1", "repaired")]
    assert found["pingpong_2"].visible.sum() == 262
    assert ("pingpong_2", "dropped") in reasons


def test_nfs_repacked_layout_is_recognised(tmp_path: Path) -> None:
    layouts.make_nfs_repacked(tmp_path)
    found, _ = load_all(datasets.Nfs(source=tmp_path))
    np.testing.assert_array_equal(found["bee"].box[0], [10, 12, 40, 36])


LAYOUTS = sorted(set(datasets.DATASETS) - {"folder", "video"})


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_is_refused_with_what_was_expected_and_found(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "holiday").mkdir()
    with pytest.raises(UserError, match=r"expected .*; found holiday/\."):
        datasets.DATASETS[name](source=tmp_path).entries(Findings())


@pytest.mark.parametrize("name", sorted(datasets.DATASETS))
def test_a_missing_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        datasets.DATASETS[name](source=tmp_path / "nowhere").entries(Findings())


def test_a_slash_behind_a_listed_name_is_none_and_a_name_counts_once(tmp_path: Path) -> None:
    layouts.make_got10k(tmp_path)
    names = [f"GOT-10k_Train_{n:06d}" for n in (1, 2)]
    lines = [f"{names[0]}/", f"./{names[1]}/", names[0], "../val", "a\\b"]
    (tmp_path / "train" / "list.txt").write_text("\n".join(lines))
    findings = Findings()
    entries = datasets.Got10k(source=tmp_path).entries(findings)
    assert [entry.name for entry in entries] == names
    said = {f.sequence: f.why for f in findings}
    assert "named again in" in said[names[0]]
    for name in ("../val", "a\\b"):
        assert "not that of one file" in said[name]
        assert "list.txt" in said[name]


def test_a_name_that_is_no_text_is_left_out_escaped(tmp_path: Path) -> None:
    layouts.make_got10k(tmp_path)
    (tmp_path / "train" / "list.txt").unlink()
    folder = os.fsencode(tmp_path / "train")
    os.rename(folder + b"/GOT-10k_Train_000001", folder + b"/M\xfcnchen")
    findings = Findings()
    entries = datasets.Got10k(source=tmp_path).entries(findings)
    assert [entry.name[-1] for entry in entries] == ["2", "3"]
    assert "M\\xfcnchen" in [f.sequence for f in findings if f.action == "dropped"]
    for n in (2, 3):
        os.rename(folder + b"/GOT-10k_Train_00000%d" % n, folder + b"/\xfc%d" % n)
    with pytest.raises(UserError, match=r"No name .* can be used, as 'M\\xfcnchen'; give names"):
        datasets.Got10k(source=tmp_path).entries(Findings())


def test_images_of_coco_in_folders_have_distinct_safe_names(tmp_path: Path) -> None:
    layouts.make_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    folder = tmp_path / "images" / "train2017"
    (folder / "cam").mkdir()
    (folder / "000000000009.jpg").rename(folder / "cam" / "9.jpg")
    content["images"][0]["file_name"] = "cam/9.jpg"
    content["images"][1]["file_name"] = "cam_9.jpg"
    content["images"].append({"id": 31, "file_name": "../../etc/passwd.jpg"})
    box = {"category_id": 1, "iscrowd": 0, "bbox": [1, 2, 3, 4]}
    content["annotations"].append({"id": 8, "image_id": 31} | box)
    content["annotations"].append(
        {"id": 9, "image_id": 9} | box | {"bbox": [1, 2, 3, float("nan")]}
    )
    file.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    found, said = load_all(datasets.Coco(source=tmp_path))
    assert sorted(found) == ["cam_9-0-1", "cam_9-0-2", "cam_9-1-4"]
    assert found["cam_9-0-1"].images == (str(folder / "cam" / "9.jpg"),)
    assert "is not in train2017" in said["31", "dropped"]
    assert "finite numbers" in said["annotation 9", "dropped"]


@pytest.mark.parametrize("text", ['{"images": [{"id": 1e999}]}', "[" * 100_000, "{}", "x", "[1]"])
def test_what_is_no_file_of_coco_is_a_sentence(text: str, tmp_path: Path) -> None:
    layouts.make_coco(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_text(text)
    with pytest.raises(UserError, match="is not COCO's instances file"):
        datasets.Coco(source=tmp_path).entries(Findings())
