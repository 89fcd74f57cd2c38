"""Gaussian blur of a batch, each sample with its own radius, as PIL approximates it.

B batch, C 3 channels, H W rows and columns, K taps of a kernel.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lorat.data.pairs.augment_draws import BLUR_RADIUS


def gaussian_blur(level_BCHW: Tensor, radius_B: Tensor) -> Tensor:
    """Blur each sample with its own radius, borders repeated, rounded to whole grey levels."""
    batch, channels, height, width = level_BCHW.shape
    kernel_BK = blur_kernel(radius_B)
    # A matrix product with each axis: fewer calls than taps have, and on GPUs no grouped
    # convolution, the slowest of all.
    down_B1HH = _blur_matrix(kernel_BK, height).unsqueeze(1)
    across_BWW = _blur_matrix(kernel_BK, width).transpose(1, 2)
    level_BCHW = torch.matmul(down_B1HH, level_BCHW)
    level_BNW = torch.bmm(level_BCHW.view(batch, channels * height, width), across_BWW)
    return level_BNW.view(batch, channels, height, width).add_(0.5).floor_()


def sum_of_taps(level_BCHW: Tensor, kernel_BK: Tensor, axis: int) -> Tensor:
    """Apply each sample's kernel along an axis, which gets shorter by the kernel's reach twice."""
    reach = kernel_BK.shape[1] // 2
    length = level_BCHW.shape[axis] - 2 * reach
    weights = kernel_BK.view(-1, 2 * reach + 1, 1, 1, 1).unbind(1)
    total = weights[reach] * level_BCHW.narrow(axis, reach, length)
    for tap in range(reach):
        near = level_BCHW.narrow(axis, tap, length)
        far = level_BCHW.narrow(axis, 2 * reach - tap, length)
        total = total + weights[tap] * (near + far)  # a kernel is symmetric
    return total


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


def blur_kernel(radius_B: Tensor) -> Tensor:
    """Return PIL's approximate Gaussian as kernels (B, K): three extended boxes, convolved.

    That of radius 0 is a 1 among zeros.

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
        padded_BK = F.pad(kernel_BK, (2 * reach, 2 * reach))
        kernel_BK = (padded_BK.unfold(1, box_BK.shape[1], 1) * box_BK.unsqueeze(1)).sum(2)
    return kernel_BK.float()
