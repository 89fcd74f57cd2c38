"""Pairs are a function of (seed, i), drawn by the published rules, in exact shares."""

from __future__ import annotations

import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorat.config.training import AugmentConfig, SamplingConfig
from lorat.config.variants import VARIANTS
from lorat.data import synthetic
from lorat.data.pairs.augment_draws import AUGMENT_FIELDS
from lorat.data.pairs.mixture import DatasetSchedule
from lorat.data.pairs.sampler import PairSampler, load_pairs
from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.from_memory import write_dataset
from lorat.data.shards.images import ImageReader
from lorat.data.shards.windows import WindowLaw, window_of
from lorat.errors import UserError
from lorat.image.boxes import clip_box
from lorat.image.codec import DamagedImage
from lorat.image.crops import resample
from tests.lorat.fake_index import FakeIndex, FakeReader
from tests.lorat.small_sets import tracks


def make_sampler(
    indexes: list[Any], weights: list[float] | None = None, seed: int = 42, **sampling: Any
) -> PairSampler:
    return PairSampler(
        indexes,
        weights or [1.0] * len(indexes),
        VARIANTS["T-112"],
        SamplingConfig(**sampling),
        AugmentConfig(),
        seed,
    )


def test_a_pair_is_a_function_of_seed_and_number() -> None:
    indexes = [FakeIndex([30, 40, 1, 25], seed=1), FakeIndex([1] * 50, seed=2)]
    first, second = make_sampler(indexes), make_sampler(indexes)
    forwards = [first.sample(i) for i in range(200)]
    backwards = [second.sample(i) for i in reversed(range(200))]
    assert forwards == backwards[::-1]
    assert forwards != [make_sampler(indexes, seed=43).sample(i) for i in range(200)]
    assert pickle.loads(pickle.dumps(first)).sample(77) == forwards[77]


@pytest.mark.parametrize(
    "weights", [[1, 1, 1, 1], [1, 2], [0.5, 0.3, 0.2], [1, 1 / 3, 0.123], [3], [0.7, 0.01, 12.5]]
)
def test_data_sets_come_in_exact_shares(weights: list[float]) -> None:
    schedule = DatasetSchedule(weights, seed=0)
    total = sum(weights)
    for block in (schedule.period, 131_072):
        drawn = [schedule(i)[0] for i in range(block)]
        counts = [drawn.count(d) for d in range(len(weights))]
        exact = [block * w / total for w in weights]
        assert max(abs(c - e) for c, e in zip(counts, exact, strict=True)) <= 1 + 64 * (
            block % schedule.period > 0
        )
    if block % schedule.period == 0 and weights == [1, 1, 1, 1]:
        assert counts == [32_768] * 4


def test_equal_weights_are_exact_in_every_batch() -> None:
    schedule = DatasetSchedule([1, 1, 1, 1], seed=0)
    for step in range(50):
        drawn = [schedule(i)[0] for i in range(step * 128, step * 128 + 128)]
        assert Counter(drawn) == dict.fromkeys(range(4), 32)
    # A worker that takes every fourth pair sees all data sets, in no fixed order.
    strided = Counter(schedule(i)[0] for i in range(0, 8000, 4))
    assert min(strided.values()) > 400


@pytest.mark.parametrize("weights", [[1, 2, 4], [0.31, 0.27, 0.42]])
def test_every_pair_of_a_data_set_has_its_own_ordinal(weights: list[float]) -> None:
    schedule = DatasetSchedule(weights, seed=3)
    seen: dict[int, list[int]] = {}
    for index in range(3 * schedule.period):
        dataset, ordinal = schedule(index)
        seen.setdefault(dataset, []).append(ordinal)
    for ordinals in seen.values():
        assert sorted(ordinals) == list(range(len(ordinals)))


def test_unusable_weights_are_refused() -> None:
    for weights in ([0.0, 1.0], [-1.0], [float("nan")], []):
        with pytest.raises(UserError, match="weights"):
            DatasetSchedule(weights, seed=0)
    with pytest.raises(UserError, match="one each"):
        make_sampler([FakeIndex([3])], [1.0, 2.0])


def test_tracks_are_dealt_without_replacement_and_reshuffled() -> None:
    sampler = make_sampler([FakeIndex([5] * 97)], min_object_size=0.0)
    cycles = [[sampler.sample(c * 97 + i).track for i in range(97)] for c in range(3)]
    for cycle in cycles:
        assert sorted(cycle) == list(range(97))
    assert cycles[0] != cycles[1] != cycles[2]


def test_frames_are_valid_near_and_different() -> None:
    index = FakeIndex([400, 3, 250], valid_share=0.4, stride=2, seed=5)
    sampler = make_sampler([index], max_gap=40)
    gaps = []
    for number in range(3000):
        spec = sampler.sample(number)
        for row in (spec.template_row, spec.search_row):
            assert index.valid[row]
            assert index.track_start[spec.track] <= row < index.track_start[spec.track + 1]
        gap = int(index.frame_number[spec.search_row] - index.frame_number[spec.template_row])
        assert abs(gap) <= 40
        if spec.track != 1:
            gaps.append(gap)
    assert min(gaps) <= -38
    assert max(gaps) >= 38
    assert 0 not in gaps
    assert abs(np.mean(gaps)) < 1.5
    near = np.mean([abs(gap) <= 20 for gap in gaps])
    assert abs(near - 0.5) < 0.04  # uniform over the candidates


