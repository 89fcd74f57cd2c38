"""Start ``jobs/train.py`` as a user does, watch it, and do things to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 600
CHECKPOINT_EVERY = 50


class TrainJob:
    """A training of 600 small steps in a process of its own."""

    def __init__(self, home: Path, uri: str, *options: str, **environment: str) -> None:
        command = [
            sys.executable, str(ROOT / "jobs" / "train.py"),
            "--variant", "N-112", "--backbone", "none", "--data", f"tiny={uri}",
            "--batch-size", "4", "--pairs-per-epoch", "200", "--epochs", "12",
            "--lora.rank", "4", "--cpus-per-worker", "1", "--log-every", "5",
            "--checkpoint-every", str(CHECKPOINT_EVERY), "--no-register", "--name", "run",
            *options,
        ]  # fmt: skip
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=home,
            env=inherited
            | {"LORAT_HOME": str(home), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
            | environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = 240.0) -> re.Match[str]:
        """Wait for a line that matches."""
        deadline, seen = time.monotonic() + timeout_s, 0
        while True:
            ended = self.process.poll() is not None
            while seen < len(self.lines):
                match = re.search(pattern, self.lines[seen])
                seen += 1
                if match:
                    return match
            assert not ended, f"the job ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < deadline, f"no {pattern!r} in time:\n{self.text}"
            time.sleep(0.02)

    def wait_for_step(self, least: int) -> int:
        """Wait until the progress line shows a step, and return it."""
        while True:
            steps = [int(m[1]) for m in re.finditer(r"^step +(\d+)/", self.text, re.MULTILINE)]
            if steps and steps[-1] >= least:
                return steps[-1]
            assert self.process.poll() is None, f"the job ended:\n{self.text}"
            time.sleep(0.02)

    def finish(self, timeout_s: float = 300.0) -> str:
        """Wait for the end, which must be a good one, and return what was printed."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job does not end:\n{self.text}") from None
        self._reader.join(10)
        assert code == 0, f"exit code {code}:\n{self.text}"
        return self.text

    def training_workers(self) -> list[psutil.Process]:
        """Return the training workers of an embedded Ray."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self) -> None:
        """Kill the driver alone, as the kernel does when memory runs out."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._reader.join(10)

    def clean_up(self) -> None:
        """Leave nothing behind."""
        children = []
        if self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


def run_folder(home: Path) -> Path:
    return home / "runs" / "run"


def mlflow_run_id(home: Path) -> str:
    """Return the MLflow run of the training, waiting until it is known."""
    deadline = time.monotonic() + 60
    while True:
        found = json.loads((run_folder(home) / "run.json").read_text())["mlflow_run_id"]
        if found:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.2)


def final_weights(home: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the last checkpoint: weights and optimiser."""
    folder = run_folder(home) / f"step-{NUM_STEPS:08d}"
    tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        part = load_file(file)
        tensors |= {f"{file.relative_to(folder)}:{name}": value for name, value in part.items()}
    return tensors


def assert_same_weights(home: Path, reference: Path) -> None:
    """Fail unless both runs ended with the same weights and optimiser state."""
    expected, found = final_weights(reference), final_weights(home)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-6, atol=1e-6 * float(value.float().abs().max()), msg=name
        )


def train_losses(home: Path) -> dict[int, float]:
    """Return the loss that the MLflow run shows, per logged step."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    history = client.get_metric_history(mlflow_run_id(home), "train/loss")
    return {metric.step: metric.value for metric in history}


def resumed_steps(text: str) -> list[int]:
    """Return the steps that workers went on from."""
    return [int(m) for m in re.findall(r"going on from step-(\d+)", text)]
