"""Whole trainings as a user starts them: to their end, and through the death of MLflow's server."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lorat.data.shards.frame_index import FrameIndex
from lorat.files.storage import locate
from lorat_platform.recording.store import connect
from tests.jobs.in_process import ROOT
from tests.jobs.test_train import SMALL, wrong
from tests.mlflow_home import make_home
from tests.mlflow_server import Server
from tests.other_driver import FOREIGN, announce
from tests.small_shards import make_shards
from tests.waiting import wait_until

pytestmark = pytest.mark.processes(minutes=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return (
        make_shards(folder / "train", split="train"),
        make_shards(folder / "val", split="val"),
    )


PLANTED = {
    "MLFLOW_TRACKING_USERNAME": "somebody",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-4711",
    "AWS_ACCESS_KEY_ID": "planted-key-4711",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-4711",
}
"""Secrets where they belong."""


def train(home: Path, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    make_home(home)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "train.py"), *options],
        capture_output=True,
        text=True,
        cwd=home,
        env=environment | {"LORAT_HOME": str(home)} | more,
    )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A training that was run to its end."""

    home: Path
    output: str
    data: tuple[str, ...]
    """Options that name its data."""
    ray: Path
    """Where its Ray wrote logs."""
    said_at: list[float]
    """When each of its lines came, in seconds from its start."""