def test_search_frames_are_uniform_over_the_candidates() -> None:
    sampler = make_sampler([FakeIndex([7])], min_object_size=0.0)
    pairs = Counter((s.template_row, s.search_row) for s in map(sampler.sample, range(8400)))
    assert len(pairs) == 42
    assert min(pairs.values()) > 140
    assert max(pairs.values()) < 270


def test_a_one_frame_track_pairs_with_itself() -> None:
    sampler = make_sampler([FakeIndex([1] * 20)])
    spec = sampler.sample(0)
    assert spec.template_row == spec.search_row
    assert spec.template_params != spec.search_params


def test_a_lone_valid_frame_pairs_with_itself() -> None:
    index = FakeIndex([300], valid_share=0.0)
    index.valid_rows = np.array([3, 250], np.int64)
    index.valid_start = np.array([0, 2], np.int64)
    sampler = make_sampler([index])
    for number in range(50):
        spec = sampler.sample(number)
        assert spec.template_row == spec.search_row


def test_tracks_without_a_usable_box_are_left_out() -> None:
    index = FakeIndex([10, 10, 10])
    index.valid_rows = np.concatenate([np.arange(10), np.arange(20, 30)])
    index.valid_start = np.array([0, 10, 10, 20], np.int64)
    sampler = make_sampler([index])
    assert {sampler.sample(i).track for i in range(100)} == {0, 2}
    index.valid_start = np.zeros(4, np.int64)
    with pytest.raises(UserError, match="no frame with a usable box"):
        make_sampler([index])


def test_search_boxes_keep_their_smallest_size() -> None:
    sampler = make_sampler([FakeIndex([50] * 5)])
    for number in range(500):
        spec = sampler.sample(number)
        x1, y1, x2, y2 = clip_box(spec.search_params.apply(spec.search_box), 112, 112)
        assert min(x2 - x1, y2 - y1) >= 10


def test_a_track_without_an_acceptable_crop_is_replaced() -> None:
    flat, good = FakeIndex([5]), FakeIndex([5] * 9, seed=1)
    flat.box[:] = [10.0, 10.0, 300.0, 10.5]
    sampler = make_sampler([flat, good])
    drawn = [sampler.sample(i) for i in range(100)]
    assert {spec.dataset for spec in drawn} == {1}
    with pytest.raises(UserError, match="min_object_size"):
        make_sampler([flat]).sample(0)


def test_replacements_are_deterministic_and_drawn_by_weight() -> None:
    sampler = make_sampler([FakeIndex([5] * 50), FakeIndex([5] * 50, seed=1)], [3, 1])
    assert sampler.sample(7, 1) == sampler.sample(7, 1)
    assert sampler.sample(7, 1) != sampler.sample(7, 2)
    share = np.mean([sampler.sample(i, 1).dataset == 0 for i in range(4000)])
    assert abs(share - 0.75) < 0.03


def test_a_batch_has_the_documented_arrays() -> None:
    indexes = [FakeIndex([20] * 3), FakeIndex([1] * 4, seed=1)]
    readers = [FakeReader(index) for index in indexes]
    batch = load_pairs(make_sampler(indexes), readers, [4, -1, 9])
    assert {name: (a.dtype.name, a.shape) for name, a in batch.items()} == {
        "template": ("uint8", (3, 56, 56, 3)),
        "search": ("uint8", (3, 112, 112, 3)),
        "template_box": ("float32", (3, 4)),
        "search_box": ("float32", (3, 4)),
        "augment": ("float32", (3, len(AUGMENT_FIELDS))),
        "index": ("int64", (3,)),
        "bytes_read": ("int64", (3,)),
        "damaged": ("int32", (3,)),
        "dataset": ("int32", (3,)),
    }
    assert batch["index"].tolist() == [4, -1, 9]
    assert batch["dataset"][1] == -1
    for name in ("template", "search", "template_box", "augment", "bytes_read", "damaged"):
        assert not batch[name][1].any()
        if name != "damaged":
            assert batch[name][0].any()


def test_pairs_do_not_depend_on_how_they_are_batched() -> None:
    index = FakeIndex([20] * 3)
    sampler = make_sampler([index])
    whole = load_pairs(sampler, [FakeReader(index)], range(6))
    parts = [load_pairs(sampler, [FakeReader(index)], part) for part in ([0, 1], [2], [3, 4, 5])]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))


def test_each_image_is_read_once_and_its_bytes_are_counted() -> None:
    index = FakeIndex([1] * 5)
    reader = FakeReader(index)
    batch = load_pairs(make_sampler([index]), [reader], [0])
    assert len(reader.read_rows) == 1
    assert batch["bytes_read"][0] == index.length[reader.read_rows[0]]


