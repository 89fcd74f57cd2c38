"""Races of made-up contenders: who is chosen, who leaves, and what an interruption costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lorat.config.fields import to_dict
from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.files import storage
from lorat_platform.search.plan import SearchOptions, SearchPlan, check_unchanged, make_plan
from lorat_platform.search.race import report, rounds
from lorat_platform.search.race.contenders import DEFAULT, Contender, contenders_of
from lorat_platform.search.race.options import RaceOptions
from lorat_platform.search.race.race import Race, Round, read_race, run_race
from lorat_platform.search.race.rounds import plan_of_round, prune, round_of
from lorat_platform.search.race.winner import winner_of
from lorat_platform.search.results.board import Leaderboard, TrialRow
from lorat_platform.search.results.plots import write_plots

SEQUENCES = 40


def plan(*space: str, certify: RaceOptions | None = None, **options: object) -> SearchPlan:
    values: dict[str, object] = {"name": "searched", "rungs": 2, "space": space}
    return make_plan(
        TrainConfig(variant="T-112", seed=7),
        SearchOptions(**(values | options)),  # type: ignore[arg-type]
        race=certify or RaceOptions(certify=True),
    )


class Trainings:
    """Trains nobody: what a contender scores is made up, with a share of seed and sequence."""

    def __init__(self, quality: dict[str, float], fails: dict[str, int] | None = None) -> None:
        self.quality = quality
        self.fails = fails or {}
        """Seeds with which trainings fail, by contender."""
        self.trained: list[tuple[int, tuple[str, ...]]] = []
        self.stop_at: int | None = None
        """Round that is interrupted."""

    def __call__(self, seed: int, contenders: Sequence[Contender]) -> Round | None:
        if len(self.trained) + 1 == self.stop_at:
            self.stop_at = None
            return None
        self.trained.append((seed, tuple(each.name for each in contenders)))
        found = Round(seed=seed, search=f"searched-race-{len(self.trained)}")
        hard = np.random.default_rng(1).normal(0.5, 0.15, SEQUENCES)
        for each in contenders:
            if self.fails.get(each.name) == seed:
                found.failed[each.name] = "the loss is not finite"
                continue
            rng = np.random.default_rng([seed, list(self.quality).index(each.name)])
            scores = hard + self.quality[each.name] + rng.normal(0, 0.002)
            scores += rng.normal(0, 0.01, SEQUENCES)
            found.scores[each.name] = {f"{q % 2} s{q}": float(s) for q, s in enumerate(scores)}
            found.trials[each.name] = f"{each.name.replace(' ', '')}-{seed}"
            found.checkpoints[each.name] = f"/weights/{found.trials[each.name]}"
        found.steps = 100 * len(contenders)
        return found


def race_of(trainings: Trainings, **options: object) -> Race:
    contenders = tuple(Contender(name=name, values={"lr": 1e-3}) for name in trainings.quality)
    rules = RaceOptions(certify=True, **options)  # type: ignore[arg-type]
    return Race(metric="ao", seed=7, options=rules, contenders=contenders)


def raced(trainings: Trainings, **options: object) -> Race:
    race = race_of(trainings, **options)
    assert run_race(race, trainings, lambda _: None)
    return race


def test_the_default_is_registered_where_it_is_best() -> None:
    race = raced(Trainings({DEFAULT: 0.02, "trial 1": 0.0, "trial 2": -0.01}))
    assert race.chosen == DEFAULT
    assert race.said == "worse"
    assert race.p_best[DEFAULT] > 0.9
    assert " is worse than the default" in report.conclusion(race)


def test_a_planted_winner_by_two_hundredths_is_found_and_the_others_leave() -> None:
    trainings = Trainings({DEFAULT: 0.0, "trial 1": 0.0, "trial 2": 0.02, "trial 3": -0.1})
    race = raced(trainings)
    assert (race.chosen, race.said) == ("trial 2", "better than the default")
    assert [seed for seed, _ in trainings.trained] == list(range(8, 8 + len(trainings.trained)))
    assert "trial 3" in trainings.trained[0][1]
    assert "trial 3" not in trainings.trained[-1][1]
    tags = report.tags_of(race)
    assert tags["race.verdict"] == "better than the default"
    assert tags["race.interval"].startswith("[+0.0")
    assert float(tags["race.regret"]) < 0.005
    assert "trial 3" in tags["race.p_best"]


def test_of_equal_ones_the_default_is_registered_being_the_simpler() -> None:
    race = raced(Trainings({DEFAULT: 0.0, "trial 1": 0.0, "trial 2": 0.0}), certify_within=0.05)
    assert race.chosen == DEFAULT
    assert race.said == "not distinguishable from the default"
    assert len(race.seeds) < 5, "within so much of each other"
    assert "being the simpler" in report.conclusion(race)
    assert "the rest are within 0.05" in report.conclusion(race)


def test_who_fails_is_out_with_its_reason_and_the_others_go_on() -> None:
    quality = {DEFAULT: 0.0, "trial 1": 0.05, "trial 2": 0.02}
    trainings = Trainings(quality, fails={"trial 1": 9})
    race = raced(trainings)
    assert race.chosen == "trial 2"
    assert trainings.trained[0][1] == tuple(quality)
    assert all("trial 1" not in names for _, names in trainings.trained[2:])
    assert "trial 1 is out, its training failed: the loss is not finite" in report.after_round(
        Race(**(vars(race) | {"rounds": race.rounds[:2], "_standings": {}}))
    )
    assert "failed with seed 9: the loss is not finite" in report.conclusion(race)


def test_who_left_behind_those_that_fail_later_races_again_with_the_same_seeds() -> None:
    quality = {DEFAULT: 0.0, "trial 1": 0.3, "trial 2": 0.3, "trial 3": 0.0}
    trainings = Trainings(quality, fails={"trial 1": 10, "trial 2": 10})
    race = raced(trainings, certify_within=0)
    assert trainings.trained[2] == (10, ("trial 1", "trial 2"))
    assert trainings.trained[3] == (10, (DEFAULT, "trial 3"))
    assert list(race.of_seeds(DEFAULT)) == list(race.of_seeds("trial 3"))
    assert race.chosen == DEFAULT


def test_a_default_that_fails_is_said_and_the_leader_is_chosen() -> None:
    trainings = Trainings({DEFAULT: 0.0, "trial 1": 0.05, "trial 2": 0.0}, fails={DEFAULT: 8})
    race = raced(trainings)
    assert race.chosen == "trial 1"
    assert race.said.startswith("not compared with the default, whose training failed (seed 8")
    assert race.said in report.conclusion(race)
    assert report.tags_of(race)["race.verdict"] == race.said
    assert report.draw_race(race, plan()).axes[0].get_ylabel().endswith("to trial 1")


def test_where_all_others_or_all_fail_there_is_one_left_or_none() -> None:
    alone = raced(Trainings({DEFAULT: 0.0, "trial 1": 0.1}, fails={"trial 1": 8}))
    assert (alone.chosen, len(alone.rounds)) == (DEFAULT, 1)
    assert alone.said == "not distinguishable from the default"
    assert "failed with seed 8" in report.conclusion(alone)
    nobody = raced(Trainings({DEFAULT: 0.0, "trial 1": 0.1}, fails={"trial 1": 8, DEFAULT: 8}))
    assert nobody.chosen is None
    assert winner_of(nobody, plan()) is None
    assert "failed with seed 8" in report.conclusion(nobody)
    only = raced(Trainings({DEFAULT: 0.0}))
    assert (only.chosen, len(only.rounds)) == (DEFAULT, 1)


def test_an_interrupted_race_goes_on_and_does_nothing_twice(tmp_path: Path) -> None:
    quality = {DEFAULT: 0.0, "trial 1": 0.02, "trial 2": 0.015}
    whole = Trainings(quality)
    expected = raced(whole, certify_within=0)
    place = storage.locate(tmp_path)
    trainings = Trainings(quality)
    trainings.stop_at = 3
    race = race_of(trainings, certify_within=0)
    assert not run_race(race, trainings, lambda race: race.save(place))
    assert len(trainings.trained) == 2
    again = read_race(place)
    assert run_race(again, trainings, lambda race: race.save(place))
    assert trainings.trained == whole.trained
    assert read_race(place) == Race(**(vars(expected) | {"_standings": {}}))
    assert again.chosen == expected.chosen
    assert run_race(read_race(place), pytest.fail, pytest.fail), "it is over"


def test_changed_sequences_are_refused() -> None:
    trainings = Trainings({DEFAULT: 0.0, "trial 1": 0.02})
    race = race_of(trainings)
    first = trainings(8, race.contenders)
    assert first is not None
    del first.scores[DEFAULT]["0 s0"]
    race.rounds = [first]
    with pytest.raises(UserError, match="validation sequences have changed"):
        race.standings  # noqa: B018


def test_the_registered_seed_is_the_one_nearest_to_the_mean() -> None:
    race = raced(Trainings({DEFAULT: 0.0, "trial 1": 0.05, "trial 2": 0.0}))
    winner = winner_of(race, plan())
    assert winner is not None
    means = race.means("trial 1")
    middle = np.mean(list(means.values()))
    assert abs(means[winner.seed] - middle) == min(abs(m - middle) for m in means.values())
    assert winner.checkpoint == f"/weights/trial1-{winner.seed}"
    assert f"trial 1 with seed {winner.seed}, one of {len(means)}" in winner.said
    assert winner.config.lr == 1e-3


def board(searched: SearchPlan, *rows: TrialRow) -> Leaderboard:
    made = Leaderboard(objectives=("ao",), rungs=searched.rungs)
    made.rows = {row.trial_id: row for row in rows}
    return made


def trial(number: int, ao: float, rungs: int = 2, **values: object) -> TrialRow:
    reports = [{"step": 10 * (n + 1), "ao": ao} for n in range(rungs)]
    paths = {name.replace("__", "."): value for name, value in values.items()}
    tracking = {p: v for p, v in paths.items() if p.startswith("tracking.")}
    trained = {p: v for p, v in paths.items() if p not in tracking}
    for each in reports:
        each["tracking"] = tracking  # type: ignore[assignment]
    return TrialRow(
        number=number, trial_id=f"t{number}", values=trained, status="completed", reports=reports
    )


def test_the_best_trials_of_the_highest_rung_race_and_the_default_counts_once() -> None:
    searched = plan("lora.rank=choice(4,8)", "head.depth=3", "lr=choice(0.01,0.02)")
    default = searched.space.own_values()
    assert default == {"lora.rank": 64, "lr": 0.001}, "no choice of the search"
    failed = trial(5, 0.9, lora__rank=4, lr=0.02)
    failed.status = "failed"
    rows = (
        trial(0, 0.5, lora__rank=64, lr=0.001),  # equal to the default
        trial(1, 0.6, lora__rank=4, lr=0.01),
        trial(2, 0.4, lora__rank=8, lr=0.01),
        trial(3, 0.55, lora__rank=4, lr=0.01),  # equal to trial 1
        trial(4, 0.9, 1, lora__rank=8, lr=0.02),  # of a lower rung
        failed,
    )
    found = contenders_of(searched.space, board(searched, *rows), 3)
    assert [each.name for each in found] == [DEFAULT, "trial 1", "trial 2"]
    assert found[0].values == default
    assert searched.space.configure(found[0].values) == searched.space.configure(default)
    few = contenders_of(searched.space, board(searched, *rows), 1)
    assert [each.name for each in few] == [DEFAULT, "trial 1"]


def test_a_round_trains_in_full_with_another_seed_and_each_ones_own_tracking() -> None:
    searched = plan(
        "tracking.window_penalty=choice(0.1,0.2)", max_steps=64, val_sequences=2,
        objective="ao,parameters", tracking_settings=4,
    )  # fmt: skip
    best = trial(3, 0.6, lora__rank=4, lr=2e-3, head__depth=2, tracking__window_penalty=0.2)
    default, own = contenders_of(searched.space, board(searched, best), 3)
    assert default.values["tracking.window_penalty"] == 0.45
    assert own.values == best.found
    of_seed = plan_of_round(searched, 2, 9, (default, own))
    assert (of_seed.name, of_seed.options.trials) == ("searched-race-2", 2)
    assert of_seed.rungs.steps == (searched.space.base.total_steps,)
    assert of_seed.options.val_sequences is None
    assert of_seed.settings() == ({},)
    trained = of_seed.space.configure(own.values)
    assert (trained.seed, trained.tracking.window_penalty) == (9, 0.2)
    alone = plan(
        "tracking.window_penalty=choice(0.1,0.2)", "lora.rank=5", "lr=1e-3", "head.depth=2",
        trials=1,
    )  # fmt: skip
    best = trial(0, 0.6, tracking__window_penalty=0.2)
    both = contenders_of(alone.space, board(alone, best), 3)
    of_seed = plan_of_round(alone, 1, 8, both)
    assert of_seed.options.trials == 2
    assert of_seed.space.own_values()["lora.rank"] == 5


def test_a_round_holds_values_that_the_search_had_not(tmp_path: Path) -> None:
    searched = plan(
        "lora.rank=choice(4,8)", "lr=loguniform(0.01,0.02)", "weight_decay=loguniform(1e-4,1e-3)",
        "batch_size=choice(8,32)", "clip_norm=uniform(1,2)",
        lr_with_batch="sqrt",
    )  # fmt: skip
    base = dataclasses.replace(searched.space.base, weight_decay=0.0)
    searched = dataclasses.replace(searched, space=dataclasses.replace(searched.space, base=base))
    best = trial(
        1, 0.6, 1, lora__rank=4, lr=0.015, head__depth=1, weight_decay=5e-4, batch_size=32,
        clip_norm=1.5,
    )  # fmt: skip
    contenders = contenders_of(searched.space, board(searched, best), 3)
    of_seed = plan_of_round(searched, 1, 8, contenders)
    assert of_seed.space.base == dataclasses.replace(base, seed=8)
    made = board(of_seed)
    for number, each in enumerate(contenders):
        assert to_dict(of_seed.space.configure(each.values)) == to_dict(
            searched.space.configure(each.values)
        ) | {"seed": 8}
        row = made.add(f"t{number}", each.values)
        row.report({"step": 1024, "ao": 0.5, "loss": 1.0, "parameters": 9.0})
        row.status = "completed"
    assert write_plots(made, of_seed.space, tmp_path)
    only = plan_of_round(searched, 2, 9, contenders[1:])
    assert only.space.configure(contenders[1].values).lr == pytest.approx(0.015 * 2**0.5)


def test_a_round_is_what_its_trials_left_and_weights_go_that_nobody_needs(tmp_path: Path) -> None:
    searched = plan(storage=str(tmp_path))
    contenders = tuple(Contender(name=n, values={}) for n in (DEFAULT, "trial 1", "trial 2"))
    of_seed = plan_of_round(searched, 1, 8, contenders)
    rows = [trial(n, 0.5, 1) for n in range(3)]
    rows[2].status, rows[2].reason = "failed", "the loss is not finite"
    for row in rows[:2]:
        place = tmp_path / "searched-race-1"
        (place / "sequences" / row.trial_id).mkdir(parents=True)
        content = f'[{{"a": {{"ao": 0.{row.number}}}}}, {{"a": {{"ao": 0.5}}}}]'
        (place / "sequences" / row.trial_id / "rung-0.json").write_text(content)
        (place / f"trial-{row.trial_id}" / "checkpoint_000000").mkdir(parents=True)
        (place / f"trial-{row.trial_id}" / "checkpoint_000000" / "config.json").write_text("{}")
    found = round_of(searched, of_seed, board(of_seed, *rows), contenders)
    assert found.scores["trial 1"] == {"0 a": 0.1, "1 a": 0.5}
    assert found.failed == {"trial 2": "the loss is not finite"}
    kept = Path(found.checkpoints["trial 1"])
    assert (kept / "complete.json").exists(), "an object store's is loaded by it"
    rows[2].is_own_fault = False
    with pytest.raises(UserError, match=r"trial 2 with seed 8 .* go on with --resume searched"):
        round_of(searched, of_seed, board(of_seed, *rows), contenders)

    race = race_of(Trainings(dict.fromkeys((each.name for each in contenders), 0.0)))
    race.rounds = [found]
    prune(race, storage.locate(tmp_path), ["trial 1"])
    prune(race, storage.locate(tmp_path), ["trial 1"])
    assert kept.exists()
    assert set(found.checkpoints) == {"trial 1"}
    assert not (tmp_path / "searched-race-1" / "trial-t0" / "checkpoint_000000").exists()


def test_a_round_begins_or_goes_on_or_begins_anew_where_it_was_killed_too_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = plan(storage=str(tmp_path))
    contenders = contenders_of(searched.space, board(searched, trial(0, 0.5)), 0)
    called: list[tuple[str, str]] = []

    def stopped(kind: str, name: str) -> SimpleNamespace:
        called.append((kind, name))
        return SimpleNamespace(endings=(), interrupted=True)

    def begin(of_seed: SearchPlan, *, points: list[dict[str, object]], **_: object) -> object:
        assert points == [contenders[0].values]
        return stopped("run", of_seed.name)

    monkeypatch.setattr(rounds, "run_search", begin)
    monkeypatch.setattr(rounds, "resume_search", lambda name, *_, **__: stopped("resume", name))
    assert rounds.run_round(searched, 1, 8, contenders) is None
    folder = tmp_path / "searched-race-1"
    folder.mkdir()
    (folder / "search.json").write_text("{}")  # killed before there was a snapshot
    assert rounds.run_round(searched, 1, 8, contenders) is None
    assert not folder.exists()
    folder.mkdir()
    (folder / "experiment_state-2026.json").write_text("{}")
    assert rounds.run_round(searched, 1, 8, contenders) is None
    assert called == [(kind, folder.name) for kind in ("run", "run", "resume")]


def test_a_race_is_added_on_a_resume_but_not_changed_once_begun(tmp_path: Path) -> None:
    made = plan(storage=str(tmp_path), certify=RaceOptions())
    asked = RaceOptions(certify=True, certify_top=2)
    check_unchanged(made, made.space.base, made.options, asked)
    assert "the best 2 and the default then race" in plan(certify=asked).text()
    (tmp_path / "searched").mkdir()
    (tmp_path / "searched" / "race.json").write_text("{}")
    with pytest.raises(UserError, match="--certify-top cannot be changed when a search"):
        check_unchanged(made, made.space.base, made.options, asked)
    with pytest.raises(UserError, match="delete it, and the race begins anew"):
        read_race(storage.locate(tmp_path).child("searched"))


def test_what_cannot_race_is_refused() -> None:
    with pytest.raises(UserError, match="of which none has latency"):
        plan(objective="latency,ao")
    with pytest.raises(UserError, match="--certify-top say how trials race; give --certify"):
        RaceOptions(certify_top=2)
