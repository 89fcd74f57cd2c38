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
    model: LoRAT, dtype: torch.dtype = torch.float32, autocast: bool = False
) -> list[Tensor]:
    template, search, mask = batch()
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
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


def test_error_in_half_precision_is_the_usual_form_s(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shake(tiny_model(lora=LoraConfig(rank=4, targets=ALL)), std=0.05)
    ours = loss_and_gradients(model, autocast=True)
    usual_form(monkeypatch)
    usual = loss_and_gradients(model, autocast=True)
    exact = loss_and_gradients(model.double(), torch.float64)

    def error(values: list[Tensor]) -> float:
        """Relative error of all gradients together."""
        pairs = list(zip(values[1:], exact[1:], strict=True))
        wrong = sum((v.double() - e).square().sum() for v, e in pairs)
        return float(wrong / sum(e.square().sum() for _, e in pairs)) ** 0.5

    print(f"relative error of the gradients: folded {error(ours):.3e}, usual {error(usual):.3e}")
    assert error(ours) <= 1.5 * error(usual) < 0.5


def test_dropout_takes_the_usual_form() -> None:
    layer = tiny_model(lora=LoraConfig(rank=4, dropout=0.1)).backbone.blocks[0].attn.proj
    assert isinstance(layer, adapter.FoldedLinear) and not folded.foldable(layer)
