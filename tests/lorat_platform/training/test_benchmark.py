"""The benchmark of training measures steps that count, in the form that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorat.errors import UserError
from lorat.learning.learner import Learner
from lorat_platform.training import benchmark
from lorat_platform.training.benchmark import TrainBenchmark, benchmark_train

CPU = torch.device("cpu")


def options(**given: Any) -> TrainBenchmark:
    return TrainBenchmark(
        **{"variant": "N-112", "batch_size": 2, "rounds": 1, "steps": 1, "precision": "fp32"}
        | given
    )


def overflows(monkeypatch: pytest.MonkeyPatch, growth: float, init_scale: float) -> list[Learner]:
    """Let every learner of the benchmark begin with a loss scale that is too large."""
    made = []

    class Overflowing(Learner):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.scaler = torch.amp.GradScaler("cpu", init_scale, backoff_factor=growth)  # type: ignore[assignment]
            made.append(self)

    monkeypatch.setattr(benchmark, "Learner", Overflowing)
    return made


def test_memory_is_that_of_a_step_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = benchmark.memory(options(), CPU)
    assert expected["lora_optimiser_mb"] > expected["lora_gradients_mb"] > 0
    made = overflows(monkeypatch, growth=2.0**-10, init_scale=2.0**127)
    assert benchmark.memory(options(), CPU) == expected
    assert all(learner.step > 1 for learner in made)


def test_steps_that_never_count_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "MOST_STEPS", 3)
    overflows(monkeypatch, growth=0.999, init_scale=2.0**127)
    with pytest.raises(UserError, match="No step of 3 counted"):
        benchmark.memory(options(), CPU)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("speed", {"loop_ms", "bare_ms"}),
        ("memory", {"lora_gradients_mb", "full_optimiser_mb"}),
        ("lora-memory", {"lora_gradients_mb"}),
    ],
)
def test_only_what_is_asked_for_is_measured(measure: Any, expected: set[str]) -> None:
    figures = benchmark_train(options(measure=measure, threads=torch.get_num_threads()))
    assert expected <= figures.keys()
    others = {"loop_ms", "lora_gradients_mb", "full_optimiser_mb"} - expected
    assert not figures.keys() & others


def test_the_usual_form_drops_nothing() -> None:
    config = benchmark._config(options(), "lora")
    folded, usual = (
        benchmark._model(config, options(form=form))
        for form in ("folded", "usual")  # type: ignore[arg-type]
    )
    dropouts = [m for m in usual.modules() if isinstance(m, nn.Dropout)]
    assert sum(m.p for m in dropouts) == 0
    assert sum(hasattr(m, "lora_dropout") for m in usual.modules()) <= len(dropouts)
    inputs = torch.randn(2, 3, 56, 56), torch.randn(2, 3, 112, 112), torch.ones(2, 4, 4).long()
    for name, value in folded(*inputs).items():
        torch.testing.assert_close(usual(*inputs)[name], value, rtol=1e-4, atol=1e-5)