@pytest.fixture(scope="module")
def trained(shards: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    home = tmp_path_factory.mktemp("trained")
    data = ("--data", shards[0], "--val-data", shards[1])
    # A short name, since those of sockets have a limit.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray:
        make_home(home)
        began = time.monotonic()
        job = subprocess.Popen(
            [
                sys.executable, str(ROOT / "jobs" / "train.py"), *SMALL, *data, "--name", "small",
                "--checkpoint-every", "1", "--keep", "2", "--workers", "2", "--cpus-per-worker",
                "1", "--log-every", "1",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=home,
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
            | {"LORAT_HOME": str(home), "RAY_TMPDIR": ray, "PYTHONUNBUFFERED": "1"}
            | {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2"}
            | PLANTED,
        )  # fmt: skip
        assert job.stdout is not None
        with job.stdout:
            lines = [(line, time.monotonic() - began) for line in job.stdout]
        output = "".join(line for line, _ in lines)
        assert job.wait() == 0, output
        said_at = [at for _, at in lines]
        yield Trained(home=home, output=output, data=data, ray=Path(ray), said_at=said_at)


def test_a_training_ends_with_a_registered_tracker_and_says_where(
    trained: Trained, shards: tuple[str, str], tmp_path: Path
) -> None:
    (data, val), out, home = shards, trained.output, trained.home
    assert re.search(
        r"^step +10/10  loss \d+\.\d+ .* samples/s .* left (\d+ min )?\d+ s$", out, re.MULTILINE
    )
    assert re.search(r"^validation of step 10: loss \d", out, re.MULTILINE)
    for tracker in ("LoRAT", "static", "mil"):
        assert re.search(rf"^val +{tracker} +[01]\.\d+", out, re.MULTILINE), out
    assert "model       models:/lorat/1, alias candidate" in out
    assert "mlflow server --backend-store-uri" in out
    assert re.search(r"^promote it +python jobs/promote.py --candidate models:/lorat/1$", out, re.M)
    assert "jobs/track.py VIDEO --select --model models:/lorat/1 " in out
    # The best are kept; only those that were validated, one an epoch, have a score.
    kept = sorted(path.name for path in (home / "runs" / "small").glob("step-*"))
    assert kept == ["step-00000005", "step-00000010"]
    assert re.search(r"^ +step \d+\.\d ms \(data \d", out, re.MULTILINE)
    record = json.loads((home / "runs" / "small" / "run.json").read_text())
    assert record["finished"]
    assert record["config"]["batch_size"] == 8
    assert record["data"] == {"train": FrameIndex.open(data).fingerprint}

    store = f"sqlite:///{home}/mlflow.db"
    client = MlflowClient(store, registry_uri=store)
    version = client.get_model_version_by_alias("lorat", "candidate")
    assert version.run_id == record["mlflow_run_id"]
    run = client.get_run(record["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["lora.rank"] == "2"
    assert run.data.tags["dataset.train"] == record["data"]["train"]
    names = set(run.data.metrics)
    assert {"train/loss", "system/samples_per_s", "val/ao"} <= names
    assert not {name for name in names if name.startswith("eval/")}, "single numbers, no curves"
    scores = [f"score.eval/val/ao{end}" for end in ("_low", "", "_high")]
    low, ao, high = (float(run.data.tags[name]) for name in scores)
    assert low <= ao <= high
    for name in scores:
        assert run.data.tags[name] == version.tags[name]
    histogram = json.loads(version.tags["score_histogram"])
    index = FrameIndex.open(val)
    assert sum(histogram) == index.num_frames - index.num_tracks, "each frame but the first ones"
    assert version.description.startswith(f"AO {ao:.3f}, SR50 ")
    page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType="
    assert f" then http://127.0.0.1:5000/{page}machine_learning\n" in out
    assert f"http://127.0.0.1:5000/#/models/lorat/versions/{version.version}?" in out
    assert run.data.tags["mlflow.source.name"] == "jobs/train.py"
    reads = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
    assert reads["training"].digest == record["data"]["train"][:36]
    assert reads["validation"].digest == FrameIndex.open(val).fingerprint[:36]
    assert "system/cpu_utilization_percentage" in names
    log = client.download_artifacts(run.info.run_id, "console.log", str(tmp_path))
    printed = Path(log).read_text()
    assert re.search(r"^[-0-9]+ [:0-9]+ step +10/10  loss ", printed, re.MULTILINE)
    assert "LoRAT     " in printed, "the whole log is there at the end"
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.json", "checkpoint", "evaluation"} <= names
    about = run.data.tags["mlflow.note.content"]
    for tracker in ("LoRAT", "static", "mil"):
        assert re.search(rf"^\| val \| {tracker} \| [01]\.\d+", about, re.MULTILINE), about
    assert "N-112, lora rank 2, head depth" in about
    report = {
        Path(file.path).name: file.path
        for folder in ("evaluation", "evaluation/val", "evaluation/val/clips")
        for file in client.list_artifacts(run.info.run_id, folder)
    }
    assert {"success.png", "precision.png", "sequences.csv", "report.md"} <= set(report)
    assert {name.split("-")[0] for name in report if name.endswith(".mp4")} == {"best", "worst"}
    assert json.loads(version.tags["reference_set"]) == [val]


def test_a_person_always_knows_what_goes_on(trained: Trained) -> None:
    lines = trained.output.splitlines()
    phases = (
        "N-112, recipe small, on ", "  lora.rank ", "opening the data", "starting Ray on ",
        "beginning run small in ", "its configuration: ", "opening the run in MLflow",
        "starting the training workers", "starting the stream of pairs", "building the model",
        "training on cpu", "taking the first step", "step  1/10 ", "step 10/10 ",
        "storing the last checkpoint and validating it", "uploading the checkpoint of step 10 ",
        "evaluating LoRAT on ", "evaluating static on ", "evaluating mil on ", "reporting ",
        "registering the model", "model       models:/lorat/1",
    )  # fmt: skip
    at = [next(n for n, line in enumerate(lines) if line.startswith(text)) for text in phases]
    assert at == sorted(at), trained.output
    # Ten seconds, and what a busy machine adds.
    times = [0.0, *trained.said_at]
    silences = [after - before for before, after in itertools.pairwise(times)]
    assert max(silences) < 20.0, list(zip(silences, lines, strict=False))


def test_no_file_page_or_log_of_a_run_holds_a_secret(trained: Trained) -> None:
    """The pages of MLflow are in its database."""
    secrets = [PLANTED[n].encode() for n in PLANTED if n != "MLFLOW_TRACKING_USERNAME"]
    files = [p for folder in (trained.home, trained.ray) for p in folder.rglob("*") if p.is_file()]
    assert {"mlflow.db", "run.json", "raylet.out"} <= {path.name for path in files}
    holding = {
        str(path) for path in files if any(secret in path.read_bytes() for secret in secrets)
    }
    assert not holding
    assert not any(secret in trained.output.encode() for secret in secrets)


@pytest.mark.usefixtures("shared_ray")
def test_a_finished_training_is_not_begun_again(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(trained.home))
    assert wrong(capsys, *SMALL, *trained.data, "--name", "small") == (
        f"error: The run small in {trained.home}/runs/small is finished; give another --name.\n"
    )


@pytest.mark.usefixtures("shared_ray")
def test_a_training_that_another_machine_drives_is_refused(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(trained.home))
    folder = locate(trained.home / "runs" / "other")
    folder.make()
    token = announce(folder, FOREIGN, age_s=5)
    said = wrong(capsys, *SMALL, *trained.data, "--name", "other")
    assert re.match(
        r"error: The run other is driven by process 7 on elsewhere, since .* and with its last sign"
        r" of life \d+ s ago; wait for it, stop it, or give another --name \(if it is dead",
        said,
    ), said
    assert folder.names() == [f"driver-{token}.json"]
    assert not folder.folders()


@pytest.mark.exhaustive
def test_a_training_starts_from_a_registered_tracker(trained: Trained) -> None:
    warm = train(
        trained.home, *SMALL, *trained.data, "--name", "warm", "--no-register",
        "--init-from", "models:/lorat@candidate", "--validate-every", "0", "--lr", "1e-6",
    )  # fmt: skip
    assert warm.returncode == 0, warm.stdout + warm.stderr
    record = json.loads((trained.home / "runs" / "warm" / "run.json").read_text())
    assert record["start_weights"] == "models:/lorat/1"
    cold_end, warm_end = (
        float(re.findall(r"loss (\d+\.\d+)  lr", o)[-1]) for o in (trained.output, warm.stdout)
    )
    assert warm_end < cold_end


def wait_for(pattern: str, log: Path, job: subprocess.Popen[bytes]) -> None:
    def found() -> bool:
        return bool(re.search(pattern, log.read_text(), re.MULTILINE))

    wait_until(f"line {pattern!r}", found, process=job, output=log.read_text)


@pytest.mark.exhaustive
def test_a_server_killed_in_mid_run_has_everything_at_the_end(
    tmp_path: Path, shards: tuple[str, str]
) -> None:
    train, val = shards
    server, log = Server(tmp_path / "server"), tmp_path / "log"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"LORAT_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": server.uri}
    command = [
        sys.executable, str(ROOT / "jobs" / "train.py"), "--variant", "N-112",
        "--backbone", "none", "--batch-size", "8", "--pairs-per-epoch", "80", "--epochs", "2",
        "--log-every", "1", "--validate-every", "0", "--data", train, "--val-data", val,
    ]  # fmt: skip
    server.start()
    try:
        with open(log, "wb") as output:
            job = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        wait_for(r"^step +3/20 ", log, job)
        server.kill()
        wait_for(r"^step +20/20 ", log, job)
        server.start()
        assert job.wait(300) == 0, log.read_text()
        client = connect(server.uri)
        version = client.get_model_version_by_alias("lorat", "candidate")
        run = client.get_run(version.run_id)
        assert run.info.status == "FINISHED"
        points = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted(point.step for point in points) == list(range(1, 21))
        assert "score.eval/val/ao" in run.data.tags
    finally:
        server.kill()
