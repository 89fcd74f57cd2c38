"""A real cluster on this machine: see the script."""

from __future__ import annotations

import glob
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.exhaustive
@pytest.mark.reachable
@pytest.mark.processes(minutes=6)
@pytest.mark.timeout(900)
def test_a_training_survives_the_loss_of_nodes_and_registers_its_model() -> None:
    before = set(glob.glob("/tmp/lorat-small-*"))
    result = subprocess.run(
        [sys.executable, ROOT / "infra" / "small_cluster.py"], capture_output=True, text=True
    )
    if "error: PostgreSQL is not installed" in result.stderr:
        pytest.skip("PostgreSQL is not installed and cannot be installed here")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    for event in ("is killed", "a node will be taken away", "decoding is on decode1"):
        assert event in result.stdout
    assert set(glob.glob("/tmp/lorat-small-*")) <= before
