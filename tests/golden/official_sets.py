"""Weights and variants of the fixture sets, from their scalars and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorat.config.variants import Variant


def with_scaling(weights: Path | Mapping[str, Tensor], io: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return weights with the set's alpha: a file without one was trained with the scalar's."""
    state = load_file(weights) if isinstance(weights, Path) else dict(weights)
    alpha, rslora = float(io["meta_lora_alpha"]), bool(io["meta_use_rslora"])
    return state | {"lora_alpha": torch.tensor(alpha), "use_rslora": torch.tensor(rslora)}


def variant_of(io: Mapping[str, Any], *, pretrain_grid: int = 37) -> Variant:
    """Return the sizes that a set's ``meta_*`` scalars and images give."""
    return Variant(
        name="fixture",
        timm_name=None,
        dim=int(io["meta_embed_dim"]),
        depth=int(io["meta_depth"]),
        num_heads=int(io["meta_num_heads"]),
        ffn="swiglu" if str(io["meta_ffn"]).startswith("swiglu") else "mlp",
        pretrain_grid=pretrain_grid,
        template_size=io["z"].shape[-1],
        search_size=io["x"].shape[-1],
        search_area_factor=4.0,
    )
