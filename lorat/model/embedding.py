"""Decoupled input embeddings: a shared frozen position grid and a trainable token type.

B batch, N tokens, D width, h w template grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPLATE_BACKGROUND, TEMPLATE_FOREGROUND, SEARCH = range(3)
"""Rows of the token type embedding."""


def resize_position(position_1ND: Tensor, grid: int) -> Tensor:
    """Resample a square position grid (no class row) to ``grid`` × ``grid``, in float32.

    Bicubic by target size, without antialiasing and without DINOv2's 0.1 offset: (1, N, D) ->
    (1, grid², D).  A grid that already fits is returned unchanged.
    """
    side = math.isqrt(position_1ND.shape[1])
    if side == grid:
        return position_1ND
    position_1DHW = position_1ND.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(
        position_1DHW, size=(grid, grid), mode="bicubic", align_corners=False, antialias=False
    )
    return resized.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)


def template_position(position_1ND: Tensor, grid: int) -> Tensor:
    """Cut the top-left ``grid`` × ``grid`` cells out of the search region's position grid."""
    side = math.isqrt(position_1ND.shape[1])
    return position_1ND.view(1, side, side, -1)[:, :grid, :grid].reshape(1, grid * grid, -1)


class TokenEmbedding(nn.Module):
    """Adds position and token type to template and search tokens and joins them."""

    def __init__(
        self, dim: int, *, init_std: float = 0.02, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.token_type = nn.Parameter(torch.empty(3, dim, device=device))
        nn.init.trunc_normal_(self.token_type, std=init_std)

    def forward(
        self,
        template_BND: Tensor,
        search_BND: Tensor,
        position_1ND: Tensor,
        foreground_mask_Bhw: Tensor,
    ) -> Tensor:
        """Return the joint sequence, template tokens first.

        Args:
            template_BND: patch embeddings of the template, row-major.
            search_BND: patch embeddings of the search region, row-major.
            position_1ND: position grid of the search region.
            foreground_mask_Bhw: 1 where the template cell belongs to the target, else 0.
        """
        types = self.token_type
        template_type_BND = torch.where(
            foreground_mask_Bhw.flatten(1)[..., None] != 0,
            types[TEMPLATE_FOREGROUND],
            types[TEMPLATE_BACKGROUND],
        )
        grid = foreground_mask_Bhw.shape[-1]
        template_BND = template_BND + template_position(position_1ND, grid) + template_type_BND
        search_BND = search_BND + position_1ND + types[SEARCH]
        return torch.cat([template_BND, search_BND], dim=1)
