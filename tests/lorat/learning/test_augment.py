"""The batched augmentation computes what torchvision and PIL compute, sample by sample."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as reference

from lorat.config.training import AugmentConfig
from lorat.config.variants import VARIANTS
from lorat.data.pairs.augment_draws import AUGMENT_FIELDS, JITTER_ORDERS, draw_augmentation
from lorat.image.crops import foreground_mask as foreground_mask_numpy
from lorat.learning.augment import (
    _compiled,
    augment,
    color_jitter,
    flip_boxes,
    foreground_mask,
    jitter_terms,
    three_augment,
)
from lorat.learning.blur import blur_kernel, gaussian_blur
from lorat.model.normalisation import IMAGENET_MEAN, IMAGENET_STD

CHOICE = AUGMENT_FIELDS.index("choice")
ADJUSTMENTS = (
    reference.adjust_brightness,
    reference.adjust_contrast,
    reference.adjust_saturation,
)


def photo(num: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth images with noise, uint8 (num, size, size, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (num, 3, 8, 8)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(
        torch.from_numpy(coarse), size=(size, size), mode="bicubic", align_corners=False
    ).numpy()
    noisy = smooth + rng.normal(0, 12, smooth.shape)
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)).permute(0, 2, 3, 1).contiguous()


def pil_three_augment(level_HWC: np.ndarray, choice: int, radius: float) -> np.ndarray:
    image = Image.fromarray(level_HWC)
    if choice == 0:
        return np.asarray(ImageOps.grayscale(image).convert("RGB"))
    if choice == 1:
        return np.asarray(ImageOps.solarize(image))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)))


def test_jitter_equals_torchvision_in_every_order() -> None:
    image_BCHW = photo(12, 40).permute(0, 3, 1, 2).float() / 255
    rng = np.random.default_rng(3)
    factors_B3 = torch.from_numpy(rng.uniform(0.6, 1.4, (12, 3)).astype(np.float32))
    order_B = torch.arange(12) % 6
    result_BCHW = color_jitter(image_BCHW, *jitter_terms(order_B, factors_B3))
    for sample in range(12):
        expected = image_BCHW[sample]
        for operation in JITTER_ORDERS[int(order_B[sample])]:
            expected = ADJUSTMENTS[operation](expected, float(factors_B3[sample, operation]))
        torch.testing.assert_close(result_BCHW[sample], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("choice", [0, 1])
def test_grayscale_and_solarize_equal_pil_to_the_last_level(choice: int) -> None:
    levels = photo(4, 56)
    result = three_augment(
        levels.permute(0, 3, 1, 2).float() / 255 + 1e-4, torch.full((4,), choice), torch.zeros(4)
    )
    for sample in range(4):
        expected = pil_three_augment(levels[sample].numpy(), choice, 0.0)
        got = (result[sample].permute(1, 2, 0) * 255).round().numpy()
        np.testing.assert_array_equal(got, expected)


def test_blur_differs_from_pil_by_rounding_only() -> None:
    num, size = 40, 112
    levels = photo(num, size, seed=5)
    radius = torch.linspace(0.1, 2.0, num)
    blurred = gaussian_blur(levels.permute(0, 3, 1, 2).float(), radius).permute(0, 2, 3, 1).numpy()
    expected = np.stack(
        [pil_three_augment(levels[i].numpy(), 2, float(radius[i])) for i in range(num)]
    ).astype(np.float64)
    difference = blurred - expected
    inside = difference[:, 6:-6, 6:-6]
    assert np.abs(inside).max() <= 3  # six roundings of half a level, and one of ours
    assert (np.abs(inside) > 1).mean() < 0.03
    assert np.abs(difference).max() <= 10  # PIL repeats the border anew in each of its passes
    assert np.abs(difference).mean() < 0.5
    assert abs(difference.mean()) < 0.1
    # The distribution of grey levels is the same: quantiles over all pixels agree.
    at = np.linspace(0.01, 0.99, 33)
    np.testing.assert_allclose(np.quantile(blurred, at), np.quantile(expected, at), atol=1)


def test_blur_is_its_kernel_along_both_axes_with_the_border_repeated() -> None:
    """In float64, tap by tap; float32 may round a tie to the other level."""
    level_BCHW = photo(9, 40, seed=6).permute(0, 3, 1, 2).float()
    radius_B = torch.linspace(0.1, 2.0, 9)
    kernel_BK = blur_kernel(radius_B).double()
    reach = kernel_BK.shape[1] // 2
    expected = torch.nn.functional.pad(level_BCHW.double(), (reach,) * 4, mode="replicate")
    for axis in (2, 3):
        taps = [expected.narrow(axis, tap, 40) for tap in range(2 * reach + 1)]
        weights = kernel_BK.unbind(1)
        expected = sum(
            (w.view(-1, 1, 1, 1) * t for w, t in zip(weights, taps, strict=True)), torch.zeros(())
        )
    difference = (gaussian_blur(level_BCHW, radius_B) - torch.floor(expected + 0.5)).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 1e-3


def test_distribution_of_the_normalised_batch_equals_the_pil_path() -> None:
    """Mean and deviation per channel over many random samples, with the same parameters."""
    num = 96
    batch = make_batch(num, seed=2)
    result, _, _, _ = augment(batch)
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = []
    for sample in range(num):
        values = dict(zip(AUGMENT_FIELDS, batch["augment"][sample].tolist(), strict=True))
        image = batch["template"][sample].permute(2, 0, 1).float() / 255
        if values["template_flip"]:
            image = reference.horizontal_flip(image)
        factors = [values[f"template_{n}"] for n in ("brightness", "contrast", "saturation")]
        for operation in JITTER_ORDERS[int(values["template_order"])]:
            image = ADJUSTMENTS[operation](image, factors[operation])
        levels = image.mul(255).byte().permute(1, 2, 0).numpy()
        levels = pil_three_augment(levels, int(values["choice"]), values["blur_radius"])
        expected.append((levels.transpose(2, 0, 1) / 255 - mean) / std)
    expected_BCHW = np.stack(expected)
    one_level = 1 / 255 / 0.224
    difference = np.abs(result.numpy() - expected_BCHW)
    assert difference.mean() < 0.25 * one_level
    assert np.quantile(difference, 0.999) <= 2.1 * one_level
    for statistic in (np.mean, np.std):
        np.testing.assert_allclose(
            statistic(result.numpy(), axis=(0, 2, 3)),
            statistic(expected_BCHW, axis=(0, 2, 3)),
            atol=0.25 * one_level,
        )


def test_no_augmentation_is_normalisation_alone() -> None:
    batch = make_batch(3, config=AugmentConfig(flip=0, color_jitter=0, three_augment=False))
    template, search, template_box, search_box = augment(batch)
    for image, role in ((template, "template"), (search, "search")):
        expected = reference.normalize(
            batch[role].permute(0, 3, 1, 2).float() / 255,
            list(IMAGENET_MEAN),
            list(IMAGENET_STD),
        )
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)
    assert torch.equal(template_box, batch["template_box"])
    assert torch.equal(search_box, batch["search_box"].clamp(0, 112))


def test_a_flip_moves_the_object_with_its_box() -> None:
    batch = make_batch(2, config=AugmentConfig(flip=1, color_jitter=0, three_augment=False))
    batch["search"].zero_()
    batch["search"][:, 20:40, 10:25] = 255
    batch["search_box"][:] = torch.tensor([10.0, 20.0, 25.0, 40.0])
    _, search, _, search_box = augment(batch)
    assert search_box[0].tolist() == [87.0, 20.0, 102.0, 40.0]
    bright = (search[0, 0] > 0).nonzero()
    assert bright.amin(0).tolist() == [20, 87]
    assert (bright.amax(0) + 1).tolist() == [40, 102]


def test_boxes_are_clipped_after_the_flip() -> None:
    boxes = torch.tensor([[-5.0, 3.0, 20.0, 130.0]])
    assert flip_boxes(boxes, torch.tensor([True]), 112).tolist() == [[92.0, 3.0, 117.0, 130.0]]
    batch = make_batch(1, config=AugmentConfig(flip=1))
    batch["search_box"][:] = boxes
    assert augment(batch)[3].tolist() == [[92.0, 3.0, 112.0, 112.0]]


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    batch = make_batch(9, seed=4)
    whole = augment(batch)
    alone = augment({name: value[5:6] for name, value in batch.items()})
    for one, many in zip(alone, whole, strict=True):
        torch.testing.assert_close(one[0], many[5], atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["T-112", "B-378"])
def test_the_mask_on_the_device_equals_the_one_in_numpy(variant: str) -> None:
    row = VARIANTS[variant]
    rng = np.random.default_rng(0)
    centre = rng.uniform(0.1, 0.9, (200, 2)) * row.template_size
    half = rng.uniform(1, 0.5 * row.template_size, (200, 2))
    boxes = np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)
    boxes[:20] = np.round(boxes[:20] / 14) * 14  # on the grid, within float32 of it
    boxes[:20, 2:] = np.maximum(boxes[:20, 2:], boxes[:20, :2].clip(0) + 14)
    boxes[:20, :2] = np.minimum(boxes[:20, :2], row.template_size - 14)
    mask_Bhw = foreground_mask(torch.from_numpy(boxes), row)
    for box, mask in zip(boxes.tolist(), mask_Bhw.numpy(), strict=True):
        expected = foreground_mask_numpy(tuple(box), row.template_size, row.template_grid)
        np.testing.assert_array_equal(mask, expected)


def test_parameters_have_their_ranges_and_shares() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([draw_augmentation(AugmentConfig(), rng) for _ in range(6000)])
    values = dict(zip(AUGMENT_FIELDS, drawn.T, strict=True))
    for role in ("template", "search"):
        assert abs(values[f"{role}_flip"].mean() - 0.5) < 0.03
        assert np.bincount(values[f"{role}_order"].astype(int), minlength=6).min() > 850
        for name in ("brightness", "contrast", "saturation"):
            factor = values[f"{role}_{name}"]
            assert factor.min() >= 0.6
            assert factor.max() <= 1.4
            assert abs(factor.mean() - 1) < 0.02
    assert np.bincount(values["choice"].astype(int)).min() > 1850
    assert values["blur_radius"].min() >= 0.1
    assert values["blur_radius"].max() <= 2.0
    off = draw_augmentation(AugmentConfig(three_augment=False), rng)
    assert off[AUGMENT_FIELDS.index("choice")] == -1


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    _compiled.cache_clear()
    yield
    torch._dynamo.reset()
    _compiled.cache_clear()


@pytest.mark.usefixtures("fresh_compiler")
def test_the_compiler_gets_the_same_augmentation_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiling = torch.compile

    def trace_only(function: Callable[..., Any], **given: Any) -> Callable[..., Any]:
        given.pop("options", None)
        return compiling(function, backend="eager", **given)

    monkeypatch.setattr(torch, "compile", trace_only)
    assert_compiled_is_the_same(torch.device("cpu"))


@pytest.mark.exhaustive
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_code_computes_the_same() -> None:
    assert_compiled_is_the_same(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_computes_what_the_cpu_computes() -> None:
    batch = make_batch(16, seed=8)
    on_cuda = augment({name: value.cuda() for name, value in batch.items()})
    assert_same_levels(on_cuda, augment(batch), share=1e-3)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_compiled_on_cuda_it_computes_the_same_and_never_waits() -> None:
    assert_compiled_is_the_same(torch.device("cuda"))
    batch = {name: value.cuda() for name, value in make_batch(16, seed=9).items()}
    try:
        torch.cuda.set_sync_debug_mode("error")
        augment(batch, compiled=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_compiled_is_the_same(device: torch.device) -> None:
    """For all samples; and without jitter to the last grey level, however it is rounded."""
    batch = make_batch(24, seed=8)
    batch["augment"][:2, CHOICE] = -1
    for number, name in enumerate(("brightness", "contrast", "saturation")):  # in every order
        rows = slice(6 * number, 6 * number + 6)
        batch["augment"][rows, AUGMENT_FIELDS.index(f"search_{name}")] = 1
        batch["augment"][rows, AUGMENT_FIELDS.index("search_order")] = torch.arange(6.0)
    plain = make_batch(16, seed=9, config=AugmentConfig(color_jitter=0))
    for given, share in ((batch, 2e-4), (plain, 0)):
        blurred = given["augment"][:, CHOICE] == 2
        assert blurred.any() and not blurred.all()
        found = augment({name: value.to(device) for name, value in given.items()}, compiled=True)
        expected = augment(given)
        assert_same_levels([t[~blurred.to(device)] for t in found],
                           [t[~blurred] for t in expected], share=share)  # fmt: skip
        assert_same_levels(found, expected, share=2e-4)  # sums of taps may round a tie apart
        assert all(t.is_contiguous() for t in found)


def assert_same_levels(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], *, share: float
) -> None:
    """Up to a share of values that a rounding difference moves by one grey level."""
    for one, other in zip(found, expected, strict=True):
        difference = (one.cpu() - other).abs()
        assert (difference > 1e-4).float().mean() <= share
        assert difference.max() < 1.05 / 255 / 0.224


def make_batch(
    num: int, seed: int = 0, config: AugmentConfig | None = None
) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    parameters = [draw_augmentation(config or AugmentConfig(), rng) for _ in range(num)]
    corner = torch.from_numpy(rng.uniform(0, 40, (num, 2)).astype(np.float32))
    return {
        "template": photo(num, 56, seed),
        "search": photo(num, 112, seed + 1),
        "template_box": torch.cat([corner / 4, corner / 4 + 20], dim=1),
        "search_box": torch.cat([corner, corner + 60], dim=1),
        "augment": torch.tensor(parameters, dtype=torch.float32),
    }
