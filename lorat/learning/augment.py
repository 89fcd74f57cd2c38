"""Augmentation of the crops, batched on the device; the parameters come with the batch.

Shapes: B batch, C 3 channels, H W crop rows and columns.  Every step is one formula over the
whole batch, with per-sample factors, so there is no loop over samples and no random number.

What is done to pixels exists in two forms.  Call by call, colours and blur are matrix products,
which read and write the batch once each, and a choice takes its samples out of the batch.  For
the compiler the same formulas are written out, for every sample: it makes five kernels of them,
and nothing waits until the device knows the choices.

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
from collections.abc import Callable

import torch
from torch import Tensor

from lorat.config.variants import Variant
from lorat.data.pairs.augment_draws import AUGMENT_FIELDS, JITTER_ORDERS
from lorat.image.boxes import RASTER_EPSILON
from lorat.learning.blur import blur_kernel, gaussian_blur, sum_of_taps
from lorat.model.normalisation import _constant, imagenet_statistics, normalize_

LUMA = (0.2989, 0.587, 0.114)
"""Grey weights of torchvision's colour operations."""
PIL_LUMA = (19595.0, 38470.0, 7471.0)
"""Grey weights of PIL's RGB to L conversion, in 1/65536."""
SOLARIZE_THRESHOLD = 128

_COLUMN = {name: column for column, name in enumerate(AUGMENT_FIELDS)}
_FLIP, _JITTER, _BLUR = (_COLUMN[n] for n in ("template_flip", "template_order", "blur_radius"))


