"""Linear layers with their LoRA adapters folded into the weight, one product instead of three.

y = W x + s B(A x) equals W' x with W' = W + s B A.  Making W' costs one product over the rank,
whatever the number of tokens; it is made again in the backward pass, so that it never lives
between the two.  T tokens, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Part(NamedTuple):
    """An adapter of some rows of a weight."""

    rows: slice
    scaling: float
    a_Rin: Tensor
    b_outR: Tensor


def foldable(layer: Any) -> bool:
    """Say whether a layer has active adapters, not merged, all of them without dropout."""
    return (
        hasattr(layer, "lora_A")
        and not layer.disable_adapters
        and not layer.merged
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    )


def parts_of(layer: Any, rows: slice = slice(None)) -> list[Part]:
    """Return the active adapters of a peft LoRA layer, whose output is those rows."""
    return [
        Part(rows, layer.scaling[name], layer.lora_A[name].weight, layer.lora_B[name].weight)
        for name in layer.active_adapters
        if name in layer.lora_A
    ]


def folded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Part]) -> Tensor:
    """Apply a frozen linear layer with its adapters, in autocast's dtype or that of ``x``.

    Args:
        x: (..., in).
        weight, bias: (out, in) and (out,), frozen: they get no gradient.
        parts: the adapters; those of the same rows add up.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    bias = None if bias is None else bias.to(dtype)
    matrices = [matrix for part in parts for matrix in (part.a_Rin, part.b_outR)]
    rows, scalings = [part.rows for part in parts], [part.scaling for part in parts]
    # W' is made in float32 and rounded once.
    with torch.autocast(device, enabled=False):
        y: Tensor = _Folded.apply(x.to(dtype), weight, bias, rows, scalings, *matrices)
    return y


def _fold(
    weight: Tensor,
    rows: list[slice],
    scalings: list[float],
    matrices: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> Tensor:
    exact = torch.promote_types(matrices[0].dtype, weight.dtype)
    folded = weight.to(exact, copy=True)
    pairs = zip(matrices[::2], matrices[1::2], strict=True)
    for part, scaling, (a_Rin, b_outR) in zip(rows, scalings, pairs, strict=True):
        folded[part].addmm_(b_outR, a_Rin, alpha=scaling)
    return folded.to(dtype)


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: list[slice],
        scalings: list[float],
        *matrices: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *matrices)
        ctx.rows, ctx.scalings = rows, scalings
        return F.linear(x, _fold(weight, rows, scalings, matrices, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, *matrices = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dx = None
            if ctx.needs_input_grad[0]:
                dx = dy @ _fold(weight, ctx.rows, ctx.scalings, tuple(matrices), x.dtype)
            x_Tin, dy_Tout = x.flatten(0, -2), dy.flatten(0, -2)
            gradients: list[Tensor] = []
            pairs = zip(matrices[::2], matrices[1::2], strict=True)
            for rows, scaling, (a_Rin, b_outR) in zip(ctx.rows, ctx.scalings, pairs, strict=True):
                part_Tout = dy_Tout[:, rows]
                u_TR = x_Tin @ a_Rin.to(x.dtype).t()
                v_TR = part_Tout @ b_outR.to(x.dtype)
                gradients.append((v_TR.t() @ x_Tin).to(a_Rin.dtype) * scaling)
                gradients.append((part_Tout.t() @ u_TR).to(b_outR.dtype) * scaling)
        return dx, None, None, None, None, *gradients
