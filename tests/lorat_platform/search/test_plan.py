"""What a search is asked to do is checked before it starts, and is the same when it goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.files import storage
from lorat_platform.search.driver import _write_request
from lorat_platform.search.plan import (
    REQUEST_FILE,
    SearchOptions,
    SearchPlan,
    check_unchanged,
    make_plan,
    read_plan,
)
from lorat_platform.search.trial.progress import TrialSetup

BASE = TrainConfig(variant="T-112", epochs=4, pairs_per_epoch=256, batch_size=16)
WINDOW = "tracking.window_penalty=uniform(0.2,0.7)"
FIXED = ("lora.rank=8", "head.depth=2", "lr=1e-3")


def plan(*space: str, **options: Any) -> SearchPlan:
    return make_plan(BASE, SearchOptions(space=space, **options))


def setup_of(made: SearchPlan) -> TrialSetup:
    return TrialSetup(
        space=made.space, objectives=("ao",), rungs=made.rungs, folder="", val_sequences=None,
        workers=1, worker_resources={}, crop_cache="", crop_cache_bytes=0,
    )  # fmt: skip


def test_trials_of_any_batch_size_are_compared_after_the_same_pairs() -> None:
    made = plan("batch_size=choice(4,16,32)", rungs=3)
    assert made.rungs.steps == (4, 16, 64)
    setup = setup_of(made)
    for size, steps in ((4, (16, 64, 256)), (16, (4, 16, 64)), (32, (2, 8, 32))):
        config = made.space.configure({"batch_size": size})
        assert setup.steps(config) == steps
        assert [step * size for step in steps] == [64, 256, 1024]
        assert [setup.counted(config, step) for step in steps] == [4, 16, 64]
    assert "a step is 16 pairs, also of a trial with another batch size" in made.text()
    shorter = plan("batch_size=choice(4,16)", rungs=2, max_steps=32)
    config = shorter.space.configure({"batch_size": 4})
    assert setup_of(shorter).steps(config) == (32, 128)


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        (("batch_size=choice(16,256)",), {}, "takes 4 steps, too few for 3 rungs"),
        (("batch_size=choice(1,16)",), {"workers_per_trial": 2}, "a batch of 1 for 2 workers"),
        ((WINDOW,), {"objective": "loss,latency"}, "says nothing about how trials track"),
        ((WINDOW, *FIXED), {}, "all trainings would be the same; give --trials 1"),
        (("lr=1e-3",), {"lr_with_batch": "linear"}, "the batch size is not searched"),
    ],
)
def test_what_could_not_be_compared_is_refused(
    space: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(*space, **options)


def test_a_search_of_tracking_fields_alone_is_one_training() -> None:
    made = plan(WINDOW, *FIXED, trials=1)
    assert made.space.prior() == {}
    assert len(made.settings()) == 8
    assert "track with 8 settings of tracking.window_penalty at every rung" in made.text()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "home"))
    file = tmp_path / "space.yaml"
    file.write_text("head.depth: [1, 2]\nlora.rank: 8\ndata: ['a=x,b=y', synthetic]\n")
    return file


def test_a_search_goes_on_with_the_space_that_its_file_held(file: Path) -> None:
    made = plan(WINDOW, space_file=str(file), name="kept", tracking_settings=4)
    storage.locate(made.storage).child("kept").make()
    _write_request(made)
    text = file.read_text()
    for change in (lambda: file.write_text("lr: [1, 2]"), file.unlink):
        change()
        again = read_plan("kept", trust_folder=True)
        assert again.space == made.space
        assert again.settings() == made.settings()
        check_unchanged(again, again.space.base, again.options)

    file.write_text("# moved about\n" + text)
    given = dataclasses.replace(again.options, space_file=str(file))
    check_unchanged(again, again.space.base, given)
    file.write_text(text.replace("2", "3"))
    with pytest.raises(UserError, match="--space-file cannot be changed when a search is gone on"):
        check_unchanged(again, again.space.base, given)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            [{"path": "lr", "kind": "uniform", "values": []}],
            "The values of lr are \\[\\], which is no",
        ),
        ([{"path": "lr", "kind": "logint", "values": [-1, 4]}], "which is no logint"),
        ([{"path": "lr", "kind": "normal", "values": [1]}], 'kind is "normal"; give'),
        ([{"path": "lr"}], "has no kind"),
        ([7], "is 7; give an object"),
        ([{"path": "lorra", "kind": "choice", "values": [1, 2]}], "no configuration field lorra"),
        ("lr", 'space is "lr", not a list or null'),
    ],
)
def test_a_damaged_space_in_a_search_folder_is_one_sentence(
    file: Path, held: Any, message: str
) -> None:
    made = plan(WINDOW, space_file=str(file), name="kept")
    folder = storage.locate(made.storage).child("kept")
    folder.make()
    folder.write_bytes(REQUEST_FILE, json.dumps(made.request() | {"space": held}).encode())
    with pytest.raises(UserError, match=message):
        read_plan("kept", trust_folder=True)
