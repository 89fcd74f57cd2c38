"""One trial in this process, with Ray Tune's side of it played by the test."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorat.config.training import TrainConfig
from lorat.files.storage import locate
from lorat.learning.tail_average import TailAverage
from lorat.metrics.scores import Evaluation
from lorat_platform.failures import TrialFailed
from lorat_platform.runs.checkpoints import BETWEEN_RUNGS
from lorat_platform.search.rungs import Rungs
from lorat_platform.search.space import build_space
from lorat_platform.search.trial import group, measure, single
from lorat_platform.search.trial.progress import TrialSetup
from tests.small_shards import make_shards

VALUES = {"lora.rank": 4, "lr": 2e-3, "head.depth": 1}


class Stopped(Exception):
    """The trial's process is gone."""


class Tune:
    """What a trial sees of Ray Tune."""

    def __init__(self, folder: Path) -> None:
        self.reports: list[dict[str, Any]] = []
        self.die_at: str | None = None
        self._folder = folder
        self._checkpoint: Path | None = None

    def get_context(self) -> Any:
        return SimpleNamespace(get_trial_id=lambda: "t1")

    def get_checkpoint(self) -> Any:
        if self._checkpoint is None:
            return None
        return trial_checkpoint(self._checkpoint)

    class Checkpoint:
        @staticmethod
        def from_directory(path: str) -> Path:
            return Path(path)

    def report(self, metrics: dict[str, Any], checkpoint: Path) -> None:
        self._checkpoint = self._folder / f"checkpoint-{len(self.reports)}"
        shutil.copytree(checkpoint, self._checkpoint)
        self.reports.append(json.loads(json.dumps(metrics)))


def trial_checkpoint(folder: Path) -> Any:
    from ray.tune import Checkpoint

    return Checkpoint.from_directory(str(folder))


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> TrialSetup:
    folder = tmp_path_factory.mktemp("trial")
    base = TrainConfig(
        variant="N-112", backbone="none", data=make_shards(folder / "train", split="train"),
        val_data=make_shards(folder / "val", split="val"), epochs=2, pairs_per_epoch=48,
        batch_size=8, warmup_epochs=0.0,
    )  # fmt: skip
    return TrialSetup(
        space=build_space(base),
        objectives=("ao",),
        rungs=Rungs(max_steps=12, reduction=3, num_rungs=2),
        folder=str(folder),
        val_sequences=1,
        workers=1,
        worker_resources={"CPU": 1.0},
        crop_cache="crops",
        crop_cache_bytes=10**8,
        save_every_s=0.0,
        sum_every=1,
    )


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: TrialSetup) -> Tune:
    fake = Tune(tmp_path)
    monkeypatch.setattr(single, "tune", fake)
    monkeypatch.setenv("LORAT_CROP_CACHE", str(tmp_path / "crops"))
    shutil.rmtree(Path(setup.folder) / BETWEEN_RUNGS, ignore_errors=True)
    return fake


