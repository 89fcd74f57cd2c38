"""Own checkpoints, the deployable form, and resuming."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorat.checkpoint.folder import (
    load,
    load_training_state,
    read_config,
    save,
    save_backbone,
    save_merged,
    save_training_state,
    warm_start,
)
from lorat.checkpoint.official import export_official
from lorat.config.tracking import TrackingConfig
from lorat.config.training import HeadConfig, LoraConfig, TrainConfig, resolve
from lorat.config.variants import Variant
from lorat.errors import UserError
from lorat.learning.criterion import Criterion
from lorat.learning.optimisation import build_optimizer, scheduled_lr, set_learning_rate
from lorat.model.network import LoRAT, build_model
from tests.lorat.tiny_models import BOTH_FFNS, batch, shake, tiny_config, tiny_model

FFNS = pytest.mark.parametrize("variant", BOTH_FFNS, ids=lambda v: v.ffn)


def assert_same(a: LoRAT, b: LoRAT) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name
        assert value.dtype == b.state_dict()[name].dtype, name


@pytest.mark.parametrize("adaptation", ["lora", "full", "head"])
@FFNS
def test_a_saved_model_loads_bit_for_bit(variant: Variant, adaptation, tmp_path: Path) -> None:
    config = tiny_config(
        adaptation=adaptation, lora=LoraConfig(rank=4, alpha=2.0), head=HeadConfig(depth=2)
    )
    model = shake(build_model(config, variant=variant))
    save(model, config, tmp_path / "a")
    again = load(tmp_path / "a")
    assert_same(model, again)
    assert read_config(tmp_path / "a") == config
    assert again.variant == variant and again.adaptation == adaptation and again.config == config
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in again.named_parameters() if p.requires_grad}
    files = {str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*.*")}
    assert {Path(f).suffix for f in files} <= {".json", ".safetensors", ".md"}
    assert ("adapter/adapter_model.safetensors" in files) == (adaptation == "lora")


def test_frozen_weights_of_half_size_load_bit_for_bit(tmp_path: Path) -> None:
    config = tiny_config(frozen_dtype="bf16")
    model = build_model(config)
    save(model, config, tmp_path)
    assert_same(model, load(tmp_path))


def test_a_backbone_from_a_file_is_not_stored_again(tmp_path: Path) -> None:
    file = tmp_path / "backbone.safetensors"
    save_backbone(shake(tiny_model(adaptation="full")), file)
    config = tiny_config(backbone=str(file))
    model = shake_trained(build_model(config))
    save(model, config, tmp_path / "a")
    assert not (tmp_path / "a/backbone.safetensors").exists()
    assert_same(model, load(tmp_path / "a"))
    moved = file.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=r"backbone\.safetensors"):
        load(tmp_path / "a")
    assert_same(model, load(tmp_path / "a", backbone=str(moved)))


def test_another_backbone_is_noticed(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_backbone(
            shake(tiny_model(adaptation="full"), seed=seed), tmp_path / f"{seed}.safetensors"
        )
    config = tiny_config(backbone=str(tmp_path / "0.safetensors"))
    save(build_model(config), config, tmp_path / "a")
    with pytest.raises(UserError, match="not the one"):
        load(tmp_path / "a", backbone=str(tmp_path / "1.safetensors"))


def shake_trained(model: LoRAT) -> LoRAT:
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_every_fault_of_a_checkpoint_is_named_at_once(tmp_path: Path) -> None:
    config = tiny_config()
    save(build_model(config), config, tmp_path)
    head = load_file(tmp_path / "head.safetensors")
    del head["embedding.token_type"]
    head["head.extra"] = torch.zeros(1)
    head["head.cls_mlp.layers.2.bias"] = torch.zeros(9)
    save_file(head, tmp_path / "head.safetensors")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    del adapter["base_model.model.blocks.1.attn.qkv.lora_B.weight"]
    save_file(adapter, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    for part in (
        "missing backbone.blocks.1.attn.k.lora_B.default.weight, "
        "backbone.blocks.1.attn.q.lora_B.default.weight, "
        "backbone.blocks.1.attn.v.lora_B.default.weight, embedding.token_type",
        "unexpected head.extra",
        "misshapen head.cls_mlp.layers.2.bias [9] instead of [1]",
    ):
        assert part in str(caught.value)


def test_damaged_and_foreign_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match='format "other"'):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load(tmp_path)
    config = tiny_config()
    save(build_model(config), config, tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    (tmp_path / "head.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)


def test_a_merged_model_is_not_saved_as_a_training_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="save_merged"):
        save(tiny_model().merge(), tiny_config(), tmp_path)


def test_how_to_track_goes_with_a_model(tmp_path: Path) -> None:
    tracking = TrackingConfig(window_penalty=0.2, search_area_factor=4.5)
    config = tiny_config(tracking=tracking)
    model = tiny_model(tracking=tracking)
    assert model.merge().tracking == tracking
    save(model, config, tmp_path / "own")
    save_merged(load(tmp_path / "own"), tmp_path / "merged")
    assert load(tmp_path / "merged").tracking == tracking
    file = tmp_path / "merged" / "config.json"
    content = json.loads(file.read_text())
    content["tracking"]["window_penalty"] = 1.5
    file.write_text(json.dumps(content))
    (tmp_path / "merged" / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"tracking.window_penalty is 1.5, not 0 to 1"):
        load(tmp_path / "merged")


@FFNS
def test_deployable_form_round_trip(variant: Variant, tmp_path: Path) -> None:
    model = shake(tiny_model(variant, head=HeadConfig(depth=1)))
    save_merged(model, tmp_path / "a")
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {"config.json", "model.safetensors", "SHA256SUMS"}
    again = load(tmp_path / "a")
    assert_same(model.merge(), again)
    assert not again.training and not again.trainable_parameters()


def test_deployable_form_needs_no_peft(tmp_path: Path) -> None:
    model = shake(tiny_model())
    save_merged(model, tmp_path)
    images = dict(zip(("template", "search", "mask"), batch(), strict=True))
    save_file(images, tmp_path / "images.safetensors")
    code = """
