"""Trackers of the smallest variant whose behaviour is known without training."""

from __future__ import annotations

import math

import torch

from lorat.config.training import TrainConfig
from lorat.model.network import LoRAT, build_model


def random_tracker(seed: int = 42) -> LoRAT:
    """Return an untrained model with adapters."""
    return build_model(TrainConfig(variant="N-112", backbone="none", seed=seed))


def staying_tracker() -> LoRAT:
    """Return a model that repeats a square box where it is: about the static baseline."""
    # All scores are alike, so the window decides: of the four middle cells the first one, whose
    # centre lies 1/16 of the crop to the left of and above the middle.
    return _constant(left=1 / 16, right=3 / 16)


def shrinking_tracker() -> LoRAT:
    """Return a model that answers with an ever smaller box: worse than the one that stays."""
    return _constant(left=0.01, right=0.01)


def _constant(*, left: float, right: float) -> LoRAT:
    model = random_tracker().merge()
    with torch.no_grad():
        for mlp, bias in (
            (model.head.cls_mlp, [0.0]),
            (model.head.reg_mlp, [_logit(left), _logit(left), _logit(right), _logit(right)]),
        ):
            last = [layer for layer in mlp.modules() if isinstance(layer, torch.nn.Linear)][-1]
            last.weight.zero_()
            last.bias.copy_(torch.tensor(bias))
    return model


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
