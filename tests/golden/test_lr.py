"""Every iteration uses the published learning rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorat.learning.optimisation import learning_rate
from tests.golden.fixture_files import golden, name_of

COVERS = ("*_lr_*.npz",)


@pytest.mark.parametrize("path", golden("*_lr_*.npz"), ids=name_of)
def test_learning_rate_at_every_iteration(path: Path) -> None:
    io = np.load(path)
    assert bool(io["warmup_prefix"]), "the cosine starts after the warm-up"
    accumulation = int(io["grad_accumulation"])
    steps_per_epoch = int(io["iterations_per_epoch"]) // accumulation
    rates = [
        learning_rate(
            int(iteration) // accumulation,
            lr=float(io["base_lr"]),
            min_lr=float(io["lr_min"]),
            warmup_lr=float(io["warmup_lr"]),
            warmup_steps=int(io["warmup_epochs"]) * steps_per_epoch,
            total_steps=int(io["num_epochs"]) * steps_per_epoch,
        )
        for iteration in io["iteration"]
    ]
    np.testing.assert_allclose(rates, io["lr_used_at_iteration"], rtol=1e-12, atol=0)
