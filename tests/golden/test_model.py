"""A released checkpoint computes the published figures, unmerged and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorat.checkpoint.folder import load_merged, save_merged
from lorat.checkpoint.official import import_official, official_state
from lorat.model.network import LoRAT
from tests.golden.fixture_files import beside, golden, name_of
from tests.golden.official_sets import variant_of, with_scaling

COVERS = (
    "*_model_*_io.npz",
    "*_model_*_backbone.safetensors",
    "*_model_*_checkpoint.safetensors",
    "*_model_*_merged.safetensors",
)
SETS = pytest.mark.parametrize("path", golden("*_model_*_io.npz"), ids=name_of)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LOGIT_TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
TRAINED = (".lora.", "head.", "token_type_embed", "lora_alpha", "use_rslora")


def inputs(io: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.from_numpy(io[name]) for name in ("z", "x", "z_feat_mask"))  # type: ignore[return-value]


def unmerged(path: Path, io: Any, **options: Any) -> LoRAT:
    """Import the set's checkpoint."""
    source = options.pop("source", beside(path, "_io.npz", "_checkpoint.safetensors"))
    backbone = options.pop("backbone", "none")
    return import_official(with_scaling(source, io), variant_of(io), backbone=backbone).eval()


def assert_outputs(model: LoRAT, io: Any, suffix: str = "") -> None:
    with torch.inference_mode():
        outputs = model(*inputs(io))
    np.testing.assert_allclose(outputs["score_map"], io[f"score_map{suffix}"], **LOGIT_TOLERANCE)
    np.testing.assert_allclose(outputs["boxes"], io[f"boxes{suffix}"], **TOLERANCE)


@SETS
def test_outputs_and_intermediates(path: Path) -> None:
    io = np.load(path)
    model = unmerged(path, io)
    kept: dict[str, Tensor] = {}
    for index, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(
            lambda _, __, output, name=f"block{index}_out": kept.update({name: output})
        )
    assert_outputs(model, io)
    with torch.inference_mode():
        tokens = model.tokens(*inputs(io))
        kept["final_norm"] = model.backbone.norm(kept[f"block{len(model.backbone.blocks) - 1}_out"])
    num_template = io["z_tokens"].shape[1]
    kept["z_tokens"], kept["x_tokens"] = tokens[:, :num_template], tokens[:, num_template:]
    assert {f"block{i}_out" for i in range(int(io["meta_depth"]))} <= set(io.files)
    for name, value in kept.items():
        np.testing.assert_allclose(value, io[name], err_msg=name, **TOLERANCE)


@SETS
def test_merged_outputs(path: Path) -> None:
    io = np.load(path)
    source = beside(path, "_io.npz", "_checkpoint.safetensors")
    # The published merge knows no alpha but the file's.
    merged = import_official(source, variant_of(io), backbone="none").merge()
    assert_outputs(merged, io, "_merged")
    published = load_file(beside(path, "_io.npz", "_merged.safetensors"))
    ours = official_state(merged)
    assert ours.keys() == published.keys()
    for name, value in published.items():
        np.testing.assert_allclose(ours[name], value, err_msg=name, rtol=1e-5, atol=1e-6)


@SETS
def test_published_merged_file_is_read(path: Path) -> None:
    io = np.load(path)
    source = beside(path, "_io.npz", "_merged.safetensors")
    model = import_official(source, variant_of(io), backbone="none").eval()
    assert_outputs(model, io, "_merged")


@SETS
def test_deployable_folder_computes_the_same(path: Path, tmp_path: Path) -> None:
    io = np.load(path)
    source = beside(path, "_io.npz", "_checkpoint.safetensors")
    save_merged(import_official(source, variant_of(io), backbone="none"), tmp_path)
    assert_outputs(load_merged(tmp_path), io, "_merged")


@SETS
def test_trained_tensors_and_a_backbone_file_are_enough(path: Path, tmp_path: Path) -> None:
    io = np.load(path)
    state = load_file(beside(path, "_io.npz", "_checkpoint.safetensors"))
    trained = {n: v for n, v in state.items() if any(part in n for part in TRAINED)}
    assert len(trained) < len(state)
    save_file(trained, tmp_path / "model.bin")
    backbone = beside(path, "_io.npz", "_backbone.safetensors")
    for source in (tmp_path / "model.bin", trained):
        assert_outputs(unmerged(path, io, source=source, backbone=str(backbone)), io)


@SETS
def test_qkv_may_lack_the_word_linear(path: Path) -> None:
    io = np.load(path)
    state = load_file(beside(path, "_io.npz", "_checkpoint.safetensors"))
    renamed = {n.replace(".linear.", "."): v for n, v in state.items()}
    assert renamed.keys() != state.keys()
    assert_outputs(unmerged(path, io, source=renamed), io)


@SETS
def test_export_gives_the_checkpoint_back(path: Path) -> None:
    io = np.load(path)
    published = load_file(beside(path, "_io.npz", "_checkpoint.safetensors"))
    ours = official_state(unmerged(path, io))
    assert ours.keys() - published.keys() <= {"lora_alpha", "use_rslora"}
    for name, value in published.items():
        assert ours[name].shape == value.shape, name
        assert torch.equal(ours[name].to(value.dtype), value), name
