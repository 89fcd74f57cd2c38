"""Target assignment and loss.

B batch, H W map rows and columns, S cells along a map side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EDGE_EPS = 1e-4
"""A cell counts as touched only if a box reaches this far into it, in cells."""
AREA_EPS = 1e-6
"""Smallest union and enclosing area."""


def positive_mask(box_px_B4: Tensor, search_size: float, map_size: int) -> Tensor:
    """Mark every cell of the response map that a box touches.

    The box is scaled to the map and widened to whole cells: floor of the first corner, floor of
    the second + 1 - 1e-4, end exclusive.

    Args:
        box_px_B4: xyxy boxes in search-crop pixels, inside the crop.
        search_size: side of the search crop, in pixels.
        map_size: side S of the response map, in cells.

    Returns:
        bool (B, S, S), rows first.
    """
    box_B4 = box_px_B4.double() * (map_size / search_size)
    start_B2 = box_B4[:, :2].floor()
    end_B2 = (box_B4[:, 2:] + (1 - EDGE_EPS)).floor()
    cell_S = torch.arange(map_size, device=box_px_B4.device, dtype=torch.float64)
    inside_B2S = (cell_S >= start_B2[..., None]) & (cell_S < end_B2[..., None])
    return inside_B2S[:, 1, :, None] & inside_B2S[:, 0, None, :]


def iou_and_giou(box_a: Tensor, box_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalised IoU (Rezatofighi et al., CVPR 2019) of xyxy boxes (..., 4)."""

    # Written out: the gradient of torch.prod asks the device whether there are zeros.
    def product(side: Tensor) -> Tensor:
        return side[..., 0] * side[..., 1]

    def area(low: Tensor, high: Tensor) -> Tensor:
        return product((high - low).clamp(min=0))

    low_a, high_a = box_a.split(2, dim=-1)
    low_b, high_b = box_b.split(2, dim=-1)
    intersection = area(torch.maximum(low_a, low_b), torch.minimum(high_a, high_b))
    size_a, size_b = product(high_a - low_a), product(high_b - low_b)
    union = (size_a + size_b - intersection).clamp(min=AREA_EPS)
    iou = intersection / union
    enclosing = area(torch.minimum(low_a, low_b), torch.maximum(high_a, high_b))
    enclosing = enclosing.clamp(min=AREA_EPS)
    return iou, iou - (enclosing - union) / enclosing


class Criterion(nn.Module):
    """IoU-aware binary cross-entropy on all cells and GIoU on the positive ones."""

    def __init__(
        self, *, cls_weight: float = 1.0, reg_weight: float = 1.0, iou_aware: bool = True
    ) -> None:
        """Set the weights of the two parts; the recipe leaves all as the published loss has them.

        Args:
            cls_weight: factor of the classification loss.
            reg_weight: factor of the box loss.
            iou_aware: score positives with the IoU of the box predicted there instead of 1.
        """
        super().__init__()
        self.cls_weight = cls_weight
        self.reg_weight = reg_weight
        self.iou_aware = iou_aware

    @staticmethod
    def count_positives(box_norm_B4: Tensor, map_size: int) -> Tensor:
        """Count the positive cells of a batch, float32 scalar, to be averaged over the workers."""
        return positive_mask(box_norm_B4, 1.0, map_size).sum(dtype=torch.float32)

    def forward(
        self,
        outputs: dict[str, Tensor],
        box_norm_B4: Tensor,
        *,
        num_positive: Tensor | None = None,
        positive_BHW: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return ``loss``, ``loss_cls``, ``loss_reg`` (weighted) and ``num_positive``, float32.

        Args:
            outputs: ``score_map`` (B, H, W) logits and ``boxes`` (B, H, W, 4) normalised xyxy.
            box_norm_B4: target boxes, xyxy as fractions of the search crop, inside [0, 1].
            num_positive: divisor of both parts, the mean over the workers of
                :meth:`count_positives`; none means that of this batch.
            positive_BHW: :func:`positive_mask`; none means that of ``box_norm_B4``.
        """
        score_BHW, boxes_BHW4 = outputs["score_map"].float(), outputs["boxes"].float()
        if positive_BHW is None:
            positive_BHW = positive_mask(box_norm_B4, 1.0, score_BHW.shape[-1])
        if num_positive is None:
            num_positive = positive_BHW.sum(dtype=torch.float32)
        divisor = num_positive.clamp(min=1)

        target_BHW4 = box_norm_B4.float()[:, None, None].expand_as(boxes_BHW4)
        iou_BHW, giou_BHW = iou_and_giou(boxes_BHW4, target_BHW4)
        positive = positive_BHW.to(score_BHW.dtype)
        score_target_BHW = positive * iou_BHW.detach() if self.iou_aware else positive
        bce_BHW = F.binary_cross_entropy_with_logits(score_BHW, score_target_BHW, reduction="none")
        loss_cls = self.cls_weight * bce_BHW.sum() / divisor
        loss_reg = self.reg_weight * ((1 - giou_BHW) * positive).sum() / divisor
        return {
            "loss": loss_cls + loss_reg,
            "loss_cls": loss_cls,
            "loss_reg": loss_reg,
            "num_positive": num_positive,
        }
