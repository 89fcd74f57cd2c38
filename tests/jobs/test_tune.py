"""`jobs/tune.py` from the command line: stopped, killed, resumed, and refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.entities import Run

from lorat import checkpoint
from lorat.checkpoint.folder import load_merged
from lorat.config.fields import from_dict
from lorat.config.summary import summary
from lorat.config.training import TrainConfig
from lorat_platform.recording.store import connect
from tests.jobs.in_process import run_in_process
from tests.mlflow_home import make_home
from tests.small_shards import make_shards
from tests.waiting import wait_until

pytestmark = pytest.mark.processes(minutes=2)

ROOT = Path(__file__).resolve().parents[2]
SPACE = """
lora.rank: [4, 8, 16]
lr: loguniform(1e-4, 1e-2)
head:
  depth: [1, 2]
batch_size: [8, 16]
tracking.window_penalty: [0.125, 0.75]  # neither is the usual one
"""


class Job:
    """A running ``jobs/tune.py`` with its output in a file."""

    def __init__(self, home: Path, *arguments: object) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {"LORAT_HOME": str(home)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        make_home(home)
        self.home = home
        self._log = home.parent / f"log-{time.time_ns()}"
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / "tune.py"), *map(str, arguments)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        """End it where a test gave up on it."""
        self.process.kill()
        self.process.wait()

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str) -> None:
        wait_until(
            f"line {pattern!r}",
            lambda: re.search(pattern, self.output),
            process=self.process,
            output=lambda: self.output,
        )

    def end(self, timeout_s: float = 300) -> int:
        return self.process.wait(timeout_s)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    train = make_shards(folder / "train", split="train")
    val = make_shards(folder / "val", split="val")
    return [
        "--variant", "N-112", "--backbone", "none", "--data", train, "--val-data", val,
        "--epochs", "2", "--pairs-per-epoch", "128", "--batch-size", "8", "--warmup-epochs", "0",
        "--rungs", "2", "--val-sequences", "1", "--crop-cache-gb", "0.1",
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A search whose driver was stopped, which was resumed, and whose winner was trained."""

    home: Path
    before: dict[str, dict[str, object]]
    """Its table of trials when it was stopped, where that had been written."""
    output: str
    """What the last job printed."""


def interrupt(job: Job) -> None:
    """Stop a search as Ctrl-C does."""
    job.process.send_signal(signal.SIGINT)
    assert job.end() == 130, job.output
    assert "--resume stopped" in job.output
    assert "Traceback" not in job.output


def kill(job: Job) -> None:
    """Kill the driver of a search, once a snapshot has what was printed."""
    snapshot = job.home / "runs" / "stopped"
    printed = time.time()
    wait_until(
        "snapshot of the search",
        lambda: any(f.stat().st_mtime > printed for f in snapshot.glob("experiment_state-*")),
        process=job.process,
        output=lambda: job.output,
    )
    job.process.kill()
    job.end()


