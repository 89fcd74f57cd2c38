"""The anchor-free head: two MLPs on the search tokens.

B batch, N search tokens, D width, H W map rows and columns.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with an exact GELU between them, none after the last."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        depth: int,
        *,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        widths = [dim] * depth + [out_dim]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, device=device) for a, b in itertools.pairwise(widths)
        )
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.trunc_normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., out_dim)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.gelu(layer(x))
        return last(x)


class Head(nn.Module):
    """Scores every cell of the search region and regresses a box from its centre."""

    def __init__(
        self,
        dim: int,
        depth: int = 3,
        *,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.cls_mlp = MLP(dim, 1, depth, init_std=init_std, device=device)
        self.reg_mlp = MLP(dim, 4, depth, init_std=init_std, device=device)

    def forward(self, search_BND: Tensor) -> dict[str, Tensor]:
        """Return ``score_map`` (B, H, W) logits and ``boxes`` (B, H, W, 4), both float32.

        Boxes are xyxy as fractions of the search crop.  Each side is a sigmoid away from the
        cell's centre, so boxes may leave [0, 1].
        """
        B, N, _ = search_BND.shape
        side = math.isqrt(N)
        score_BHW = self.cls_mlp(search_BND).float().view(B, side, side)
        ltrb_BHW4 = self.reg_mlp(search_BND).float().sigmoid().view(B, side, side, 4)
        # Made here, not kept as a buffer: half precision would blur the centres.
        centre = (torch.arange(side, device=search_BND.device, dtype=torch.float32) + 0.5) / side
        cy_HW, cx_HW = torch.meshgrid(centre, centre, indexing="ij")
        centre_HW2 = torch.stack([cx_HW, cy_HW], dim=-1)
        boxes_BHW4 = torch.cat(
            [centre_HW2 - ltrb_BHW4[..., :2], centre_HW2 + ltrb_BHW4[..., 2:]], dim=-1
        )
        return {"score_map": score_BHW, "boxes": boxes_BHW4}
