"""Crops: the law of the jitter, the alignment with pixels, stored windows, torch's arithmetic."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from lorat.image.boxes import (
    clip_box,
    enlarge_to_minimum,
    intersects,
    rasterize,
    xywh_from_xyxy,
    xyxy_from_xywh,
)
from lorat.image.crops import (
    CropParams,
    crop_params,
    foreground_mask,
    jittered_crop_params,
    resample,
    resize_bilinear,
    round_pair,
)

FILL = np.array([10.0, 120.0, 250.0])


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("num_in", "num_out"), [(160, 112), (97, 224), (448, 224), (700, 224), (901, 378), (1, 30)]
)
def test_exact_resize_is_that_of_torch_even_on_noise(num_in: int, num_out: int) -> None:
    """Torch rounds source positions to float32 once or twice, as the processor's code has it.

    One unit in the last place of a position is all that may differ between neighbours of the
    full contrast of 255.
    """
    last_place = float(np.spacing(np.float32(num_in)))
    image = noise(num_in, max(num_in - 3, 1))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].float(),
        size=(num_out, num_out),
        mode="bilinear",
        align_corners=False,
    )[0].permute(1, 2, 0)
    result = resize_bilinear(image, num_out, num_out)
    np.testing.assert_allclose(result, expected.numpy(), atol=255 * last_place + 1e-4)


def test_fast_crop_is_the_exact_crop_rounded() -> None:
    image = noise(400, 300)
    params = crop_params((100.3, 50.2, 190.7, 160.1), 4.0, 224)
    exact, adjusted_exact = resample(image, params, 224, FILL)
    fast, adjusted_fast = resample(image, params, 224, FILL, exact=False)
    assert fast.dtype == np.uint8
    assert exact.dtype == np.float32
    assert adjusted_fast == adjusted_exact
    assert np.abs(fast - exact).max() <= 1.0


def test_outside_of_the_image_is_the_fill_colour() -> None:
    image = noise(100, 80)
    params = crop_params((80, 60, 99, 79), 4.0, 112)
    crop, adjusted = resample(image, params, 112, FILL)
    _, _, right, bottom = rasterize(clip_box(adjusted.apply((0, 0, 100, 80)), 112, 112))
    assert right < 112
    assert (crop[:, right:] == FILL.astype(np.float32)).all()
    assert (crop[bottom:] == FILL.astype(np.float32)).all()
    assert not (crop[:bottom, :right] == FILL.astype(np.float32)).all(axis=2).any()


def test_a_crop_beside_the_image_is_all_fill() -> None:
    crop, _ = resample(noise(50, 50), CropParams(1, 1, 500, 500), 112, FILL, exact=False)
    assert (crop == np.rint(FILL)).all()


def test_adjusted_parameters_map_pixel_borders_to_pixel_borders() -> None:
    image = noise(640, 480)
    rng = np.random.default_rng(0)
    for _ in range(50):
        corner = rng.uniform([0, 0], [560, 400])
        box = (*corner, *(corner + rng.uniform(5, 80, 2)))
        nominal = crop_params(box, 4.0, 224)
        crop, adjusted = resample(image, nominal, 224, FILL, exact=False)
        assert crop.shape == (224, 224, 3)
        # A whole source rectangle lands on a whole crop rectangle, close to the nominal one.
        inside = adjusted.inverse().apply((0, 0, 224, 224))
        whole = [round(v) for v in clip_box(inside, 640, 480)]
        landed = np.array(adjusted.apply(tuple(whole)))
        np.testing.assert_allclose(landed, np.round(landed), atol=2e-3)
        drift = np.array(adjusted.apply(box)) - np.array(nominal.apply(box))
        assert np.abs(drift).max() <= 1.5 * max(1.0, nominal.scale_x)


def test_rounding_after_float64_is_float32_arithmetic() -> None:
    rng = np.random.default_rng(0)
    for first, second in rng.integers(1, 8192, (500, 2)).tolist():
        ratio = np.float32(first) / np.float32(second)
        product = np.float32(second) * ratio
        assert round_pair(first / second, second * float(ratio)) == (ratio, product)
        assert round_pair(first - float(product), 0.0)[0] == np.float32(first) - product


def test_a_stored_window_gives_the_crop_of_the_full_frame() -> None:
    frame = noise(400, 300)
    window = (60.0, 30.0, 340.0, 280.0)
    stored = frame[30:280, 60:340]
    nominal = crop_params((150.5, 120.25, 210.0, 170.75), 4.0, 224)
    full, adjusted_full = resample(frame, nominal, 224, FILL)
    part, adjusted_part = resample(stored, nominal, 224, FILL, window=window)
    np.testing.assert_allclose(adjusted_part, adjusted_full, rtol=1e-6)
    np.testing.assert_allclose(part, full, atol=1e-3)


def test_the_whole_frame_as_a_window_changes_no_bit() -> None:
    frame = noise(400, 300)
    nominal = crop_params((10.5, 20.25, 80.0, 90.75), 4.0, 224)
    full, adjusted_full = resample(frame, nominal, 224, FILL)
    part, adjusted_part = resample(frame, nominal, 224, FILL, window=(0.0, 0.0, 400.0, 300.0))
    assert adjusted_part == adjusted_full
    np.testing.assert_array_equal(part, full)


def test_a_reduced_window_keeps_box_and_content_in_place() -> None:
    """A bright square stays where the adjusted parameters say, whatever the stored size."""
    frame = np.zeros((480, 640, 3), np.uint8)
    box = (300.0, 200.0, 364.0, 248.0)
    frame[200:248, 300:364] = 255
    window = (200.0, 120.0, 440.0, 330.0)
    stored = torch.nn.functional.interpolate(
        torch.from_numpy(frame[120:330, 200:440]).permute(2, 0, 1)[None].float(),
        size=(147, 168),
        mode="area",
    )[0].permute(1, 2, 0)
    nominal = crop_params(box, 4.0, 112)
    crop, adjusted = resample(stored.numpy().astype(np.uint8), nominal, 112, FILL, window=window)
    x1, y1, x2, y2 = adjusted.apply(box)
    bright = crop[..., 0] > 127
    bright &= crop[..., 2] > 127
    rows, columns = np.nonzero(bright[:112, :112] & (crop[..., 1] > 127))
    assert abs(columns.min() - x1) < 1.5
    assert abs(columns.max() + 1 - x2) < 1.5
    assert abs(rows.min() - y1) < 1.5
    assert abs(rows.max() + 1 - y2) < 1.5


def test_outside_of_a_window_is_the_fill_colour() -> None:
    frame = noise(400, 300)
    stored = frame[100:200, 150:250]
    crop, _ = resample(
        stored,
        crop_params((180, 130, 230, 180), 4.0, 224),
        224,
        FILL,
        window=(150.0, 100.0, 250.0, 200.0),
        exact=False,
    )
    assert (crop[0] == np.rint(FILL)).all()
    assert (crop[:, -1] == np.rint(FILL)).all()


def test_jitter_rejects_what_leaves_too_little_of_the_object() -> None:
    box = (50.0, 60.0, 90.0, 80.0)
    rng = np.random.default_rng(0)
    for _ in range(300):
        params, accepted = jittered_crop_params(
            box, 4.0, 224, rng, scale_jitter=0.25, translation_jitter=6, min_object_size=10
        )
        x1, y1, x2, y2 = clip_box(params.apply(box), 224, 224)
        assert accepted == (min(x2 - x1, y2 - y1) >= 10)


def test_jitter_gives_up_after_its_tries() -> None:
    rng = np.random.default_rng(0)
    _, accepted = jittered_crop_params(
        (0.0, 0.0, 400.0, 1.0),
        4.0,
        112,
        rng,
        scale_jitter=0.0,
        translation_jitter=0.0,
        min_object_size=10,
        max_tries=5,
    )
    reference = np.random.default_rng(0)
    for _ in range(5):
        reference.standard_normal(2)
        reference.uniform(-1, 1, 2)
    assert not accepted
    assert rng.random() == reference.random()


def test_mask_counts_every_touched_cell() -> None:
    mask = foreground_mask((14.0, 27.9999, 28.001, 43.0), 56, 4)
    assert mask.tolist() == [[0] * 4, [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert foreground_mask((-50, -50, 200, 200), 56, 4).all()
    with pytest.raises(ValueError, match="outside"):
        foreground_mask((-20, 0, -5, 30), 56, 4)


def test_clipping_keeps_what_is_inside() -> None:
    assert clip_box((-3.0, 2.5, 9.0, 4.0), 8, 4) == (0.0, 2.5, 8, 4.0)
    assert clip_box((9.0, -1.0, -2.0, 7.0), 8, 4) == (8, 0.0, 0.0, 4)


def test_box_conversions_and_clipping() -> None:
    boxes = np.array([[1.0, 2.0, 30.0, 40.0], [-5.0, 0.0, 10.0, 10.0]])
    np.testing.assert_array_equal(xywh_from_xyxy(xyxy_from_xywh(boxes)), boxes)
    assert enlarge_to_minimum((5, 5, 7, 30), 10) == (1, 5, 11, 30)
    assert intersects((-5, -5, 1, 1), 10, 10)
    assert not intersects((-5, -5, 0, 1), 10, 10)
    params = CropParams(2.0, 4.0, 3.0, -1.0)
    assert params.inverse().apply(params.apply((1, 2, 3, 4))) == (1, 2, 3, 4)


def test_the_decode_path_imports_no_torch() -> None:
    code = (
        "import sys, lorat.data.pairs.sampler, lorat.image.crops, lorat.metrics;"
        "import lorat.metrics.result_files, lorat.data.pairs.augment_draws;"
        "print([m for m in ('torch', 'timm', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
