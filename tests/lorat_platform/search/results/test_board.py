from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from lorat_platform.search.plan import default_config
from lorat_platform.search.results.board import Leaderboard, trial_label
from lorat_platform.search.results.console import SearchConsole
from lorat_platform.search.results.plots import draw_settings, importance, write_plots
from lorat_platform.search.rungs import Rungs
from lorat_platform.search.space import build_space

RUNGS = Rungs(max_steps=160, reduction=4, num_rungs=3)
SPACE = build_space(default_config())


def _board(objectives: tuple[str, ...] = ("ao",)) -> Leaderboard:
    """Ten trials: AO grows with the learning rate, rank only costs parameters."""
    board = Leaderboard(objectives=objectives, rungs=RUNGS)
    for i in range(10):
        rank = (4, 8, 16)[i % 3]
        row = board.add(f"t{i}", {"lora.rank": rank, "lr": 1e-4 * 1.5**i, "head.depth": 1 + i % 4})
        for rung, step in enumerate(RUNGS.steps[: 3 if i >= 7 else 1]):
            row.report({
                "step": step, "budget": 4**rung, "ao": 0.3 + i / 50 + rung / 20, "loss": 2 - i / 9,
                "latency": 2.0 + rank, "parameters": 1000.0 * rank, "total_seconds": step / 10,
            })  # fmt: skip
        row.status = "completed" if i >= 7 else "stopped"
    board.add("bad", {"lora.rank": 4, "lr": 1.0, "head.depth": 1})
    board.rows["bad"].status, board.rows["bad"].reason = "failed", "loss is nan at step 3"
    return board


def test_best_is_the_best_of_the_highest_rung() -> None:
    board = _board()
    board.rows["t0"].reports[0]["ao"] = 0.99
    best = board.best()
    assert best is not None
    assert best.trial_id == "t9", "t0 was better, but only at the first rung"
    assert [r.trial_id for r in board.ranked()][:4] == ["t9", "t8", "t7", "t0"]


def test_a_trial_is_named_by_its_values() -> None:
    board = _board()
    row = board.add("t", {"lora.rank": 16, "lr": 0.002, "head.depth": 3})
    assert trial_label(row, 12) == "t11 r16 lr2e-3 d3"
    other = {"lora.rank": 4, "lr": 3.17e-4, "lora.dropout": 0.125, "variant": "B-224", "lr2": 0.5}
    assert trial_label(board.add("u", other), 1000) == (
        "t012 r4 lr3.2e-4 drop0.12 variant=B-224 lr20.5"
    )
    assert len(trial_label(board.add("v", {f"path.{i}": "long" * 9 for i in range(99)}), 9)) <= 250


def test_cost_is_counted_against_full_runs_of_the_same_trials() -> None:
    cost = _board().cost()
    assert cost.steps == 3 * 160 + 7 * 10
    assert cost.full_steps == 10 * 160, "the failed one would have failed in full training, too"
    assert cost.saved == pytest.approx(1 - 550 / 1600)


def test_failures_are_cost_and_never_savings() -> None:
    board = Leaderboard(objectives=("ao",), rungs=RUNGS)
    for number in range(6):
        row = board.add(f"t{number}", {})
        row.status, row.counted_at = "failed", time.time() - 5
        if number == 0:
            board.lose(row, 3)  # it said where
        elif number == 1:
            row.report({"step": 10, "total_seconds": 1.0})
            row.counted_at = time.time() - 5
            board.lose(row, None)  # killed: up to the rung at 40 at most
        else:
            row.report({"step": 160, "total_seconds": 1.0})
            row.status = "completed"
    cost = board.cost()
    assert (cost.steps, cost.full_steps, cost.lost_steps) == (4 * 160 + 3 + 40,) * 2 + (33,)
    assert cost.saved == 0, "nothing was stopped early"
    assert cost.seconds == pytest.approx(4 + 1 + 5 + 5, abs=0.5)
    board.rows["t4"].reports = [{"step": 10}]
    board.rows["t4"].status = "stopped"
    assert board.cost().saved == pytest.approx(150 / board.cost().full_steps)


def test_a_failed_trial_is_never_the_best() -> None:
    board = _board()
    for row in board.rows.values():
        row.status = "failed"
    assert board.best() is None


def test_pareto_front_holds_what_nothing_dominates() -> None:
    front = _board(("ao", "parameters")).pareto()
    assert [(r.trial_id, r.values["lora.rank"]) for r in front] == [("t9", 4)]
    board = _board(("ao", "parameters"))
    board.rows["t9"].reports[-1]["parameters"] = 50_000
    assert [r.trial_id for r in board.pareto()] == ["t7", "t8", "t9"]


def test_the_table_reads_back_from_csv_and_parquet(tmp_path: Path) -> None:
    board = _board()
    csv, parquet = board.write(tmp_path)
    for table in (pyarrow.csv.read_csv(csv), pq.read_table(parquet)):
        assert table.num_rows == 11
        rows = table.to_pylist()
        assert rows[0]["trial"] == 9
        assert rows[0]["ao"] == pytest.approx(0.58)
        assert rows[0]["lora.rank"] == 4
        assert rows[-1]["reason"] == "loss is nan at step 3"
        assert {r["status"] for r in rows} == {"completed", "stopped", "failed"}


