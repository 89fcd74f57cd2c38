"""Stored windows: small, sharp enough, and rarely left by a crop."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

from lorat.config.training import AugmentConfig, SamplingConfig
from lorat.config.variants import VARIANTS
from lorat.data.pairs.sampler import PairSampler, load_pairs
from lorat.data.shards.from_memory import write_dataset
from lorat.data.shards.images import ImageReader
from lorat.data.shards.windows import SEGMENT_WIDTH, WindowLaw, cut_window, needed_scale, window_of
from lorat.image.crops import crop_params, jittered_crop_params
from tests.lorat import small_sets

FRAME_WH = (1280, 720)


@pytest.mark.parametrize("variant", ["B-224", "B-378"])
@pytest.mark.parametrize(
    "box",
    [
        (600.0, 320.0, 640.0, 370.0),
        (40.0, 30.0, 75.0, 60.0),
        (1190.0, 500.0, 1280.0, 700.0),
        (300.0, 340.0, 420.0, 370.0),
    ],
)
def test_at_most_one_search_crop_in_a_hundred_reaches_outside(
    variant: str, box: tuple[float, float, float, float]
) -> None:
    row = VARIANTS[variant]
    left, top, right, bottom = window_of(np.array(box), FRAME_WH, WindowLaw.for_variant(row))
    rng = np.random.default_rng(4)
    count = outside = 0
    while count < 6000:
        params, accepted = jittered_crop_params(
            box, row.search_area_factor, row.search_size, rng,
            scale_jitter=0.25, translation_jitter=3.0, min_object_size=10.0,
        )  # fmt: skip
        if not accepted:
            continue
        count += 1
        x1, y1, x2, y2 = params.inverse().apply((0, 0, row.search_size, row.search_size))
        outside += (
            max(x1, 0) < left
            or max(y1, 0) < top
            or min(x2, FRAME_WH[0]) > right
            or min(y2, FRAME_WH[1]) > bottom
        )
    assert outside / count <= 0.01 + 2 * np.sqrt(0.01 / count)


@pytest.mark.parametrize("variant", ["B-224", "B-378", "T-112"])
@pytest.mark.parametrize("sides", [(400.0, 300.0), (90.0, 250.0), (30.0, 20.0)])
def test_a_window_keeps_the_resolution_of_both_crops(
    variant: str, sides: tuple[float, float]
) -> None:
    row = VARIANTS[variant]
    law = WindowLaw.for_variant(row)
    box = (200.0, 200.0, 200.0 + sides[0], 200.0 + sides[1])
    search = crop_params(box, row.search_area_factor, row.search_size).scale_x
    template = crop_params(box, row.template_area_factor, row.template_size).scale_x
    scale = needed_scale(*sides, law)
    assert scale == pytest.approx(min(1.0, max(search, template)))
    image = np.zeros((720, 1280, 3), np.uint8)
    (x1, y1, x2, y2), stored = cut_window(image, np.array(box), law)
    assert stored.shape[1] >= scale * (x2 - x1) - 1e-6
    assert stored.shape[0] >= scale * (y2 - y1) - 1e-6
    assert stored.shape[1] <= x2 - x1
    assert stored.shape[1] <= scale * (x2 - x1) + SEGMENT_WIDTH


def test_windows_are_much_smaller_than_frames() -> None:
    law = WindowLaw()
    for side in (30, 100, 200, 400):
        box = np.array([600, 300, 600 + side, 300 + side], float)
        _, stored = cut_window(np.zeros((1080, 1920, 3), np.uint8), box, law)
        assert stored.shape[0] * stored.shape[1] < 0.35 * 1920 * 1080


def test_a_frame_without_box_keeps_a_small_picture() -> None:
    window, stored = cut_window(np.zeros((720, 1280, 3), np.uint8), None, WindowLaw())
    assert window == (0, 0, 1280, 720)
    assert max(stored.shape) <= 64


@pytest.mark.parametrize(
    "box", [(-50.0, 10.0, 3.0, 60.0), (1275.0, 700.0, 1400.0, 900.0), (0.0, 0.0, 1280.0, 720.0),
            (10.0, 10.0, 10.5, 700.0)],
)  # fmt: skip
def test_odd_boxes_have_a_window_inside_the_frame(box: tuple[float, ...]) -> None:
    x1, y1, x2, y2 = window_of(np.array(box), FRAME_WH, WindowLaw())
    assert 0 <= x1 < x2 <= 1280
    assert 0 <= y1 < y2 <= 720


def test_windows_give_three_times_the_pairs_of_full_720p_frames(tmp_path: Path) -> None:
    made = []
    for track in small_sets.tracks(2, 8, size_wh=FRAME_WH):
        corner = np.random.default_rng(1).uniform(200, 500, (8, 2))
        made.append(dataclasses.replace(track, box=np.concatenate([corner, corner + 70], axis=1)))
    variant, seconds = VARIANTS["B-224"], {}
    for stored in ("full", "window"):
        index = write_dataset(str(tmp_path / stored), made, stored=stored)  # type: ignore[arg-type]
        sampler = PairSampler([index], [1.0], variant, SamplingConfig(), AugmentConfig(), 3)
        readers = [ImageReader(index)]
        load_pairs(sampler, readers, range(4))
        start = time.process_time()
        load_pairs(sampler, readers, range(60))
        seconds[stored] = time.process_time() - start
    assert seconds["full"] / seconds["window"] >= 3


def test_a_law_serves_smaller_variants_only() -> None:
    law = WindowLaw.for_variant(VARIANTS["L-224"])
    assert law.serves(VARIANTS["T-112"])
    assert law.serves(VARIANTS["g-224"])
    assert not law.serves(VARIANTS["B-378"])


def test_a_law_serves_no_wider_sampling_and_no_other_template() -> None:
    row = VARIANTS["B-224"]
    law = WindowLaw.for_variant(row)
    assert law.serves(row, SamplingConfig())
    for name, narrower, wider in (
        ("translation_jitter", 2.0, 4.0),
        ("scale_jitter", 0.1, 0.5),
        ("min_object_size", 20.0, 5.0),
    ):
        assert law.serves(row, SamplingConfig(**{name: narrower}))
        assert not law.serves(row, SamplingConfig(**{name: wider}))
    assert not law.serves(dataclasses.replace(row, template_area_factor=5.0))
    assert not law.serves(dataclasses.replace(row, template_area_factor=1.2))
    for wanted in VARIANTS.values():
        assert WindowLaw.for_variant(wanted).serves(wanted)
