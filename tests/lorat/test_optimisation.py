"""Groups, schedule, accumulation and the step."""

from __future__ import annotations

import pytest
import torch

from lorat.config import TrainConfig, resolve
from lorat.errors import UserError
from lorat.optimisation import (
    accumulation_steps,
    build_optimizer,
    clip_and_step,
    learning_rate,
    parameter_groups,
    scheduled_lr,
)
from tests.lorat.tiny_models import batch, tiny_config, tiny_model

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


@pytest.mark.parametrize(
    ("local", "micro", "expected"),
    [(16, None, 1), (16, 16, 1), (16, 8, 2), (16, 5, 4), (7, 3, 7), (12, 5, 3), (1, 9, 1)],
)
def test_accumulation_uses_the_fewest_equal_passes(local, micro, expected) -> None:
    assert accumulation_steps(local, micro) == expected


def test_accumulation_refuses_an_empty_step() -> None:
    with pytest.raises(UserError, match="1 or more"):
        accumulation_steps(0, 4)


def test_accumulated_gradients_equal_those_of_the_mean_loss() -> None:
    model = tiny_model()
    images = batch(size=4)

    def losses(rows: slice) -> torch.Tensor:
        return model(*(t[rows] for t in images))["score_map"].square().mean()

    losses(slice(0, 4)).backward()
    whole = [p.grad.clone() for p in model.trainable_parameters() if p.grad is not None]
    model.zero_grad()
    g = accumulation_steps(4, 2)
    for index in range(g):
        (losses(slice(2 * index, 2 * index + 2)) / g).backward()
    parts = [p.grad for p in model.trainable_parameters() if p.grad is not None]
    assert len(parts) == len(whole) > 0
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


def test_step_clips_the_global_norm_and_uses_the_given_rate() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, resolve(tiny_config()))
    before = [p.detach().clone() for p in model.trainable_parameters()]
    seen = {}

    def look(*_: object) -> None:
        grads = [p.grad for p in model.trainable_parameters() if p.grad is not None]
        seen["norm"] = torch.stack([g.norm() for g in grads]).norm().item()

    optimizer.register_step_pre_hook(look)
    (100 * model(*batch())["score_map"].sum()).backward()
    norm = clip_and_step(optimizer, model.trainable_parameters(), lr=1e-3, clip_norm=0.5)
    assert norm > 0.5 and seen["norm"] == pytest.approx(0.5, rel=1e-3)
    change = max(
        (a - b).abs().max() for a, b in zip(before, model.trainable_parameters(), strict=True)
    )
    assert 0 < change <= 1.2e-3
    assert all(p.grad is None for p in model.trainable_parameters())


def test_loss_scaler_leaves_out_a_step_that_is_not_finite() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, resolve(tiny_config()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.trainable_parameters()]
    scaler.scale(model(*batch())["score_map"].sum() * float("inf")).backward()
    norm = clip_and_step(
        optimizer, model.trainable_parameters(), lr=1e-3, clip_norm=1.0, scaler=scaler
    )
    assert not norm.isfinite()
    assert scaler.get_scale() == 512
    assert all(torch.equal(a, b) for a, b in zip(before, model.trainable_parameters(), strict=True))
