from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Experiment
from ray.tune.schedulers import TrialScheduler
from ray.tune.search.search_generator import SearchGenerator

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.metrics import METRICS
from lorat_platform.search.algorithms import (
    SLOTS,
    SlotLimiter,
    build_scheduler,
    build_searcher,
    extend,
    take_back,
)
from lorat_platform.search.plan import SearchOptions
from lorat_platform.search.results.board import Leaderboard
from lorat_platform.search.rungs import Rungs, pareto_fronts, pareto_order
from lorat_platform.search.space import build_space

RUNGS = Rungs(max_steps=256, reduction=4, num_rungs=3)


class Past(SimpleNamespace):
    """What a scheduler sees of a trial."""

    __hash__ = object.__hash__


def _trial(name: str, last_result: dict[str, Any] | None = None, *, finished: bool = False) -> Any:
    return Past(
        trial_id=name, last_result=last_result, is_finished=lambda: finished, status="PENDING"
    )


def test_rungs_are_steps_of_the_full_schedule() -> None:
    assert RUNGS.steps == (16, 64, 256)
    assert Rungs(max_steps=250, reduction=4, num_rungs=3).steps == (16, 63, 250)
    assert [RUNGS.budget(i) for i in range(3)] == [1, 4, 16]
    assert Rungs(max_steps=10, reduction=3, num_rungs=1).steps == (10,)


@pytest.mark.parametrize(
    "wrong", [{"max_steps": 8}, {"reduction": 1}, {"num_rungs": 0}, {"max_steps": 0}]
)
def test_rungs_that_cannot_be_are_an_error(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError):
        Rungs(**({"max_steps": 256, "reduction": 4, "num_rungs": 3} | wrong))


@pytest.mark.parametrize("objectives", [["ao"], ["ao", "latency"]])
def test_asha_stops_the_worse_and_lets_the_better_go_on(objectives: list[str]) -> None:
    scheduler = build_scheduler("asha", objectives, RUNGS)
    decisions = []
    for i, ao in enumerate((0.5, 0.4, 0.3, 0.6)):
        trial = _trial(str(i))
        scheduler.on_trial_add(None, trial)
        result = {"budget": 1, "ao": ao, "latency": 1 - ao}
        decisions.append(scheduler.on_trial_result(None, trial, result))
    go, stop = TrialScheduler.CONTINUE, TrialScheduler.STOP
    assert decisions == [go, stop, stop, go]
    assert scheduler.on_trial_result(None, trial, {"budget": 16, "ao": 1, "latency": 1}) == stop


@pytest.mark.parametrize("objectives", [["ao"], ["ao", "parameters"]])
@pytest.mark.parametrize("name", ["asha", "median"])
def test_restored_trials_keep_their_say(name: Any, objectives: list[str]) -> None:
    if name == "median" and len(objectives) > 1:
        pytest.skip("median stopping compares one objective")
    scheduler = build_scheduler(name, objectives, RUNGS)
    controller: Any = SimpleNamespace(get_live_trials=list)
    for i in range(4):
        report = {"budget": 1, "ao": 0.5 + i / 100, "parameters": 1}
        past = report | {"history": [report]}
        scheduler.on_trial_add(controller, _trial(f"old{i}", past, finished=i < 3))
    late = _trial("late")
    scheduler.on_trial_add(controller, late)
    worse = {"budget": 1, "ao": 0.4, "parameters": 1}
    assert scheduler.on_trial_result(controller, late, worse) == TrialScheduler.STOP


def _past(name: str, values: list[float], *, finished: bool = True) -> Any:
    """A trial that reported at the first rungs."""
    history = [{"budget": 4**i, "ao": ao} for i, ao in enumerate(values)]
    return _trial(name, history[-1] | {"history": history}, finished=finished)


def test_median_stopping_decides_nothing_again_about_restored_trials() -> None:
    scheduler: Any = build_scheduler("median", ["ao"], RUNGS)
    controller: Any = SimpleNamespace(get_live_trials=list)
    past = [_past(f"old{i}", [0.1 + i / 10] * 3) for i in range(4)]
    for trial in reversed(past):  # the newest first, the oldest is the worst
        scheduler.on_trial_add(controller, trial)
    unfinished = _past("unfinished", [0.01], finished=False)
    scheduler.on_trial_add(controller, unfinished)
    report = {"budget": 4, "ao": 0.9}
    assert scheduler.on_trial_result(controller, unfinished, report) == TrialScheduler.CONTINUE
    bad = _trial("bad")
    scheduler.on_trial_add(controller, bad)
    report = {"budget": 1, "ao": 0.05}
    assert scheduler.on_trial_result(controller, bad, report) == TrialScheduler.STOP


