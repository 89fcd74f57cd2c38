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
    y: Tensor = _apply(x.to(dtype), weight, bias, rows, scalings, _joined(x), *matrices)
    return y


def _joined(x: Tensor) -> bool:
    """Say whether the products with A and B are extra columns of the large ones.

    Each factor is then read once for both, which counts where memory is the limit.  The results
    have gaps between their rows, which costs nothing only where a compiler makes what reads them.
    """
    return x.is_cuda and torch.compiler.is_compiling()


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
    *,
    stacked: bool = False,
) -> Tensor:
    """Return W' in ``dtype``, made in the adapters' precision and rounded once.

    Args:
        weight, rows, scalings, matrices: of the layer.
        dtype: of the result.
        stacked: append the rows of all matrices A.
    """
    exact = torch.promote_types(matrices[0].dtype, weight.dtype)
    if stacked:
        folded = torch.cat([weight.to(exact), *matrices[::2]])
    else:
        folded = weight.to(exact, copy=True)
    pairs = zip(matrices[::2], matrices[1::2], strict=True)
    for part, scaling, (a_Rin, b_outR) in zip(rows, scalings, pairs, strict=True):
        folded[: len(weight)][part].addmm_(b_outR, a_Rin, alpha=scaling)
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
        joined: bool,
        *matrices: Tensor,
    ) -> Tensor:
        ctx.rows, ctx.scalings, ctx.joined = rows, scalings, joined
        with torch.autocast(x.device.type, enabled=False):
            folded = _fold(weight, rows, scalings, matrices, x.dtype, stacked=joined)
            if not joined:
                ctx.save_for_backward(x, weight, *matrices)
                return F.linear(x, folded, bias)
            num_ranks = len(folded) - len(weight)
            if bias is not None:
                bias = F.pad(bias, (0, num_ranks))
            y, u = F.linear(x, folded, bias).split([len(weight), num_ranks], dim=-1)
            # A copy, since a view would keep all of y.
            ctx.save_for_backward(x, weight, u.flatten(0, -2).contiguous(), *matrices)
            return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, *matrices = ctx.saved_tensors
    u_TR = matrices.pop(0) if ctx.joined else None
    a_all, b_all = matrices[::2], matrices[1::2]
    ranks = [len(a_Rin) for a_Rin in a_all]
    x_Tin, dy_Tout = x.flatten(0, -2), dy.flatten(0, -2)
    parts = [dy_Tout[:, rows] for rows in ctx.rows]
    dx = v_TR = None
    if ctx.needs_input_grad[0]:
        folded = _fold(weight, ctx.rows, ctx.scalings, matrices, x.dtype)
        if ctx.joined:
            b_outR = folded.new_zeros(len(folded), sum(ranks))
            for rows, b, column in zip(ctx.rows, b_all, b_outR.split(ranks, dim=1), strict=True):
                column[rows] = b
            dx, v = (dy @ torch.cat([folded, b_outR], dim=1)).split(
                [x.shape[-1], sum(ranks)], dim=-1
            )
            v_TR = v.flatten(0, -2)
        else:
            dx = dy @ folded
    if u_TR is None:
        # The matrices A stacked, so that x is read once for all parts.
        a_stacked = a_all[0] if len(a_all) == 1 else torch.cat(a_all)
        u_TR = x_Tin @ a_stacked.to(x.dtype).t()
    if v_TR is None:
        v_all = [p @ b.to(x.dtype) for p, b in zip(parts, b_all, strict=True)]
        v_TR = v_all[0] if len(v_all) == 1 else torch.cat(v_all, dim=1)
    da_all = (v_TR.t() @ x_Tin).split(ranks)
    u_all = u_TR.split(ranks, dim=1)
    gradients: list[Tensor] = []
    for scaling, a, b, da, part, u in zip(
        ctx.scalings, a_all, b_all, da_all, parts, u_all, strict=True
    ):
        gradients.append(da.to(a.dtype) * scaling)
        gradients.append((part.t() @ u).to(b.dtype) * scaling)
    return dx, None, None, None, None, None, *gradients
