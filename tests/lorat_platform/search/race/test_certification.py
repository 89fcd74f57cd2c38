"""The race at a search's end in MLflow and on disk; its trainings are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat_platform.recording.store import connect
from lorat_platform.search.driver import open_search_run
from lorat_platform.search.plan import SearchOptions, make_plan
from lorat_platform.search.race import certification
from lorat_platform.search.race.certification import Certified, certify
from lorat_platform.search.race.contenders import DEFAULT, Contender
from lorat_platform.search.race.options import RaceOptions
from lorat_platform.search.race.race import Round
from lorat_platform.search.results.board import Leaderboard
from lorat_platform.search.results.outcome import SearchOutcome
from tests.lorat_platform.search.race.test_race import Trainings, board, trial

NAMES = {DEFAULT: 0.0, "trial 0": 0.03, "trial 1": 0.0}


class Certification:
    """A search that has ended, whose race trains nobody and registers nothing."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        options = SearchOptions(name="searched", rungs=2, val_sequences=1)
        self.plan = make_plan(
            TrainConfig(variant="T-112", seed=7), options, race=RaceOptions(certify=True)
        )
        self.folder = home / "runs" / "searched"
        (self.folder / "results").mkdir(parents=True)
        self.trainings = Trainings(NAMES)
        self.registered: list[str] = []
        self.fault: Callable[[], object] = lambda: None
        """Called before each round and each registration."""
        patch.setattr(certification, "run_round", self.run_round)
        patch.setattr(certification, "register", self.register)

    @property
    def board(self) -> Leaderboard:
        rows = [
            trial(n, 0.6 - 0.1 * n, lora__rank=4 * 2**n, lr=1e-3, head__depth=1) for n in (0, 1)
        ]
        return board(self.plan, *rows)

    def run_round(
        self, plan: Any, number: int, seed: int, contenders: Sequence[Contender], **_: Any
    ) -> Round | None:
        assert plan is self.plan
        assert number == len(self.trainings.trained) + 1
        self.fault()
        return self.trainings(seed, contenders)

    def register(self, race: Any, winner: Any, plan: Any, **about: Any) -> str:
        self.fault()
        assert about["search_run_id"]
        self.registered.append(winner.name)
        return "3"

    def certify(self) -> Certified:
        outcome: Any = SearchOutcome(
            plan=self.plan, board=self.board, best=None, best_config=None, best_config_file=None,
            run_id=None, page=None, table="#/table", interrupted=False, endings=(),
        )  # fmt: skip
        return certify(outcome)


@pytest.fixture
def search(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> Certification:
    return Certification(own_store, monkeypatch)


def runs() -> Any:
    client = connect()
    experiment = client.get_experiment_by_name("lorat-search")
    return client.search_runs([experiment.experiment_id])


def test_the_searchs_run_has_verdict_table_plot_and_account(
    search: Certification, caplog: pytest.LogCaptureFixture
) -> None:
    open_search_run(search.plan).close()  # as the search has ended it
    with caplog.at_level("INFO"):
        certified = search.certify()
    assert not certified.interrupted
    assert search.registered == ["trial 0"]
    (run,) = runs()
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    assert tags["lorat.race.verdict"] == "better than the default"
    assert tags["lorat.race.version"] == "3"
    cost = search.board.cost().steps
    assert int(tags["lorat.race.steps"]) == certified.race.steps > 0
    assert int(tags["lorat.steps_spent"]) == cost + certified.race.steps
    text = tags["mlflow.note.content"]
    assert "**The race: trial 0 is better than the default.**" in text
    assert f"took {certified.race.steps} steps more, {cost + certified.race.steps} in all" in text
    assert "Version 3 of lorat is trial 0 with seed" in text
    assert "(#/table)" in text
    kept = {entry.path for entry in connect().list_artifacts(run.info.run_id, "race")}
    assert kept == {"race/race.csv", "race/race.png"}
    config = json.loads((search.folder / "results" / "certified_config.json").read_text())
    assert (config["lora"]["rank"], config["seed"]) == (4, 7)
    said = caplog.text
    assert "round 1 trains with seed 8: default as trial 0, trial 0 as trial 1, trial 1 as" in said
    assert "race: seed 9 (2 of at most 5); trial 0 leads with ao" in said
    assert "models:/lorat/3, alias candidate: trial 0 with seed" in said


def test_an_interrupted_race_goes_on_and_one_that_is_over_is_registered_once(
    search: Certification, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt() -> None:
        if len(search.trainings.trained) == 1:
            raise KeyboardInterrupt

    search.fault = interrupt
    with caplog.at_level("INFO"):
        assert search.certify().interrupted
    assert "python jobs/tune.py --resume searched" in caplog.text
    (run,) = runs()
    assert run.info.status == "KILLED"
    assert not search.registered

    def fail() -> None:
        if len(search.trainings.trained) > 1:
            raise UserError("MLflow does not take the model.")

    search.fault = fail
    with pytest.raises(UserError, match="does not take"):
        search.certify()
    search.fault = lambda: None
    assert not search.certify().interrupted
    rounds = list(search.trainings.trained)
    assert [seed for seed, _ in rounds] == list(range(8, 8 + len(rounds)))
    again = search.certify()
    assert search.trainings.trained == rounds
    assert search.registered == ["trial 0"]
    assert again.race.version == "3"
    (run,) = runs()
    assert run.info.status == "FINISHED"
    left = [set(each.checkpoints) for each in again.race.rounds]
    assert all("trial 0" in each for each in left)


def test_a_race_that_trained_nobody_to_the_end_registers_nothing(
    search: Certification, caplog: pytest.LogCaptureFixture
) -> None:
    search.trainings.fails = dict.fromkeys(NAMES, 8)
    certified = search.certify()
    assert certified.race.version is None
    assert not search.registered
    assert "nothing is registered" in caplog.text
    (run,) = runs()
    assert "failed with seed 8" in run.data.tags["mlflow.note.content"]
