"""LoRA through peft: targets, initial weights, scaling, cost and exchange with peft."""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import Mlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

from lorat.checkpoint.folder import load, save
from lorat.config.training import LoraConfig
from lorat.config.variants import Variant
from lorat.errors import UserError
from lorat.model.adapter import ADAPTER, adapted_layers, matrices, peft_config
from lorat.model.backbone import plain_weights
from lorat.model.network import LoRAT
from tests.lorat.tiny_models import BOTH_FFNS, MLP_VARIANT, batch, shake, tiny_config, tiny_model

FFNS = pytest.mark.parametrize("variant", BOTH_FFNS, ids=lambda v: v.ffn)


class CountProducts(TorchDispatchMode):
    """Counts matrix products with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.shapes.append(tuple(args[-1].shape))
        return func(*args, **(kwargs or {}))


def test_qkv_costs_one_product_over_the_tokens() -> None:
    model = tiny_model(lora=LoraConfig(rank=4, targets=("q", "k", "v"))).eval()
    attention = model.backbone.blocks[0].attn
    with CountProducts() as count, torch.no_grad():
        attention(torch.randn(2, 6, 64))
    assert sorted(count.shapes) == [(64, 64), (64, 192)]


def test_qkv_backward_costs_one_frozen_product_and_the_adapters_own() -> None:
    model = tiny_model(lora=LoraConfig(rank=4, targets=("q", "k", "v")))
    x = torch.randn(2, 6, 64, requires_grad=True)
    y = model.backbone.blocks[0].attn(x).sum()
    with CountProducts() as count:
        y.backward()
    # Input gradients of qkv and proj.  Of the adapters, x A' and the gradient of A for all three
    # at once, dy B and the gradient of B for each.
    assert len(count.shapes) == 2 + 2 + 2 * 3


@pytest.mark.parametrize(
    "targets",
    [("q", "v"), ("k",), ("proj",), ("fc1", "fc2"), ("q", "k", "v", "proj", "fc1", "fc2")],
)
@FFNS
def test_targets_choose_the_layers(variant: Variant, targets: tuple[str, ...]) -> None:
    model = tiny_model(variant, lora=LoraConfig(rank=2, targets=targets))
    names = {name for name, _ in adapted_layers(model.backbone)}
    assert len(names) == variant.depth * len(targets)
    assert {name.rpartition(".")[2] for name in names} == set(targets)
    images = batch(variant)
    shake(model).eval()
    torch.testing.assert_close(
        model(*images)["score_map"], model.merge()(*images)["score_map"], rtol=1e-4, atol=1e-4
    )


def test_paper_init_makes_both_matrices_random() -> None:
    model = tiny_model(lora=LoraConfig(rank=64))
    for _, layer in adapted_layers(model.backbone):
        for matrix in matrices(layer):
            assert matrix.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("init", "std"), [("kaiming", 1 / (3 * 64) ** 0.5), ("gaussian", 1 / 16)])
def test_other_inits_start_from_the_frozen_function(init, std: float) -> None:
    model = tiny_model(lora=LoraConfig(rank=16, init=init)).eval()
    for name, layer in adapted_layers(model.backbone):
        a, b = matrices(layer)
        assert not b.any()
        if not name.endswith("fc2"):
            assert a.std().item() == pytest.approx(std, rel=0.15)
    frozen = tiny_model(adaptation="head").eval()
    frozen.head.load_state_dict(model.head.state_dict())
    frozen.embedding.load_state_dict(model.embedding.state_dict())
    images = batch()
    torch.testing.assert_close(
        model(*images)["boxes"], frozen(*images)["boxes"], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, 1.0),
        ({"alpha": 8.0}, 2.0),
        ({"alpha": 8.0, "rslora": True}, 4.0),
        ({"rslora": True}, 2.0),
        ({"alpha": 0.5}, 0.125),
    ],
)
def test_scaling(fields, scaling: float) -> None:
    model = tiny_model(lora=LoraConfig(rank=4, **fields))
    for _, layer in adapted_layers(model.backbone):
        assert layer.scaling[ADAPTER] == pytest.approx(scaling)


@FFNS
def test_merged_model_computes_the_same(variant: Variant) -> None:
    model = shake(tiny_model(variant, lora=LoraConfig(rank=4, alpha=6.0, rslora=True))).eval()
    merged = model.merge()
    assert not any(True for _ in adapted_layers(merged.backbone))
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    images = batch(variant)
    for name, value in model(*images).items():
        torch.testing.assert_close(merged(*images)[name], value, rtol=1e-4, atol=1e-4)


def test_merge_leaves_the_model_as_it_was() -> None:
    model = shake(tiny_model())
    before = {n: v.clone() for n, v in model.state_dict().items()}
    merged = model.merge()
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_dropout_acts_on_training_alone_and_on_the_adapters_alone() -> None:
    model = shake(tiny_model(lora=LoraConfig(rank=4, dropout=0.5)))
    images = batch()
    first, second = model.train()(*images)["boxes"], model(*images)["boxes"]
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(*images)["boxes"], model(*images)["boxes"])
    torch.testing.assert_close(
        model(*images)["boxes"], model.merge()(*images)["boxes"], rtol=1e-4, atol=1e-4
    )


def plain_timm(model: LoRAT) -> VisionTransformer:
    """Return timm's own transformer with the frozen weights of a model; no class of ours."""
    variant, swiglu = model.variant, model.variant.ffn == "swiglu"
    plain = VisionTransformer(
        img_size=variant.search_size,
        patch_size=variant.patch_size,
        num_classes=0,
        global_pool="",
        embed_dim=variant.dim,
        depth=variant.depth,
        num_heads=variant.num_heads,
        mlp_ratio=(variant.ffn_hidden * (2 if swiglu else 1) + 0.5) / variant.dim,
        init_values=1.0,
        class_token=False,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        act_layer=torch.nn.SiLU if swiglu else torch.nn.GELU,
        mlp_layer=SwiGLUPacked if swiglu else Mlp,
    )
    plain.load_state_dict(plain_weights(model.backbone))
    return plain.eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [("q", "k", "v", "proj", "fc1", "fc2"), ("v", "q"), ("fc1",)])
