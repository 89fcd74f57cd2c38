"""What a training worker starts from, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.train import Checkpoint

from lorat.errors import UserError
from lorat.files.storage import locate
from lorat.learning.learner import Learner, World
from lorat.learning.loop import Hooks, run
from lorat_platform.cluster.console import Console
from lorat_platform.recording.recorder import Recorder
from lorat_platform.runs import checkpoints
from lorat_platform.runs.claim import Lease
from lorat_platform.training.after import AfterLastStep
from lorat_platform.training.worker import (
    WorkerSetup,
    _monitor,
    _Reporter,
    _Upload,
    make_learner,
)
from tests.lorat.learning.test_learner import CONFIG, source


def setup(folder: Path, start_weights: str | None) -> WorkerSetup:
    return WorkerSetup(
        config=CONFIG,
        sources=(),
        run_folder=locate(folder),
        run_name="run",
        lease="",
        start_weights=start_weights,
        threads=1,
        worker_cpus=1,
        decode_actors=None,
        decode_threads=None,
        checkpoint_every=5,
        log_every=5,
        validate_steps=None,
        run=None,
        console=Console(None),
        after=AfterLastStep(forwards=0.0, other_s=0.0),
    )


def test_start_weights_are_only_asked_for_without_a_checkpoint(tmp_path: Path) -> None:
    """The model behind an alias, or MLflow itself, may be gone when a worker is replaced."""
    trained = run(CONFIG, source(), end_step=3)
    trained.save(tmp_path / "local")
    folder = locate(tmp_path / "run")
    folder.make()
    checkpoints.upload(tmp_path / "local", folder, "step-00000003")
    gone = setup(tmp_path / "run", str(tmp_path / "gone"))
    learner = make_learner(gone, World(), "step-00000003")
    assert learner.step == 3
    for a, b in zip(learner.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match=r"There is no model .*gone"):
        make_learner(gone, World(), None)
    warm = make_learner(setup(tmp_path / "run", str(tmp_path / "local")), World(), None)
    assert warm.step == 0
    assert torch.equal(warm.parameters[0], trained.parameters[0])
    cold: Learner = make_learner(setup(tmp_path / "run", None), World(), None)
    assert not torch.equal(cold.parameters[0], trained.parameters[0])


def test_a_checkpoint_of_a_driver_that_lost_the_run_is_not_written(tmp_path: Path) -> None:
    folder = locate(tmp_path / "run")
    folder.make()
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "head.safetensors").write_bytes(b"h")
    checkpoint = Checkpoint.from_directory(str(tmp_path / "local"))
    lease = Lease(folder, "The run mine", "wait").claim()
    _Upload(folder, lease.token, ())(checkpoint, "step-00000005")
    folder.delete(f"driver-{lease.token}.json")  # as who takes over does
    said = r"has taken .*run over from the driver of this one"
    with Lease(folder, "The run mine", "wait").claim(), pytest.raises(UserError, match=said):
        _Upload(folder, lease.token, ())(checkpoint, "step-00000010")
    assert checkpoints.names(folder) == ["step-00000005"]
    lease.release()


class Heard:
    """A console that keeps lines and phases in order."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str, after: object = ()) -> None:
        self.said.append(text)

    def phase(self, text: str = "", *, quiet: bool = False) -> None:
        self.said.append(f"({text})" if quiet else f"[{text}]")


def test_the_first_steps_are_told_and_the_time_left_has_what_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: None)
    heard = Heard()
    told = dataclasses.replace(
        setup(tmp_path, None), console=heard, after=AfterLastStep(forwards=0.0, other_s=3600.0)
    )
    learner = Learner(CONFIG)
    reporter = _Reporter(told, World(), learner)
    hooks = Hooks(log_every=1, on_interval=reporter.interval, on_step=reporter.step)
    end = CONFIG.total_steps
    run(CONFIG, source(), learner=learner, hooks=hooks)
    steps = [text for text in heard.said if text.startswith("step")]
    assert len(steps) == end
    left = [re.search(r"left (\d+) h", text) for text in steps]
    assert all(found and found[1] == "1" for found in left), steps
    phases = [text for text in heard.said if text[0] in "[("]
    first = min(end, 10)
    assert phases[0] == "[taking the first step]"
    assert phases[1:] == [f"(taking step {n} of {end})" for n in range(2, first + 1)] + ["[]"]


class Records(Recorder):
    """Keeps the names of metrics."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def _record(self, op: str, **fields: Any) -> None:
        self.names.update(fields["values"])

    def _store(self, source: Path | bytes, name: str, folder: str) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("local_rank", "local_size", "prefix"),
    [(0, 4, "system/"), (0, 2, "system/node_3/"), (1, 2, None)],
)
def test_the_first_worker_of_a_machine_records_how_busy_it_is(
    local_rank: int, local_size: int, prefix: str | None, tmp_path: Path
) -> None:
    context = SimpleNamespace(
        get_local_rank=lambda: local_rank,
        get_local_world_size=lambda: local_size,
        get_world_size=lambda: 4,
        get_node_rank=lambda: 3,
    )
    run = Records()
    worker = dataclasses.replace(setup(tmp_path, None), run=run, sample_every_s=0.02)
    with _monitor(worker, context):
        deadline = time.monotonic() + (20 if prefix else 0.2)
        while time.monotonic() < deadline and not (prefix and run.names):
            time.sleep(0.01)
    assert bool(run.names) == (prefix is not None)
    assert prefix is None or f"{prefix}cpu_utilization_percentage" in run.names
