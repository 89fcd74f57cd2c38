"""One optimiser step is that of the whole global batch, however it is shared."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file

from lorat.checkpoint.folder import save_backbone
from lorat.checkpoint.official import import_official
from lorat.config.training import HeadConfig, LoraConfig, TrainConfig, resolve
from lorat.data.pairs.augment_draws import AUGMENT_FIELDS
from lorat.data.pairs.batches import Batch
from lorat.errors import UserError
from lorat.files.storage import locate
from lorat.learning.learner import Learner, World, resolve_precision, step_seed
from lorat.learning.loop import Hooks, run
from lorat.learning.optimisation import (
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)
from lorat.learning.replay import dump, replay
from lorat.model.network import build_model
from lorat_platform.data.layout import local_range
from tests.lorat.tiny_models import released_state
from tests.lorat_platform.local_source import LocalSource

CONFIG = resolve(
    TrainConfig(
        variant="N-112",
        backbone="none",
        batch_size=10,
        epochs=2,
        pairs_per_epoch=100,
        lora=LoraConfig(rank=4),
        head=HeadConfig(depth=2),
        warmup_epochs=0.0,
    )
)


def random_pairs(indices: np.ndarray) -> Batch:
    """Return noise with boxes, a function of each pair's number."""
    parts = []
    for index in indices.tolist():
        rng = np.random.default_rng(index)
        low = rng.uniform(5, 50, (2, 2))
        boxes = np.concatenate([low, low + rng.uniform(8, 40, (2, 2))], axis=1).astype(np.float32)
        augment = np.zeros(len(AUGMENT_FIELDS), np.float32)
        augment[AUGMENT_FIELDS.index("choice")] = -1
        for field in ("brightness", "contrast", "saturation"):
            for role in ("template", "search"):
                augment[AUGMENT_FIELDS.index(f"{role}_{field}")] = 1
        parts.append(
            {
                "template": rng.integers(0, 256, (56, 56, 3), dtype=np.uint8),
                "search": rng.integers(0, 256, (112, 112, 3), dtype=np.uint8),
                "template_box": boxes[0] / 2,
                "search_box": boxes[1],
                "augment": augment,
                "index": np.int64(index),
                "bytes_read": np.int64(100),
                "damaged": np.int32(0),
                "dataset": np.int32(0),
            }
        )
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def source(rank: int = 0, size: int = 1, load: Callable[[np.ndarray], Batch] = random_pairs) -> Any:
    return LocalSource(load, batch_size=10, end_step=20, rank=rank, num_workers=size, threads=1)


def one_step(config: TrainConfig, world: World) -> tuple[dict[str, torch.Tensor], float]:
    """Return the gradients of the first step, as the optimiser sees them, and the loss."""
    torch.set_num_threads(1)
    learner = Learner(config, world=world)
    seen: dict[str, torch.Tensor] = {}
    names = {id(p): n for n, p in learner.model.named_parameters()}

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            seen.update({names[id(p)]: p.grad.clone() for p in group["params"]})

    learner.optimizer.register_step_pre_hook(look)
    (batch, *_rest) = source(world.rank, world.size).batches(0)
    result = learner.train_step(learner.to_device(batch))
    loss = result.losses[0].clone()
    if world.size > 1:
        dist.all_reduce(loss)
    return seen, float(loss) / world.size


def _worker(rank: int, size: int, config: TrainConfig, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    gradients, loss = one_step(config, World(rank=rank, size=size))
    if rank == 0:
        torch.save(gradients | {"loss": torch.tensor(loss)}, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("size", "micro_batch"), [(2, None), pytest.param(3, 2, marks=pytest.mark.exhaustive)]
)
def test_several_workers_have_the_loss_and_gradients_of_one(
    tmp_path: Path, size: int, micro_batch: int | None
) -> None:
    expected, loss = one_step(CONFIG, World())
    config = dataclasses.replace(CONFIG, micro_batch=micro_batch)
    mp.spawn(_worker, (size, config, str(tmp_path)), nprocs=size)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert float(found.pop("loss")) == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(micro_batch: int) -> None:
    expected, loss = one_step(CONFIG, World())
    found, other = one_step(dataclasses.replace(CONFIG, micro_batch=micro_batch), World())
    assert other == pytest.approx(loss, rel=1e-5)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)


