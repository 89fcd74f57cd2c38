"""There is always exactly one champion, whoever promotes at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorat.errors import UserError
from lorat_platform.promotion import champion as promotion
from lorat_platform.recording.store import connect, ensure_experiment, tracking_uri
from lorat_platform.registry.versions import (
    add_evaluation,
    add_to_description,
    ensure_registered_model,
)
from tests.mlflow_home import make_home
from tests.mlflow_server import running_server

pytestmark = pytest.mark.processes(minutes=0.5)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAT_HOME", str(make_home(tmp_path / "home")))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_server(tmp_path_factory.mktemp("server")) as server:
        yield server.uri


@pytest.fixture(params=["sqlite", "server"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LORAT_HOME", str(make_home(tmp_path / "home")))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if request.param == "server":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("server_uri"))
    return request.param


def make_versions(name: str, count: int) -> None:
    client = connect()
    ensure_registered_model(client, name)
    experiment = ensure_experiment(client, "lorat", tracking_uri())
    run = client.create_run(experiment)
    for _ in range(count):  # a server refuses a source that belongs to no run
        client.create_model_version(name, f"{run.info.artifact_uri}/model", run_id=run.info.run_id)


def promote(version: str, expected: str | None) -> bool:
    return promotion.promote(
        "lorat", version, expected_champion=expected, tags={"gate.decision": "promoted"}, by="gate"
    )


def test_promotion_moves_the_alias_and_remembers(sqlite: None) -> None:
    make_versions("lorat", 3)
    client = connect()
    assert promotion.champion_of(client) is None
    assert promote("1", None)
    assert promote("3", "1")
    assert promotion.champion_of(client) == "3"
    assert client.get_model_version_by_alias("lorat", "previous").version in (1, "1")
    assert client.get_model_version("lorat", "3").tags["gate.decision"] == "promoted"
    assert [entry["version"] for entry in promotion.history_of(client)] == ["1", "3"]


def test_promotion_against_an_outdated_champion_does_nothing(sqlite: None) -> None:
    make_versions("lorat", 3)
    assert promote("1", None)
    assert promote("2", "1")
    assert not promote("3", "1")
    assert promotion.champion_of(connect()) == "2"


def test_rollback_restores_the_champion_before(sqlite: None) -> None:
    make_versions("lorat", 3)
    assert promote("1", None)
    assert promote("2", "1")
    assert promote("3", "2")
    assert promotion.roll_back() == ("3", "2")
    assert promotion.roll_back() == ("2", "1")
    assert promotion.champion_of(connect()) == "1"
    assert "rolled_back" in connect().get_model_version("lorat", "3").tags
    with pytest.raises(UserError, match="No champion before version 1"):
        promotion.roll_back()


def test_rollback_returns_to_the_recorded_champion_after_one_set_by_hand(sqlite: None) -> None:
    make_versions("lorat", 2)
    assert promote("1", None)
    connect().set_registered_model_alias("lorat", "champion", "2")
    assert promotion.roll_back() == ("2", "1")


def test_rollback_skips_a_deleted_version(sqlite: None) -> None:
    make_versions("lorat", 3)
    assert promote("1", None)
    assert promote("2", "1")
    assert promote("3", "2")
    connect().delete_model_version("lorat", "2")
    assert promotion.roll_back() == ("3", "1")


def test_rollback_finds_no_deleted_version_for_the_alias_previous(sqlite: None) -> None:
    from mlflow.exceptions import MlflowException

    make_versions("lorat", 3)
    assert promote("1", None)
    assert promote("2", "1")
    assert promote("3", "2")
    client = connect()
    client.delete_model_version("lorat", "1")
    assert promotion.roll_back(tags={"rolled_back.note": "lost the ball"}) == ("3", "2")
    assert client.get_model_version("lorat", "3").tags["rolled_back.note"] == "lost the ball"
    with pytest.raises(MlflowException, match="previous"):
        client.get_model_version_by_alias("lorat", "previous")


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("moment", ["before the alias", "after the alias"])
def test_a_kill_in_a_promotion_leaves_a_true_history(
    moment: str, sqlite: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    make_versions("lorat", 4)
    assert promote("1", None)
    client = connect()
    client.set_registered_model_alias("lorat", "champion", "2")  # by hand: not on record yet
    set_alias = MlflowClient.set_registered_model_alias

    def kill(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if moment == "after the alias":
            set_alias(self, name, alias, version)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", kill)
        with pytest.raises(Killed):
            promote("3", "2")
    champion = "3" if moment == "after the alias" else "2"
    assert promotion.champion_of(client) == champion
    assert promotion.roll_back() == (champion, "2" if champion == "3" else "1")
    assert promote("4", "2" if champion == "3" else "1")
    versions = [entry["version"] for entry in promotion.history_of(client)]
    assert versions == (["1", "2", "4"] if champion == "3" else ["1", "4"])


def test_the_history_fits_into_a_tag_of_every_database() -> None:
    history: list[dict[str, str]] = []
    for number in range(100_000, 100_200):
        history = promotion._with(history, str(number), by="alias")
    assert history[-1]["version"] == "100199"
    assert len(json.dumps(history)) < 5000


def test_of_two_who_find_a_stale_lock_only_one_takes_it_away(
    sqlite: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_versions("lorat", 1)
    client = connect()
    stale = client.create_registered_model("lorat.promotion-lock", tags={"owner": "gone"})
    monkeypatch.setattr(promotion, "LOCK_STALE_S", 0.0)
    time.sleep(0.01)
    with promotion.locked(client, "lorat") as still_locked:
        assert still_locked()
        with monkeypatch.context() as patch:  # another one, who looked before
            patch.setattr(client, "get_registered_model", lambda _: stale)
            assert promotion._break_stale(client, "lorat.promotion-lock") == []
        assert still_locked()
    assert [model.name for model in client.search_registered_models()] == ["lorat"]


def test_descriptions_stay_within_what_databases_take(sqlite: None) -> None:
    make_versions("lorat", 1)
    client = connect()
    client.update_model_version("lorat", "1", "LoRAT N-112\n")
    for number in range(30):
        add_to_description(client, "lorat", "1", f"day {number}", "refused " * 60)
    text = client.get_model_version("lorat", "1").description
    assert len(text) <= 5000
    assert text.startswith("LoRAT N-112")
    assert "### day 29" in text
    assert "### day 3\n" not in text


def test_an_evaluation_is_noted_where_the_registration_had_none(sqlite: None) -> None:
    make_versions("lorat", 1)
    client = connect()
    client.update_model_version("lorat", "1", "T-112. LoRAT.\n\n### promoted")
    scores = {"eval/val/ao": 0.5, "eval/val/ao_low": 0.4, "eval/val/ao_high": 0.61}
    add_evaluation(client, "lorat", "1", scores, {"score_histogram": "[1]"})
    add_evaluation(client, "lorat", "1", {"eval/other/ao": 0.9}, {"score_histogram": "[2]"})
    version = client.get_model_version("lorat", "1")
    assert version.description == "AO 0.500 (val). T-112. LoRAT.\n\n### promoted"
    assert version.tags == {
        "score.eval/val/ao": "0.5000",
        "score.eval/val/ao_low": "0.4000",
        "score.eval/val/ao_high": "0.6100",
        "score_histogram": "[1]",
    }


def test_nothing_to_roll_back_is_one_sentence(sqlite: None) -> None:
    make_versions("lorat", 1)
    with pytest.raises(UserError, match="has no champion"):
        promotion.roll_back()


def test_lock_of_a_dead_process_is_broken(sqlite: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make_versions("lorat", 1)
    client = connect()
    client.create_registered_model("lorat.promotion-lock", tags={"owner": "gone"})
    with (
        pytest.raises(UserError, match="Another promotion holds"),
        promotion.locked(client, "lorat", timeout_s=0.5),
    ):
        pass
    monkeypatch.setattr(promotion, "LOCK_STALE_S", 0.0)
    time.sleep(0.01)
    assert promote("1", None)
    assert [model.name for model in client.search_registered_models()] == ["lorat"]


def test_a_lock_given_back_at_that_moment_is_taken_next(
    sqlite: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    make_versions("lorat", 1)
    client = connect()
    create, answers = client.create_registered_model, ["gone meanwhile"]

    def first_gone(*args: object, **values: object) -> object:
        if answers:
            raise MlflowException(answers.pop(), RESOURCE_DOES_NOT_EXIST)
        return create(*args, **values)

    monkeypatch.setattr(client, "create_registered_model", first_gone)
    with promotion.locked(client, "lorat", timeout_s=10):
        assert not answers


RACER = """
import os, sys, time
from lorat_platform.promotion import champion as promotion
from lorat_platform.recording.store import connect

