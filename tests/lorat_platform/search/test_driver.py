"""Whole searches on a real local Ray and a real MLflow store, tiny models and videos."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import ray
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from lorat.config.fields import from_dict, to_dict
from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.files import storage
from lorat_platform import cluster
from lorat_platform.recording.recorder import flatten
from lorat_platform.recording.store import connect
from lorat_platform.runs.claim import announcements
from lorat_platform.search import driver, session
from lorat_platform.search import plan as search_plan
from lorat_platform.search.driver import run_search
from lorat_platform.search.plan import REQUEST_FILE, SearchOptions, make_plan
from lorat_platform.search.results.outcome import SearchOutcome, search_description
from lorat_platform.search.slots import check_reach, count_slots
from tests.other_driver import FOREIGN, announce
from tests.small_shards import make_shards

pytestmark = pytest.mark.processes(minutes=2.5)

Data = tuple[str, str]
REVISION = "0123456789" * 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Data]:
    """Shards of four training and four validation videos, and a Ray with two CPUs."""
    folder = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAT_HOME", str(folder / "home"))
        patch.setenv("LORAT_CROP_CACHE", str(folder / "crops"))
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        train = make_shards(folder / "train", split="train")
        val = make_shards(folder / "val", split="val")
        crops = {"LORAT_CROP_CACHE": str(folder / "crops")}
        with cluster.connected("local", num_cpus=2, env=crops):
            yield train, val


def config(data: Data, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "variant": "N-112", "backbone": "none", "data": data[0], "val_data": data[1],
        "epochs": 2, "pairs_per_epoch": 32, "batch_size": 8, "warmup_epochs": 0.0,
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def options(**changes: Any) -> SearchOptions:
    values: dict[str, Any] = {
        "trials": 4, "rungs": 2, "reduction": 4, "val_sequences": 1, "searcher": "random",
        "crop_cache_gb": 0.1,
    }  # fmt: skip
    return SearchOptions(**(values | changes))


@pytest.fixture(scope="module")
def outcome(data: Data) -> SearchOutcome:
    """A search in which a learning rate of 10 makes some trials diverge."""
    space = (
        "lr=choice(0.001,10)", "head.depth=choice(1,2)", "lora.rank=choice(4,8)",
        "tracking.window_penalty=choice(0.1,0.45)",
    )  # fmt: skip
    plan = make_plan(
        config(data, weight_decay=10.0),
        options(trials=8, space=space, scheduler="none", rungs=None, name="whole"),
    )
    return run_search(plan, git_revision=REVISION)


def test_a_search_ends_with_the_best_configuration(outcome: SearchOutcome) -> None:
    assert not outcome.interrupted
    assert len(outcome.board.rows) == 8
    best, file = outcome.best, outcome.best_config_file
    assert best is not None
    assert file is not None
    assert best.last("ao") == max(r.last("ao") or 0 for r in outcome.board.rows.values())
    saved = from_dict(TrainConfig, json.loads(file.read_text()))
    assert saved == outcome.plan.space.configure(best.found)
    tried = {e["tracking"]["tracking.window_penalty"]: e["scores"] for e in best.last("settings")}
    assert set(tried) == {0.1, 0.45}
    assert best.last("ao") == max(scores["ao"] for scores in tried.values())
    assert tried[saved.tracking.window_penalty]["ao"] == best.last("ao")
    assert saved.total_steps == 8


def test_the_first_trial_has_the_base_values(outcome: SearchOutcome) -> None:
    first = min(outcome.board.rows.values(), key=lambda row: row.number)
    assert first.values == {"lr": 0.001, "head.depth": 2, "lora.rank": 8}


def test_diverged_trials_are_failed_with_their_reason_and_the_search_goes_on(
    outcome: SearchOutcome,
) -> None:
    for row in outcome.board.rows.values():
        if row.values["lr"] == 10:
            assert row.status == "failed"
            assert row.reason is not None
            assert "not finite" in row.reason
        else:
            assert row.status == "completed"
            assert row.steps == 8
    assert 0 < outcome.board.count("failed") < 8


def test_equal_configurations_give_equal_results(outcome: SearchOutcome) -> None:
    results: dict[str, set[tuple[float | None, ...]]] = {}
    fine = [row for row in outcome.board.rows.values() if row.status == "completed"]
    for row in fine:
        scores = (row.last("ao"), row.last("loss"))
        results.setdefault(json.dumps(row.values), set()).add(scores)
    assert len(results) < len(fine), "the seed gives no pair of equal trials; take another"
    assert all(len(scores) == 1 for scores in results.values())


def test_pairs_are_decoded_once_for_all_trials(outcome: SearchOutcome) -> None:
    rows = [row for row in outcome.board.rows.values() if row.reports]
    decoded = sum(row.last("crops_decoded") or 0 for row in rows)
    assert decoded <= 64, "the run has 64 pairs, and failed trials decoded some of them"
    assert sum(row.last("crop_cache_hit_rate") == 1 for row in rows) >= len(rows) - 2
    assert not list(Path(os.environ["LORAT_CROP_CACHE"]).glob("crops-*")), "removed at the end"


def test_mlflow_has_the_search_and_its_trials_nested(outcome: SearchOutcome) -> None:
    client = connect()
    experiment = client.get_experiment_by_name("lorat-search")
    parent = client.get_run(outcome.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["git_revision"] == REVISION
    assert parent.data.tags["lorat.trials_failed"] == str(outcome.board.count("failed"))
    assert set(parent.data.metrics) == {"best_ao"}, "what is one number is no chart"
    assert "Best is trial" in parent.data.tags["mlflow.note.content"]
    children = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{outcome.run_id}'"
    )
    assert len(children) == 8
    by_trial = {run.data.tags["lorat.trial_id"]: run for run in children}
    for row in outcome.board.rows.values():
        run = by_trial[row.trial_id]
        assert run.data.tags["lorat.trial_status"] == row.status
        names = flatten(to_dict(outcome.plan.space.configure(row.values))).keys()
        untold = {"tracking.window_penalty"} if row.status == "failed" else set()
        assert run.data.params.keys() == names - untold, "those of a training"
        assert run.data.params["lora.rank"] == str(row.values["lora.rank"])
        number, *values = run.info.run_name.split()
        assert number == f"t{row.number:02d}"
        assert f"r{row.values['lora.rank']}" in values and f"d{row.values['head.depth']}" in values
        assert run.data.tags["mlflow.source.git.commit"] == REVISION
        assert [i.dataset.name for i in run.inputs.dataset_inputs] == ["train", "val"]
        if row.status == "failed":
            assert run.info.status == "FAILED"
            assert "not finite" in run.data.tags["lorat.failure"]
        else:
            assert run.info.status == "FINISHED"
            history = client.get_metric_history(run.info.run_id, "val/ao")
            assert [(m.step, m.value) for m in history] == [(8, row.last("ao"))]
            assert run.data.metrics["train/loss"] == row.last("loss")
            penalty = row.tracking["tracking.window_penalty"]
            assert run.data.params["tracking.window_penalty"] == str(penalty)


def test_table_and_plots_are_on_the_parent_run(outcome: SearchOutcome, tmp_path: Path) -> None:
    client = connect()
    names = {entry.path for entry in client.list_artifacts(outcome.run_id)}
    assert names == {
        "best_config.json", "console.log", "plots",
        *(f"{table}.{kind}" for table in ("trials", "settings") for kind in ("csv", "parquet")),
    }  # fmt: skip
    log = Path(client.download_artifacts(outcome.run_id, "console.log", str(tmp_path))).read_text()
    assert log.count(": completed after 8 steps\n") == outcome.board.count("completed")
    experiment = client.get_experiment_by_name("lorat-search")
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{outcome.plan.identity}"])
    assert {"params.`lora.rank`", "params.`lr`", "metrics.`val/ao`"} <= set(view["selectedColumns"])
    plots = {Path(entry.path).stem for entry in client.list_artifacts(outcome.run_id, "plots")}
    assert {"history", "parallel_coordinates", "rank_lr_map", "pareto_front"} <= plots
    assert "tracking_settings" in plots
    client.download_artifacts(outcome.run_id, "trials.csv", str(tmp_path))
    client.download_artifacts(outcome.run_id, "trials.parquet", str(tmp_path))
    best = outcome.best
    assert best is not None
    for table in (
        pyarrow.csv.read_csv(tmp_path / "trials.csv"),
        pq.read_table(tmp_path / "trials.parquet"),
    ):
        assert table.num_rows == 8
        assert table["trial_id"][0].as_py() == best.trial_id


def test_a_name_that_exists_is_an_error(outcome: SearchOutcome) -> None:
    with pytest.raises(UserError, match="go on with --resume whole"):
        run_search(outcome.plan)


class StopTheFirst(ASHAScheduler):
    """ASHA, but the first trial ends at its first rung."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        super().on_trial_result(tune_controller, trial, result)
        first = tune_controller.get_trials()[0]
        return TrialScheduler.STOP if trial is first else TrialScheduler.CONTINUE


