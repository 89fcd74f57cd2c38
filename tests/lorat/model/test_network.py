"""The network: what trains, precisions, compilation, memory saving."""

from __future__ import annotations

import pytest
import torch

from lorat.config.training import LoraConfig
from lorat.config.variants import VARIANTS, Variant
from lorat.learning.criterion import Criterion
from lorat.model.network import LoRAT, build_model, differences
from tests.lorat.tiny_models import BOTH_FFNS, MLP_VARIANT, batch, shake, tiny_config, tiny_model

FFNS = pytest.mark.parametrize("variant", BOTH_FFNS, ids=lambda v: v.ffn)


@pytest.mark.parametrize(
    ("adaptation", "trained"),
    [
        ("lora", lambda n: ".lora_" in n or n.startswith(("head.", "embedding."))),
        ("full", lambda n: True),
        ("head", lambda n: n.startswith("head.")),
    ],
)
def test_adaptation_decides_what_trains(adaptation, trained) -> None:
    model = tiny_model(adaptation=adaptation)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if trained(n)}
    outputs = model(*batch())
    (outputs["score_map"].sum() + outputs["boxes"].sum()).backward()
    assert all(p.grad is not None for p in model.trainable_parameters())
    assert len(model.trainable_parameters()) == len(names)


@FFNS
def test_outputs_have_the_shapes_of_the_variant(variant: Variant) -> None:
    outputs = tiny_model(variant)(*batch(variant, size=2))
    assert outputs["score_map"].shape == (2, 8, 8)
    assert outputs["boxes"].shape == (2, 8, 8, 4)
    assert all(v.dtype == torch.float32 for v in outputs.values())


def test_the_foreground_flag_reaches_the_output() -> None:
    model = shake(tiny_model()).eval()
    template, search, mask = batch()
    changed = model(template, search, 1 - mask)["score_map"]
    assert not torch.allclose(model(template, search, mask)["score_map"], changed)


def test_the_seed_draws_the_weights_and_nothing_else() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second = tiny_model(seed=7).state_dict(), tiny_model(seed=7).state_dict()
    other = tiny_model(seed=8).state_dict()
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["embedding.token_type"], other["embedding.token_type"])


def test_drop_path_defaults_to_the_variant() -> None:
    from dataclasses import replace

    variant = replace(MLP_VARIANT, drop_path=0.4)
    assert tiny_model(variant).backbone.blocks[0].drop_path == 0.4
    assert tiny_model(variant, drop_path=0.0).backbone.blocks[1].drop_path == 0.0
    assert [VARIANTS[f"{n}-224"].drop_path for n in "SBLg"] == [0.0, 0.0, 0.1, 0.4]


def gradients(model: LoRAT, images: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    boxes = torch.tensor([[0.2, 0.3, 0.6, 0.7]]).expand(len(images[0]), 4)
    Criterion()(model(*images), boxes)["loss"].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("drop_path", [0.0, 0.1, 0.4])
def test_activation_checkpointing_changes_no_gradient(drop_path: float) -> None:
    images = batch(size=4)
    results = []
    for checkpointing in (False, True):
        model = tiny_model(
            drop_path=drop_path,
            activation_checkpointing=checkpointing,
            lora=LoraConfig(rank=4, dropout=0.2),
        )
        torch.manual_seed(3)
        results.append(gradients(model, images))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@FFNS
def test_half_precision_inference_is_close(variant: Variant, dtype: torch.dtype) -> None:
    images = batch(variant)
    merged = tiny_model(variant).merge()
    exact = merged(*images)
    template, search, mask = images
    outputs = merged.to(dtype)(template.to(dtype), search.to(dtype), mask)
    for name, value in outputs.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.05, atol=0.02)


def test_unmerged_half_precision_inference_works() -> None:
    template, search, mask = batch()
    outputs = tiny_model().half().eval()(template.half(), search.half(), mask)
    assert all(v.isfinite().all() for v in outputs.values())


@pytest.mark.parametrize("frozen_dtype", ["fp32", "bf16"])
def test_training_under_autocast_is_close(frozen_dtype: str) -> None:
    images = batch()
    exact = gradients(tiny_model(), images)
    model = tiny_model(frozen_dtype=frozen_dtype)
    model.zero_grad()
    boxes = torch.tensor([[0.2, 0.3, 0.6, 0.7]]).expand(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(*images)
    assert all(v.dtype == torch.float32 for v in outputs.values())
    Criterion()(outputs, boxes)["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
            difference = (parameter.grad - exact[name]).norm()
            # bf16 keeps 8 bits, and the sharp attention of a model from scratch (tokens attend
            # to their like) passes its rounding on; a wrong cast would give an error near 1.
            assert difference < 0.3 * exact[name].norm() + 1e-3, name


@pytest.mark.parametrize(
    "fields",
    [
        {"adaptation": "lora"},
        {"adaptation": "full"},
        {"adaptation": "lora", "frozen_dtype": "bf16", "activation_checkpointing": True},
    ],
    ids=["lora", "full", "lora-bf16-checkpointing"],
)
def test_compiled_training_equals_eager_training(fields) -> None:
    images = batch()
    eager = gradients(tiny_model(**fields), images)
    model = tiny_model(**fields)
    compiled = torch.compile(model, backend="aot_eager")
    boxes = torch.tensor([[0.2, 0.3, 0.6, 0.7]]).expand(3, 4)
    Criterion()(compiled(*images), boxes)["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-4, atol=1e-6)


@FFNS
def test_compiled_inference_needs_one_graph(variant: Variant) -> None:
    model = shake(tiny_model(variant)).eval()
    images = batch(variant)
    with torch.no_grad():
        outputs = torch.compile(model, fullgraph=True)(*images)
        for name, value in model(*images).items():
            torch.testing.assert_close(outputs[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drop_path", [0.4, pytest.param(0.1, marks=pytest.mark.exhaustive)])
def test_drop_path_compiles(drop_path: float) -> None:
    model = torch.compile(tiny_model(drop_path=drop_path), backend="aot_eager")
    outputs = model(*batch(size=5))
    (outputs["score_map"].sum() + outputs["boxes"].sum()).backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


def test_random_backbones_are_not_muted_by_layer_scale() -> None:
    model = build_model(tiny_config(backbone="none"))
    assert model.backbone.blocks[0].ls1.gamma.min() == 1


def test_differences_lists_everything() -> None:
    text = differences({"a": (1,), "b": (2,), "c": (3,)}, {"b": (2,), "c": (4,), "d": (5,)})
    assert text == "missing a; unexpected d; misshapen c [4] instead of [3]"
    assert differences({"a": (1,)}, {"a": (1,)}) is None
