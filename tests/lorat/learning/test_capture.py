"""A step that is recorded and replayed does what an eager one does, at every learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lorat.learning.capture import EAGER_STEPS, CapturedStep
from lorat.learning.learner import Learner, World
from lorat.model.cuda_graphs import CudaGraphs, Recorder
from tests.lorat.learning.test_learner import CONFIG, source

SCHEDULED = dataclasses.replace(CONFIG, warmup_epochs=1.0)
"""The learning rate is another in every step."""


class Rerun:
    """Records a step as the call itself, with the learning rate where the recording read it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._group = optimizer.param_groups[0]
        self.num_replays = 0

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recorded_lr = self._group["lr"]
        assert isinstance(recorded_lr, Tensor)

        def replay() -> Tensor:
            self.num_replays += 1
            assert float(recorded_lr) == pytest.approx(self._group["lr"])
            return step()

        return replay


class Refuse:
    """Fails half-way through the step."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        for parameter in self._learner.parameters:
            parameter.grad = torch.full_like(parameter, torch.nan)
        assert self._learner.scaler is not None
        self._learner.scaler.unscale_(self._learner.optimizer)
        raise RuntimeError("operation not permitted when stream is capturing")


def trained(make: Callable[[Learner], Recorder] | None, num_steps: int = 8) -> Learner:
    learner = Learner(SCHEDULED)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    if make is not None:
        learner._captured = CapturedStep(learner.optimizer, make(learner))
    batches = source().batches(0)
    for number in range(num_steps):
        result = learner.train_step(learner.to_device(next(batches)))
        assert (result.step, result.finite, result.num_pairs) == (number, True, 10)
    return learner


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every learner take itself for compiled, without the wait."""
    build = Learner.__init__

    def init(self: Learner, *given: object, **named: object) -> None:
        build(self, *given, **named)  # type: ignore[arg-type]
        self.compiled = True

    monkeypatch.setattr(Learner, "__init__", init)


@pytest.mark.usefixtures("compiled")
def test_replayed_steps_are_eager_steps() -> None:
    made: list[Rerun] = []

    def make(learner: Learner) -> Recorder:
        made.append(Rerun(learner.optimizer))
        return made[0]

    eager, captured = trained(None), trained(make)
    assert made[0].num_replays == 8 - EAGER_STEPS
    for one, other in zip(captured.parameters, eager.parameters, strict=True):
        assert torch.equal(one, other)
    assert captured.optimizer.param_groups[0]["lr"] == eager.optimizer.param_groups[0]["lr"]
    result = captured.step_on(*(t[:4] for t in _inputs(captured)))
    assert result.num_pairs == 4 and made[0].num_replays == 8 - EAGER_STEPS


@pytest.mark.usefixtures("compiled")
def test_where_a_step_cannot_be_recorded_training_goes_on_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    eager, refused = trained(None), trained(Refuse)
    assert caplog.text.count("cannot be captured as a CUDA graph") == 1
    for one, other in zip(refused.parameters, eager.parameters, strict=True):
        assert torch.equal(one, other)


def test_no_number_of_a_step_is_asked_for() -> None:
    """To hand one to the host stops a recording, and without one the device waits."""
    learner = trained(None, 1)
    inputs = _inputs(learner)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        learner._step(*inputs)
    asked = [event for event in seen.events() or [] if event.name == "aten::item"]
    assert asked  # the fused optimiser's on a CPU, where the counts of its steps are
    assert {event.cpu_parent.name for event in asked} == {"aten::_fused_adamw_"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1.0), ("fp16", 10.0)])
def test_a_graph_on_cuda_gives_what_eager_steps_give(
    precision: Literal["fp32", "fp16"], tolerance: float
) -> None:
    found = []
    for captured in (False, True):
        config = dataclasses.replace(SCHEDULED, precision=precision, compile="off")
        learner = Learner(config, world=World(device=torch.device("cuda")))
        if captured:
            learner.compiled = True
            learner._captured = CapturedStep(learner.optimizer, CudaGraphs(learner.device))
        batches = source().batches(0)
        losses = [
            learner.train_step(learner.to_device(next(batches))).losses.cpu() for _ in range(8)
        ]
        found.append(([p.detach().cpu() for p in learner.parameters], losses))
        if captured:
            assert learner._captured is not None and learner._captured._replay is not None
    (eager, eager_losses), (graph, graph_losses) = found
    for ours, expected, rtol in ((graph_losses, eager_losses, 1e-4), (graph, eager, 1e-3)):
        torch.testing.assert_close(
            ours, expected, rtol=tolerance * rtol, atol=tolerance * rtol / 10
        )


def _inputs(learner: Learner) -> tuple[Tensor, ...]:
    return learner.prepare(learner.to_device(next(source().batches(0))))
