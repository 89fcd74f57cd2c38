"""Pretraining: it ends in time, goes on where it was, and changes the grid without forgetting."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from lorat import checkpoint
from lorat.checkpoint.folder import save_backbone
from lorat.config.json_files import write_json
from lorat.data.synthetic.beside import draw_beside
from lorat.data.synthetic.material import PILES
from lorat.errors import UserError
from lorat.learning import pretraining
from lorat.learning.pretraining import MovingAverage, PretrainConfig, pretrain


def _write_piles(folder: Path) -> Path:
    """Write a few small pictures as material."""
    rng = np.random.default_rng(2)
    shapes = {
        "photographs": [[160, 200, 3], [170, 180, 3]],
        "cutouts": [[60, 50, 4], [50, 70, 4]],
        "drawings": [[60, 60, 4]],
    }
    folder.mkdir()
    for pile in PILES:
        sizes = [int(np.prod(shape)) for shape in shapes[pile]]
        np.save(folder / f"{pile}.npy", rng.integers(0, 255, sum(sizes), dtype=np.uint8))
    write_json(shapes, folder / "piles.json")
    return folder


def test_the_learning_rate_warms_up_stays_and_falls_with_the_time() -> None:
    plan = PretrainConfig(lr=1e-3, fall_share=0.4)
    assert plan.learning_rate(0.0, 0) == pytest.approx(5e-6)
    assert plan.learning_rate(0.3, 5000) == plan.learning_rate(0.59, 9000) == 1e-3
    assert plan.learning_rate(0.8, 9000) == pytest.approx(5e-4)
    assert plan.learning_rate(1.0, 9000) == pytest.approx(0.0)
    assert plan.learning_rate(0.45, 20) < 2e-4  # after a change of the grid
    with pytest.raises(UserError, match=r"pretraining\.minutes"):
        PretrainConfig(minutes=0.0)


def test_the_moving_average_forgets_its_first_values_and_changes_places() -> None:
    weight = torch.zeros(3)
    average = MovingAverage([weight])
    for value in (1.0, 2.0, 3.0):
        weight.fill_(value)
        average.add()
    expected = 0.0
    for number, value in enumerate((1.0, 2.0, 3.0), 1):
        decay = (1 + number) / (10 + number)
        expected = decay * expected + (1 - decay) * value
    assert average.mean[0].tolist() == pytest.approx([expected] * 3)
    average.swap()
    assert weight.tolist() == pytest.approx([expected] * 3)
    assert average.mean[0].tolist() == [3.0] * 3


def test_drawn_batches_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    piles = _write_piles(tmp_path / "piles")
    drawn = []
    for drawers in (1, 2):
        batches = draw_beside(piles, "N-112", 2, drawers, 5)
        drawn.append([next(batches) for _ in range(3)])
        batches.close()
    for one, two in zip(*drawn, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    assert [b["index"].tolist() for b in drawn[0]] == [[10, 11], [12, 13], [14, 15]]


def test_a_pretraining_changes_its_grid_and_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    piles = _write_piles(tmp_path / "piles")
    plan = PretrainConfig(minutes=0.02, coarse_share=0.5, batch_size=2, checkpoint_minutes=0.005)
    pretrain(dataclasses.replace(plan, minutes=0.01, coarse_share=1.0), piles, tmp_path / "run")
    state = tmp_path / "run" / pretraining.STATE
    cut_off = checkpoint.load(state)
    assert cut_off.variant.name == "T-112"
    learner, average, elapsed = pretraining._begin(plan, tmp_path / "run")
    assert learner.step > 0 and elapsed >= 0.6
    assert any(
        not torch.equal(mean, weight)
        for mean, weight in zip(average.mean, learner.parameters, strict=True)
    )

    mean = checkpoint.load(pretrain(plan, piles, tmp_path / "run"))
    assert mean.variant.name == "T-168"
    assert mean.backbone.pos_embed.shape == (1, 144, 128)
    again, _, elapsed_again = pretraining._begin(plan, tmp_path / "run")
    assert again.step > learner.step and again.first_step >= learner.step
    assert elapsed_again >= 1.2
    assert again.lr < 1e-3 and again.share == 0.0


def test_a_pretraining_goes_on_from_a_backbone_that_was_written(tmp_path: Path) -> None:
    first = pretraining.PretrainingLearner(
        pretraining._config(PretrainConfig(), "T-168"), PretrainConfig()
    )
    file = tmp_path / "backbone.safetensors"
    save_backbone(first.model, file, with_head=True)
    plan = PretrainConfig(start=str(file), coarse_share=0.0)
    again, _, elapsed = pretraining._begin(plan, tmp_path / "run")
    assert elapsed == again.step == 0
    for name, value in first.model.plain_state().items():
        assert torch.equal(again.model.plain_state()[name], value), name


def test_another_grid_keeps_every_weight_but_the_positions() -> None:
    plan = PretrainConfig()
    learner = pretraining.PretrainingLearner(pretraining._config(plan, "T-112"), plan)
    copy = pretraining._at_grid(learner.model, pretraining._config(plan, "T-168"))
    assert copy.adaptation == "full"
    for name, value in learner.model.plain_state().items():
        if name != "backbone.pos_embed":
            assert torch.equal(copy.plain_state()[name], value), name
