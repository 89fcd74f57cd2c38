"""One-pass evaluation: scheduling, first frames, timing, damage, baselines."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lorat.config.training import TrainConfig
from lorat.data import synthetic
from lorat.errors import UserError
from lorat.model.network import build_model
from lorat.tracking.baselines import available, baseline
from lorat.tracking.one_pass import SequenceResult, track_by_all, track_sequences
from lorat.tracking.tracker import Tracker
from tests.lorat.fake_index import FakeIndex, FakeReader
from tests.real_data import REAL_DATA


class Recorder:
    """A tracker that notes who is in each batch and answers with a shifted box."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.steps: list[int] = []

    def start(self, frames: Sequence[np.ndarray], boxes: Sequence[Sequence[float]]) -> list[Any]:
        self.started.append(len(frames))
        return [list(box) for box in boxes]

    def step(
        self, targets: Sequence[Any], frames: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        self.steps.append(len(targets))
        for target in targets:
            target[0] += 1
        return np.array(targets), np.full(len(targets), 0.5)


def test_longest_first_and_never_more_than_the_batch() -> None:
    index = FakeIndex([3, 9, 1, 6, 4], name="set")
    recorder, ended = Recorder(), []
    results = track_sequences(
        recorder,
        index,
        FakeReader(index),
        [0, 1, 2, 3, 4],
        batch_size=2,
        on_sequence=lambda result: ended.append(result.track),
    )
    assert [result.track for result in results] == [0, 1, 2, 3, 4]
    assert [len(result.boxes) for result in results] == [3, 9, 1, 6, 4]
    assert max(recorder.steps) == 2
    assert sum(recorder.steps) == sum(n - 1 for n in (3, 9, 1, 6, 4))
    assert recorder.started[0] == 2
    assert ended.index(3) < ended.index(0)
    assert recorder.steps.count(2) >= 8  # a finished sequence makes room at once


def test_the_first_frame_is_the_ground_truth_with_score_one() -> None:
    index = FakeIndex([4])
    (result,) = track_sequences(Recorder(), index, FakeReader(index), [0])
    np.testing.assert_array_equal(result.boxes[0], index.box[0])
    assert result.scores.tolist() == [1, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(result.boxes[:, 0], index.box[0, 0] + np.arange(4))
    assert result.name == "fake-0000"


def test_results_do_not_depend_on_the_batch() -> None:
    model = build_model(TrainConfig(variant="N-112", backbone="none"))
    tracker = Tracker(model, device="cpu")
    index = FakeIndex([5, 3, 4])
    alone, together = (
        track_sequences(tracker, index, FakeReader(index), range(3), batch_size=size)
        for size in (1, 3)
    )
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.boxes, many.boxes, atol=1e-3)
        np.testing.assert_allclose(one.scores, many.scores, atol=1e-5)


def test_several_trackers_share_each_decoded_frame() -> None:
    """And each finds what it finds alone, in sequences that start and end at different times."""

    index = FakeIndex([5, 9, 4])
    reader, ended = FakeReader(index, damaged=[2, 14]), []
    moving, static = track_by_all(
        [Recorder(), baseline("static")],
        index,
        reader,
        range(3),
        batch_size=2,
        on_sequence=lambda number, result: ended.append((result.track, number)),
    )
    assert sorted(reader.read_rows) == list(range(15)), "every frame is decoded once"
    assert ended == [(0, 0), (0, 1), (2, 0), (2, 1), (1, 0), (1, 1)]
    assert [result.track for result in moving] == [0, 1], "the first frame of 2 is damaged"
    for tracker, several in ((Recorder(), moving), (baseline("static"), static)):
        alone = track_sequences(tracker, index, FakeReader(index, damaged=[2, 14]), range(3))
        for one, many in zip(alone, several, strict=True):
            np.testing.assert_array_equal(one.boxes, many.boxes)
            np.testing.assert_array_equal(one.scores, many.scores)
            assert one.damaged == many.damaged


def test_times_add_up_to_the_wall_clock() -> None:
    class Slow(Recorder):
        def step(
            self, targets: Sequence[Any], frames: Sequence[np.ndarray]
        ) -> tuple[np.ndarray, np.ndarray]:
            time.sleep(0.02)
            return super().step(targets, frames)

    index = FakeIndex([6, 6])
    results = track_sequences(Slow(), index, FakeReader(index), [0, 1], batch_size=2)
    for result in results:
        assert result.seconds.shape == result.decode_seconds.shape == (6,)
        assert (result.seconds[1:] >= 0.01).all()
        assert result.fps <= 6 / 0.05
        assert result.fps_with_decoding < result.fps
    assert sum(float(r.seconds.sum()) for r in results) >= 0.1


def test_a_damaged_frame_repeats_the_box_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    index = FakeIndex([5])
    (result,) = track_sequences(Recorder(), index, FakeReader(index, damaged=[2]), [0])
    assert result.damaged == 1
    np.testing.assert_array_equal(result.boxes[2], result.boxes[1])
    assert result.scores.tolist() == [1, 0.5, 0, 0.5, 0.5]
    assert "row 2" in caplog.text


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_sequence_whose_first_frame_is_damaged_is_left_out_alone(batch_size: int) -> None:
    index = FakeIndex([5, 7, 2])
    ended: list[SequenceResult] = []
    results = track_sequences(
        Recorder(),
        index,
        FakeReader(index, damaged=[5]),
        range(3),
        batch_size=batch_size,
        on_sequence=ended.append,
    )
    assert [result.track for result in results] == [0, 2]
    for result in results:
        assert np.isfinite(result.boxes).all()
    (lost,) = [result for result in ended if result.left_out]
    assert (lost.track, lost.name, len(ended)) == (1, "fake-0001", 3)
    assert "first frame is damaged" in lost.left_out


def test_what_cannot_be_evaluated_is_refused() -> None:
    windowed = FakeIndex([3], window=np.zeros((3, 4), np.float32))
    with pytest.raises(UserError, match="--full-frame"):
        track_sequences(Recorder(), windowed, FakeReader(windowed), [0])
    index = FakeIndex([3])
    index.box[0] = np.nan
    with pytest.raises(UserError, match="no usable box"):
        track_sequences(Recorder(), index, FakeReader(index), [0])
    with pytest.raises(UserError, match="static, mil"):
        baseline("kcf")


class FolderReader:
    """Frames of one real sequence."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.jpg"))

    def decode(self, row: int) -> np.ndarray:
        return cv2.imread(str(self.files[row]), cv2.IMREAD_COLOR_RGB)


def run_real(name: str, tracker: Any, num_frames: int | None = None) -> tuple[Any, SequenceResult]:
    folder = REAL_DATA / "sequences" / name
    truth = np.loadtxt(folder / "groundtruth.txt", delimiter=",")[:num_frames]
    index = FakeIndex([len(truth)], name=name)
    index.box = np.concatenate([truth[:, :2], truth[:, :2] + truth[:, 2:]], axis=1)
    (result,) = track_sequences(tracker, index, FolderReader(folder), [0])
    return index, result


def mean_overlap(first: np.ndarray, second: np.ndarray) -> float:
    size = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    inter = size.clip(0).prod(axis=1)
    union = sum((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (first, second)) - inter
    return float((inter / union)[1:].mean())


needs_sequences = pytest.mark.skipif(
    not (REAL_DATA / "baselines.json").is_file(), reason="the real sequences are not here"
)


@needs_sequences
@pytest.mark.parametrize("name", ["Skiing", "Football1", "ball1"])
def test_the_static_baseline_has_its_known_overlap(name: str) -> None:
    index, result = run_real(name, baseline("static"))
    expected = json.loads((REAL_DATA / "baselines.json").read_text())[name]["static"]["AO"]
    assert mean_overlap(result.boxes, index.box) == pytest.approx(expected, abs=2e-4)


@needs_sequences
def test_the_mil_baseline_follows_the_target() -> None:
    index, result = run_real("building4", baseline("mil"), 40)
    assert mean_overlap(result.boxes, index.box) > 0.5
    assert set(result.scores) <= {0.0, 1.0}


@pytest.mark.parametrize("name", [name for name in available() if name != "static"])
def test_opencvs_trackers_repeat_themselves_whatever_is_tracked_beside(name: str) -> None:
    video = synthetic.render("val", 0, 12)
    frames, boxes = video.images, video.box[:1].tolist()

    def track(copies: int) -> np.ndarray:
        tracker = baseline(name)
        targets = tracker.start([frames[0]] * copies, boxes * copies)
        steps = [tracker.step(targets, [frame] * copies)[0] for frame in frames[1:]]
        return np.stack(steps)

    alone, beside = track(1), track(3)
    assert len(np.unique(alone[:, 0], axis=0)) > 3  # it moves
    assert np.array_equal(beside, np.repeat(alone, 3, axis=1))


def test_a_tracker_that_opencv_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "TrackerCSRT", raising=False)
    assert available() == ("static", "mil")
    with pytest.raises(UserError, match=r"without TrackerCSRT.*static, mil.*opencv-contrib-python"):
        baseline("csrt")


@needs_sequences
@pytest.mark.parametrize("name", ["DragonBaby", "Freeman1"])
def test_real_sequences_track_without_leaving_the_frame(name: str) -> None:
    tracker = Tracker(build_model(TrainConfig(variant="N-112", backbone="none")), device="cpu")
    _, result = run_real(name, tracker, 40)
    height, width = FolderReader(REAL_DATA / "sequences" / name).decode(0).shape[:2]
    assert np.isfinite(result.boxes).all()
    assert (result.boxes[1:] >= 0).all()
    assert (result.boxes[1:] <= [width, height, width, height]).all()
    assert ((result.scores >= 0) & (result.scores <= 1)).all()