@pytest.mark.exhaustive
def test_a_stopped_trial_frees_the_only_slot_at_once(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: Any, **__: Any) -> TrialScheduler:
        return StopTheFirst(time_attr="budget", max_t=4, grace_period=1, metric="ao", mode="max")

    monkeypatch.setattr(search_plan, "build_scheduler", build)
    plan = make_plan(config(data), options(trials=2, cpus_per_trial=2, name="one-slot"))
    assert count_slots(plan.options) == 1
    outcome = run_search(plan)
    first, second = sorted(outcome.board.rows.values(), key=lambda row: row.number)
    assert (first.status, first.steps) == ("stopped", 2)
    assert (second.status, second.steps) == ("completed", 8)
    assert first.ended_at is not None
    assert second.started_at is not None
    assert second.started_at - first.ended_at < 2.0


def _kill_trials(killed: list[int], number: int) -> None:
    """Kill -9 the first processes of trials that have begun to train, one after another."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(killed) < number:
        listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
        ours = os.environ["LORAT_HOME"].encode()
        for line in listed.splitlines():
            if "ray::ImplicitFunc.train" not in line:
                continue
            pid = int(line.split()[0])
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                continue
            if ours in environment and pid not in killed and len(killed) < number:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        time.sleep(0.05)


def test_a_trial_whose_process_dies_is_tried_again_and_a_resumed_search_tries_it_once_more(
    data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "RETRIES", 1)
    killed: list[int] = []
    killer = threading.Thread(target=_kill_trials, args=(killed, 2))
    asked = options(
        trials=2, objective="ao,parameters", searcher="tpe", concurrent=1, name="killed"
    )
    killer.start()
    outcome = run_search(make_plan(config(data), asked))
    killer.join()
    assert len(killed) == 2, "no two trials began to train within 120 s"
    failed, other = sorted(outcome.board.rows.values(), key=lambda row: row.number)
    assert (failed.status, failed.starts, failed.retries) == ("failed", 2, 1)
    assert failed.reason is not None
    assert "process died" in failed.reason
    assert failed.can_be_tried_again
    assert other.status == "completed"
    assert other.starts == 1
    said = capsys.readouterr().out
    assert "trial 0: tried again (try 1 of 1), for a failure that is not its own" in said
    assert "(tried 2 times)" in said
    account = search_description(outcome.plan, outcome.board)
    assert "trial 0 (the trial's process died" in account
    assert "`--resume killed` tries them again" in account

    outcome = driver.resume_search("killed", trials=3)
    rows = sorted(outcome.board.rows.values(), key=lambda row: row.number)
    assert [row.number for row in rows] == [0, 1, 2]
    assert rows[0].trial_id == failed.trial_id
    assert rows[0].status in ("completed", "stopped")
    assert len(rows[0].troubles) == 2, (failed, other, rows, said)
    assert rows[1] == other
    assert outcome.board.count("completed", "stopped") == 3
    assert outcome.board.pareto()
    again = connect().get_run(_run_of(outcome, rows[0].trial_id))
    ended = {"completed": "FINISHED", "stopped": "KILLED"}
    assert again.info.status == ended[rows[0].status]
    with pytest.raises(UserError, match="--trials is 2 but the search killed has begun 3"):
        driver.resume_search("killed", trials=2)


def _run_of(outcome: SearchOutcome, trial_id: str) -> str:
    """Return MLflow's one run of a trial."""
    client = connect()
    experiment = client.get_experiment_by_name("lorat-search")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`lorat.trial_id` = '{trial_id}'")
    return str(run.info.run_id)


