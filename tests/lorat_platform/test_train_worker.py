"""What a training worker starts from, and what it leaves behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from lorat.errors import UserError
from lorat.storage import locate
from lorat_platform import checkpoint_store, run_record
from lorat_platform.console import Console
from lorat_platform.learner import Learner, World
from lorat_platform.train_loop import run
from lorat_platform.train_worker import (
    LOCAL_FOLDER,
    WorkerSetup,
    make_learner,
    make_local_folder,
    sweep_local_folders,
)
from tests.lorat_platform.test_learner import CONFIG, source


def setup(folder: Path, start_weights: str | None) -> WorkerSetup:
    return WorkerSetup(
        config=CONFIG,
        sources=(),
        run_folder=locate(folder),
        run_name="run",
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
    checkpoint_store.upload(tmp_path / "local", folder, "step-00000003")
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


def test_checkpoints_that_killed_workers_left_behind_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = make_local_folder()
    host = socket.gethostname()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        start = run_record.start_time(other.pid)
        alive = tmp_path / f"{LOCAL_FOLDER}-{host}-{other.pid}-{start}-abcdefgh"
        stale = [
            tmp_path / f"{LOCAL_FOLDER}-{host}-{other.pid}-1-abcdefgh",  # its number is used again
            tmp_path / f"{LOCAL_FOLDER}-{host}-{2**22 + 1}-12345-abcdefgh",
        ]
        foreign = tmp_path / f"{LOCAL_FOLDER}-{host}-2-{2**22 + 1}-12345-abcdefgh"
        for folder in (alive, *stale, foreign):
            folder.mkdir()
            (folder / "head.safetensors").write_bytes(b"h")
        sweep_local_folders()
        assert sorted(tmp_path.iterdir()) == sorted([own, alive, foreign])
        other.kill()
    sweep_local_folders()
    assert sorted(tmp_path.iterdir()) == sorted([own, foreign])
    assert str(os.getpid()) in own.name
