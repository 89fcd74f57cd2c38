"""A forecast counts what this training would hold, and refuses what could not start."""

from __future__ import annotations

import re

import pytest
import torch

from lorat.config.training import TrainConfig, resolve
from lorat.errors import UserError
from lorat_platform.training import estimate as estimate_module
from lorat_platform.training.estimate import estimate
from lorat_platform.training.options import RunOptions

CONFIG = resolve(TrainConfig(variant="B-224", backbone="none"))


def activations(text: str) -> float:
    number, unit = re.findall(r"activations +([\d.,]+) (\w+)", text)[0]
    return float(number.replace(",", "")) * {"MB": 1e6, "GB": 1e9}[unit]


def same(one: str, other: str) -> bool:
    free = r"[\d.]+ .B of memory free"  # changes
    return re.sub(free, "", one) == re.sub(free, "", other)


def test_automatic_precision_is_single_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    on_this_cpu = (5e10, "CPU, 2 threads, measured fp32 product")
    monkeypatch.setattr(estimate_module, "peak_flops", lambda device: on_this_cpu)
    on_gpu = estimate(CONFIG, RunOptions(device="gpu"))
    on_cpu = estimate(CONFIG, RunOptions(device="cpu"))
    assert activations(on_cpu) == pytest.approx(2 * activations(on_gpu), rel=0.01)
    assert "on each GPU" in on_gpu
    assert "on each CPU worker" in on_cpu
    if not torch.cuda.is_available():
        assert "no GPU is at hand; one like the A100 is assumed" in on_gpu
    assert re.search(r"device +CPU, \d+ cores, [\d.]+ GB of memory free; no GPU is used", on_cpu)
    assert "1 x this CPU reached 35 % of 0.05 TFLOP/s" in on_cpu
    here = estimate(CONFIG, RunOptions())
    assert same(here, on_gpu if torch.cuda.is_available() else on_cpu)
    assert estimate(CONFIG, RunOptions(address="head:6379")) == on_gpu


def test_more_workers_than_pairs_are_refused() -> None:
    with pytest.raises(UserError, match="--workers is 200 but a global batch has 128 pairs"):
        estimate(CONFIG, RunOptions(workers="200"))