@pytest.fixture(
    scope="module", params=[interrupt, pytest.param(kill, marks=pytest.mark.exhaustive)]
)
def resumed(
    request: pytest.FixtureRequest,
    arguments: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Resumed:
    home = tmp_path_factory.mktemp("resumed") / "home"
    space = home.parent / "space.yaml"
    space.write_text(SPACE)
    with Job(
        home, *arguments, "--trials", 5, "--name", "stopped", "--concurrent", 1,
        "--space-file", space, "--lr-with-batch", "sqrt",
    ) as job:  # fmt: skip
        job.wait_for(r"trial 1: .* after \d+ steps")
        request.param(job)
    before = _rows(home) if request.param is interrupt else {}
    trial = next((home / "runs" / "stopped").glob("trial-*/checkpoint_*")).parent
    half = trial / "checkpoint_000099"  # as a kill leaves what Ray Tune was deleting
    half.mkdir()
    (half / "optimizer.safetensors").write_bytes(b"o")
    space.unlink()  # what it held is kept with the search
    unchanged = ("--epochs", "2", "--name", "stopped", "--trials", "6")
    with Job(home, "--resume", "stopped", *unchanged, "--final") as job:
        assert job.end() == 0, job.output
    return Resumed(home=home, before=before, output=job.output)


def search_runs(home: Path) -> tuple[Run, dict[str, Run], list[Run]]:
    """Return the MLflow run of the search, those of its trials by id, and all others."""
    client = connect(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("lorat-search")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    trials = {r.data.tags["lorat.trial_id"]: r for r in runs if "lorat.trial_id" in r.data.tags}
    return parent, trials, [r for r in runs if r is not parent and r not in trials.values()]


def test_a_stopped_search_goes_on(resumed: Resumed) -> None:
    before, rows = resumed.before, _rows(resumed.home)
    assert len(before) < 5
    ended = {k: v for k, v in before.items() if v["status"] in ("completed", "stopped")}
    assert len(ended) >= 2 or not before, "a killed driver had no time for its table"
    assert len(rows) == 6, "it went on to more trials than it was begun with"
    assert all(row["status"] in ("completed", "stopped") for row in rows.values())
    for trial_id, row in ended.items():
        assert rows[trial_id] == row, "a finished trial stays as it was"
    numbers = sorted(row["trial"] for row in rows.values())
    assert numbers == list(range(6))
    folder = resumed.home / "runs" / "stopped"
    assert not list(folder.glob("trial-*/checkpoint_000099"))
    assert len({path.parent for path in folder.glob("trial-*/checkpoint_*")}) == 6
    assert not list(folder.glob("driver-*"))

    best = resumed.home / "runs" / "stopped" / "results" / "best_config.json"
    config = from_dict(TrainConfig, json.loads(best.read_text()))
    assert config.batch_size in (8, 16)
    assert config.total_steps * config.batch_size == 256
    assert {(row["steps"], row["pairs"]) for row in rows.values()} <= {(8, 64.0), (32, 256.0)}
    parent, trials, _ = search_runs(resumed.home)
    assert parent.info.status == "FINISHED"
    assert trials.keys() >= rows.keys()
    for trial_id, row in rows.items():
        stopped = row["status"] == "stopped"
        assert trials[trial_id].info.status == ("KILLED" if stopped else "FINISHED")
    assert all(r.info.status in ("FINISHED", "KILLED") for r in trials.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--epochs", "3", "--lora.dropout", "0.1", "--rungs", "2"],
            "--lora.dropout and --epochs cannot be changed when a search is gone on with; leave "
            "out what is not as it was (--lora.dropout 0.0, --epochs 2), or",
        ),
        (["--space", "head.depth=1"], "--space cannot be changed"),
        (["--lr-with-batch", "linear"], "--lr-with-batch cannot be changed"),
        (["--name", "other"], "--name cannot be changed"),
    ],
)
def test_what_cannot_be_changed_on_a_resume_is_refused_by_name(
    resumed: Resumed,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(resumed.home))
    assert run_in_process("tune", "--resume", "stopped", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheduler", ["median", "hyperband"])
def test_a_killed_search_goes_on_with_other_schedulers(
    tmp_path: Path, arguments: list[str], scheduler: str
) -> None:
    home = tmp_path / "home"
    with Job(
        home, *arguments, "--epochs", 1, "--trials", 6, "--name", "stopped",
        "--scheduler", scheduler, "--space", "lora.rank=4", "--space", "head.depth=1",
    ) as job:  # fmt: skip
        shown = r"trial 3: .* after \d+ steps" if scheduler == "median" else r"trial 1: rung 1"
        job.wait_for(shown)
        kill(job)
    with Job(home, "--resume", "stopped") as job:
        assert job.end() == 0, job.output
    rows = _rows(home)
    assert sorted(row["trial"] for row in rows.values()) == list(range(6))
    assert all(row["status"] in ("completed", "stopped") for row in rows.values())
    assert any(row["status"] == "completed" for row in rows.values())
    if scheduler == "median":
        assert not re.search(r"trial 0: rung 1/", job.output), "what was finished stays so"


def test_the_winner_is_trained_in_full_and_registered(
    resumed: Resumed, capsys: pytest.CaptureFixture[str]
) -> None:
    home = resumed.home
    client = connect(f"sqlite:///{home}/mlflow.db")
    version = client.get_model_version_by_alias("lorat", "candidate")
    parent, trials, (final,) = search_runs(home)
    assert version.tags["search_run_id"] == parent.info.run_id
    assert parent.data.tags["lorat.final_version"] == str(version.version)
    assert parent.data.tags["lorat.final_run"] == final.info.run_id
    assert final.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert "score.eval/val/ao" in final.data.tags
    best = home / "runs" / "stopped" / "results" / "best_config.json"
    penalty = json.loads(best.read_text())["tracking"]["window_penalty"]
    assert penalty in (0.125, 0.75)
    assert version.tags["tracking.window_penalty"] == str(penalty)
    bundle = Path(version.source.removeprefix("file://")) / "artifacts" / "bundle"
    assert load_merged(bundle).tracking.window_penalty == penalty
    said = re.search(r"([\d.]+) trained in full, the search said ([\d.]+)", resumed.output)
    assert said is not None
    best_ao = max(
        trials[trial_id].data.metrics["val/ao"]
        for trial_id, row in _rows(home).items()
        if row["status"] == "completed"
    )
    assert float(said[2]) == pytest.approx(best_ao, abs=1e-4)

    assert f"python jobs/train.py --config {best}" in resumed.output
    capsys.readouterr()
    assert run_in_process("train", "--config", str(best), "--dry-run") == 0
    config = from_dict(TrainConfig, json.loads(best.read_text()))
    assert capsys.readouterr().out.startswith(f"{summary(config)}\n")


@pytest.mark.usefixtures("shared_ray")
def test_a_race_that_is_killed_goes_on_and_its_winner_is_registered(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    home = tmp_path / "home"
    race = ("--certify", "--certify-top", 1, "--certify-seeds", 2, "--certify-within", 0)
    with Job(
        home, *arguments, "--trials", 2, "--name", "raced", "--concurrent", 1, "--scheduler",
        "none", "--rungs", 1, "--epochs", 1, "--space", "lr=choice(0.0005,0.002)", *race,
    ) as job:  # fmt: skip
        job.wait_for(r"(?s)with seed 44: .*trial 0: completed after \d+ steps")
        job.process.kill()
        job.end()
    runs = home / "runs"
    first = {path: path.stat().st_mtime_ns for path in (runs / "raced-race-1").rglob("rung-*.json")}
    monkeypatch.setenv("LORAT_HOME", str(home))
    caplog.set_level("INFO")
    assert run_in_process("tune", "--resume", "raced") == 0
    assert "with seed 44:" in caplog.text
    assert "with seed 43:" not in caplog.text
    assert len(first) == 2
    assert {path: path.stat().st_mtime_ns for path in first} == first, "a round was done twice"
    client = connect(f"sqlite:///{home}/mlflow.db")
    version = client.get_model_version_by_alias("lorat", "candidate")
    tags = version.tags
    experiment = client.get_experiment_by_name("lorat-search")
    all_runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in all_runs if "mlflow.parentRunId" not in run.data.tags]
    rounds = [run for run in all_runs if "-race-" in run.info.run_name]
    assert {run.data.tags["mlflow.parentRunId"] for run in rounds} == {parent.info.run_id}
    assert len(rounds) == 2
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["lorat.race.verdict"] == tags["race.verdict"]
    assert parent.data.tags["lorat.race.version"] == str(version.version)
    assert int(parent.data.tags["lorat.race.steps"]) >= 4 * 16
    assert "The race took" in parent.data.tags["mlflow.note.content"]
    kept = {entry.path for entry in client.list_artifacts(parent.info.run_id, "race")}
    assert kept == {"race/race.csv", "race/race.png"}
    assert tags["search_run_id"] == parent.info.run_id
    assert {"race.p_best", "race.interval", "race.regret", "score_histogram"} <= tags.keys()
    assert f"seed {tags['race.seed']}, one of 2 that the race trained" in version.description
    seeds = json.loads(tags["race.seeds"])
    assert set(seeds) == {"43", "44"}
    assert {checkpoint.load(place).variant.name for place in seeds.values()} == {"N-112"}
    config = json.loads((runs / "raced" / "results" / "certified_config.json").read_text())
    assert from_dict(TrainConfig, config).seed == 42


@pytest.mark.usefixtures("shared_ray")
def test_a_search_without_a_finished_trial_is_no_success(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(make_home(tmp_path / "home")))
    caplog.set_level("INFO")
    lost = (
        "--trials",
        1,
        "--name",
        "lost",
        "--final",
        "--space",
        "lr=choice(9.0,10.0)",
        "--weight-decay",
        10,
    )
    assert run_in_process("tune", *arguments, *lost) == 1
    assert "No trial finished" in caplog.text
    assert "not finite" in caplog.text.rpartition("No trial finished")[2]


def _rows(home: Path) -> dict[str, dict[str, object]]:
    import pyarrow.parquet as pq

    table = pq.read_table(home / "runs" / "stopped" / "results" / "trials.parquet")
    left_out = ("pareto",)
    return {
        row["trial_id"]: {k: v for k, v in row.items() if k not in left_out}
        for row in table.to_pylist()
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--space", "lora.rang=choice(1,2)"], "no configuration field lora.rang"),
        (["--space", "lora.dropout=uniform(0,2)"], "give 0 or more, below 1"),
        (["--trails", "3"], "did you mean --trials"),
        (["--resume", "nothing"], "no search nothing"),
        (["--certify", "--final"], "a race trains in full, leave --final out"),
        (["--certify-seeds", "2"], "give --certify as well"),
        (["--certify", "--objective", "latency,ao"], "of which none has latency"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    tmp_path: Path,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "home"))
    assert run_in_process("tune", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "home").exists()


def test_the_plan_can_be_read_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "home"))
    with caplog.at_level("INFO"):
        assert run_in_process("tune", "--dry-run") == 0
    assert "32 trials of T-112 on synthetic for ao" in caplog.text
    assert "tpe proposes, asha compares at steps 64, 256, 1024" in caplog.text
    assert not (tmp_path / "home").exists()
