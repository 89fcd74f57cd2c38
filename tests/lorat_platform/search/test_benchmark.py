from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat_platform.search.benchmark import (
    compare,
    in_order,
    overhead_seconds,
    run_or_go_on,
    table,
    verdict,
)
from lorat_platform.search.plan import REQUEST_FILE, SearchOptions, make_plan
from lorat_platform.search.results.board import Leaderboard
from lorat_platform.search.rungs import Rungs

RUNGS = Rungs(max_steps=160, reduction=4, num_rungs=3)


def _boards() -> tuple[Leaderboard, Leaderboard]:
    """Four trials on one process; the search stops two of them and misses the best."""
    searched = Leaderboard(objectives=("ao",), rungs=RUNGS)
    full = Leaderboard(objectives=("ao",), rungs=RUNGS)
    end = 100.0
    for i, (ao, num_rungs) in enumerate(((0.60, 3), (0.50, 1), (0.61, 1), (0.55, 2))):
        values = {"lora.rank": 4 * 2**i, "lr": 1e-3}
        row = searched.add(f"s{i}", values)
        for rung, step in enumerate(RUNGS.steps[:num_rungs]):
            row.report({
                "step": step, "ao": ao - 0.1 * (2 - rung), "train_seconds": 3.0,
                "evaluation_seconds": 1.0, "crop_cache_hit_rate": float(i > 0),
            })  # fmt: skip
        row.status = "completed" if num_rungs == 3 else "stopped"
        row.worker, row.starts = "host:1", 1
        row.proposed_at, row.started_at, row.ended_at = end - 7, end + 0.1, end + 4.0 + i / 2
        end = row.ended_at
        twin = full.add(f"f{i}", values)
        twin.report({"step": 160, "ao": ao})
        twin.status = "completed"
    return searched, full


def test_quality_and_cost_are_against_full_training_of_the_same_trials() -> None:
    figures = compare(*_boards())
    assert (figures["found"], figures["possible"]) == (0.60, 0.61)
    assert figures["quality"] == pytest.approx(0.60 / 0.61)
    assert figures["steps"] == 160 + 10 + 10 + 40
    assert figures["cost"] == pytest.approx(220 / 640)
    assert figures["largest_difference_of_repeated_trials"] == 0
    assert figures["crop_cache_hit_rate"] == 0.75


def test_overhead_is_what_training_and_evaluation_do_not_explain() -> None:
    searched, _ = _boards()
    overheads, firsts = overhead_seconds(searched)
    assert overheads == pytest.approx([0.5, 1.0, 1.5])
    assert firsts == pytest.approx([7.0]), "the start of the process counts"
    in_order(searched)[0].starts = in_order(searched)[1].starts = 2
    overheads, firsts = overhead_seconds(searched)
    assert overheads == pytest.approx([1.0, 1.5]), "interrupted ones do not count"
    assert firsts == []


def test_the_report_names_every_trial_and_what_was_wanted() -> None:
    boards = _boards()
    lines = table(*boards).splitlines()
    assert len(lines) == 2 + 4
    assert lines[4] == "| 2 | 16 | 0.001 | stopped | 10 | 0.4100 | 0.6100 |"
    text = verdict(compare(*boards) | {"search_seconds": 5.0, "full_seconds": 9.0})
    assert "98.4% (wanted 98%)" in text
    assert "220 of 640: 34.4%" in text
    assert "overhead per trial: median 1.00 s" in text
    assert "overhead of the first trial of a process" in text
    assert "longest 7.00 s" in text


def test_a_benchmark_goes_on_only_with_what_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(tmp_path))
    config, folder = TrainConfig(variant="N-112"), tmp_path / "runs" / "mine"
    folder.mkdir(parents=True, mode=0o700)
    begun = make_plan(config, SearchOptions(name="mine", trials=16))
    (folder / REQUEST_FILE).write_text(json.dumps(begun.request()))
    other = make_plan(config, SearchOptions(name="mine", trials=17, reduction=3))
    with pytest.raises(UserError, match="--trials and --reduction cannot be changed"):
        run_or_go_on(other)