def test_activation_checkpointing_changes_no_gradient() -> None:
    expected, _ = one_step(CONFIG, World())
    found, _ = one_step(dataclasses.replace(CONFIG, activation_checkpointing=True), World())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_frozen_weights_have_neither_gradient_nor_optimiser_state() -> None:
    learner = Learner(CONFIG)
    run(CONFIG, source(), learner=learner, end_step=2)
    held = sum(v.numel() for s in learner.optimizer.state.values() for v in s.values() if v.ndim)
    assert held == 2 * sum(p.numel() for p in learner.model.trainable_parameters())
    frozen = [p for p in learner.model.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_a_training_gone_on_with_ends_with_the_same_weights(
    tmp_path: Path, drop_path: float
) -> None:
    config = dataclasses.replace(CONFIG, drop_path=drop_path)
    whole = run(config, source())
    first = run(config, source(), end_step=7)
    first.save(tmp_path / "checkpoint")
    second = run(config, source(), learner=Learner(config, resume=tmp_path / "checkpoint"))
    assert whole.step == second.step == 20
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_step_clips_the_global_norm_and_uses_the_rate_of_the_schedule() -> None:
    config = dataclasses.replace(CONFIG, clip_norm=1e-3)
    learner = Learner(config)
    seen: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"]]
        seen.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        assert {g["lr"] for g in optimizer.param_groups} == {learner.lr}

    learner.optimizer.register_step_pre_hook(look)
    (batch, *_rest) = source().batches(0)
    result = learner.train_step(learner.to_device(batch))
    assert float(result.grad_norm) > 1e-3
    assert seen == [pytest.approx(1e-3, rel=1e-3)]
    assert all(p.grad is None for p in learner.parameters)


def test_the_loss_scaler_leaves_out_a_step_that_overflows() -> None:
    learner = Learner(CONFIG)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [p.detach().clone() for p in learner.parameters]
    (batch, *_rest) = source().batches(0)
    result = learner.train_step(learner.to_device(batch))
    assert result.finite  # no fault of the data: the next step has a smaller scale
    assert not result.grad_norm.isfinite()
    assert learner.scaler.get_scale() == 2.0**126
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))


