"""What the gate sees of a version: its own weights, and those of the other seeds of its race."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorat.errors import UserError
from lorat.metrics.comparison import GateConfig, compare_seeds
from lorat_platform.promotion import decision


def client(tags: dict[str, str]) -> Any:
    return SimpleNamespace(get_model_version=lambda name, version: SimpleNamespace(tags=tags))


def test_a_version_that_raced_has_the_seeds_whose_weights_are_left(tmp_path: Path) -> None:
    for seed in (8, 9, 10):
        (tmp_path / f"{seed}").mkdir()
        (tmp_path / f"{seed}" / "config.json").write_text("{}")
    seeds = {str(seed): str(tmp_path / str(seed)) for seed in (8, 9, 10, 11)}
    tags = {"race.seed": "9", "race.seeds": json.dumps(seeds)}
    found = decision.trainings_of(client(tags), "lorat", "4")
    assert found.models == {"9": "models:/lorat/4", "8": seeds["8"], "10": seeds["10"]}
    assert found.said == (
        "3 seeds of version 4 were seen (9, 8, 10); its race's weights of 11 are gone"
    )
    for seed in (8, 10):
        (tmp_path / f"{seed}" / "config.json").unlink()
    found = decision.trainings_of(client(tags), "lorat", "4")
    assert found.models == {"9": "models:/lorat/4"}
    assert found.said.startswith("one seed of version 4 was seen; its race's weights of 8, 10, 11")


def test_of_a_version_that_did_not_race_one_seed_is_seen() -> None:
    found = decision.trainings_of(client({}), "lorat", "3")
    assert found.models == {"": "models:/lorat/3"}
    assert found.said == "one seed of version 3 was seen"
    with pytest.raises(UserError, match=r"The tag race.seeds of lorat version 3 cannot be used"):
        decision.trainings_of(client({"race.seeds": "[]"}), "lorat", "3")


def test_all_trainings_are_compared_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told = [], []

    def results_on(address: str, *_: object) -> list[SimpleNamespace]:
        asked.append(address)
        better = {"models:/lorat/4": 0.1, "/eight": 0.12}.get(address, 0.0)
        scores = {f"s{q}": float(0.4 + better + 0.01 * q) for q in range(20)}
        found = {"scores": {"AO": 0.5 + better}, "intervals": {}, "results": {}}
        return [SimpleNamespace(name="set", of_sequences=lambda metric: scores, **found)]

    def add_evaluation(_: object, name: str, version: str, scores: Any, *__: object) -> None:
        told.append((name, version, scores["eval/set/ao"]))

    monkeypatch.setattr(decision, "results_on", results_on)
    monkeypatch.setattr(decision.versions, "add_evaluation", add_evaluation)
    monkeypatch.setattr(decision, "connect", lambda: None)
    candidate = decision.Candidate(name="lorat", version="4")
    trainings = [
        decision.Trainings(version="4", models={"9": "models:/lorat/4", "8": "/eight"}, gone=()),
        decision.Trainings(version="3", models={"": "models:/lorat/3"}, gone=()),
    ]
    found = decision.compare_with(candidate, trainings, ["data"])
    assert asked == ["models:/lorat/4", "/eight", "models:/lorat/3"]
    assert told == [("lorat", "4", 0.6)], "of the candidate's own weights alone"
    assert found.mean_difference == pytest.approx(0.11)
    assert found.numbers()["candidate_seeds"] == 2
    table = decision._seeds_table(found)
    assert "| 8 | 0.6150 |  |" in table
    assert "| its own |  | 0.4950 |" in table
    one = {"": {f"s{q}": float(q) for q in np.arange(6)}}
    assert decision._seeds_table(compare_seeds(one, one, GateConfig())) == ""
