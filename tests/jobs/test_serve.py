"""The serving job: what it prints, whom it serves, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import yaml

from infra.processes import free_port
from lorat import checkpoint
from lorat_platform.serving.application import TOKEN, build
from lorat_platform.serving.client import Client
from lorat_platform.serving.connections import BOUNDED
from tests.constant_trackers import random_tracker
from tests.jobs.in_process import run_in_process
from tests.mlflow_home import make_home
from tests.served_models import BOX, frames
from tests.served_web import is_bounded
from tests.waiting import wait_until

pytestmark = pytest.mark.processes(minutes=1)

ROOT = Path(__file__).resolve().parents[2]


def test_a_checkpoint_is_served_until_the_job_is_interrupted(tmp_path: Path) -> None:
    model = random_tracker()
    checkpoint.save(model, model.config, tmp_path / "tracker")
    port = free_port()
    output = tmp_path / "output"
    command = [sys.executable, ROOT / "jobs" / "serve.py", "--model", tmp_path / "tracker"]
    environment = os.environ | {"LORAT_HOME": str(make_home(tmp_path / "home"))}
    environment.pop("LORAT_SERVE_TOKEN", None)
    with output.open("wb") as file:
        job = subprocess.Popen(
            [*map(str, command), "--port", str(port)], stdout=file, stderr=file, env=environment
        )
    try:
        found = wait_until(
            "page",
            lambda: re.search(r"Page: (http://127\.0\.0\.1:\d+)/#ticket=(\S+)", output.read_text()),
            process=job,
            output=output.read_text,
        )
        assert found[1].endswith(f":{port}")
        with Client(f"ws://127.0.0.1:{port}/track", token=found[2]) as client:
            assert client.hello["model"] == "tracker"
            assert len(list(client.track(frames(5), {"it": BOX}))) == 5
        assert is_bounded(f"127.0.0.1:{port}")
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=120) == 130
        assert "Traceback" not in output.read_text()
        assert "graceful_shutdown" not in output.read_text()
    finally:
        job.kill()
        job.wait()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=30).ok
    except requests.ConnectionError:
        return False


@pytest.mark.exhaustive
@pytest.mark.parametrize("by", ["import path", "manifest"])
def test_serve_run_serves_as_the_job_does(by: str, ray_address: str, tmp_path: Path) -> None:
    """By hand, and with the configuration of the RayService, on a Ray that runs already."""
    model = random_tracker()
    checkpoint.save(model, model.config, tmp_path / "tracker")
    port = 8000 if by == "import path" else free_port()  # there it cannot be chosen
    token, output = "a-token-that-nobody-guesses", tmp_path / "output"
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    variables = BOUNDED | {TOKEN: token, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}"}
    args = {"model": str(tmp_path / "tracker"), "replicas": "1", "cpus": "0.5", "gpus": "0"}
    if by == "manifest":
        service = yaml.safe_load((ROOT / "infra/kuberay/serve/service.yaml").read_text())
        config = yaml.safe_load(service["spec"]["serveConfigV2"])
        config |= {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": port},
        }
        config["applications"][0] |= {"args": args, "runtime_env": {"env_vars": variables}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        what = [str(tmp_path / "config.yaml")]
    else:
        what = [f"{build.__module__}:{build.__name__}", *(f"{k}={v}" for k, v in args.items())]
    command = [
        str(Path(sys.executable).parent / "serve"), "run", "--address", ray_address,
        "--runtime-env-json", json.dumps({"env_vars": variables}), *what,
    ]  # fmt: skip
    environment = os.environ | variables | loopback
    with output.open("wb") as file:
        run = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=tmp_path)
    try:
        wait_until(
            "application",
            lambda: answers(f"http://127.0.0.1:{port}/status?token={token}"),
            process=run,
            output=output.read_text,
        )
        with Client(f"ws://127.0.0.1:{port}/track", token=token) as client:
            assert len(list(client.track(frames(5), {"it": BOX}))) == 5
        assert is_bounded(f"127.0.0.1:{port}")
        run.send_signal(signal.SIGINT)
        run.wait(timeout=120)
    finally:
        run.kill()
        run.wait()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nowhere"], "There is no model nowhere"),
        (["--port", "70000"], "--port is 70000; give 1 to 65,535"),
        (["--window", "0"], "--window is 0"),
        (["--replicas", "3", "--max-replicas", "2"], "fewer than the 3"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(tmp_path))
    assert run_in_process("serve", *arguments) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert len(printed.strip().splitlines()) == 1
