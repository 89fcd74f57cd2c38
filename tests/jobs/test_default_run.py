"""The command without arguments: a tracker that tracks, in minutes, on this machine's CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.exhaustive
@pytest.mark.processes(minutes=5)
@pytest.mark.timeout(900)
def test_the_default_run_registers_a_tracker_that_tracks(tmp_path: Path) -> None:
    dropped = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH"}
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    result = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "train.py")],
        cwd=tmp_path,
        env=environment | {"LORAT_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-6000:]

    client = MlflowClient(f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}")
    version = client.get_model_version_by_alias("lorat", "candidate")
    assert version.run_id is not None
    tags = client.get_run(version.run_id).data.tags
    overlap, static, mil = (
        float(tags[f"score.eval/synthetic/{name}"]) for name in ("ao", "static_ao", "mil_ao")
    )
    assert static < 0.35
    assert overlap >= 0.55
    assert overlap > mil
    assert any(line.split()[:2] == ["synthetic", "LoRAT"] for line in result.stdout.splitlines()), (
        "the final table names the tracker"
    )
