"""Folded adapters compute what the usual form of LoRA computes, in every combination."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorat.config.training import LoraConfig
from lorat.model import adapter, backbone, folded
from lorat.model.network import LoRAT
from tests.lorat.tiny_models import batch, shake, tiny_model

ALL = ("q", "k", "v", "proj", "fc1", "fc2")


def usual_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (backbone, folded):
        monkeypatch.setattr(module, "foldable", lambda layer: False)


def loss_and_gradients(
    model: LoRAT,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    seed: int = 0,
) -> list[Tensor]:
    template, search, mask = batch(seed=seed)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        outputs = model(template.to(dtype), search.to(dtype), mask)
    loss = sum(value.to(dtype).square().mean() for value in outputs.values())
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if ".lora_" in n]
    return [loss.detach(), *(g.detach().clone() for g in gradients if g is not None)]


@pytest.mark.parametrize(
    ("lora", "fields"),
    [
        ({"targets": ALL}, {}),
        ({"targets": ("q", "v", "fc2")}, {}),
        ({"targets": ALL, "alpha": 8.0, "rslora": True}, {}),
        ({"targets": ALL}, {"activation_checkpointing": True}),
        ({"targets": ALL}, {"frozen_dtype": "bf16"}),
    ],
    ids=["all", "some targets", "rslora", "activation checkpointing", "frozen bf16"],
)
def test_same_loss_and_gradients_in_float32(
    lora: dict[str, Any], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shake(tiny_model(lora=LoraConfig(rank=4, **lora), **fields), std=0.05)
    ours = loss_and_gradients(model)
    usual_form(monkeypatch)
    usual = loss_and_gradients(model)
    assert len(ours) == len(usual) > 1
    for value, expected in zip(ours, usual, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_errors_in_half_precision_are_the_usual_form_s(
    half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, of the loss and of all gradients together, over some batches."""
    seeds = range(4)
    model = shake(tiny_model(lora=LoraConfig(rank=4, targets=ALL)), std=0.05)
    ours = [loss_and_gradients(model, autocast=half, seed=seed) for seed in seeds]
    usual_form(monkeypatch)
    usual = [loss_and_gradients(model, autocast=half, seed=seed) for seed in seeds]
    exact = [loss_and_gradients(model.double(), torch.float64, seed=seed) for seed in seeds]

    def error(values: list[list[Tensor]], which: slice) -> float:
        found, true = (
            torch.cat([v.double().flatten() for row in rows for v in row[which]])
            for rows in (values, exact)
        )
        return float((found - true).norm() / true.norm())

    for what, which in (("loss", slice(1)), ("gradients", slice(1, None))):
        folded_error, usual_error = error(ours, which), error(usual, which)
        print(f"{half}, {what}: folded {folded_error:.3e}, usual {usual_error:.3e}")
        assert folded_error <= 1.5 * usual_error < 0.5, what


def test_compiled_it_has_the_same_outputs_and_gradients() -> None:
    model = shake(tiny_model(lora=LoraConfig(rank=4, targets=ALL)), std=0.05)
    block = model.backbone.blocks[0]
    x = torch.randn(2, 5, 64, requires_grad=True)
    trained = [x, *(p for p in block.parameters() if p.requires_grad)]

    def outputs_and_gradients() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x)
        return [y, *torch.autograd.grad(y.square().mean(), trained)]

    expected = outputs_and_gradients()
    block.compile(backend="aot_eager", fullgraph=True)
    for value, other in zip(outputs_and_gradients(), expected, strict=True):
        scale = other.detach().abs().max().item()
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4 * scale)


def test_dropout_takes_the_usual_form() -> None:
    layer = tiny_model(lora=LoraConfig(rank=4, dropout=0.1)).backbone.blocks[0].attn.proj
    assert isinstance(layer, adapter.FoldedLinear) and not folded.foldable(layer)


def test_a_disabled_or_merged_adapter_is_not_folded_in() -> None:
    model = shake(tiny_model(lora=LoraConfig(rank=4, targets=("fc1",)))).eval()
    layer = model.backbone.blocks[0].mlp.fc1
    base: Any = layer.get_base_layer()
    x = torch.randn(2, 5, base.in_features)
    with torch.no_grad():
        adapted = layer(x)
        layer.enable_adapters(False)
        assert not folded.foldable(layer)
        torch.testing.assert_close(layer(x), base(x))
        layer.enable_adapters(True)
        layer.merge()
        assert not folded.foldable(layer)
        torch.testing.assert_close(layer(x), adapted, rtol=1e-4, atol=1e-4)
        layer.unmerge()
        torch.testing.assert_close(layer(x), adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, base(x), atol=1e-2)
