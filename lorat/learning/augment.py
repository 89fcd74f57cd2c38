"""Augmentation of the crops, batched on the device; the parameters come with the batch.

Shapes: B batch, C 3 channels, H W crop rows and columns.  Every step is one formula over the
whole batch, with per-sample factors, so there is no loop over samples and no random number.

The order is that of the paper: horizontal flip, colour jitter, then one of grayscale, solarize
and Gaussian blur (3-Augment of DeiT III), then ImageNet normalisation.  Flip, jitter, grayscale
and solarize compute what torchvision and PIL compute, to the last grey level; the reference passes
the crops through uint8 between jitter and 3-Augment, and so does this.  The one difference is the
blur: PIL approximates the Gaussian by three extended box filters and rounds to uint8 after each;
here the same three boxes are one combined kernel, rounded once.  Six roundings against one: grey
levels differ by at most 3 inside the image (3 in a hundred by more than 1) and the mean by less
than 0.1; within six pixels of the border, where PIL repeats the border in each pass, by up to 10.
The crops themselves come as uint8, that is rounded once more than the reference's float crops (at
most half a grey level).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lorat.config.variants import Variant
from lorat.data.pairs.augment_draws import AUGMENT_FIELDS, BLUR_RADIUS, JITTER_ORDERS
from lorat.image.boxes import RASTER_EPSILON
from lorat.model.normalisation import _constant, normalize_

LUMA = (0.2989, 0.587, 0.114)
"""Grey weights of torchvision's colour operations."""
PIL_LUMA = (19595.0, 38470.0, 7471.0)
"""Grey weights of PIL's RGB to L conversion, in 1/65536."""
SOLARIZE_THRESHOLD = 128

_COLUMN = {name: column for column, name in enumerate(AUGMENT_FIELDS)}
_FLIP, _JITTER, _BLUR = (_COLUMN[n] for n in ("template_flip", "template_order", "blur_radius"))


def augment(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Augment and normalise a batch of pairs.

    Args:
        batch: what :func:`lorat.data.pairs.sampler.load_pairs` gives, as tensors on one device.

    Returns:
        Template (B, C, T, T) and search (B, C, S, S), ImageNet-normalised float32; template box
        and search box (B, 4) float32, xyxy in crop pixels, flipped with their crops and clipped.
    """
    parameters_BK = batch["augment"].float()
    num = len(parameters_BK)
    choice_B, radius_B = parameters_BK[:, _COLUMN["choice"]], parameters_BK[:, _BLUR]
    # Both crops' parameters at once, (2 B, ...): on small batches the calls cost, not the numbers.
    jitter_BR4 = parameters_BK[:, _JITTER : _JITTER + 8].view(num, 2, 4)
    jitter_N4 = jitter_BR4.transpose(0, 1).reshape(-1, 4)
    blend_N3CC, mean_N3 = jitter_terms(jitter_N4[:, 0].long(), jitter_N4[:, 1:])
    outputs, boxes = [], []
    for number, role in enumerate(("template", "search")):
        rows = slice(number * num, (number + 1) * num)
        size = batch[role].shape[1]
        flip_B = parameters_BK[:, _FLIP + number] > 0.5
        image_BHWC = flip_images(batch[role], flip_B).float().div_(255)
        boxes.append(flip_boxes(batch[f"{role}_box"].float(), flip_B, size).clamp_(0, size))
        image_BCHW = image_BHWC.permute(0, 3, 1, 2)  # a view: the first product transposes it
        image_BCHW = color_jitter(image_BCHW, blend_N3CC[rows], mean_N3[rows])
        outputs.append(normalize_(three_augment(image_BCHW, choice_B, radius_B)))
    return outputs[0], outputs[1], boxes[0], boxes[1]


def flip_images(image_BHWC: Tensor, flip_B: Tensor) -> Tensor:
    """Mirror the chosen samples left to right; channels last, as images are decoded."""
    mirrored_BHWC = image_BHWC.flip(2)
    if image_BHWC.dtype == torch.uint8 and image_BHWC[0].numel() % 4 == 0:
        # Choosing words of four bytes takes a seventh of the time that choosing bytes does.
        words_BN, mirrored_BN = (
            i.flatten(1).view(torch.int32) for i in (image_BHWC, mirrored_BHWC)
        )
        chosen_BN = torch.where(flip_B.view(-1, 1), mirrored_BN, words_BN)
        return chosen_BN.view(torch.uint8).view(image_BHWC.shape)
    return torch.where(flip_B.view(-1, 1, 1, 1), mirrored_BHWC, image_BHWC)


def flip_boxes(box_B4: Tensor, flip_B: Tensor, width: int) -> Tensor:
    """Mirror the chosen boxes (xyxy, pixels) in an image of that width."""
    x1, y1, x2, y2 = box_B4.unbind(-1)
    mirrored_B4 = torch.stack([width - x2, y1, width - x1, y2], dim=-1)
    return torch.where(flip_B.view(-1, 1), mirrored_B4, box_B4)


def jitter_terms(order_N: Tensor, factors_N3: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :func:`color_jitter` does in its three steps, in each sample's own order.

    Args:
        order_N: index into :data:`lorat.data.pairs.augment_draws.JITTER_ORDERS`.
        factors_N3: brightness, contrast, saturation; 1 changes nothing.

    Returns:
        Each step's matrix (N, 3, C, C), and the share of the grey mean that it adds (N, 3).
    """
    device = factors_N3.device
    operation_N3 = _constant(JITTER_ORDERS, device)[order_N]
    factor_N3 = factors_N3.gather(1, operation_N3)
    base_N3 = 1 - factor_N3
    same_CC = torch.eye(3, device=device)
    grey_N3 = torch.where(operation_N3 == 2, base_N3, 0.0)
    luma_C = _constant(LUMA, device)
    blend_N3CC = factor_N3[..., None, None] * same_CC + grey_N3[..., None, None] * luma_C
    return blend_N3CC, torch.where(operation_N3 == 1, base_N3, 0.0)


def color_jitter(image_BCHW: Tensor, blend_B3CC: Tensor, mean_B3: Tensor) -> Tensor:
    """Apply brightness, contrast and saturation.

    All three are one blend, ``clamp(f * image + (1 - f) * base)``: the base is black, the mean of
    the grey image, or the grey image.

    Args:
        image_BCHW: 0 to 1.
        blend_B3CC, mean_B3: what :func:`jitter_terms` gives.
    """
    # Every operation is affine in a pixel's three channels: one small matrix product each, which
    # reads and writes the batch once (P pixels).  Two buffers serve in turn: new memory costs as
    # much as a product.
    luma_C = _constant(LUMA, image_BCHW.device)
    image_BCP = image_BCHW.flatten(2)
    buffers = torch.empty((2, *image_BCP.shape), dtype=image_BCP.dtype, device=image_BCP.device)
    for step in range(3):
        offset_B = mean_B3[:, step] * (image_BCP.mean(-1) @ luma_C)
        image_BCP = torch.bmm(blend_B3CC[:, step], image_BCP, out=buffers[step % 2])
        image_BCP.add_(offset_B[:, None, None]).clamp_(0, 1)
    return image_BCP.view(image_BCHW.shape)


def three_augment(image_BCHW: Tensor, choice_B: Tensor, radius_B: Tensor) -> Tensor:
    """Apply grayscale, solarize or Gaussian blur to each sample, through 256 grey levels.

    Args:
        image_BCHW: 0 to 1.
        choice_B: -1 nothing, 0 grayscale, 1 solarize, 2 blur.
        radius_B: radius of the blur, in pixels.

    Returns:
        The given tensor, overwritten.  On CUDA it waits until the choices are known, three times.
    """
    operations = (_grayscale, _solarize, gaussian_blur)
    for choice, operation in enumerate(operations):
        chosen = torch.nonzero(choice_B == choice).flatten()
        if len(chosen):
            level_BCHW = image_BCHW.index_select(0, chosen).mul_(255).floor_()
            result_BCHW = operation(level_BCHW, radius_B[chosen]).div_(255)
            image_BCHW.index_copy_(0, chosen, result_BCHW)
    return image_BCHW


def _grayscale(level_BCHW: Tensor, radius_B: Tensor) -> Tensor:
    grey_B1HW = torch.floor((_weighted_sum(level_BCHW, PIL_LUMA) + 32768) / 65536)
    return grey_B1HW.repeat(1, 3, 1, 1)


def _solarize(level_BCHW: Tensor, radius_B: Tensor) -> Tensor:
    return torch.where(level_BCHW < SOLARIZE_THRESHOLD, level_BCHW, 255 - level_BCHW)


def gaussian_blur(level_BCHW: Tensor, radius_B: Tensor) -> Tensor:
    """Blur each sample with its own radius, borders repeated, rounded to whole grey levels."""
    batch, channels, height, width = level_BCHW.shape
    kernel_BK = _blur_kernel(radius_B)
    # A matrix product with each axis: fewer calls than taps have, and on GPUs no grouped
    # convolution, the slowest of all.
    down_B1HH = _blur_matrix(kernel_BK, height).unsqueeze(1)
    across_BWW = _blur_matrix(kernel_BK, width).transpose(1, 2)
    level_BCHW = torch.matmul(down_B1HH, level_BCHW)
    level_BNW = torch.bmm(level_BCHW.view(batch, channels * height, width), across_BWW)
    return level_BNW.view(batch, channels, height, width).add_(0.5).floor_()


def _blur_matrix(kernel_BK: Tensor, length: int) -> Tensor:
    """Return kernels as matrices (B, length, length) that repeat the border."""
    batch, num_taps = kernel_BK.shape
    places_KN = _tap_places(num_taps, length, kernel_BK.device)
    return (kernel_BK @ places_KN).view(batch, length, length)


@functools.cache
def _tap_places(num_taps: int, length: int, device: torch.device) -> Tensor:
    """Return, for each tap, which pixel each pixel takes by it, as ones in (K, length²)."""
    place = torch.arange(length)
    offset = torch.arange(num_taps) - num_taps // 2
    source_KL = (place + offset.unsqueeze(1)).clamp_(0, length - 1)
    with torch.inference_mode(False):
        return F.one_hot(source_KL, length).float().flatten(1).to(device)


def _blur_kernel(radius_B: Tensor) -> Tensor:
    """Return PIL's approximate Gaussian as kernels (B, K): three extended boxes, convolved.

    P. Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box
    filtering", SSVM 2011.
    """
    passes = 3
    widest = math.sqrt(12 * BLUR_RADIUS[1] ** 2 / passes + 1)
    reach = math.floor((widest - 1) / 2) + 1
    variance_B1 = radius_B.double().square().view(-1, 1) / passes
    whole_B1 = torch.floor((torch.sqrt(12 * variance_B1 + 1) - 1) / 2)
    edge_B1 = (
        (2 * whole_B1 + 1)
        * (whole_B1 * (whole_B1 + 1) - 3 * variance_B1)
        / (6 * (variance_B1 - (whole_B1 + 1).square()))
    )
    distance_1K = torch.arange(-reach, reach + 1, device=radius_B.device).abs().view(1, -1)
    box_BK = torch.where(
        distance_1K <= whole_B1, 1.0, torch.where(distance_1K == whole_B1 + 1, edge_B1, 0.0)
    )
    box_BK = box_BK / box_BK.sum(dim=1, keepdim=True)
    kernel_BK = box_BK
    for _ in range(passes - 1):
        num, length = kernel_BK.shape
        padded = F.pad(kernel_BK.unsqueeze(0), (2 * reach, 2 * reach))
        kernel_BK = F.conv1d(padded, box_BK.unsqueeze(1), groups=num)[0]
        assert kernel_BK.shape[1] == length + 2 * reach
    return kernel_BK.float()


def foreground_mask(template_box_B4: Tensor, variant: Variant) -> Tensor:
    """Mark the template tokens that each box touches.

    Args:
        template_box_B4: xyxy in template crop pixels; clipped here.

    Returns:
        int64 (B, h, w), 1 foreground and 0 background.
    """
    grid, stride = variant.template_grid, variant.patch_size
    scaled_B4 = template_box_B4.clamp(0, variant.template_size) / stride
    first_B2 = torch.floor(scaled_B4[:, :2])
    last_B2 = torch.floor(scaled_B4[:, 2:] + (1 - RASTER_EPSILON))
    cell_g = torch.arange(grid, device=template_box_B4.device)
    inside_B2g = (cell_g >= first_B2.unsqueeze(-1)) & (cell_g < last_B2.unsqueeze(-1))
    return (inside_B2g[:, 1].unsqueeze(-1) & inside_B2g[:, 0].unsqueeze(-2)).long()


def _weighted_sum(image_BCHW: Tensor, weights: tuple[float, float, float]) -> Tensor:
    red, green, blue = image_BCHW.unbind(1)
    return (weights[0] * red + weights[1] * green + weights[2] * blue).unsqueeze(1)
