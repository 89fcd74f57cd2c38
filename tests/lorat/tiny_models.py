"""Models small enough to run in every test, of both FFN kinds."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lorat.checkpoint.official import official_state
from lorat.config.training import LoraConfig, TrainConfig
from lorat.config.variants import VARIANTS, Variant
from lorat.model.network import LoRAT, build_model

MLP_VARIANT = VARIANTS["N-112"]
SWIGLU_VARIANT = dataclasses.replace(MLP_VARIANT, name="tiny-swiglu", ffn="swiglu", dim=48)
BOTH_FFNS = (MLP_VARIANT, SWIGLU_VARIANT)


def tiny_config(**fields: Any) -> TrainConfig:
    """Return a configuration of N-112 with rank 4, unless told otherwise."""
    fields = {"lora": LoraConfig(rank=4), "backbone": "none"} | fields
    return TrainConfig(variant="N-112", **fields)


def tiny_model(variant: Variant = MLP_VARIANT, **fields: Any) -> LoRAT:
    """Build a tiny model with random weights."""
    return build_model(tiny_config(**fields), variant=variant)


def released_state(model: LoRAT, *, scalars: bool = True) -> dict[str, Tensor]:
    """Return what the released ``.bin`` files hold: the tensors that are trained."""
    state = official_state(model, scalars=scalars)
    parts = ("head.", "token_type_embed", ".lora.", "lora_alpha", "use_rslora")
    return {n: v for n, v in state.items() if any(part in n for part in parts)}


def batch(variant: Variant = MLP_VARIANT, size: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    """Return random template, search and foreground mask."""
    generator = torch.Generator().manual_seed(seed)
    template = torch.randn(
        size, 3, variant.template_size, variant.template_size, generator=generator
    )
    search = torch.randn(size, 3, variant.search_size, variant.search_size, generator=generator)
    mask = torch.zeros(size, variant.template_grid, variant.template_grid, dtype=torch.int64)
    mask[:, 1:3, 1:3] = 1
    return template, search, mask


def shake(model: LoRAT, std: float = 0.1, seed: int = 0) -> LoRAT:
    """Move every weight away from its initial value, so that each one matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return model
