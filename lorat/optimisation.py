"""Optimiser groups, learning-rate schedule and the optimiser step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorat.config import TrainConfig
from lorat.errors import UserError

BETAS = (0.9, 0.999)
EPS = 1e-8


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into three groups of (name, parameter) pairs.

    Matrices decay.  Vectors do not: biases and whatever is one-dimensional without its axes of
    length 1, such as the score's output weight.  Neither does anything with ``embed`` in its
    name: token types, and with the full backbone patches and positions.  Empty groups are left
    out.
    """
    matrices, vectors, embeddings = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.squeeze().ndim <= 1:
            vectors.append((name, parameter))
        elif "embed" in name:
            embeddings.append((name, parameter))
        else:
            matrices.append((name, parameter))
    groups = ((matrices, weight_decay), (vectors, 0.0), (embeddings, 0.0))
    return [{"params": pairs, "weight_decay": decay} for pairs, decay in groups if pairs]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; ``config`` must be resolved."""
    assert config.lr is not None
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=BETAS, eps=EPS
    )


def learning_rate(
    step: int, *, lr: float, min_lr: float, warmup_lr: float, warmup_steps: int, total_steps: int
) -> float:
    """Return the learning rate of optimiser step ``step`` (0-based).

    Linear warm-up from ``warmup_lr``, then a cosine of length ``total_steps`` that starts after
    the warm-up (so it is cut off before ``min_lr``), as timm's CosineLRScheduler gives it with
    ``warmup_prefix``.  The published training updates the schedule after each step with that
    step's own index, hence a lag of one: steps 0 and 1 both use ``warmup_lr``.
    """
    update = max(step - 1, 0)
    if update < warmup_steps:
        return warmup_lr + update * (lr - warmup_lr) / warmup_steps
    update -= warmup_steps
    if update >= total_steps:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * update / total_steps))


def scheduled_lr(step: int, config: TrainConfig) -> float:
    """Return :func:`learning_rate` of a resolved configuration."""
    assert config.lr is not None and config.min_lr is not None
    return learning_rate(
        step,
        lr=config.lr,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_steps=config.warmup_steps,
        total_steps=config.total_steps,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def accumulation_steps(local_batch: int, micro_batch: int | None) -> int:
    """Return the fewest equal forward passes g that keep each within ``micro_batch`` pairs.

    The loss of each is divided by g, and the optimiser steps once after all of them, so a step
    and its learning rate count optimiser updates, not passes.

    Raises:
        UserError: if there is no pair or the micro-batch is below 1.
    """
    limit = local_batch if micro_batch is None else micro_batch
    if local_batch < 1 or limit < 1:
        raise UserError(
            f"A worker has {local_batch} pairs in a step and micro_batch is {limit}; "
            "both must be 1 or more."
        )
    candidates = (g for g in range(1, local_batch + 1) if local_batch % g == 0)
    return next(g for g in candidates if local_batch // g <= limit)


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    clip_norm: float,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Clip the global gradient norm, step with ``lr``, and drop the gradients.

    Args:
        optimizer: holds ``parameters``.
        parameters: everything that is trained.
        lr: learning rate of this step.
        clip_norm: largest L2 norm over all gradients.
        scaler: loss scaler; it unscales first and leaves the step out if a gradient is not finite.

    Returns:
        The norm before clipping.
    """
    set_learning_rate(optimizer, lr)
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), clip_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm
