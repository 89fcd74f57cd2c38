"""Groups and schedule."""

from __future__ import annotations

import pytest

from lorat.config.training import TrainConfig, resolve
from lorat.learning.optimisation import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    scheduled_lr,
)
from tests.lorat.tiny_models import tiny_config, tiny_model

PAPER = {
    "lr": 1e-4,
    "min_lr": 1e-6,
    "warmup_lr": 1e-7,
    "warmup_steps": 2048,
    "total_steps": 174_080,
}


def test_full_training_decays_matrices_alone() -> None:
    model = tiny_model(adaptation="full")
    groups = parameter_groups(model, 0.1)
    decays = {name: g["weight_decay"] for g in groups for name, _ in g["params"]}
    assert decays.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        plain = parameter.squeeze().ndim > 1 and "embed" not in name
        assert decays[name] == (0.1 if plain else 0.0), name
    assert decays["backbone.patch_embed.proj.weight"] == decays["backbone.pos_embed"] == 0


def test_head_training_has_no_empty_group() -> None:
    groups = parameter_groups(tiny_model(adaptation="head"), 0.1)
    assert len(groups) == 2 and all(g["params"] for g in groups)


def test_the_moments_decay_as_configured() -> None:
    config = tiny_config(lr=1e-3, beta1=0.8, beta2=0.95, adam_eps=1e-6)
    for group in build_optimizer(tiny_model(), config).param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


def test_paper_schedule_landmarks() -> None:
    assert learning_rate(0, **PAPER) == learning_rate(1, **PAPER) == 1e-7
    assert learning_rate(2049, **PAPER) == pytest.approx(1e-4, rel=1e-12)
    assert learning_rate(174_079, **PAPER) == pytest.approx(1.0339e-6, rel=1e-4)
    assert learning_rate(10**7, **PAPER) == 1e-6
    config = resolve(TrainConfig(variant="B-224"))
    for step in (0, 17, 2048, 100_000):
        assert scheduled_lr(step, config) == learning_rate(step, **PAPER)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0, **(PAPER | {"warmup_steps": 0})) == 1e-4
