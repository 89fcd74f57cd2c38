"""What a training worker starts from, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ray.train import Checkpoint

from lorat.errors import UserError
from lorat.files.storage import locate
from lorat.learning.learner import Learner, World
from lorat.learning.loop import run
from lorat_platform.cluster.console import Console
from lorat_platform.runs import checkpoints
from lorat_platform.runs.claim import Lease
from lorat_platform.training.worker import WorkerSetup, _Upload, make_learner
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
