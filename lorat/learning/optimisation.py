"""Optimiser groups and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lorat.config.training import TrainConfig


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
    """Return AdamW over the trainable parameters; ``config`` must be resolved.

    It is the fused one, one kernel for all parameters.  While its attribute ``found_inf`` is a
    tensor of 1, a step changes neither weights nor moments nor step counts.  On CUDA a graph may
    capture its steps.
    """
    assert config.lr is not None
    groups = parameter_groups(model, config.weight_decay)
    on_cuda = any(parameter.is_cuda for parameter in model.parameters())
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
        capturable=on_cuda,
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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