def augment(
    batch: dict[str, Tensor], *, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Augment and normalise a batch of pairs.

    Args:
        batch: what :func:`lorat.data.pairs.sampler.load_pairs` gives, as tensors on one device.
        compiled: let torch.compile make the kernels, at the first batch of these sizes.  One
            pixel in ten thousand may come out one grey level off.

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
    terms: tuple[Tensor, ...] = jitter_terms(jitter_N4[:, 0].long(), jitter_N4[:, 1:])
    kernel_BK = None
    if compiled:
        terms = _five_steps(*terms)
        kernel_BK = blur_kernel(torch.where(choice_B == 2, radius_B, 0.0))
    outputs, boxes = [], []
    for number, role in enumerate(("template", "search")):
        rows = slice(number * num, (number + 1) * num)
        size = batch[role].shape[1]
        flip_B = parameters_BK[:, _FLIP + number] > 0.5
        boxes.append(flip_boxes(batch[f"{role}_box"].float(), flip_B, size).clamp_(0, size))
        own_terms = [term[rows] for term in terms]
        if kernel_BK is not None:
            outputs.append(_augment_compiled(batch[role], flip_B, own_terms, choice_B, kernel_BK))
            continue
        image_BHWC = flip_images(batch[role], flip_B).float().div_(255)
        image_BCHW = image_BHWC.permute(0, 3, 1, 2)  # a view: the first product transposes it
        image_BCHW = color_jitter(image_BCHW, *own_terms)
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


def jitter_terms(order_N: Tensor, factors_N3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`color_jitter` does in its three steps, in each sample's own order.

    Args:
        order_N: index into :data:`lorat.data.pairs.augment_draws.JITTER_ORDERS`.
        factors_N3: brightness, contrast, saturation; 1 changes nothing.

    Returns:
        Each step's factor, and the shares of the grey image and of its mean that it adds (N, 3).
    """
    operation_N3 = _constant(JITTER_ORDERS, factors_N3.device)[order_N]
    factor_N3 = factors_N3.gather(1, operation_N3)
    base_N3 = 1 - factor_N3
    grey_N3 = torch.where(operation_N3 == 2, base_N3, 0.0)
    return factor_N3, grey_N3, torch.where(operation_N3 == 1, base_N3, 0.0)


def color_jitter(image_BCHW: Tensor, factor_B3: Tensor, grey_B3: Tensor, mean_B3: Tensor) -> Tensor:
    """Apply brightness, contrast and saturation.

    All three are one blend, ``clamp(f * image + (1 - f) * base)``: the base is black, the mean of
    the grey image, or the grey image.

    Args:
        image_BCHW: 0 to 1.
        factor_B3, grey_B3, mean_B3: what :func:`jitter_terms` gives.
    """
    # Every operation is affine in a pixel's three channels: one small matrix product each, which
    # reads and writes the batch once (P pixels).  Two buffers serve in turn: new memory costs as
    # much as a product.
    luma_C = _constant(LUMA, image_BCHW.device)
    same_CC = torch.eye(3, device=image_BCHW.device)
    blend_B3CC = factor_B3[..., None, None] * same_CC + grey_B3[..., None, None] * luma_C
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


def _augment_compiled(
    image_BHWC: Tensor,
    flip_B: Tensor,
    steps: list[Tensor],
    choice_B: Tensor,
    kernel_BK: Tensor,
) -> Tensor:
    """Do with uint8 images, in a few kernels, all that :func:`augment` does with pixels.

    Args:
        steps: what :func:`_five_steps` gives.
        choice_B: as for :func:`three_augment`.
        kernel_BK: each sample's blur; of those that are not blurred, a 1 among zeros.
    """
    levels, down, across = _compiled()
    reach = kernel_BK.shape[1] // 2
    row_h, column_w = (
        torch.arange(-reach, length + reach, device=image_BHWC.device).clamp_(0, length - 1)
        for length in image_BHWC.shape[1:3]
    )
    mirrored_w = image_BHWC.shape[2] - 1 - column_w
    column_Bw = torch.where(flip_B.view(-1, 1), mirrored_w, column_w)
    level_BCHW = levels(image_BHWC, row_h, column_Bw, *steps, choice_B)
    statistics_C11 = imagenet_statistics(image_BHWC.device)
    return across(down(level_BCHW, kernel_BK), kernel_BK, choice_B, *statistics_C11)


@functools.cache
def _compiled() -> tuple[Callable[..., Tensor], ...]:
    """Return the parts of :func:`_augment_compiled`: each writes a batch that the next reads.

    They are apart because the compiler would compute a part again for each of the blur's taps.
    Within the first it shall do so: what it kept, it would write, and read again.
    """
    compiling = functools.partial(torch.compile, dynamic=False, fullgraph=True)
    thresholds = ("realize_reads_threshold", "realize_acc_reads_threshold")
    keep_nothing = dict.fromkeys((*thresholds, "realize_opcount_threshold"), 1_000_000)
    return (
        compiling(_levels, options=keep_nothing),
        compiling(_blur_down),
        compiling(_blur_across),
    )


def _levels(
    image_BHWC: Tensor,
    row_h: Tensor,
    column_Bw: Tensor,
    factor_B5: Tensor,
    grey_B: Tensor,
    mean_B5: Tensor,
    before_B5: Tensor,
    choice_B: Tensor,
) -> Tensor:
    """Flip, jitter, grayscale and solarize; 0 to 255, in memory channel by channel.

    In levels the colours of an image without jitter stay whole, however they are rounded.

    Args:
        row_h, column_Bw: what to take of the images: with their border, and mirrored.
        factor_B5, grey_B, mean_B5, before_B5: what :func:`_five_steps` gives.
    """
    # The grey mean of what the steps before the contrast leave; the others change nothing here.
    # Row by row, since whole images are too few for the device's threads.
    before_BCHW = _five_jitter_steps(
        image_BHWC.permute(0, 3, 1, 2).float(),
        torch.where(before_B5, factor_B5, 1.0),
        torch.where(before_B5[:, 2], grey_B, 0.0),
        torch.zeros_like(mean_B5),
    )
    mean_B1 = _weighted_sum(before_BCHW, LUMA).mean(3).mean(2)

    sample_B = torch.arange(len(image_BHWC), device=image_BHWC.device)
    image_BhwC = image_BHWC[sample_B.view(-1, 1, 1), row_h.view(-1, 1), column_Bw.unsqueeze(1)]
    level_BChw = _five_jitter_steps(
        image_BhwC.permute(0, 3, 1, 2).float(), factor_B5, grey_B, mean_B5 * mean_B1
    )

    choice_B111 = choice_B.view(-1, 1, 1, 1)
    level_BChw = torch.where(choice_B111 < 0, level_BChw, level_BChw.floor())
    grey_BChw, solar_BChw = _grayscale(level_BChw, choice_B), _solarize(level_BChw, choice_B)
    level_BChw = torch.where(choice_B111 == 1, solar_BChw, level_BChw)
    return torch.where(choice_B111 == 0, grey_BChw, level_BChw).contiguous()


def _five_steps(
    factor_N3: Tensor, grey_N3: Tensor, mean_N3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the three jitter steps as five, of which the middle one alone mixes the channels.

    Wherever a sample's saturation comes, it comes there; of the two steps before and after it,
    those that the sample lacks change nothing.  Were each of three steps to mix the channels, the
    last one's formula would hold the first one's nine times.

    Returns:
        Factors (N, 5), the middle step's share of the grey image (N,), shares of its mean (N, 5),
        and which steps come before the one that has such a share (N, 5).
    """
    first_N, second_N, third_N = (grey_N3 != 0).unbind(1)  # which step is the saturation
    none_N, one_N, two_N = (torch.full_like(first_N, step, dtype=torch.long) for step in range(3))
    step_N5 = torch.stack([none_N, one_N, second_N + 2 * third_N, one_N, two_N], dim=1)
    some_N = first_N | second_N | third_N
    has_N5 = torch.stack([~first_N, ~(first_N | second_N), some_N, first_N, ~third_N], dim=1)
    factor_N5 = torch.where(has_N5, factor_N3.gather(1, step_N5), 1.0)
    mean_N5 = torch.where(has_N5, mean_N3.gather(1, step_N5), 0.0)
    return factor_N5, grey_N3.sum(1), mean_N5, torch.cumsum(mean_N5 != 0, 1) == 0


def _five_jitter_steps(
    level_BCHW: Tensor, factor_B5: Tensor, grey_B: Tensor, offset_B5: Tensor
) -> Tensor:
    for step in range(5):
        factor, offset = (t[:, step].view(-1, 1, 1, 1) for t in (factor_B5, offset_B5))
        if step == 2:
            offset = offset + grey_B.view(-1, 1, 1, 1) * _weighted_sum(level_BCHW, LUMA)
        level_BCHW = (factor * level_BCHW + offset).clamp(0, 255)
    return level_BCHW


def _blur_down(level_BChw: Tensor, kernel_BK: Tensor) -> Tensor:
    """Apply each sample's kernel along the rows, which takes their border."""
    return sum_of_taps(level_BChw, kernel_BK, 2)


def _blur_across(
    level_BCHw: Tensor, kernel_BK: Tensor, choice_B: Tensor, mean_C11: Tensor, std_C11: Tensor
) -> Tensor:
    """Apply each sample's kernel along the columns, round what is blurred, and normalise."""
    level_BCHW = sum_of_taps(level_BCHw, kernel_BK, 3)
    whole_BCHW = torch.floor(level_BCHW + 0.5)
    level_BCHW = torch.where(choice_B.view(-1, 1, 1, 1) == 2, whole_BCHW, level_BCHW)
    return (level_BCHW / 255 - mean_C11) / std_C11


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
