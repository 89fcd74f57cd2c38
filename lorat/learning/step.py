"""What an optimiser step takes and gives, and how its numbers come back to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-3
"""A loss scale below this means that overflows never end."""


class Readback:
    """The values of a small tensor; on CUDA they come when the device gets there.

    Args:
        tensor: one-dimensional; what is done to it on the same stream from now on does not count.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.clone()

    def values(self) -> list[float]:
        """Return the values; waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._host.tolist()


class Inputs(NamedTuple):
    """What a step takes, augmented and on the device."""

    template_BCHW: Tensor
    search_BCHW: Tensor
    mask_Bhw: Tensor
    box_norm_B4: Tensor
    """Targets, xyxy as fractions of the search crop."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimiser step gave; tensors stay on the device."""

    step: int
    """Number of the step, from 0."""
    losses: Tensor
    """Loss, its part for the scores and its part for the boxes, (3,).  Those of this worker's
    pairs; the mean over the workers is the loss of the global batch."""
    grad_norm: Tensor
    """Global gradient norm before clipping, the same on every worker."""
    num_pairs: int
    verdict: Readback
    """Whether the loss was not finite, whether the gradient was not, and the loss scale or 0."""

    @property
    def grad_finite(self) -> bool:
        """Whether the gradient norm is finite; waits for the step."""
        return not self.verdict.values()[1]

    @property
    def finite(self) -> bool:
        """False if the weights were left as they were, and it was a fault; waits for the step.

        An overflow of scaled gradients is none, unless it never ends: the scale is lowered.
        """
        bad_loss, bad_grad, scale = self.verdict.values()
        return not bad_loss and (not bad_grad or scale > SMALLEST_SCALE)