import sys
sys.modules["peft"] = None
from safetensors.torch import load_file, save_file
from lorat.checkpoint.folder import load
images = load_file(sys.argv[1] + "/images.safetensors")
outputs = load(sys.argv[1])(images["template"], images["search"], images["mask"])
save_file(outputs, sys.argv[1] + "/outputs.safetensors")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    outputs = load_file(tmp_path / "outputs.safetensors")
    for name, value in model.merge()(*batch()).items():
        torch.testing.assert_close(outputs[name], value, rtol=1e-5, atol=1e-5)


def train(
    model: LoRAT, optimizer: torch.optim.Optimizer, config: TrainConfig, steps: range
) -> None:
    boxes = torch.tensor([[0.2, 0.3, 0.6, 0.7]]).expand(4, 4)
    for step in steps:
        torch.manual_seed(step)
        Criterion()(model(*batch(size=4, seed=step)), boxes)["loss"].backward()
        set_learning_rate(optimizer, scheduled_lr(step, config))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_resuming_reproduces_the_uninterrupted_run(adaptation, tmp_path: Path) -> None:
    config = resolve(
        tiny_config(
            adaptation=adaptation, drop_path=0.4, epochs=2, pairs_per_epoch=32, batch_size=4
        )
    )
    model = build_model(config)
    optimizer = build_optimizer(model, config)
    train(model, optimizer, config, range(3))
    save(model, config, tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    save_training_state(tmp_path, model, optimizer, step=3, scaler=scaler, extra={"run_id": "r"})
    train(model, optimizer, config, range(3, 6))

    again = load(tmp_path)
    optimizer = build_optimizer(again, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    state = load_training_state(tmp_path, again, optimizer, scaler=scaler)
    assert state.step == 3 and state.extra == {"run_id": "r"} and scaler.get_scale() == 4096
    train(again, optimizer, config, range(state.step, 6))
    assert_same(model, again)


def test_training_state_ignores_wrappers_and_notices_other_models(tmp_path: Path) -> None:
    config = resolve(tiny_config())
    model = build_model(config)
    optimizer = build_optimizer(model, config)
    train(model, optimizer, config, range(1))
    wrapped = torch.nn.ModuleDict({"module": torch.compile(model)})
    save_training_state(tmp_path, wrapped, optimizer, step=1)
    load_training_state(tmp_path, model, build_optimizer(model, config))
    other = build_model(tiny_config(lora=LoraConfig(rank=4, targets=("q",))))
    with pytest.raises(UserError, match=r"unexpected .*lora_A"):
        load_training_state(tmp_path, other, build_optimizer(other, config))


def test_nothing_is_pickled(tmp_path: Path) -> None:
    config = resolve(tiny_config())
    model = build_model(config)
    optimizer = build_optimizer(model, config)
    train(model, optimizer, config, range(1))
    save(model, config, tmp_path)
    save_training_state(tmp_path, model, optimizer, step=1)
    for path in tmp_path.rglob("*"):
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.is_dir() or path.name in ("README.md", "SHA256SUMS")


def test_warm_start_takes_over_like_adapters(tmp_path: Path) -> None:
    config = tiny_config()
    source = shake(build_model(config))
    save(source, config, tmp_path)
    model = tiny_model(seed=9)
    warm_start(model, tmp_path)
    assert_same(source, model)


@pytest.mark.parametrize("kind", ["own", "merged", "official"])
@pytest.mark.parametrize("adaptation", ["full", "head"])
def test_warm_start_from_every_kind_of_checkpoint(kind, adaptation, tmp_path: Path) -> None:
    config = tiny_config()
    source = shake(build_model(config)).eval()
    path = tmp_path / "a"
    if kind == "own":
        save(source, config, path)
    elif kind == "merged":
        save_merged(source, path)
    else:
        export_official(source, path)
    model = tiny_model(seed=9, adaptation=adaptation).eval()
    warm_start(model, path)
    images = batch()
    torch.testing.assert_close(
        model(*images)["boxes"], source(*images)["boxes"], rtol=1e-4, atol=1e-4
    )
    save(model, tiny_config(adaptation=adaptation), tmp_path / "b")
    assert_same(model, load(tmp_path / "b"))


def test_warm_start_folds_other_adapters_into_the_base(tmp_path: Path) -> None:
    config = tiny_config()
    source = shake(build_model(config)).eval()
    save(source, config, tmp_path)
    model = tiny_model(lora=LoraConfig(rank=2, init="kaiming")).eval()
    warm_start(model, tmp_path)
    images = batch()
    torch.testing.assert_close(
        model(*images)["boxes"], source(*images)["boxes"], rtol=1e-4, atol=1e-4
    )


def test_warm_start_names_what_does_not_fit(tmp_path: Path) -> None:
    config = tiny_config(head=HeadConfig(depth=2))
    save(build_model(config), config, tmp_path)
    with pytest.raises(UserError, match=r"missing head\.cls_mlp\.layers\.2"):
        warm_start(tiny_model(adaptation="head"), tmp_path)


def test_a_released_file_needs_its_variant(tmp_path: Path) -> None:
    export_official(tiny_model(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="give variant"):
        load(tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors", variant="N-112").variant.name == "N-112"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 10_000_000}, "depth is 10000000; give 1 to 256"),
        ({"dim": 4096, "depth": 24}, "do not fit the backbone"),
        ({"depth": 200}, "do not fit the backbone"),
        ({"name": "evil", "timm_name": "hf-hub:somebody/anything"}, "no backbone of a known"),
        ({"name": "Z-1"}, "No backbone is shipped for"),
    ],
)
def test_sizes_that_a_header_claims_cost_no_memory(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = tiny_config()
    save(build_model(config), config, tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    header = json.loads((tmp_path / "config.json").read_text())
    header["variant"] |= changes
    if "name" in changes:
        header["backbone"] |= {"included": False, "source": "shipped"}
    if "timm_name" in changes:
        header["backbone"]["source"] = "hub"
    (tmp_path / "config.json").write_text(json.dumps(header))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message):
        load(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
