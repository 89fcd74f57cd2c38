"""Start ``jobs/train.py`` as a user does, watch it, and do things to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file

from lorat.config.training import LoraConfig, TrainConfig
from tests.mlflow_home import make_home
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 700
CHECKPOINT_EVERY = 25
STEPS_PER_EPOCH = 50
LOG_EVERY = 10


def training_config(uri: str) -> TrainConfig:
    """Return the configuration that the command line of :class:`TrainJob` gives."""
    return TrainConfig(
        variant="N-112", backbone="none", data=f"tiny={uri}", batch_size=4,
        pairs_per_epoch=4 * STEPS_PER_EPOCH, epochs=NUM_STEPS // STEPS_PER_EPOCH,
        lora=LoraConfig(rank=4),
    )  # fmt: skip


class TrainJob:
    """A training of small steps in a process of its own."""

    def __init__(self, home: Path, uri: str, *options: str, **environment: str) -> None:
        command = [
            sys.executable, str(ROOT / "jobs" / "train.py"),
            "--variant", "N-112", "--backbone", "none", "--data", f"tiny={uri}",
            "--batch-size", "4", "--pairs-per-epoch", str(4 * STEPS_PER_EPOCH),
            "--epochs", str(NUM_STEPS // STEPS_PER_EPOCH),
            "--lora.rank", "4", "--cpus-per-worker", "1", "--log-every", str(LOG_EVERY),
            "--checkpoint-every", str(CHECKPOINT_EVERY), "--no-register", "--name", "run",
            *options,
        ]  # fmt: skip
        self.home = home
        make_home(home)
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

    def wait_for(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Wait for a line that matches, of those after a number of lines."""

        def found() -> re.Match[str] | None:
            nonlocal after
            if self.process.poll() is not None:
                self._reader.join(10)
            for line in self.lines[after:]:
                after += 1
                match = re.search(pattern, line)
                if match:
                    return match
            return None

        match = wait_until(
            f"line {pattern!r}", found, process=self.process, output=lambda: self.text
        )
        assert match is not None
        return match

    def wait_for_step(self, least: int, after: int = 0) -> int:
        """Wait until a line, of those after a number of lines, shows a step; return the newest."""
        while int(self.wait_for(r"^step +(\d+)/", after)[1]) < least:
            after += 1
        steps = [re.match(r"step +(\d+)/", line) for line in self.lines]
        return [int(match[1]) for match in steps if match][-1]

    def wait_for_end(self, timeout_s: float = 300.0) -> int:
        """Wait for the end and return the exit code."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {timeout_s:.0f} s:\n{self.text}") from None
        self._reader.join(10)
        return code

    def finish(self) -> str:
        """Wait for the end, which must be a good one, and return what was printed."""
        code = self.wait_for_end()
        assert code == 0, f"exit code {code}:\n{self.text}"
        return self.text

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
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def job(home: Path, uri: str, *options: str, **environment: str) -> Iterator[TrainJob]:
    """Run a job for the length of a ``with`` block at most."""
    started = TrainJob(home, uri, *options, **environment)
    try:
        yield started
    finally:
        started.clean_up()


def processes_of(name: str) -> list[psutil.Process]:
    """Return the processes below this one whose command line holds a name."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


def run_folder(home: Path) -> Path:
    return home / "runs" / "run"


def mlflow_run_id(home: Path) -> str:
    """Return the MLflow run of the training, waiting until it is known."""
    return wait_until(
        "id of the MLflow run",
        lambda: json.loads((run_folder(home) / "run.json").read_text())["mlflow_run_id"],
    )


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint: weights and optimiser."""
    tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        part = load_file(file)
        tensors |= {f"{file.relative_to(folder)}:{name}": value for name, value in part.items()}
    return tensors


def assert_same_weights(home: Path, reference: Path) -> None:
    """Fail unless a run ended with the weights and optimiser state of a checkpoint."""
    expected = checkpoint_tensors(reference)
    found = checkpoint_tensors(run_folder(home) / f"step-{NUM_STEPS:08d}")
    assert expected and expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-6, atol=1e-6 * float(value.float().abs().max()), msg=name
        )


def mlflow_run(home: Path) -> Run:
    """Return the one MLflow run of the training."""
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("train")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def train_losses(home: Path) -> dict[int, float]:
    """Return the loss that the MLflow run shows, per logged step, each of which is there once."""
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    history = client.get_metric_history(mlflow_run(home).info.run_id, "train/loss")
    losses = {metric.step: metric.value for metric in history}
    assert len(losses) == len(history), "a step that was taken again is there twice"
    return losses


def shown_steps(text: str) -> set[int]:
    """Return the steps of all progress lines."""
    return {int(step) for step in re.findall(r"^step +(\d+)/", text, re.MULTILINE)}


def resumed_steps(text: str) -> list[int]:
    """Return the steps that workers went on from."""
    return [int(m) for m in re.findall(r"going on from step-(\d+)", text)]
