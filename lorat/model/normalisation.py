"""Normalisation of crops with ImageNet's mean and deviation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_(image_BCHW: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its deviation, in place; the input is 0 to 1."""
    mean_C11, std_C11 = imagenet_statistics(image_BCHW.device)
    return image_BCHW.sub_(mean_C11).div_(std_C11)


def imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ImageNet's mean and deviation (C, 1, 1) of images of 0 to 1."""
    mean_C11 = _constant(IMAGENET_MEAN, device).view(3, 1, 1)
    return mean_C11, _constant(IMAGENET_STD, device).view(3, 1, 1)


@functools.cache
def _constant(values: tuple, device: torch.device) -> Tensor:
    """Return numbers as a tensor, made once per device: a copy to a GPU would wait for its work."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)
