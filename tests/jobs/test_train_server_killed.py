"""A training goes on while MLflow's server is dead, and loses nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from lorat_platform.mlflow_store import connect
from tests.jobs.in_process import ROOT
from tests.mlflow_server import Server
from tests.small_shards import make_shards


def wait_for(pattern: str, log: Path, job: subprocess.Popen[bytes], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not re.search(pattern, log.read_text(), re.MULTILINE):
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def test_a_server_killed_in_mid_run_has_everything_at_the_end(tmp_path: Path) -> None:
    train = make_shards(tmp_path / "train", split="train")
    val = make_shards(tmp_path / "val", split="val")
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
        assert "eval/val/ao" in run.data.metrics
    finally:
        server.kill()
