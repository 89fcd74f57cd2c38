"""Backbone weights from every source, and the transformer against timm's own."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Mlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lorat.checkpoint.folder import save_backbone
from lorat.config.training import HeadConfig
from lorat.config.variants import VARIANTS, Variant
from lorat.errors import UserError
from lorat.model import backbone as backbone_module
from lorat.model.backbone import (
    TOKEN_TYPE_KEY,
    Block,
    StoredLinear,
    build_backbone,
    fingerprint,
    plain_weights,
    source_of,
    write_backbone,
)
from lorat.model.network import build_model
from tests.lorat.tiny_models import (
    BOTH_FFNS,
    MLP_VARIANT,
    SWIGLU_VARIANT,
    batch,
    shake,
    tiny_config,
    tiny_model,
)

FFNS = pytest.mark.parametrize("variant", BOTH_FFNS, ids=lambda v: v.ffn)


def timm_vit(variant: Variant) -> VisionTransformer:
    """Build what timm builds for DINOv2, at a small size and with a class token."""
    torch.manual_seed(0)
    swiglu = variant.ffn == "swiglu"
    model = VisionTransformer(
        img_size=variant.pretrain_grid * 14,
        patch_size=14,
        num_classes=0,
        embed_dim=variant.dim,
        depth=variant.depth,
        num_heads=variant.num_heads,
        mlp_ratio=2 * variant.ffn_hidden / variant.dim if swiglu else 4,
        init_values=1e-5,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        mlp_layer=SwiGLUPacked if swiglu else Mlp,
        act_layer=nn.SiLU if swiglu else nn.GELU,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def dinov2_keys(state: dict[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    renamed = {"mask_token": torch.zeros(1, variant.dim)}
    for name, value in state.items():
        if variant.ffn == "swiglu":
            name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        renamed[name] = value
    return renamed


@FFNS
def test_blocks_compute_what_timm_computes(variant: Variant) -> None:
    reference = timm_vit(variant)
    state = {k: v for k, v in reference.state_dict().items() if k not in {"cls_token", "pos_embed"}}
    ours = build_backbone(variant).eval()
    ours.load_state_dict(state | {"pos_embed": ours.pos_embed}, strict=True)
    x = torch.randn(2, 20, variant.dim)
    with torch.inference_mode():
        torch.testing.assert_close(ours.blocks(x), reference.blocks(x), rtol=1e-5, atol=1e-5)


@FFNS
@pytest.mark.parametrize("layout", ["timm", "dinov2"])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_both_key_layouts_in_both_file_kinds(
    variant: Variant, layout: str, ending: str, tmp_path: Path
) -> None:
    state = timm_vit(variant).state_dict()
    content = dinov2_keys(state, variant) if layout == "dinov2" else dict(state)
    path = tmp_path / f"backbone{ending}"
    if ending == ".pth":
        torch.save(content, path)
    else:
        save_file(content, path)
    model = build_model(tiny_config(backbone=str(path)), variant=variant)
    loaded = plain_weights(model.backbone)
    for name, value in state.items():
        if name == "pos_embed":
            assert torch.equal(loaded[name], value[:, 1:])
        elif name != "cls_token":
            assert torch.equal(loaded[name], value), name
    assert model.backbone_source == str(path)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"weights": Path("/")}, path)
    with pytest.raises(UserError, match="weights_only=True"):
        build_model(tiny_config(backbone=str(path)))
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match=r"evil\.pth"):
        build_model(tiny_config(backbone=str(path)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        build_model(tiny_config(backbone=str(tmp_path / "nowhere.safetensors")))


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    state = dict(timm_vit(MLP_VARIANT).state_dict())
    del state["blocks.0.norm1.weight"], state["norm.bias"]
    state["register_tokens"] = torch.zeros(1, 4, 64)
    state["blocks.1.mlp.fc1.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError) as caught:
        build_model(tiny_config(backbone=str(tmp_path / "wrong.safetensors")))
    message = str(caught.value)
    for part in (
        "missing blocks.0.norm1.weight, norm.bias",
        "unexpected register_tokens",
        "blocks.1.mlp.fc1.bias [7] instead of [256]",
    ):
        assert part in message


def test_hub_weights_come_through_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = dataclasses.replace(MLP_VARIANT, timm_name="vit_small_patch14_dinov2.lvd142m")
    asked = []

    def create_model(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        asked.append((name, pretrained, num_classes))
        return timm_vit(variant)

    monkeypatch.setattr(timm, "create_model", create_model)
    model = build_model(tiny_config(backbone="auto"), variant=variant)
    assert asked == [("vit_small_patch14_dinov2.lvd142m", True, 0)]
    assert model.backbone_source == "hub"
    expected = timm_vit(variant).state_dict()["blocks.1.attn.qkv.weight"]
    assert torch.equal(plain_weights(model.backbone)["blocks.1.attn.qkv.weight"], expected)


def test_an_unreachable_hub_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(*_: object, **__: object) -> nn.Module:
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(UserError, match=r"backbone=FILE .* or backbone=none") as caught:
        build_model(tiny_config(backbone="auto"), variant=VARIANTS["S-224"])
    assert "no route" in str(caught.value)


def test_a_variant_without_public_weights_has_none_on_the_hub() -> None:
    with pytest.raises(UserError, match="no public backbone"):
        build_model(tiny_config(backbone="hub"))


def test_every_large_variant_names_a_timm_model_of_its_sizes() -> None:
    for variant in VARIANTS.values():
        if variant.timm_name is None:
            continue
        with torch.device("meta"):
            theirs = timm.create_model(variant.timm_name, num_classes=0).state_dict()
        ours = build_backbone(variant, device="meta", initialise=False).state_dict()
        assert theirs.keys() == ours.keys() | {"cls_token"}
        for name, value in ours.items():
            if name != "pos_embed":
                assert theirs[name].shape == value.shape, name
        assert theirs["pos_embed"].shape[1] == variant.pretrain_grid**2 + 1


def test_auto_means_shipped_hub_or_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    variant = VARIANTS["T-112"]
    shipped = tmp_path / "t112_backbone.safetensors"
    monkeypatch.setattr(backbone_module, "SHIPPED", {"T-112": shipped})
    assert source_of("auto", VARIANTS["N-112"]) == "none"
    assert source_of("auto", VARIANTS["B-224"]) == "hub"
    with caplog.at_level(logging.WARNING):
        assert source_of("auto", variant) == "none"
    assert "T-112" in caplog.text

    source = build_model(tiny_config(adaptation="full"), variant=variant)
    save_backbone(source, shipped, dtype=torch.float16)
    assert shipped.stat().st_size < 5_000_000
    model = build_model(tiny_config(backbone="auto"), variant=variant)
    assert model.backbone_source == "shipped"
    for name, value in plain_weights(source.backbone).items():
        assert torch.equal(plain_weights(model.backbone)[name], value.half().float()), name


@FFNS
def test_written_backbone_has_dinov2_keys_and_its_token_types_and_loads_again(
    variant: Variant, tmp_path: Path
) -> None:
    model = shake(tiny_model(variant, adaptation="full"))
    path = tmp_path / "backbone.safetensors"
    save_backbone(model, path)
    written = load_file(path)
    types = written.pop(TOKEN_TYPE_KEY)
    reference = dinov2_keys(timm_vit(variant).state_dict(), variant)
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in reference.items()}
    again = build_model(tiny_config(backbone=str(path)), variant=variant)
    for name, value in plain_weights(model.backbone).items():
        assert torch.equal(plain_weights(again.backbone)[name], value), name
    assert torch.equal(types, model.embedding.token_type)
    assert torch.equal(again.embedding.token_type, types)


def test_a_head_that_goes_along_is_taken_unless_its_depth_is_another(tmp_path: Path) -> None:
    source = shake(tiny_model(adaptation="full"))
    file = tmp_path / "backbone.safetensors"
    save_backbone(source, file, with_head=True)
    head = source.head.state_dict()
    for adaptation in ("lora", "full", "head"):
        again = tiny_model(backbone=str(file), adaptation=adaptation).head.state_dict()
        assert all(torch.equal(again[name], value) for name, value in head.items())
    deeper = tiny_model(backbone=str(file), head=HeadConfig(depth=4)).head.state_dict()
    assert len(deeper) > len(head)
    fresh = tiny_model(backbone="none", head=HeadConfig(depth=4)).head.state_dict()
    assert deeper.keys() == fresh.keys()


def test_a_lora_trained_backbone_is_written_merged(tmp_path: Path) -> None:
    model = shake(tiny_model())
    save_backbone(model, tmp_path / "backbone.safetensors")
    written = load_file(tmp_path / "backbone.safetensors")
    merged = model.merge().backbone.state_dict()
    assert torch.equal(written["blocks.0.attn.qkv.weight"], merged["blocks.0.attn.qkv.weight"])


def test_fingerprints_tell_backbones_apart() -> None:
    first, second = tiny_model(), tiny_model()
    assert fingerprint(first.backbone) == fingerprint(second.backbone)
    with torch.no_grad():
        second.backbone.norm.bias += 1e-3
    assert fingerprint(first.backbone) != fingerprint(second.backbone)


def residual_block(rate: float) -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    backbone = build_backbone(MLP_VARIANT, drop_path=rate, layer_scale=1.0)
    block = backbone.blocks[0]
    assert isinstance(block, Block)
    return block, torch.randn(10, 6, MLP_VARIANT.dim)


def test_drop_path_does_nothing_in_eval_mode() -> None:
    block, x = residual_block(0.4)
    plain, _ = residual_block(0.0)
    assert torch.equal(block.eval()(x), plain.eval()(x))


def test_high_rates_skip_a_fixed_share_of_the_batch() -> None:
    block, x = residual_block(0.4)
    sizes = []
    block.norm1.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    out = block._residual(x, block.norm1, block.attn, block.ls1)
    branch = block.ls1(block.attn(block.norm1(x)))
    changed = [i for i in range(10) if not torch.equal(out[i], x[i])]
    assert sizes[0] == len(changed) == 6
    torch.testing.assert_close(out[changed], (x + branch * 10 / 6)[changed])


def test_high_rates_keep_one_sample_at_least() -> None:
    block, x = residual_block(0.9)
    branch = (block.norm1, block.attn, block.ls1)
    expected = x[:1] + block.ls1(block.attn(block.norm1(x[:1])))
    torch.testing.assert_close(block._residual(x[:1], *branch), expected)


def test_low_rates_drop_single_samples_by_chance() -> None:
    block, x = residual_block(0.1)
    branch = block.ls1(block.attn(block.norm1(x)))
    kept = 0
    for _ in range(100):
        out = block._residual(x, block.norm1, block.attn, block.ls1)
        for i in range(10):
            if torch.equal(out[i], x[i]):
                continue
            kept += 1
            torch.testing.assert_close(out[i], x[i] + branch[i] / 0.9)
    assert 860 <= kept <= 940


def test_frozen_weights_can_be_stored_in_half_the_bytes() -> None:
    model = tiny_model(frozen_dtype="bf16")
    stored = [m for m in model.backbone.modules() if isinstance(m, StoredLinear)]
    assert len(stored) == 4 * MLP_VARIANT.depth
    assert all(m.weight.dtype == torch.bfloat16 for m in stored)
    assert all(p.dtype == torch.float32 for p in model.trainable_parameters())
    exact = tiny_model()
    images = batch()
    difference = model.eval()(*images)["score_map"] - exact.eval()(*images)["score_map"]
    assert 0 < difference.abs().max() < 0.05
    model.train()(*images)["score_map"].sum().backward()
    assert all(p.grad is not None for p in model.head.cls_mlp.parameters())


def test_swiglu_width_follows_dinov2() -> None:
    assert VARIANTS["g-224"].ffn_hidden == 4096
    block = build_backbone(SWIGLU_VARIANT).blocks[0]
    assert tuple(block.mlp.fc1.weight.shape) == (2 * SWIGLU_VARIANT.ffn_hidden, 48)
    write_keys = plain_weights(build_backbone(SWIGLU_VARIANT))
    assert "blocks.0.mlp.fc1.weight" in write_keys


def test_written_file_is_small_in_half_precision(tmp_path: Path) -> None:
    backbone = build_backbone(MLP_VARIANT)
    write_backbone(backbone, tmp_path / "a.safetensors", ffn="mlp", dtype=torch.float16)
    assert all(v.dtype == torch.float16 for v in load_file(tmp_path / "a.safetensors").values())
