"""The released layout: names, scalings and errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorat.checkpoint.official import export_official, import_official, official_state
from lorat.config.training import HeadConfig, LoraConfig
from lorat.config.variants import VARIANTS, Variant
from lorat.errors import UserError
from lorat.model.backbone import write_backbone
from lorat.model.network import LoRAT
from tests.lorat.tiny_models import (
    BOTH_FFNS,
    MLP_VARIANT,
    batch,
    released_state,
    shake,
    tiny_model,
)

FFNS = pytest.mark.parametrize("variant", BOTH_FFNS, ids=lambda v: v.ffn)


def assert_same_function(a: LoRAT, b: LoRAT) -> None:
    images = batch(a.variant)
    for name, value in a.eval()(*images).items():
        torch.testing.assert_close(b.eval()(*images)[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lora": LoraConfig(rank=4, alpha=1.0)},
        {"lora": LoraConfig(rank=4, alpha=6.5, rslora=True)},
        {"lora": LoraConfig(rank=3, targets=("q", "v"))},
        {"lora": LoraConfig(rank=1, targets=("fc1", "fc2")), "head": HeadConfig(depth=1)},
        {"adaptation": "full", "head": HeadConfig(depth=2)},
    ],
)
@FFNS
def test_export_and_import_are_inverse(variant: Variant, fields, tmp_path: Path) -> None:
    model = shake(tiny_model(variant, **fields))
    export_official(model, tmp_path / "model.safetensors")
    again = import_official(tmp_path / "model.safetensors", variant, backbone="none")
    assert again.adaptation == model.adaptation
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert_same_function(model, again)


def test_released_key_list_of_b224() -> None:
    model = LoRAT(VARIANTS["B-224"], device="meta", initialise=False)
    model.adapt("lora", LoraConfig())
    state = official_state(model)
    assert len(state) == 380
    for name, shape in {
        "blocks.11.attn.qkv.k.linear.weight": (768, 768),
        "blocks.0.attn.qkv.q.linear.bias": (768,),
        "blocks.0.attn.qkv.v.lora.A": (64, 768),
        "blocks.0.attn.proj.lora.B": (768, 64),
        "blocks.3.mlp.fc1.lora.B": (3072, 64),
        "blocks.3.mlp.fc2.linear.weight": (768, 3072),
        "blocks.3.ls2.gamma": (768,),
        "pos_embed": (1, 256, 768),
        "token_type_embed": (3, 768),
        "head.reg_mlp.layers.2.weight": (4, 768),
        "lora_alpha": (),
        "use_rslora": (),
    }.items():
        assert tuple(state[name].shape) == shape, name
    giant = LoRAT(VARIANTS["g-224"], device="meta", initialise=False)
    giant.adapt("lora", LoraConfig())
    state = official_state(giant)
    assert tuple(state["blocks.39.mlp.w12.lora.B"].shape) == (8192, 64)
    assert tuple(state["blocks.39.mlp.w3.linear.weight"].shape) == (1536, 4096)


def test_trainable_file_of_b224_has_the_published_size() -> None:
    model = LoRAT(VARIANTS["B-224"], device="meta", initialise=False)
    model.adapt("lora", LoraConfig())
    state = released_state(model, scalars=False)
    assert sum(v.numel() for v in state.values()) == 12_985_349


@FFNS
def test_trained_tensors_alone_need_the_backbone(variant: Variant, tmp_path: Path) -> None:
    model = shake(tiny_model(variant))
    save_file(released_state(model), tmp_path / "model.bin")
    with pytest.raises(UserError) as caught:
        import_official(tmp_path / "model.bin", variant, backbone="none")
    message = str(caught.value)
    assert "blocks.1.attn.qkv.v.weight" in message and "patch_embed.proj.bias" in message
    assert "backbone=FILE" in message

    backbone = tmp_path / "dinov2.safetensors"
    write_backbone(model.backbone, backbone, ffn=variant.ffn)
    again = import_official(tmp_path / "model.bin", variant, backbone=str(backbone))
    assert again.backbone_source == str(backbone)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_every_wrong_key_is_named_at_once() -> None:
    state = official_state(tiny_model())
    del state["blocks.0.attn.qkv.q.lora.B"], state["head.cls_mlp.layers.0.bias"]
    state["blocks.1.attn.qkv.k.linear.weight"] = torch.zeros(5, 64)
    state["blocks.7.norm1.weight"] = torch.zeros(64)
    state["something.else"] = torch.zeros(1)
    with pytest.raises(UserError) as caught:
        import_official(state, MLP_VARIANT, backbone="none")
    for part in (
        "missing blocks.0.attn.qkv.q.lora.B, head.cls_mlp.layers.0.bias",
        "unexpected blocks.7.norm1.weight, something.else",
        "blocks.1.attn.qkv.k.linear.weight [5, 64] instead of [64, 64]",
    ):
        assert part in str(caught.value)


def test_wrong_keys_are_found_before_the_hub_is_asked() -> None:
    state = released_state(tiny_model()) | {"odd": torch.zeros(1)}
    variant = dataclasses.replace(MLP_VARIANT, timm_name="not_a_model")
    with pytest.raises(UserError, match="unexpected odd"):
        import_official(state, variant, backbone="hub")


def test_scaling_without_an_alpha_is_one() -> None:
    model = shake(tiny_model(lora=LoraConfig(rank=4, alpha=4.0)))
    state = official_state(model, scalars=False)
    again = import_official(state, MLP_VARIANT, backbone="none")
    assert again.lora is not None and again.lora.resolved_alpha == 4
    assert_same_function(model, again)


def test_a_layer_may_have_an_alpha_of_its_own() -> None:
    model = shake(tiny_model(lora=LoraConfig(rank=4, alpha=4.0)))
    state = official_state(model)
    state["blocks.0.mlp.fc1.lora.alpha"] = torch.tensor(8.0)
    state["blocks.0.mlp.fc1.lora.B"] = state["blocks.0.mlp.fc1.lora.B"] / 2
    state["blocks.1.attn.qkv.q.lora.alpha"] = torch.tensor(6)
    state["blocks.1.attn.qkv.q.lora.use_rslora"] = torch.tensor(True)
    state["blocks.1.attn.qkv.q.lora.B"] = state["blocks.1.attn.qkv.q.lora.B"] / 3
    assert_same_function(model, import_official(state, MLP_VARIANT, backbone="none"))


def test_integer_alpha_is_read() -> None:
    state = official_state(tiny_model()) | {"lora_alpha": torch.tensor(64)}
    model = import_official(state, MLP_VARIANT, backbone="none")
    assert model.lora is not None and model.lora.resolved_alpha == 64
