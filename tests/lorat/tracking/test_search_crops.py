"""Regions that are resampled on the device become the crops that the host makes."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorat.image.crops import CropParams, align, crop_params
from lorat.tracking import search_crops
from lorat.tracking.search_crops import COLUMNS, WHOLE_LINES, DeviceCrops, HostCrops
from tests.lorat.tracking.recorded_ops import RecordedOps

CPU = torch.device("cpu")
SIZE = 56
BOXES = {
    "inside": (60.3, 50.1, 90.7, 85.2),
    "at the left border": (-8.0, 40.0, 22.5, 70.0),
    "at a corner": (135.0, 95.5, 180.0, 150.0),
    "larger than the frame": (-300.0, -200.0, 500.0, 400.0),
    "wide": (0.5, 60.0, 159.0, 61.5),
    "tiny": (80.2, 60.9, 80.7, 61.1),
    "outside": (900.0, 900.0, 930.0, 940.0),
}


def frame_of(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def both(
    frames: list[np.ndarray], nominal: list[CropParams], fills: list[np.ndarray], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    made = []
    params = []
    for way in (HostCrops(size, CPU), DeviceCrops(size, CPU)):
        adjusted, packed = way.cut(frames, nominal, fills)
        params.append(adjusted)
        made.append(way.crops(way.send(packed), len(frames)))
    assert params[0] == params[1]
    return made[0], made[1]


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_the_pixels_are_the_same(box: tuple[float, ...], factor: float) -> None:
    fill = np.array([101.25, 3.5, 200.0], np.float32)
    nominal = crop_params(box, factor, SIZE)
    host, device = both([frame_of(160, 120)], [nominal], [fill], SIZE)
    assert host.shape == (1, SIZE, SIZE, 3)
    assert torch.equal(host, device)


def test_a_batch_of_many_sizes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_crops, "STRIP_LINES", 50)
    rng = np.random.default_rng(5)
    frames, nominal, fills = [], [], []
    for seed in range(24):
        width, height = (int(v) for v in rng.integers(20, 900, 2))
        corner = rng.uniform(-0.2, 1.0, 2) * (width, height)
        sides = np.exp(rng.uniform(np.log(4), np.log(600), 2))
        box = (*corner.tolist(), *(corner + sides).tolist())
        frames.append(frame_of(width, height, seed))
        nominal.append(crop_params(box, 4.0, SIZE))
        fills.append(rng.uniform(0, 255, 3).astype(np.float32))
    host, device = both(frames, nominal, fills, SIZE)
    assert torch.equal(host, device)


def test_frames_may_be_views_and_may_not_be_written_to() -> None:
    frame = frame_of(200, 400)
    mirrored = frame[:, ::-1, ::-1]
    frame.setflags(write=False)
    nominal = [crop_params((50, 50, 150, 250), 4.0, SIZE)] * 2
    host, device = both([frame, mirrored], nominal, [np.zeros(3, np.float32)] * 2, SIZE)
    assert torch.equal(host, device)


def test_only_what_the_crop_needs_goes_up() -> None:
    way, fill = DeviceCrops(SIZE, CPU), np.zeros(3, np.float32)
    table = COLUMNS * 8
    frame = frame_of(1280, 720)

    for side in (20.0, 100.0, 140.0, 300.0, 719.0, None):
        box = (10.0, 5.0, 10.0 + side, 5.0 + side) if side else (2e3, 0.0, 3e3, 99.0)
        nominal = crop_params(box, 1.0, SIZE)
        left, top, right, bottom = align(nominal, SIZE, 1280, 720).src
        assert right - left <= (side or 0) + 20
        # Of more than a few lines per row of the crop, two.
        num_lines = bottom - top if bottom - top <= WHOLE_LINES * SIZE else 2 * SIZE
        num_pixels = (right - left) * num_lines
        assert way.cut([frame], [nominal], [fill])[1] == table + 3 * num_pixels


def test_the_buffers_grow_and_then_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_crops, "FIRST_BYTES", COLUMNS * 8)
    way, host = DeviceCrops(SIZE, CPU), HostCrops(SIZE, CPU)
    fill = [np.zeros(3, np.float32)] * 4
    frames = [frame_of(160, 120, seed) for seed in range(4)]
    places = []
    for num in (1, 4, 2, 4, 1):
        nominal = [crop_params(BOXES["inside"], 4.0, SIZE)] * num
        sent = way.send(way.cut(frames[:num], nominal, fill[:num])[1])
        expected = host.cut(frames[:num], nominal, fill[:num])[1]
        assert np.array_equal(way.crops(sent, num).numpy(), expected)
        places.append(sent.data_ptr())
    assert len(set(places)) == 2
    assert len(set(places[1:])) == 1


@pytest.mark.parametrize("num", [1, 2])
def test_an_empty_region_at_the_end_of_a_full_buffer_is_filled(
    num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_crops, "FIRST_BYTES", COLUMNS * 8)
    fill = np.array([1.0, 2.0, 3.0], np.float32)
    nominal = [crop_params(BOXES["outside"], 4.0, SIZE)] * num
    host, device = both([frame_of(160, 120)] * num, nominal, [fill] * num, SIZE)
    assert torch.equal(host, device)


class Copies(TorchDispatchMode):
    """Notes the place and the length of what is copied to a tensor, in bytes."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target
        self.made: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.made.append((args[0].data_ptr() - self._target.data_ptr(), args[0].numel()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_threads", [1, 4])
def test_parts_go_up_once_each_while_the_next_are_packed(
    num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: num_threads)
    monkeypatch.setattr(search_crops, "PART_BYTES", 3 * 1000)
    way, host = DeviceCrops(SIZE, CPU), HostCrops(SIZE, CPU)
    boxes = [*BOXES.values()] * 4
    frames = [frame_of(160, 120, seed) for seed in range(len(boxes))]
    given = (
        frames,
        [crop_params(box, 4.0, SIZE) for box in boxes],
        [np.full(3, float(number), np.float32) for number in range(len(boxes))],
    )
    expected = host.cut(*given)[1]
    for _ in range(5):
        way._sent.fill_(99)
        with Copies(way._sent) as copies:
            packed = way.cut(*given)[1]
            num_early = len(copies.made)
            sent = way.send(packed)
        if num_threads == 1:  # several may all be done before the first is told
            assert num_early >= 1
        assert len(copies.made) == num_early + 1
        assert np.cumsum([0, *(length for _, length in copies.made)]).tolist() == [
            *(begin for begin, _ in copies.made),
            packed,
        ]
        assert np.array_equal(way.crops(sent, len(boxes)).numpy(), expected)


def test_little_goes_up_in_one_copy() -> None:
    way = DeviceCrops(SIZE, CPU)
    num = len(BOXES)
    nominal = [crop_params(box, 4.0, SIZE) for box in BOXES.values()]
    _, packed = way.cut([frame_of(160, 120)] * num, nominal, [np.zeros(3, np.float32)] * num)
    with Copies(way._sent) as copies:
        way.send(packed)
    assert copies.made == [(0, packed)]


def test_the_first_are_told_while_later_ones_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    told = [threading.Event() for _ in range(6)]
    in_time: list[bool] = []

    def work(item: int) -> None:
        if item >= 4:  # the first four may begin at the same time
            in_time.append(told[item - 4].wait(10))

    def first_done(num: int) -> None:
        for event in told[:num]:
            event.set()

    search_crops._Threads().in_order(work, range(6), first_done)
    assert in_time == [True, True]
    assert all(event.is_set() for event in told)


def test_no_thread_packs_any_more_once_one_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    ended: list[int] = []

    def work(item: int) -> None:
        if item == 1:
            raise ValueError("damaged")
        time.sleep(0.02)
        ended.append(item)

    first_done: list[int] = []
    with pytest.raises(ValueError, match="damaged"):
        search_crops._Threads().in_order(work, range(10), first_done.append)
    assert sorted(ended) == [0, *range(2, 10)]
    assert first_done == [1]


def test_a_recorded_call_fits_regions_of_other_sizes() -> None:
    way, host = DeviceCrops(SIZE, CPU), HostCrops(SIZE, CPU)
    fill = [np.array([9.0, 8.0, 7.0], np.float32)]
    replay = None
    for box in BOXES.values():
        given = [frame_of(160, 120)], [crop_params(box, 4.0, SIZE)], fill
        sent = way.send(way.cut(*given)[1])
        if replay is None:
            replay = RecordedOps().record(lambda sent=sent: way.crops(sent, 1))  # type: ignore[misc]
        assert np.array_equal(replay().numpy(), host.cut(*given)[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_resamples_to_the_same_pixels() -> None:
    frames = [frame_of(160, 120, seed) for seed in range(len(BOXES))]
    nominal = [crop_params(box, 4.0, SIZE) for box in BOXES.values()]
    fills = [np.full(3, 17.5, np.float32)] * len(BOXES)
    way, host = DeviceCrops(SIZE, torch.device("cuda")), HostCrops(SIZE, CPU)
    made = way.crops(way.send(way.cut(frames, nominal, fills)[1]), len(BOXES))
    assert np.array_equal(made.cpu().numpy(), host.cut(frames, nominal, fills)[1])