@pytest.mark.exhaustive
def test_hyperband_stops_trials_and_finishes(data: Data) -> None:
    plan = make_plan(
        config(data), options(trials=6, searcher="tpe", scheduler="hyperband", name="hyperband")
    )
    outcome = run_search(plan)
    assert not outcome.interrupted
    assert outcome.board.count("completed") >= 1
    assert outcome.board.count("stopped") >= 2


@pytest.mark.exhaustive
def test_a_trial_of_two_workers_learns_what_one_worker_learns(data: Data) -> None:
    space = ("lora.rank=8", "head.depth=2", "lr=choice(0.001,0.002)")
    alone = options(trials=1, scheduler="none", rungs=None, space=space, name="alone")
    both = options(
        trials=1, scheduler="none", rungs=None, space=space, workers_per_trial=2,
        cpus_per_trial=0.5, name="both",
    )  # fmt: skip
    losses = []
    for request in (alone, both):
        outcome = run_search(make_plan(config(data), request))
        assert outcome.best is not None, [r.reason for r in outcome.board.rows.values()]
        assert outcome.best.status == "completed"
        losses.append((outcome.best.last("loss"), outcome.best.last("ao")))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    assert losses[1][1] == pytest.approx(losses[0][1], abs=1e-3)
    assert ray.available_resources()["CPU"] == 2