name, version, barrier = sys.argv[1:]
client = connect()
open(f"{barrier}/{version}", "w").close()
while len(os.listdir(barrier)) < 4:
    time.sleep(0.005)
won = promotion.promote(name, version, expected_champion="1", tags={"by": version}, by="gate")
print("won" if won else "lost")
"""


def test_promotions_at_the_same_time_leave_exactly_one_champion(store: str, tmp_path: Path) -> None:
    name = f"race-{store}"
    make_versions(name, 5)
    client = connect()
    promotion.promote(name, "1", expected_champion=None, tags={}, by="gate")
    (tmp_path / "barrier").mkdir()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    racers = {
        version: subprocess.Popen(
            [sys.executable, "-c", RACER, name, version, tmp_path / "barrier"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for version in "2345"
    }
    seen = set()
    while any(racer.poll() is None for racer in racers.values()):
        seen.add(promotion.champion_of(client, name))
        time.sleep(0.02)
    outcomes = {}
    for version, racer in racers.items():
        output, errors = racer.communicate()
        assert racer.returncode == 0, errors
        outcomes[version] = output.strip()
    winners = [version for version, outcome in outcomes.items() if outcome == "won"]
    assert len(winners) == 1, outcomes
    assert promotion.champion_of(client, name) == winners[0]
    assert None not in seen, "at some moment there was no champion"
    assert seen <= {"1", winners[0]}
    assert client.get_model_version_by_alias(name, "previous").version in (1, "1")
    assert [e["version"] for e in promotion.history_of(client, name)] == ["1", winners[0]]
