"""Curves of trainings: gathered from what trials leave, written, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat_platform.search.curves import curves_of, read_curves
from lorat_platform.search.plan import SearchOptions, SearchPlan, make_plan
from lorat_platform.search.results.board import Leaderboard


def trained(folder: Path, seed: int) -> tuple[SearchPlan, Leaderboard]:
    """Return a search of two configurations after its end: three rungs, two sequences."""
    options = SearchOptions(
        trials=2, scheduler="none", rungs=3, name=f"seed-{seed}", storage=str(folder)
    )
    plan = make_plan(TrainConfig(variant="T-112", seed=seed), options)
    board = Leaderboard(objectives=("ao",), rungs=plan.rungs)
    for number in range(2):
        row = board.add(f"t{number}", {"lr": 1e-3 * (number + 1)})
        row.status = "completed"
        place = folder / plan.name / "sequences" / row.trial_id
        place.mkdir(parents=True)
        for rung in range(3):
            ao = 0.1 * number + 0.01 * rung + 0.001 * seed
            content = [{"a": {"ao": ao}}, {"a": {"ao": 0.5 + ao}}]  # of two sets
            (place / f"rung-{rung}.json").write_text(json.dumps(content))
    return plan, board


def test_curves_are_what_the_trials_left(tmp_path: Path) -> None:
    curves = curves_of([trained(tmp_path, seed) for seed in (1, 2, 3)])
    assert curves.scores.shape == (2, 3, 3, 2)
    assert curves.scores[1, 2, 0] == pytest.approx([0.103, 0.603])
    assert curves.scores[0, 0, 2] == pytest.approx([0.021, 0.521])
    curves.write(tmp_path / "curves.parquet")
    again = read_curves(tmp_path / "curves.parquet")
    np.testing.assert_allclose(again.scores, curves.scores, atol=1e-4)
    assert again.values == ({"lr": 1e-3}, {"lr": 2e-3})
    assert again.steps == curves.steps == (64, 256, 1024)
    assert again.sequences == ("0 a", "1 a")


def test_failed_trainings_and_incomplete_tables_are_refused(tmp_path: Path) -> None:
    plan, board = trained(tmp_path, 1)
    curves_of([(plan, board)]).write(tmp_path / "curves.parquet")
    board.rows["t1"].status, board.rows["t1"].reason = "failed", "the loss is not finite"
    with pytest.raises(UserError, match="Trial 1 of seed-1 failed: the loss is not finite"):
        curves_of([(plan, board)])
    table = pq.read_table(tmp_path / "curves.parquet")
    pq.write_table(table.slice(1), tmp_path / "less.parquet")
    with pytest.raises(UserError, match="lacks curves of some configuration"):
        read_curves(tmp_path / "less.parquet")
    (tmp_path / "none.parquet").write_text("no")
    with pytest.raises(UserError, match="holds no curves"):
        read_curves(tmp_path / "none.parquet")