def test_what_no_node_can_hold_is_an_error_before_anything_starts(data: Data) -> None:
    plan = make_plan(config(data), options(cpus_per_trial=64, name="too-big"))
    with pytest.raises(UserError, match=r"needs 1 × 64 CPU but the nodes have 2 CPU;"):
        run_search(plan)
    plan = make_plan(config(data), options(gpus_per_trial=0.5, name="no-gpu"))
    with pytest.raises(UserError, match=r"0\.5 GPU"):
        run_search(plan)
    plan = make_plan(config(data), options(cpus_per_trial=0, name="nothing"))
    with pytest.raises(UserError, match="neither CPUs nor GPUs"):
        run_search(plan)
    assert not plan.folder.exists(), "the name is not used up"


def test_storage_that_a_node_cannot_see_is_refused(data: Data, tmp_path: Path) -> None:
    check_reach(storage.locate(str(tmp_path)), options())
    folder = os.open(tmp_path, os.O_RDONLY)  # the trials have other open files
    plan = make_plan(config(data), options(storage=f"/proc/self/fd/{folder}", name="unseen"))
    try:
        with pytest.raises(UserError, match=r"cannot see; give --storage with an s3"):
            run_search(plan)
    finally:
        os.close(folder)
    assert list((tmp_path / "unseen").iterdir()) == []


