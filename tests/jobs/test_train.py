"""The training job as a user meets it: whole path, wrong input, dry run, replay."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorat.frame_index import FrameIndex
from tests.jobs.in_process import ROOT, run_in_process
from tests.small_shards import make_shards

SMALL = (
    "--variant", "N-112", "--backbone", "none", "--batch-size", "8", "--pairs-per-epoch", "40",
    "--epochs", "2", "--lora.rank", "2", "--val-sequences", "2", "--val-pairs", "16",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return (
        make_shards(folder / "train", split="train"),
        make_shards(folder / "val", split="val"),
    )


def train(home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "train.py"), *options],
        capture_output=True,
        text=True,
        cwd=home,
        env=environment | {"LORAT_HOME": str(home)},
        timeout=400,
    )


def test_a_training_ends_with_a_registered_tracker_and_says_where(
    tmp_path: Path, shards: tuple[str, str]
) -> None:
    data, val = shards
    done = train(
        tmp_path, *SMALL, "--data", data, "--val-data", val, "--name", "small",
        "--checkpoint-every", "1", "--keep", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    out = done.stdout
    assert re.search(r"^step +10/10  loss \d+\.\d+ .* samples/s .* left 0 s$", out, re.MULTILINE)
    assert re.search(r"^validation of step 10: loss \d", out, re.MULTILINE)
    for tracker in ("LoRAT", "static", "mil"):
        assert re.search(rf"^val +{tracker} +[01]\.\d+", out, re.MULTILINE), out
    assert "model       models:/lorat/1, alias candidate" in out
    assert "mlflow server --backend-store-uri" in out
    # The best are kept; only those that were validated, one an epoch, have a score.
    kept = sorted(path.name for path in (tmp_path / "runs" / "small").glob("step-*"))
    assert kept == ["step-00000005", "step-00000010"]
    assert re.search(r"^ +step \d+\.\d ms \(data \d", out, re.MULTILINE)
    record = json.loads((tmp_path / "runs" / "small" / "run.json").read_text())
    assert record["finished"]
    assert record["config"]["batch_size"] == 8
    assert record["data"] == {"train": FrameIndex.open(data).fingerprint}

    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(store, registry_uri=store)
    version = client.get_model_version_by_alias("lorat", "candidate")
    assert version.run_id == record["mlflow_run_id"]
    run = client.get_run(record["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["config.lora.rank"] == "2"
    assert run.data.tags["dataset.train"] == record["data"]["train"]
    assert {"train/loss", "system/samples_per_s", "val/ao", "eval/val/ao"} <= set(run.data.metrics)
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
    assert json.loads(version.tags["benchmark"]) == [val]

    again = train(tmp_path, *SMALL, "--data", data, "--val-data", val, "--name", "small")
    assert again.returncode == 2
    assert again.stderr == (
        f"error: The run small in {tmp_path}/runs/small is finished; give another --name.\n"
    )

    warm = train(
        tmp_path, *SMALL, "--data", data, "--val-data", val, "--name", "warm", "--no-register",
        "--init-from", "models:/lorat@candidate", "--validate-every", "0", "--lr", "1e-6",
    )  # fmt: skip
    assert warm.returncode == 0, warm.stdout + warm.stderr
    record = json.loads((tmp_path / "runs" / "warm" / "run.json").read_text())
    assert record["start_weights"] == "models:/lorat/1"
    cold_end, warm_end = (
        float(re.findall(r"loss (\d+\.\d+)  lr", o)[-1]) for o in (out, warm.stdout)
    )
    assert warm_end < cold_end


def wrong(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    assert run_in_process("train", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_wrong_options_give_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean --epochs" in wrong(capsys, "--epoch", "3")
    assert "did you mean --lora.rank" in wrong(capsys, "--lora.rnak", "3")
    assert "There is no variant Z-224" in wrong(capsys, "--variant", "Z-224")
    assert "lr is -1.0; give more than 0" in wrong(capsys, "--lr", "-1")
    assert "batch_size is 64 but an epoch has 8" in wrong(
        capsys, "--batch-size", "64", "--pairs-per-epoch", "8"
    )
    assert "--workers is '2:1'" in wrong(capsys, "--workers", "2:1")
    assert "--cpus-per-worker is 0; give 1 or more" in wrong(capsys, "--cpus-per-worker", "0")
    assert "--workers is 200 but a global batch has 128 pairs" in wrong(
        capsys, "--variant", "B-224", "--workers", "200", "--dry-run"
    )
    missing = tmp_path / "config.json"
    assert f"{missing} cannot be read" in wrong(capsys, "--config", missing)
    missing.write_text('{"lora": {"rnak": 3}}')
    assert "Unknown configuration field lora.rnak" in wrong(capsys, "--config", missing)
    assert "holds no dump" in wrong(capsys, "--replay", tmp_path)


def test_missing_data_gives_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = wrong(capsys, *SMALL, "--data", tmp_path / "nothing", "--val-data", tmp_path)
    assert "There is no dataset at" in error


def test_a_dry_run_says_what_will_be_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"variant": "L-224", "lora": {"rank": 32}, "epochs": 100}))
    code = run_in_process("train", "--dry-run", "--config", file, "--epochs", "3", "--workers", "8")
    out = capsys.readouterr().out
    assert code == 0
    config = json.loads(out[: out.index("\nL-224")])
    assert (config["variant"], config["epochs"], config["lora"]["rank"]) == ("L-224", 3, 32)
    assert (config["batch_size"], config["recipe"]) == (128, "paper")
    assert "3,072 of 128 pairs" in out
    for word in ("memory", "activations", "TFLOP a step", "kB per pair", "GMACs"):
        assert word in out


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("train", "--help") == 0
    out = capsys.readouterr().out
    for flag in ("--lora.rank", "--epochs", "--batch-size", "--workers", "--dry-run", "--replay"):
        assert flag in out
    assert "Rank r of every adapter" in out