def scores(reports: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    names = ("step", "budget", "ao", "sr50", "loss", "parameters")
    return [tuple(report[name] for name in names) for report in reports]


def test_a_trial_reports_every_rung(tune: Tune, setup: TrialSetup) -> None:
    single.run_trial(VALUES, setup)
    assert [(r["step"], r["budget"]) for r in tune.reports] == [(4, 1), (12, 3)]
    last = tune.reports[-1]
    assert [h["budget"] for h in last["history"]] == [1, 3]
    assert last["history"][1]["ao"] == last["ao"]
    assert 0 <= last["ao"] <= 1
    assert last["loss"] > 0
    assert last["latency"] > 0
    assert last["total_seconds"] >= last["train_seconds"] + last["evaluation_seconds"]


def test_a_rung_is_judged_by_the_mean_of_its_last_weights_and_the_last_by_its_own(
    tune: Tune, setup: TrialSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: dict[int, torch.Tensor] = {}
    judged: list[torch.Tensor] = []
    add = TailAverage.add

    def noting_add(average: TailAverage, step: int) -> None:
        weights[step] = average._parameters[-1].detach().clone()
        add(average, step)

    def validate(model: Any, *_: Any) -> dict[str, Any]:
        judged.append(model.trainable_parameters()[-1].detach().clone())
        return {"ao": 0.5, "sequences": []}

    monkeypatch.setattr(TailAverage, "add", noting_add)
    monkeypatch.setattr("lorat_platform.search.trial.measure.validate", validate)
    single.run_trial(VALUES, setup)
    torch.testing.assert_close(judged[0], (weights[3] + weights[4]) / 2)
    assert not torch.equal(weights[3], weights[4])
    assert torch.equal(judged[1], weights[12])


def test_a_trial_that_dies_anywhere_ends_like_an_uninterrupted_one(
    tune: Tune, setup: TrialSetup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setup = dataclasses.replace(setup, sum_every=3)
    single.run_trial(VALUES, setup)
    expected = scores(tune.reports)

    interrupted = Tune(tmp_path / "again")
    monkeypatch.setattr(single, "tune", interrupted)
    shutil.rmtree(Path(setup.folder) / BETWEEN_RUNGS)
    whole_run = single.run
    for deadly_step in (2, 3, 7):  # 3 is among the steps whose mean the first rung is judged by

        def dying_run(*args: Any, deadly_step: int = deadly_step, **kwargs: Any) -> Any:
            if kwargs["learner"].step < deadly_step < kwargs["end_step"]:
                kwargs["end_step"] = deadly_step
                whole_run(*args, **kwargs)
                raise Stopped
            return whole_run(*args, **kwargs)

        monkeypatch.setattr(single, "run", dying_run)
        with pytest.raises(TrialFailed, match="Stopped"):
            single.run_trial(VALUES, setup)
    steps: list[int] = []

    def noting_run(*args: Any, **kwargs: Any) -> Any:
        steps.append(kwargs["learner"].step)
        return whole_run(*args, **kwargs)

    monkeypatch.setattr(single, "run", noting_run)
    single.run_trial(VALUES, setup)
    assert steps == [7], "it goes on from what was saved between two rungs"
    got = scores(interrupted.reports)
    assert len(got) == 2
    assert got[0][:4] == expected[0][:4]
    assert got[1][:4] == expected[1][:4], "same score after two deaths"
    assert [g[4] for g in got] == pytest.approx([e[4] for e in expected], rel=1e-6), (
        "the loss is the mean over the whole rung"
    )


def test_weights_are_tracked_with_every_setting_after_one_training(
    tune: Tune, setup: TrialSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a batch of twice the base's, which is compared after the same pairs."""
    window = "tracking.window_penalty"
    settings = tuple({window: weight} for weight in (0.45, 0.0, 1.0))
    setup = dataclasses.replace(setup, settings=settings)
    tracked: list[float] = []
    trained: list[int] = []
    whole_run = single.run

    whole = measure.tracking_evaluations

    def evaluated(tracker: Any, *args: Any, **kwargs: Any) -> list[Evaluation]:
        tracked.append(tracker.tracking.window_penalty)
        (found,) = whole(tracker, *args, **kwargs)
        scores = found.scores | {"AO": 0.9 if tracked[-1] == 0.0 else 0.5}
        sequences = {
            name: dataclasses.replace(s, scores=s.scores | {"AO": scores["AO"]})
            for name, s in found.sequences.items()
        }
        return [dataclasses.replace(found, scores=scores, sequences=sequences)]

    def noting_run(*args: Any, **kwargs: Any) -> Any:
        learner = whole_run(*args, **kwargs)
        trained.append(learner.step)
        return learner

    monkeypatch.setattr(measure, "tracking_evaluations", evaluated)
    monkeypatch.setattr(single, "run", noting_run)
    single.run_trial(VALUES | {"batch_size": 16}, setup)
    assert trained == [2, 6], "one training to each rung"
    assert tracked == [0.45, 0.0, 1.0] * 2
    assert [(r["step"], r["budget"], r["optimiser_steps"], r["pairs"]) for r in tune.reports] == [
        (4, 1, 2, 32), (12, 3, 6, 96),
    ]  # fmt: skip
    for report in tune.reports:
        assert (report["ao"], report["tracking"]) == (0.9, {window: 0.0})
        assert [each["tracking"][window] for each in report["settings"]] == [0.45, 0.0, 1.0]
        assert report["history"][-1]["ao"] == 0.9
    for rung in range(2):
        (kept,) = json.loads((Path(setup.folder) / f"sequences/t1/rung-{rung}.json").read_text())
        assert kept and {each["ao"] for each in kept.values()} == {0.9}, "those of the best setting"
    best = setup.space.configure(VALUES | tune.reports[-1]["tracking"])
    assert best.tracking.window_penalty == 0.0


def test_only_the_last_states_between_rungs_are_kept(tune: Tune, setup: TrialSetup) -> None:
    single.run_trial(VALUES, setup)
    kept = sorted(p.name for p in (Path(setup.folder) / BETWEEN_RUNGS / "t1").iterdir())
    assert kept == ["step-00000010", "step-00000011"]


@pytest.fixture
def lone_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let this process be the only worker of a group."""
    import ray.train
    import torch.distributed

    place = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: place)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setenv("LORAT_CROP_CACHE", str(tmp_path / "crops"))


def rung_work(setup: TrialSetup, folder: Path, rung: int = 0) -> group.RungWork:
    """Return the work of a new trial's group."""
    location = locate(str(folder))
    location.make()
    return group.RungWork(
        config=setup.space.configure(VALUES), setup=setup, rung=rung, folder=location,
        progress=single.read_progress(None),
    )  # fmt: skip


@pytest.mark.usefixtures("lone_worker")
def test_a_group_that_dies_at_the_end_of_a_rung_goes_on(
    setup: TrialSetup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = rung_work(setup, tmp_path / "whole")
    group._worker(whole)
    expected = json.loads(whole.folder.read_bytes(whole.result_file))["measured"]

    def dies(*_: Any) -> dict[str, float]:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(group, "measure", dies)
        with pytest.raises(Stopped):
            group._worker(rung_work(setup, tmp_path / "killed"))
    again = rung_work(setup, tmp_path / "killed")
    assert not again.folder.exists(again.result_file)
    group._worker(again)
    got = json.loads(again.folder.read_bytes(again.result_file))["measured"]
    assert got["loss"] == expected["loss"]
    assert got["ao"] == expected["ao"]


@pytest.mark.usefixtures("lone_worker")
def test_a_group_that_dies_within_a_rung_reports_the_loss_of_the_whole_rung(
    setup: TrialSetup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(group, "measure", lambda *a: {"loss": a[3].loss})
    losses: dict[str, list[float]] = {}
    whole_run = group.run

    def dying_run(*args: Any, **kwargs: Any) -> Any:
        kwargs["end_step"] = 7
        whole_run(*args, **kwargs)
        raise Stopped

    for name in ("whole", "killed"):
        for rung in range(2):
            work = rung_work(setup, tmp_path / name, rung)
            if rung == 1 and name == "killed":
                with monkeypatch.context() as patch:
                    patch.setattr(group, "run", dying_run)
                    with pytest.raises(Stopped):
                        group._worker(work)
                work = dataclasses.replace(work, progress=single.read_progress(None))
            group._worker(work)
            measured = json.loads(work.folder.read_bytes(work.result_file))["measured"]
            losses.setdefault(name, []).append(measured["loss"])
    assert losses["killed"] == pytest.approx(losses["whole"], rel=1e-6)
