"""The learner's steps reproduce losses, gradients, rates and weights, with drop path too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorat.checkpoint.official import import_official, official_state
from lorat.config.training import HeadConfig, TrainConfig
from lorat.learning.learner import Learner
from lorat.learning.optimisation import build_optimizer
from lorat.model.network import LoRAT, build_model
from tests.golden.fixture_files import beside, golden, name_of
from tests.golden.official_sets import variant_of, with_scaling
from tests.lorat.tiny_models import released_state

COVERS = (
    "*_train_io.npz",
    "*_train_init_checkpoint.safetensors",
    "*_train_final_trainable.safetensors",
    "*_train_first_step_clipped_grads.safetensors",
)
SETS = pytest.mark.parametrize("path", golden("*_train_io.npz"), ids=name_of)


def recipe(io: Any) -> TrainConfig:
    batch_size, per_epoch = int(io["batch_size"]), int(io["iterations_per_epoch"])
    return TrainConfig(
        drop_path=float(io["drop_path"]),
        batch_size=batch_size,
        pairs_per_epoch=batch_size * per_epoch,
        epochs=int(io["num_epochs"]),
        lr=float(io["base_lr"]),
        min_lr=float(io["lr_min"]),
        warmup_lr=float(io["warmup_lr"]),
        warmup_epochs=float(io["warmup_epochs"]),
        weight_decay=float(io["weight_decay"]),
        clip_norm=float(io["max_grad_norm"]),
    )


def initial_model(path: Path, io: Any) -> LoRAT:
    weights = with_scaling(beside(path, "_io.npz", "_init_checkpoint.safetensors"), io)
    released = import_official(weights, variant_of(io), backbone="none")
    assert released.lora is not None
    head = HeadConfig(depth=released.head_depth)
    config = dataclasses.replace(recipe(io), backbone="none", lora=released.lora, head=head)
    model = build_model(config, variant=variant_of(io))
    model.load_state_dict(released.state_dict())
    return model


def official_names(model: LoRAT) -> dict[str, str]:
    """Map our parameter names to the released ones."""
    tensors = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    released = {v.data_ptr(): n for n, v in official_state(model, scalars=False).items()}
    return {name: released[value.data_ptr()] for name, value in tensors.items()}


@SETS
def test_training_steps(path: Path) -> None:
    io = np.load(path)
    config = recipe(io)
    model = initial_model(path, io)
    names = official_names(model)
    learner = Learner(config, model=model)
    first_gradients: dict[str, torch.Tensor] = {}

    def keep_first_gradients(*_: object) -> None:
        if not first_gradients:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    first_gradients[name] = parameter.grad.clone()

    learner.optimizer.register_step_pre_hook(keep_first_gradients)
    if int(io["torch_seed"]) >= 0:
        torch.manual_seed(int(io["torch_seed"]))
    size, batch_size = io["x"].shape[-1], int(io["batch_size"])
    for step in range(int(io["steps"])):
        rows = slice(step * batch_size, (step + 1) * batch_size)
        template, search, mask, box_px = (
            torch.from_numpy(io[name][rows])
            for name in ("z", "x", "z_feat_mask", "gt_boxes_crop_pixels")
        )
        box_norm = (box_px / size).float()
        lr = learner.lr
        result = learner.step_on(template, search, mask, box_norm)
        assert {g["lr"] for g in learner.optimizer.param_groups} == {lr}
        tolerance = 1e-5 if step == 0 else 1e-3
        for ours, published in (
            (result.losses[0], "loss"),
            (result.losses[1], "loss_cls"),
            (result.losses[2], "loss_reg"),
            (result.grad_norm, "grad_norm"),
        ):
            np.testing.assert_allclose(
                ours.item(), io[published][step], rtol=tolerance, err_msg=f"{published} {step}"
            )
        np.testing.assert_allclose(lr, io["lr"][step], rtol=1e-12)
        num_positive = learner.criterion.count_positives(box_norm, int(io["meta_search_feat"]))
        assert num_positive.item() == io["num_positive"][step]

    published = load_file(beside(path, "_io.npz", "_first_step_clipped_grads.safetensors"))
    assert {names[n] for n in first_gradients} == published.keys()
    for name, gradient in first_gradients.items():
        np.testing.assert_allclose(
            gradient, published[names[name]], err_msg=name, rtol=1e-4, atol=1e-6
        )
    published = load_file(beside(path, "_io.npz", "_final_trainable.safetensors"))
    final = released_state(model, scalars=False)
    assert final.keys() == published.keys()
    for name, value in published.items():
        np.testing.assert_allclose(final[name], value, err_msg=name, rtol=0, atol=5e-3)


@SETS
def test_optimizer_groups(path: Path) -> None:
    io = np.load(path)
    model = initial_model(path, io)
    names = official_names(model)
    groups = build_optimizer(model, recipe(io)).param_groups
    ours = {frozenset(names[n] for n in g["param_names"]): g["weight_decay"] for g in groups}
    published = {}
    while f"group{len(published)}_names" in io.files:
        index = len(published)
        members = frozenset(str(n) for n in io[f"group{index}_names"])
        published[members] = float(io[f"group{index}_weight_decay"])
    published.pop(frozenset(), None)
    assert published and ours == published


@SETS
def test_drop_path_reaches_every_block(path: Path) -> None:
    io = np.load(path)
    model = initial_model(path, io)
    rates = {block.drop_path for block in model.backbone.blocks}
    assert rates == {float(io["drop_path"])}