def test_a_damaged_image_is_counted_logged_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    index = FakeIndex([1] * 40)
    sampler = make_sampler([index])
    bad = sampler.sample(3).template_row
    batch = load_pairs(sampler, [FakeReader(index, damaged=[bad])], [2, 3])
    assert batch["damaged"].tolist() == [0, 1]
    assert f"row {bad}" in caplog.text
    again = load_pairs(sampler, [FakeReader(index, damaged=[bad])], [3])
    np.testing.assert_array_equal(batch["search"][1], again["search"][0])
    replacement = sampler.sample(3, 1)
    assert batch["augment"][1].tolist() == np.float32(replacement.augment).tolist()


def test_nothing_but_damage_ends_in_an_error() -> None:
    index = FakeIndex([1] * 4)
    with pytest.raises(DamagedImage):
        load_pairs(make_sampler([index]), [FakeReader(index, damaged=range(4))], [0])


def test_a_window_stored_set_gives_the_crops_of_the_full_frames() -> None:
    """Same pixels, stored in part: same boxes and, inside the window, the same crop."""
    full = FakeIndex([6] * 4, frame_wh=(320, 240))
    windowed = FakeIndex(
        [6] * 4,
        frame_wh=(320, 240),
        window=np.tile(np.array([20, 10, 310, 235], np.float32), (24, 1)),
        stored_wh=(290, 225),
    )

    class Part(FakeReader):
        def decode(self, row: int) -> np.ndarray:
            return FakeReader(full).decode(row)[10:235, 20:310]

    whole = load_pairs(make_sampler([full]), [FakeReader(full)], range(12))
    part = load_pairs(make_sampler([windowed]), [Part(windowed)], range(12))
    # Near the window's edge the crop is aligned with the window's pixels, not the frame's.
    assert np.abs(whole["search_box"] - part["search_box"]).max() < 2.0
    same = np.abs(whole["search_box"] - part["search_box"]).max(axis=1) < 1e-3
    assert same.any()


@pytest.mark.parametrize("sides", [(100.0, 100.0), (30.0, 90.0), (160.0, 40.0)])
def test_at_most_one_pair_in_a_hundred_reaches_outside_of_its_stored_window(
    sides: tuple[float, float],
) -> None:
    index = FakeIndex([1] * 3000, frame_wh=(4000, 4000), seed=9)
    index.box[:] = [2000, 2000, 2000 + sides[0], 2000 + sides[1]]
    variant = VARIANTS["B-224"]
    sampler = PairSampler([index], [1.0], variant, SamplingConfig(), AugmentConfig(), 5)
    window = window_of(index.box[0], (4000, 4000), WindowLaw.for_variant(variant))
    outside = 0
    for number in range(3000):
        crop = sampler.sample(number).search_params.inverse().apply((0, 0, 224, 224))
        outside += crop[0] < window[0] or crop[1] < window[1]
        outside += not (crop[0] < window[0] or crop[1] < window[1]) and (
            crop[2] > window[2] or crop[3] > window[3]
        )
    assert outside / 3000 <= 0.01 + 3 * np.sqrt(0.01 / 3000)


def test_pairs_of_real_shards_equal_those_of_their_index(tmp_path: Path) -> None:
    """The same pairs come through the shards on disk as through arrays in memory."""
    index = FrameIndex.open(synthetic.ensure(tmp_path, "val"))
    sampler = make_sampler([index])
    reader = ImageReader(index)
    batch = load_pairs(sampler, [reader], range(8))
    assert batch["bytes_read"].sum() == reader.bytes_read
    assert not batch["damaged"].any()
    for row in range(8):
        spec = sampler.sample(row)
        assert index.valid[spec.search_row]
        crop, adjusted = resample(
            reader.decode(spec.search_row),
            spec.search_params,
            112,
            index.mean_rgb[spec.search_row],
            exact=False,
        )
        np.testing.assert_array_equal(batch["search"][row], crop)
        np.testing.assert_allclose(
            batch["search_box"][row], adjusted.apply(spec.search_box), rtol=1e-5
        )


def test_a_stored_window_that_cannot_be_cut_is_still_read_once(tmp_path: Path) -> None:
    """Small frames are stored whole, and a crop of one needs all of it."""

    class Counting(ImageReader):
        num_reads = num_whole = 0

        def read(self, row: int) -> bytes:
            self.num_reads += 1
            return super().read(row)

        def decode_region(self, row: int, region_px: Any) -> Any:
            image, window = super().decode_region(row, region_px)
            self.num_whole += window == tuple(self.index.window[row].tolist())
            return image, window

    index = write_dataset(str(tmp_path), tracks(size_wh=(96, 72)), stored="window")
    reader = Counting(index)
    batch = load_pairs(make_sampler([index]), [reader], range(8))
    assert not batch["damaged"].any()
    assert reader.num_reads == 16
    assert reader.num_whole > 0
    assert reader.bytes_read == batch["bytes_read"].sum()


def test_threads_draw_what_one_thread_draws() -> None:
    sampler = make_sampler([FakeIndex([40] * 30)])
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(sampler.sample, range(2000)))
    assert together == [sampler.sample(i) for i in range(2000)]
