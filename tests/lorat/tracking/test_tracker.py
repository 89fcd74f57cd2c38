"""Tracking: user errors, batches, precisions, and boxes that never leave the frame."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from lorat.config.tracking import TrackingConfig
from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.model.network import LoRAT, build_model
from lorat.tracking.capture import EAGER_CALLS
from lorat.tracking.tracker import STAGES, Tracker, round_products
from tests.lorat.tracking.recorded_ops import as_on_a_gpu

BOX = (50.0, 40.0, 90.0, 80.0)


@pytest.fixture(scope="module")
def model() -> LoRAT:
    return build_model(TrainConfig(variant="N-112", backbone="none", seed=3))


@pytest.fixture(scope="module")
def tracker(model: LoRAT) -> Tracker:
    return Tracker(model, device="cpu")


def video(num: int, width: int = 160, height: int = 120, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(num)]


def test_boxes_stay_inside_the_frame_and_scores_in_range(tracker: Tracker) -> None:
    for seed, box in enumerate([BOX, (-20, -10, 12, 8), (150, 100, 400, 300), (3, 3, 4.5, 4.2)]):
        frames = video(6, seed=seed)
        tracker.init(frames[0], box)
        for frame in frames[1:]:
            found, score = tracker.update(frame)
            assert found.shape == (4,)
            assert found.dtype == np.float64
            assert (found >= 0).all()
            assert (found <= [160, 120, 160, 120]).all()
            assert 0 <= score <= 1


def test_a_batch_gives_what_single_tracking_gives(tracker: Tracker) -> None:
    videos = [video(5, width=100 + 30 * s, seed=s) for s in range(4)]
    targets = tracker.start([frames[0] for frames in videos], [BOX] * 4)
    together = [tracker.step(targets, [frames[t] for frames in videos]) for t in range(1, 5)]
    for number, frames in enumerate(videos):
        tracker.init(frames[0], BOX)
        for step, frame in enumerate(frames[1:]):
            box, score = tracker.update(frame)
            np.testing.assert_allclose(box, together[step][0][number], atol=1e-3)
            np.testing.assert_allclose(score, together[step][1][number], atol=1e-5)


def test_how_to_track_is_the_models_unless_it_is_said(model: LoRAT) -> None:
    frames = video(5)

    def boxes(tracker: Tracker) -> np.ndarray:
        tracker.init(frames[0], BOX)
        return np.array([tracker.update(frame)[0] for frame in frames[1:]])

    tracker = Tracker(model, device="cpu")
    usual = boxes(tracker)
    for changed in ({"window_penalty": 0.0}, {"search_area_factor": 2.0}, {"min_object_size": 90}):
        own = copy.deepcopy(model)
        own.tracking = TrackingConfig(**changed)
        found = boxes(Tracker(own, device="cpu"))
        assert np.abs(found - usual).max() > 1, changed
        tracker.tracking = own.tracking
        np.testing.assert_array_equal(boxes(tracker), found)


def test_the_frame_size_may_change_within_a_video(tracker: Tracker) -> None:
    tracker.init(video(1)[0], BOX)
    tracker.update(video(1, 320, 240)[0])
    box, _ = tracker.update(video(1, 60, 50)[0])
    assert (box <= [60, 50, 60, 50]).all()


def test_a_degenerate_box_is_submitted_but_not_followed(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outside(*inputs: Any) -> dict[str, torch.Tensor]:
        boxes = torch.tensor([0.0, 0.3, 0.05, 0.6]).expand(1, 8, 8, 4)
        return {"score_map": torch.zeros(1, 8, 8), "boxes": boxes}

    frame = video(1)[0]
    (target,) = tracker.start([frame], [(0.0, 40.0, 30.0, 80.0)])
    monkeypatch.setattr(tracker, "model", outside)
    boxes, _ = tracker.step([target], [frame])
    assert boxes[0, 0] == boxes[0, 2] == 0
    assert target.box == (0.0, 40.0, 30.0, 80.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tracks_on_the_cpu(model: LoRAT, dtype: torch.dtype) -> None:
    frames = video(4)
    half, full = Tracker(model, device="cpu", dtype=dtype), Tracker(model, device="cpu")
    half.init(frames[0], BOX)
    full.init(frames[0], BOX)
    for frame in frames[1:]:
        assert abs(half.update(frame)[1] - full.update(frame)[1]) < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_cuda_tracks_what_the_cpu_tracks(model: LoRAT, dtype: torch.dtype | None) -> None:
    frames = video(EAGER_CALLS + 4)
    cuda, cpu = Tracker(model, device="cuda", dtype=dtype), Tracker(model, device="cpu")
    cuda.init(frames[0], BOX)
    cpu.init(frames[0], BOX)
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    for frame in frames[1:]:
        (box, score), (expected, expected_score) = cuda.update(frame), cpu.update(frame)
        assert abs(score - expected_score) < tolerance
        if dtype is torch.float32:
            np.testing.assert_allclose(box, expected, atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_cuda_graphs_track_what_kernels_one_by_one_track(
    model: LoRAT, dtype: torch.dtype | None
) -> None:
    frames = video(EAGER_CALLS + 4)
    captured = Tracker(model, device="cuda", dtype=dtype)
    eager = Tracker(model, device="cuda", dtype=dtype, capture=False)
    captured.init(frames[0], BOX)
    eager.init(frames[0], BOX)
    for frame in frames[1:]:
        (box, score), (expected, expected_score) = captured.update(frame), eager.update(frame)
        np.testing.assert_allclose(box, expected, atol=0.05 if dtype is torch.float32 else 1)
        assert abs(score - expected_score) < (1e-5 if dtype is torch.float32 else 0.01)
    assert captured.num_captured == 1
    assert eager.num_captured == 0


def test_captured_steps_track_what_the_cpu_tracks(model: LoRAT, tracker: Tracker) -> None:
    """Whichever targets share a batch, and whatever sizes their regions have."""
    other = Tracker(model, device="cpu")
    recorder = as_on_a_gpu(other)
    videos = [video(11, width=100 + 70 * s, height=90 + 40 * s, seed=s) for s in range(3)]
    first = [frames[0] for frames in videos]
    boxes = [BOX, (-10, 20, 60, 85), (20, 20, 180, 150)]
    here, there = tracker.start(first, boxes), other.start(first, boxes)
    for step in range(1, 11):
        chosen = [0, 1, 2] if step % 2 else [2, 0]
        frames = [videos[number][step] for number in chosen]
        expected = tracker.step([here[number] for number in chosen], frames)
        found = other.step([there[number] for number in chosen], frames)
        for given, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(given, wanted)
    assert recorder.num_records == other.num_captured == 2


def test_templates_are_stacked_again_only_for_other_targets(model: LoRAT, tracker: Tracker) -> None:
    frames = video(6)
    boxes = [BOX, (20, 20, 60, 70)]
    other = Tracker(model, device="cpu")
    as_on_a_gpu(other)
    first, second = other.start([frames[0]] * 2, boxes)
    stacked = other._stack([first, second])
    assert other._stack([first, second]) is stacked
    assert other._stack([second, first]) is not stacked
    expected = tracker.start([frames[0]] * 2, boxes)
    for step, frame in enumerate(frames[1:]):
        tracker._stacked = None
        if step >= EAGER_CALLS + 1:  # the step is a replay
            first.template_CHW, second.template_CHW = second.template_CHW, first.template_CHW
            expected[0].template_CHW, expected[1].template_CHW = (
                expected[1].template_CHW,
                expected[0].template_CHW,
            )
        for given, wanted in zip(
            other.step([first, second], [frame] * 2),
            tracker.step(expected, [frame] * 2),
            strict=True,
        ):
            np.testing.assert_array_equal(given, wanted)


def test_other_weights_are_tracked_with_at_once(model: LoRAT) -> None:
    tracker, frames = Tracker(model, device="cpu"), video(8)
    as_on_a_gpu(tracker)
    targets = tracker.start(frames[:1], [BOX])
    for frame in frames[1:6]:
        tracker.step(targets, [frame])
    weights = build_model(TrainConfig(variant="N-112", backbone="none", seed=4)).merge()
    expected = Tracker(weights, device="cpu").step(copy.deepcopy(targets), [frames[6]])
    tracker.model.load_state_dict(weights.state_dict(), assign=True)
    for given, wanted in zip(tracker.step(targets, [frames[6]]), expected, strict=True):
        np.testing.assert_array_equal(given, wanted)


def test_threads_that_share_captured_steps_take_turns(model: LoRAT, tracker: Tracker) -> None:
    other = Tracker(model, device="cpu")
    as_on_a_gpu(other)

    def track(with_: Tracker, seed: int) -> list[Any]:
        frames = video(7, width=120 + 40 * seed, seed=seed)
        targets = with_.start(frames[:1], [BOX])
        return [with_.step(targets, [frame]) for frame in frames[1:]]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: track(other, seed), range(4)))
    for seed in range(4):
        np.testing.assert_array_equal(
            [np.append(*part) for part in found[seed]],
            [np.append(*part) for part in track(tracker, seed)],
        )


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
def test_a_tracker_that_is_left_frees_its_memory_at_once(model: LoRAT, captured: bool) -> None:
    tracker, frames = Tracker(model, device="cpu"), video(6)
    if captured:
        as_on_a_gpu(tracker)
    tracker.init(frames[0], BOX)
    for frame in frames[1:]:
        tracker.update(frame)
    weights = weakref.ref(next(tracker.model.parameters()))
    gc.disable()
    try:
        del tracker
        assert weights() is None
    finally:
        gc.enable()


def test_stages_are_told_in_their_order(model: LoRAT) -> None:
    tracker, told, frames = Tracker(model, device="cpu"), [], video(3)
    tracker.after_stage = told.append
    tracker.init(frames[0], BOX)
    for frame in frames[1:]:
        tracker.update(frame)
    assert told == [*STAGES, *STAGES]


def test_weights_rounded_beforehand_give_autocast_the_same_bits(model: LoRAT) -> None:
    network = model.merge()
    rounded = copy.deepcopy(network)
    round_products(rounded, torch.bfloat16)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32, torch.bfloat16}
    inputs = torch.randn(2, 3, 56, 56), torch.randn(2, 3, 112, 112), torch.ones(2, 4, 4).long()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, found = network(*inputs), rounded(*inputs)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_given_model_is_left_as_it_is(model: LoRAT) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = len(model.trainable_parameters())
    Tracker(model, device="cpu", dtype=torch.bfloat16)
    deployable = model.merge()
    Tracker(deployable, device="cpu", dtype=torch.bfloat16)
    assert next(deployable.parameters()).dtype == torch.float32
    assert len(model.trainable_parameters()) == trainable
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_update_before_init_is_a_user_error(model: LoRAT) -> None:
    with pytest.raises(UserError, match="init"):
        Tracker(model, device="cpu").update(video(1)[0])


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((200, 10, 240, 50), "outside"),
        ((-40, 10, -1, 50), "outside"),
        ((50, 40, 50, 80), "empty"),
        ((50, 40, 20, 80), "empty"),
        ((50, 40, float("nan"), 80), "finite"),
        ((50, 40, 80), "four"),
    ],
)
def test_an_unusable_box_is_a_user_error(
    tracker: Tracker, box: tuple[float, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tracker.init(video(1)[0], box)


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((20, 20), np.uint8),
        np.zeros((20, 20, 4), np.uint8),
        np.zeros((20, 20, 3), np.float32),
        np.zeros((0, 20, 3), np.uint8),
        None,
    ],
)
def test_a_frame_that_is_no_rgb_image_is_a_user_error(tracker: Tracker, frame: Any) -> None:
    with pytest.raises(UserError, match="RGB"):
        tracker.init(frame, (1, 1, 10, 10))


def test_an_absent_device_is_a_user_error(model: LoRAT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="has none"):
        Tracker(model, device="cuda")


def test_output_that_is_not_finite_is_a_user_error(model: LoRAT) -> None:
    broken = model.merge()
    with torch.no_grad():
        next(broken.head.parameters()).fill_(float("nan"))
    tracker = Tracker(broken, device="cpu")
    frame = video(1)[0]
    tracker.init(frame, BOX)
    with pytest.raises(UserError, match="not finite"):
        tracker.update(frame)


def test_the_package_offers_the_tracker() -> None:
    import lorat

    assert lorat.Tracker is Tracker
    with pytest.raises(AttributeError, match="no attribute Trackers"):
        _ = lorat.Trackers  # type: ignore[attr-defined]