@FFNS
def test_peft_opens_the_saved_adapter_on_a_plain_timm_model(
    variant: Variant, targets: Any, rslora: bool, tmp_path: Path
) -> None:
    config = tiny_config(lora=LoraConfig(rank=4, alpha=6.0, targets=targets, rslora=rslora))
    model = tiny_model(variant, lora=config.lora).eval()
    save(model, config, tmp_path)
    stored = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert stored["r"] == 4 and stored["lora_alpha"] == 6 and stored["peft_type"] == "LORA"
    images = torch.randn(2, 3, variant.search_size, variant.search_size)
    base = plain_timm(model)
    without = base(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of keys that are missing
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    expected = model.backbone(images)
    assert (expected - without).abs().max() > 1e-3
    torch.testing.assert_close(theirs(images), expected, rtol=1e-5, atol=1e-5)
    # Every stored matrix is in use: nothing was left out on the way.
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == sum(".lora_" in name for name in theirs.state_dict())
    ours = model.merge().backbone.state_dict()
    for name, value in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6, msg=name)
    again = load(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value), name


def test_an_adapter_that_mixes_q_k_and_v_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    save(tiny_model(), config, tmp_path)
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.blocks.0.attn.qkv.lora_B.weight"][0, -1] = 1.0
    save_file(weights, file)
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="mixes q, k and v"):
        load(tmp_path)


def test_copies_and_casts_keep_the_slices_on_their_own_fused_weight() -> None:
    model = tiny_model()
    copied = copy.deepcopy(model).half()
    for source, attention in (
        (model, model.backbone.blocks[0].attn),
        (copied, copied.backbone.blocks[0].attn),
    ):
        base = attention.k.get_base_layer()
        assert base.weight.dtype == source.embedding.token_type.dtype
        assert base.weight.data_ptr() == attention.qkv.weight[64:128].data_ptr()
    assert copied.backbone.blocks[0].attn.qkv is not model.backbone.blocks[0].attn.qkv


def test_patterns_match_the_blocks_alone() -> None:
    import re

    pattern = peft_config(LoraConfig()).target_modules
    assert isinstance(pattern, str)
    assert re.fullmatch(pattern, "blocks.11.attn.proj")
    assert re.fullmatch(pattern, "backbone.blocks.0.mlp.fc2")
    for name in ("patch_embed.proj", "blocks.0.attn.qkv", "head.cls_mlp.layers.0", "blocks.0.attn"):
        assert not re.fullmatch(pattern, name)


def test_adapters_are_the_only_backbone_parameters_that_train() -> None:
    model = tiny_model(MLP_VARIANT)
    for name, parameter in model.backbone.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