def test_slots_follow_the_resources(data: Data) -> None:
    assert count_slots(options(trials=9)) == 2
    assert count_slots(options(trials=9, cpus_per_trial=0.5)) == 4
    assert count_slots(options(trials=9, cpus_per_trial=0.5, concurrent=3)) == 3
    assert count_slots(options(trials=9, cpus_per_trial=0.5, workers_per_trial=2)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "accuracy"}, "--objective is accuracy"),
        ({"objective": "ao,ao"}, "each once"),
        ({"trials": 0}, "--trials is 0"),
        ({"name": "a/b"}, "letters, digits"),
        ({"name": "lr sweep"}, "letters, digits"),
        ({"scheduler": "hyperband", "concurrent": 1}, "--concurrent does not work"),
        ({"scheduler": "hyperband", "workers_per_trial": 2}, "--workers-per-trial is 2"),
        ({"scheduler": "median", "objective": "ao,latency"}, "compares one objective"),
        ({"rungs": 9}, "cannot hold 9 rungs"),
        ({"space": ("lora.rank=uniform(1,2)",)}, "use int"),
    ],
)
def test_a_request_that_cannot_be_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(TrainConfig(variant="N-112"), SearchOptions(**changes))


def test_validation_needs_full_frames(data: Data) -> None:
    plan = make_plan(config(data, val_data=data[0]), options(name="windows"))
    with pytest.raises(UserError, match="--full-frame"):
        run_search(plan)
    with pytest.raises(UserError, match="--val-data"):
        make_plan(config(data, val_data=None), options(name="no-val"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("sampling.translation_jitter=uniform(1,6)", r"translation_jitter.*with 6.*this sampling"),
        ("variant=choice(N-112,B-378)", r"with B-378: .*too small for B-378"),
        ("data=choice({train},/nowhere)", r"with /nowhere"),
        ("val_data=choice(none,{val})", "leaves out the validation sequences"),
        ("val_data=choice({val},{train})", "--full-frame"),
    ],
)
def test_searched_values_that_the_data_does_not_serve_are_errors(
    data: Data, entry: str, message: str
) -> None:
    entry = entry.format(train=data[0], val=data[1])
    plan = make_plan(config(data), options(space=(entry,), name="unserved"))
    with pytest.raises(UserError, match=message):
        run_search(plan)
    assert not plan.folder.exists(), "nothing was started"


def test_a_second_driver_of_a_search_is_refused(data: Data) -> None:
    plan = make_plan(config(data), options(name="driven"))
    location = storage.locate(plan.storage).child(plan.name)
    location.make()
    location.write_bytes(REQUEST_FILE, json.dumps(plan.request()).encode())
    token = announce(location, FOREIGN, age_s=5)
    for start in (lambda: driver.resume_search("driven"), lambda: run_search(plan)):
        with pytest.raises(UserError, match="search driven is driven by process 7 on elsewhere"):
            start()
    location.delete(f"driver-{token}.json")
    with pytest.raises(UserError, match="There is a search driven"):
        run_search(plan)
    with pytest.raises(UserError, match="had not begun"):
        driver.resume_search("driven")


def test_the_mark_of_the_driver_is_taken_away(outcome: SearchOutcome) -> None:
    location = storage.locate(outcome.plan.storage).child("whole")
    assert not announcements(location)


@pytest.mark.parametrize("where", ["trial", "scheduler"])
def test_a_snapshot_that_is_damaged_is_left_as_it_is(
    data: Data, tmp_path: Path, outcome: SearchOutcome, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(Path(outcome.plan.storage) / "whole", folder)
    (snapshot,) = folder.glob("experiment_state-*.json")
    if where == "scheduler":

        def raise_late(*_: Any) -> None:
            raise AssertionError

        monkeypatch.setattr(FIFOScheduler, "on_trial_add", raise_late)
    else:
        content = json.loads(snapshot.read_text())
        content["trial_data"][0][0] = "damaged"
        snapshot.write_text(json.dumps(content))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"cannot be taken up .* and is left as it is"):
        driver.resume_search("whole", str(tmp_path))
    kept = {path: path.read_bytes() for path in before}
    assert kept == before
    assert len(list(folder.glob("trial-*"))) == 8, "no trial was begun"


def test_a_search_that_does_not_exist_cannot_be_resumed(data: Data) -> None:
    with pytest.raises(UserError, match="no search nothing"):
        driver.resume_search("nothing")
