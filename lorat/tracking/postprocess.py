"""From the network's output to a box in the frame and the next place to look.

B batch, H W rows and columns of the score map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorat.image.boxes import Box, intersects
from lorat.image.crops import CropParams


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The best cell of every score map."""

    confidence_B: Tensor
    """Sigmoid score of that cell, without the window."""
    box_B4: Tensor
    """Its box, normalised xyxy of the search crop."""


def hann_window(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the (H, W) Hann window whose edges are exactly 0."""
    rows_H = torch.hann_window(height, periodic=False, device=device)
    columns_W = torch.hann_window(width, periodic=False, device=device)
    return torch.outer(rows_H, columns_W)


def penalise(score_BHW: Tensor, window_HW: Tensor, penalty: float) -> Tensor:
    """Blend scores, 0 to 1, with the window, of weight ``penalty``."""
    return score_BHW * (1 - penalty) + window_HW * penalty


def find_peak(
    score_map_BHW: Tensor,
    boxes_BHW4: Tensor,
    window_HW: Tensor,
    penalty: float,
) -> Peak:
    """Choose the cell with the best score blended with the window.

    Args:
        score_map_BHW: logits.
        boxes_BHW4: normalised xyxy.
        window_HW: see :func:`hann_window`.
        penalty: weight of the window, 0 to 1.
    """
    score_BHW = score_map_BHW.float().sigmoid()
    index_B = penalise(score_BHW, window_HW, penalty).flatten(1).argmax(dim=1)
    batch_B = torch.arange(len(index_B), device=index_B.device)
    return Peak(
        confidence_B=score_BHW.flatten(1)[batch_B, index_B],
        box_B4=boxes_BHW4.float().flatten(1, 2)[batch_B, index_B],
    )


def box_in_frame(box_norm: Box, search_size: int, adjusted: CropParams) -> Box:
    """Map a normalised box of the search crop to the frame's pixels, unclipped."""
    x1, y1, x2, y2 = box_norm
    return adjusted.inverse().apply(
        (x1 * search_size, y1 * search_size, x2 * search_size, y2 * search_size)
    )


def next_box(submitted: Box, previous: Box, frame_wh: tuple[int, int]) -> Box:
    """Return the box to search around next: the submitted one, unless it is degenerate.

    Args:
        submitted: clipped box of this frame.
        previous: the box that this frame was searched with.
        frame_wh: size of the frame.
    """
    x1, y1, x2, y2 = submitted
    if x1 < x2 and y1 < y2 and intersects(submitted, *frame_wh):
        return submitted
    return previous
