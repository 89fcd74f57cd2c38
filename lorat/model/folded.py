"""Linear layers with their LoRA adapters folded into the weight, one product instead of three.

y = W x + s B(A x) equals W' x with W' = W + s B A.  Making W' costs one product over the rank,
whatever the number of tokens; it is made again in the backward pass, so that it never lives
between the two.  T tokens, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        weight, bias: (out, in) and (out,), frozen.
        parts: the adapters; those of the same rows add up.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    bias = None if bias is None else bias.to(dtype)
    matrices = [matrix for part in parts for matrix in (part.a_Rin, part.b_outR)]
    rows, scalings = [part.rows for part in parts], [part.scaling for part in parts]
    assert not weight.requires_grad
    y: Tensor = _apply(x.to(dtype), weight, bias, rows, scalings, *matrices)
    return y


# The compiler takes it as it is: what it makes of the class itself fails where a size is symbolic.
@torch.compiler.allow_in_graph
def _apply(*arguments: Any) -> Any:
    return _Folded.apply(*arguments)


def _fold(
    weight: Tensor,
    rows: list[slice],
    scalings: list[float],
    matrices: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Return W' in ``dtype``, made in the adapters' precision and rounded once."""
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
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _fold(weight, rows, scalings, matrices, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, *matrices = ctx.saved_tensors
        a_all, b_all = matrices[::2], matrices[1::2]
        with torch.autocast(x.device.type, enabled=False):
            dx = None
            if ctx.needs_input_grad[0]:
                dx = dy @ _fold(weight, ctx.rows, ctx.scalings, matrices, x.dtype)
            x_Tin, dy_Tout = x.flatten(0, -2), dy.flatten(0, -2)
            # The matrices A stacked, so that x is read once for all parts.
            ranks = [len(a_Rin) for a_Rin in a_all]
            a_stacked = a_all[0] if len(a_all) == 1 else torch.cat(a_all)
            u_all = (x_Tin @ a_stacked.to(x.dtype).t()).split(ranks, dim=1)
            parts = [dy_Tout[:, rows] for rows in ctx.rows]
            v_all = [p @ b.to(x.dtype) for p, b in zip(parts, b_all, strict=True)]
            v_stacked = v_all[0] if len(v_all) == 1 else torch.cat(v_all, dim=1)
            da_all = (v_stacked.t() @ x_Tin).split(ranks)
            gradients: list[Tensor] = []
            for scaling, da, part, u, b in zip(
                ctx.scalings, da_all, parts, u_all, b_all, strict=True
            ):
                gradients.append(da.to(a_stacked.dtype) * scaling)
                gradients.append((part.t() @ u).to(b.dtype) * scaling)
        return dx, None, None, None, None, *gradients