def test_a_loss_that_is_not_finite_takes_no_step_though_its_gradients_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner = Learner(dataclasses.replace(CONFIG, nonfinite="skip"))
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses_of = learner.criterion.forward

    def infinite(*arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        losses = losses_of(*arguments, **options)
        return losses | {"loss": losses["loss"] + torch.inf}

    monkeypatch.setattr(learner.criterion, "forward", infinite)
    before = [p.detach().clone() for p in learner.parameters]
    batches = source().batches(0)
    for _ in range(2):  # the scaler is left fit for the next step
        result = learner.train_step(learner.to_device(next(batches)))
        assert not result.finite
        assert result.grad_norm.isfinite()
    assert learner.num_skipped == 2
    for state in learner.optimizer.state.values():  # moments and the number of steps
        assert not any(value.any() for value in state.values())
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimiser(
    poison: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(dataclasses.replace(CONFIG, nonfinite="skip"))
    batches = source().batches(0)
    learner.train_step(learner.to_device(next(batches)))

    def held() -> list[torch.Tensor]:
        moments = [v for state in learner.optimizer.state.values() for v in state.values()]
        return [v.detach().clone() for v in (*learner.parameters, *moments)]

    before = held()
    with monkeypatch.context() as patch:
        if poison == "loss":
            losses_of = learner.criterion.forward
            patch.setattr(
                learner.criterion,
                "forward",
                lambda *given, **options: {
                    name: value + torch.nan for name, value in losses_of(*given, **options).items()
                },
            )
            result = learner.train_step(learner.to_device(next(batches)))
        else:
            hook = learner.parameters[-1].register_hook(lambda gradient: gradient * torch.inf)
            result = learner.train_step(learner.to_device(next(batches)))
            hook.remove()
    after = held()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (result.finite, result.grad_finite) == (False, poison == "loss")
    assert (learner.step, learner.num_skipped) == (2, 1)
    result = learner.train_step(learner.to_device(next(batches)))
    assert result.finite and learner.num_skipped == 1
    changed = [not torch.equal(a, b) for a, b in zip(after, held(), strict=True)]
    assert all(changed)
    steps = {float(state["step"]) for state in learner.optimizer.state.values()}
    assert steps == {2}


def test_fused_steps_are_those_of_the_plain_optimiser() -> None:
    """To a millionth of the largest weight, over ten steps that are clipped."""
    models = [build_model(CONFIG) for _ in range(2)]
    ours = build_optimizer(models[0], CONFIG)
    assert ours.defaults["fused"]
    plain = torch.optim.AdamW(
        parameter_groups(models[1], CONFIG.weight_decay),
        lr=0.01,
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.adam_eps,
        fused=False,
    )
    generator = torch.Generator().manual_seed(0)
    parameters = [model.trainable_parameters() for model in models]
    for _ in range(10):
        for one, other in zip(*parameters, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer, weights in zip((ours, plain), parameters, strict=True):
            set_learning_rate(optimizer, 0.01)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
    for one, other in zip(*parameters, strict=True):
        scale = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * scale)


def test_a_warm_start_takes_frozen_weights_from_the_given_backbone(tmp_path: Path) -> None:
    """A released file of trained weights alone works without a network."""
    trained = build_model(dataclasses.replace(CONFIG, seed=5))
    save_file(released_state(trained), tmp_path / "released.bin")
    save_backbone(build_model(dataclasses.replace(CONFIG, seed=9)), tmp_path / "b.safetensors")
    given = dataclasses.replace(CONFIG, backbone=str(tmp_path / "b.safetensors"))
    learner = Learner(given, start_weights=tmp_path / "released.bin")
    expected = import_official(
        tmp_path / "released.bin", CONFIG.model_variant, backbone=given.backbone
    ).state_dict()
    state = learner.model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, msg=name)
    with pytest.raises(UserError, match="give backbone=hub or backbone=FILE"):
        Learner(CONFIG, start_weights=tmp_path / "released.bin")


def test_bfloat16_trains_and_fp16_is_refused_on_a_cpu() -> None:
    config = dataclasses.replace(CONFIG, precision="bf16")
    losses: list[float] = []

    def keep(step: int, metrics: dict[str, float]) -> None:
        losses.append(metrics["train/loss"])

    run(config, source(), hooks=Hooks(log_every=10, on_interval=keep))
    assert np.isfinite(losses).all()
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        resolve_precision(dataclasses.replace(CONFIG, precision="fp16"), torch.device("cpu"))


def test_a_compiler_that_fails_is_left_out_with_a_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here")

    def compile_broken(self: torch.nn.Module, **_: object) -> None:
        self._compiled_call_impl = broken

    monkeypatch.setattr(torch.nn.Module, "compile", compile_broken)
    learner = run(dataclasses.replace(CONFIG, compile="on"), source(), end_step=2)
    assert learner.step == 2
    assert "no compiler here" in caplog.text
    assert "goes on without it" in caplog.text


def test_an_augmentation_that_cannot_be_compiled_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("lorat.learning.augment._compiled", broken)
    learner = Learner(CONFIG)
    assert not learner._augment_compiled, "on a CPU nothing is compiled"
    batch = learner.to_device(next(source().batches(0)))
    expected = learner.prepare(batch)
    learner._augment_compiled = True
    for _ in range(2):
        for one, other in zip(learner.prepare(batch), expected, strict=True):
            assert torch.equal(one, other)
    assert caplog.text.count("failed for the augmentation (RuntimeError: no compiler here)") == 1


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_dump_with_drop_path_is_replayed_with_the_same_draws(tmp_path: Path) -> None:
    """Its figures come from a pass with drop path, so the same text means the same draws."""
    learner = Learner(dataclasses.replace(CONFIG, drop_path=0.1))
    with torch.no_grad():  # losses that are finite, gradients whose norm is not
        learner.model.head.cls_mlp.layers[-1].weight.mul_(1e25)
    (batch, *_rest) = source().batches(0)
    learner.step = 4
    uri = dump(learner, batch, locate(tmp_path / "dump"))
    first = replay(uri)
    torch.manual_seed(1234)
    assert replay(uri) == first
    assert "10 of 10 pairs" in first
    assert len({step_seed(42, step, rank) for step in range(5) for rank in range(4)}) == 20


def test_ranges_of_workers_cover_the_batch() -> None:
    for size in range(1, 11):
        ranges = [local_range(10, size, rank) for rank in range(size)]
        assert [i for first, last in ranges for i in range(first, last)] == list(range(10))
