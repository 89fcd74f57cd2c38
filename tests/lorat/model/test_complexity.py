"""Counts and multiply-accumulates are those of the paper's table."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lorat.config.training import HeadConfig, LoraConfig, TrainConfig
from lorat.config.variants import VARIANTS
from lorat.model.complexity import describe, merged_macs
from lorat.model.network import LoRAT
from tests.lorat.tiny_models import BOTH_FFNS, batch, tiny_model

SHARED = {
    # backbone, LoRA, head, token type, trainable
    "S": (22_056_576, 5_308_416, 593_285, 1_152, 5_902_853),
    "B": (86_580_480, 10_616_832, 2_366_213, 2_304, 12_985_349),
    "L": (304_368_640, 28_311_552, 4_203_525, 3_072, 32_518_149),
    "g": (1_136_480_768, 70_778_880, 9_451_013, 4_608, 80_234_501),
}
BY_CROP = {
    # total while training, total merged, GMACs merged and the digits they are known to
    "S-224": (27_530_885, 22_222_469, 7.96, 2),
    "S-378": (27_712_517, 22_404_101, 28.2, 1),
    "B-224": (98_708_741, 88_091_909, 29.8, 1),
    "B-378": (99_072_005, 88_455_173, 96.5, 1),
    "L-224": (335_744_005, 307_432_453, 102.9, 1),
    "L-378": (336_228_357, 307_916_805, 325.0, 1),
    "g-224": (1_215_001_093, 1_144_222_213, 377.7, 1),
    "g-378": (1_215_727_621, 1_144_948_741, 1160.4, 1),
}


@pytest.mark.parametrize("name", BY_CROP)
def test_counts_and_macs_equal_the_published_table(name: str) -> None:
    found = describe(name)
    backbone, lora, head, token_type, trainable = SHARED[name.partition("-")[0]]
    assert found.backbone_params == backbone
    assert found.lora_params == lora
    assert found.head_params == head
    assert found.token_type_params == token_type
    assert found.trainable_params == trainable
    training, inference, gmacs, digits = BY_CROP[name]
    assert found.total_training_params == training
    assert found.total_inference_params == inference
    assert round(found.macs / 1e9, digits) == gmacs


@pytest.mark.parametrize("name", ["S-378", "g-224", "T-112"])
def test_macs_equal_what_torch_counts(name: str) -> None:
    variant = VARIANTS[name]
    model = LoRAT(variant, initialise=False, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*(t.to("meta") for t in batch(variant, size=1)))
    assert counter.get_total_flops() == 2 * sum(merged_macs(variant).values())


@pytest.mark.parametrize("variant", BOTH_FFNS, ids=lambda v: v.ffn)
@pytest.mark.parametrize("adaptation", ["lora", "full", "head"])
def test_training_work_equals_what_torch_counts(variant, adaptation) -> None:
    config = TrainConfig(adaptation=adaptation, lora=LoraConfig(rank=4), backbone="none")
    model = tiny_model(variant, adaptation=adaptation)
    # Not every torch counts the fused attention of the CPU; all count its plain products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = model(*batch(variant, size=1))
        (outputs["score_map"].sum() + outputs["boxes"].sum()).backward()
    assert describe(variant, config).train_flops == pytest.approx(
        counter.get_total_flops(), rel=1e-3
    )


def test_describing_allocates_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = set()
    register = torch.nn.Module.register_parameter

    def record(self, name, parameter) -> None:
        if parameter is not None:
            devices.add(parameter.device.type)
        register(self, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", record)
    describe("B-224")
    assert devices == {"meta"}


def test_counts_follow_the_configuration() -> None:
    lora = LoraConfig(rank=8, targets=("q", "v"))
    config = TrainConfig(lora=lora, head=HeadConfig(depth=2))
    found = describe("B-224", config)
    assert found.lora_params == 12 * 2 * 8 * (768 + 768)
    assert found.head_params == 2 * (768 * 768 + 768) + 5 * 768 + 5
    full = describe("B-224", TrainConfig(adaptation="full"))
    assert full.trainable_params == full.total_training_params == full.total_inference_params
    assert full.lora_params == 0


def test_text_names_the_counts() -> None:
    text = describe("B-224").text
    for part in ("B-224", "98,708,741", "88,091,909", "12,985,349", "10,616,832", "29.82"):
        assert part in text
