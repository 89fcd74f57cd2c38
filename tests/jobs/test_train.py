"""The training job as a user meets it: whole path, wrong input, dry run, replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.jobs.in_process import ROOT, run_in_process

SMALL = (
    "--variant", "N-112", "--backbone", "none", "--batch-size", "8", "--pairs-per-epoch", "40",
    "--epochs", "2", "--lora.rank", "2", "--val-sequences", "2", "--val-pairs", "16",
)  # fmt: skip


JOBS = ("train", "evaluate", "export", "ingest", "pretrain", "promote", "track", "tune")


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
    assert "lr is -1.0; give more than 0, at most 10" in wrong(capsys, "--lr", "-1")
    assert "batch_size is 64 but an epoch has 8" in wrong(
        capsys, "--batch-size", "64", "--pairs-per-epoch", "8"
    )
    assert '--workers is "2:1"' in wrong(capsys, "--workers", "2:1")
    assert "--cpus-per-worker is 0; give 1 to 1024" in wrong(capsys, "--cpus-per-worker", "0")
    assert "--workers is 200 but a global batch has 128 pairs" in wrong(
        capsys, "--variant", "B-224", "--workers", "200", "--dry-run"
    )
    for option in ("--data", "--val-data", "--storage", "--init-from"):
        error = wrong(capsys, option, "s3://KEY:PLANTED@bucket/a", "--dry-run")
        assert f"{option} s3://bucket/a was given with a password" in error
        assert "PLANTED" not in error
    missing = tmp_path / "config.json"
    assert f"There is no {missing}; give" in wrong(capsys, "--config", missing)
    missing.write_text('{"lora": {"rnak": 3}}')
    assert "Unknown configuration field lora.rnak" in wrong(capsys, "--config", missing)
    assert "dump.json; give the folder" in wrong(capsys, "--replay", tmp_path)


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
    first, *_, last = screen = out[: out.index("\nL-224\n")].splitlines()
    assert first == "L-224, recipe paper, on synthetic, validated on synthetic"
    assert [line.split() for line in screen[2:4]] == [
        ["lora.rank", "32", "(recipe:", "64)"], ["epochs", "3", "(recipe:", "170)"]
    ]  # fmt: skip
    assert "batch_size 128" in out
    assert last.endswith("seed 42")
    assert "3,072 of 128 pairs" in out
    for word in ("device", "memory", "activations", "TFLOP a step", "kB per pair", "GMACs"):
        assert word in out


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("train", "--help") == 0
    out = capsys.readouterr().out
    for flag in ("--lora.rank", "--epochs", "--batch-size", "--workers", "--dry-run", "--replay"):
        assert flag in out
    assert "Rank r of every adapter" in out


@pytest.mark.parametrize("job", JOBS)
def test_help_has_one_example_a_line(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    about = (ROOT / "jobs" / f"{job}.py").read_text().split('"""')[1]
    examples = [line.split() for line in about.splitlines() if line.startswith("python ")]
    assert examples
    assert run_in_process(job, "--help") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    begun = [line for line in lines if line[:1] == ["python"]]
    assert [line[:4] for line in begun] == [example[:4] for example in examples]