@pytest.mark.parametrize("objectives", [["ao"], ["ao", "parameters"]])
def test_a_rung_that_is_trained_again_is_judged_again(objectives: list[str]) -> None:
    scheduler = build_scheduler("asha", objectives, RUNGS)
    for i in range(4):
        report = {"budget": 1, "ao": 0.5 + i / 100, "parameters": 1}
        scheduler.on_trial_add(None, _trial(f"old{i}", report | {"history": [report]}))
    worse = {"budget": 1, "ao": 0.4, "parameters": 1}
    lost = _trial("lost", worse | {"history": [worse]})
    scheduler.on_trial_add(None, lost)
    assert scheduler.on_trial_result(None, lost, worse) == TrialScheduler.STOP


def test_non_dominated_fronts() -> None:
    points = np.array([[1.0, 4], [2, 3], [3, 1], [1, 1], [2, 2], [0, 0]])
    assert pareto_fronts(points) == [[0, 1, 2], [4], [3], [5]]
    assert pareto_order(points)[:2] == [0, 2], "the ends of the front come first"


def test_hyperband_ignores_finished_trials_of_an_earlier_session() -> None:
    scheduler: Any = build_scheduler("hyperband", ["ao"], RUNGS)
    scheduler.on_trial_add(None, _trial("old", finished=True))
    assert scheduler.state()["num_brackets"] == 0


def test_combinations_that_do_not_work_are_errors() -> None:
    with pytest.raises(UserError, match="one objective"):
        build_scheduler("median", ["ao", "latency"], RUNGS)