def test_choices_of_mixed_types_are_written_as_text(tmp_path: Path) -> None:
    board = Leaderboard(objectives=("ao",), rungs=RUNGS)
    for i, value in enumerate((None, "q+v", 1.5)):
        board.add(str(i), {"field": value})
    assert board.table()["field"].to_pylist() == [None, "q+v", "1.5"]


def test_a_snapshot_brings_everything_back() -> None:
    import json

    board = _board()
    again = Leaderboard.from_dict(json.loads(json.dumps(board.to_dict())))
    assert again == board


def test_a_report_that_is_redone_replaces_the_old_one() -> None:
    row = _board().rows["t9"]
    row.report({"step": 40, "ao": 0.1})
    assert [r["step"] for r in row.reports] == [10, 40]
    assert row.last("ao") == 0.1


def test_time_left_shrinks_with_the_work() -> None:
    board = _board()
    assert board.seconds_left(11, 60.0, 0) == 0
    more = board.seconds_left(22, 60.0, 0)
    assert more is not None
    assert more == pytest.approx(11 * 50 * 60 / 550)
    assert Leaderboard(objectives=("ao",), rungs=RUNGS).seconds_left(3, 9.0, 0) is None


@pytest.mark.parametrize("objectives", [("ao",), ("ao", "latency")])
def test_every_plot_is_drawn(tmp_path: Path, objectives: tuple[str, ...]) -> None:
    paths = write_plots(_board(objectives), SPACE, tmp_path)
    assert {p.stem for p in paths} == {
        "history", "parallel_coordinates", "importance", "rank_lr_map", "pareto_front",
        "learning_curves",
    }  # fmt: skip
    assert all(p.stat().st_size > 5_000 for p in paths)


def test_importance_finds_the_field_that_matters() -> None:
    board = _board()
    shares = importance(board, SPACE, [r for r in board.rows.values() if r.reports])
    assert max(shares, key=lambda name: shares[name]) == "lr"
    assert sum(shares.values()) == pytest.approx(1)


def test_a_search_without_reports_has_no_plots(tmp_path: Path) -> None:
    board = Leaderboard(objectives=("ao",), rungs=RUNGS)
    board.add("t0", {"lr": 1e-3})
    assert write_plots(board, SPACE, tmp_path) == []
    assert board.best() is None
    assert board.table().num_rows == 1


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_console_shows_trials_best_and_time_left(kind: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = kind()
    monkeypatch.setattr(sys, "stdout", stream)
    board = _board()
    console = SearchConsole(board, num_trials=20)
    console.start()
    row = board.add("new", {"lora.rank": 8, "lr": 1e-3, "head.depth": 2})
    row.status = "running"
    row.report({"step": 10, "ao": 0.35, "loss": 1.5})
    console.line(row, "rung 1/3, ao 0.3500")
    console.refresh()
    console.stop()
    text = stream.getvalue()
    assert "best" in text
    assert "left" in text
    if kind is Terminal:
        for word in ("trial", "rung", "11 of 20 trials ended", "0.35", "failed: loss is nan"):
            assert word in text
    else:
        values = "(lora.rank 8, lr 0.001, head.depth 2)"
        assert f"trial 11: rung 1/3, ao 0.3500 {values}, best 0.5800 (trial 9), about" in text


def test_what_weights_track_best_with_belongs_to_what_was_found(tmp_path: Path) -> None:
    board = Leaderboard(objectives=("ao",), rungs=RUNGS)
    row = board.add("t0", {"lr": 0.1})
    window = "tracking.window_penalty"
    for step, weight in ((10, 0.2), (40, 0.7)):
        found = [{"tracking": {window: w}, "scores": {"ao": w, "sr75": 0.1}} for w in (0.2, 0.7)]
        report = {"step": step, "ao": weight, "tracking": {window: weight}, "settings": found}
        row.report(report)
    assert row.found == {"lr": 0.1, window: 0.7}
    assert Leaderboard.from_dict(json.loads(json.dumps(board.to_dict()))).rows["t0"] == row
    assert board.table()[window].to_pylist() == [0.7]
    names = [path.name for path in board.write(tmp_path)]
    assert names == ["trials.csv", "trials.parquet", "settings.csv", "settings.parquet"]
    tried = pq.read_table(tmp_path / "settings.parquet").to_pylist()
    assert [(t["trial"], t["rung"], t["steps"], t[window], t["ao"]) for t in tried] == [
        (0, 1, 10, 0.2, 0.2), (0, 1, 10, 0.7, 0.7), (0, 2, 40, 0.2, 0.2), (0, 2, 40, 0.7, 0.7),
    ]  # fmt: skip
    space = build_space(default_config(), [f"{window}=uniform(0,1)"])
    figure = draw_settings(board, space, [row])
    assert figure is not None
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == (window, "AO")
    assert draw_settings(_board(), SPACE, [row for row in _board().ranked() if row.reports]) is None