def test_tpe_begins_with_the_papers_values_and_stays_in_the_space() -> None:
    space = build_space(TrainConfig(variant="B-224"), ["lora.dropout=uniform(0,0.2)"])
    searcher: Any = build_searcher("tpe", space, ["ao"], num_trials=16, seed=3, max_concurrent=0)
    rng = np.random.default_rng(0)
    for i in range(20):
        values = searcher.suggest(f"t{i}")
        if i == 0:
            assert values == {"lora.rank": 64, "lr": 1e-4, "head.depth": 3, "lora.dropout": 0.0}
        config = space.configure(values)
        assert config.lora.rank in (4, 8, 16, 32, 64, 128)
        assert config.lr is not None
        assert 1e-5 <= config.lr <= 1e-3
        assert 0 <= config.lora.dropout <= 0.2
        result = {"ao": float(rng.random()), "training_iteration": 1}
        searcher.on_trial_complete(f"t{i}", result)


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_restored_search_uses_the_slots_of_the_present_cluster(
    name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> Any:
        space = build_space(TrainConfig())
        made: Any = build_searcher(name, space, ["ao"], num_trials=9, seed=0, max_concurrent=2)
        made = SlotLimiter(made, max_concurrent=2) if name == "tpe" else made
        made.search = "resumed"
        return made

    before = build()
    assert before.max_concurrent == 2
    monkeypatch.setitem(SLOTS, "resumed", 5)
    after = build()
    after.set_state(before.get_state())
    assert after.max_concurrent == 5


@pytest.mark.parametrize("objectives", [["ao"], ["ao", "latency"]])
def test_a_searcher_read_back_from_json_proposes_what_it_would_have(
    tmp_path: Path, objectives: list[str]
) -> None:
    space = build_space(TrainConfig(variant="B-224"), ["lora.dropout=uniform(0,0.2)"])

    def build() -> Any:
        return build_searcher("tpe", space, objectives, num_trials=16, seed=3, max_concurrent=0)

    def result(i: int) -> dict[str, float]:
        return {"ao": 1.0 / (i + 1), "latency": float(i % 3), "training_iteration": 1}

    before = build()
    for i in range(8):
        before.suggest(f"t{i}")
        before.on_trial_result(f"t{i}", result(i))
    for i in range(6):
        before.on_trial_complete(f"t{i}", None if i == 5 else result(i), error=i == 5)
    before.save_to_dir(str(tmp_path), "now")
    (file,) = tmp_path.glob("searcher-state-*")
    assert len(json.loads(file.read_text())["trials"]) == 8

    after = build()
    after.restore_from_dir(str(tmp_path))
    for searcher in (before, after):
        searcher.on_trial_complete("t6", result(6))
        searcher.on_trial_result("t7", result(2) | {"training_iteration": 2})
    assert after.suggest("t7") == before.suggest("t7"), "it is running"
    assert [after.suggest(f"n{i}") for i in range(6)] == [before.suggest(f"n{i}") for i in range(6)]
    file.write_text('{"trials": 7}')
    with pytest.raises(ValueError, match="no state of a searcher"):
        after.restore_from_dir(str(tmp_path))


@pytest.mark.parametrize("taken", [2, 3])
@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_restored_search_proposes_as_many_trials_as_are_wanted_now(name: Any, taken: int) -> None:
    space = build_space(TrainConfig())

    def build() -> Any:
        made: Any = build_searcher(name, space, ["ao"], num_trials=3, seed=0, max_concurrent=0)
        return made if name == "random" else SearchGenerator(SlotLimiter(made, max_concurrent=9))

    before = build()
    param_space = space.to_tune() if name == "random" else {}
    before.add_configurations(
        [Experiment("some", run=lambda _: None, config=param_space, num_samples=3)]
    )
    ids = [before.next_trial().trial_id for _ in range(taken)]
    if taken == 3:
        assert before.next_trial() is None
    after = build()
    after.set_state(before.get_state())
    extend(after, 5)
    take_back(after, ids[0])
    ids += [after.next_trial().trial_id for _ in range(5 - taken)]
    assert after.next_trial() is None
    assert after.is_finished()
    assert len(set(ids)) == 5
    live = after._live_trials if name == "random" else after.searcher.live_trials
    assert ids[0] in live, "it is tried again, and counts among those that run"


def test_tpe_learns_from_a_trial_that_failed_and_was_tried_again(tmp_path: Path) -> None:
    space = build_space(TrainConfig(variant="B-224"))

    def build() -> Any:
        made: Any = build_searcher("tpe", space, ["ao"], num_trials=4, seed=3, max_concurrent=0)
        return made

    before = build()
    values = before.suggest("t0")
    before.on_trial_complete("t0", None, error=True)
    before.save_to_dir(str(tmp_path), "now")
    after = build()
    after.restore_from_dir(str(tmp_path))
    after.on_trial_complete("t0", None, error=True)
    assert [trial.state.name for trial in after._ot_study.get_trials()] == ["FAIL"]
    after.on_trial_complete("t0", {"ao": 0.25})
    assert after._ot_study.best_value == 0.25
    assert after._ot_study.best_params == values


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_an_objective_that_scheduler_and_table_know_the_better_of(
    name: str,
) -> None:
    assert SearchOptions(objective=name).objectives == (name,)
    scheduler: Any = build_scheduler("asha", [name], RUNGS)
    assert scheduler._mode == METRICS[name].better
    board = Leaderboard(objectives=(name,), rungs=RUNGS)
    for trial_id, value in (("low", 0.2), ("high", 0.8)):
        board.add(trial_id, {}).report({"step": 1, "budget": 1, name: value})
    best = board.best()
    assert best is not None
    assert best.trial_id == ("high" if METRICS[name].better == "max" else "low")
    assert name in board.table().column_names


def test_an_unknown_objective_is_answered_by_all_metrics() -> None:
    with pytest.raises(UserError, match=f"give one or more of {', '.join(METRICS)}"):
        SearchOptions(objective="sr57")


def test_a_space_without_training_fields_proposes_its_one_training() -> None:
    fixed = ["tracking.window_penalty=uniform(0,1)", "lora.rank=8", "lr=1e-3", "head.depth=2"]
    space = build_space(TrainConfig(), fixed)
    made: Any = build_searcher("tpe", space, ["ao"], num_trials=1, seed=0, max_concurrent=1)
    made.add_configurations([Experiment("some", run=lambda _: None, config=space.to_tune())])
    assert made.next_trial().config == {}
    assert made.next_trial() is None
