from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import ray.exceptions
import torch
from ray.exceptions import RayActorError, RayTaskError

from lorat.errors import UserError
from lorat_platform.failures import failure_reason

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of "
    "which 1.10 GiB is free.\nSee documentation for Memory Management"
)
RAY = (
    "2 worker(s) were killed due to the node running low on memory. Memory on the node was 31 GB.\n"
    "Refer to the documentation on how to address the out of memory issue."
)


def _failed(folder: Path, error: Exception, *, pickled: bool = True) -> Any:
    """Return what Ray Tune keeps of a failed trial."""
    text, kept = folder / "error.txt", folder / "error.pkl"
    text.write_text(f"Failure # 1 (occurred at 12:00)\n{error}\n")
    if pickled:
        kept.write_bytes(cloudpickle.dumps(error))
    return SimpleNamespace(error_file=str(text), pickled_error_file=str(kept))


def _raised(error: Exception) -> RayTaskError:
    """Return how Ray hands on what a trial raised."""
    return RayTaskError("train", f"Traceback\n{error!r}", error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("The loss is not finite at step 3."), "The loss is not finite at step 3."),
        (ValueError("first\nlast"), "ValueError: last"),
        (MemoryError(), "memory ran out: MemoryError"),
        (MemoryError("Unable to allocate 9 GiB"), "memory ran out: Unable to allocate 9 GiB"),
        (
            torch.OutOfMemoryError(CUDA),
            "the GPU's memory ran out: CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
    ],
)
def test_what_a_trial_raised_is_one_line(tmp_path: Path, error: Exception, reason: str) -> None:
    assert failure_reason(_failed(tmp_path, _raised(error))) == reason


def test_a_process_that_ray_ended_for_memory_is_said_so(tmp_path: Path) -> None:
    error = ray.exceptions.OutOfMemoryError(RAY)
    said = "its machine ran low on memory and Ray ended the trial's process"
    assert failure_reason(_failed(tmp_path, error, pickled=False)) == said
    assert failure_reason(_failed(tmp_path, error)) == said
    assert failure_reason(_failed(tmp_path, RayActorError(error_msg=RAY))) == said


def test_a_process_that_was_killed_is_said_so(tmp_path: Path) -> None:
    reason = failure_reason(_failed(tmp_path, RayActorError(error_msg="It received SIGKILL.")))
    assert reason == "the trial's process died: It received SIGKILL."


def test_an_error_that_others_may_have_written_is_not_unpickled(tmp_path: Path) -> None:
    failed = _failed(tmp_path, ValueError("pickled"))
    (tmp_path / "error.txt").write_text("first\nas text")
    assert failure_reason(failed) == "ValueError: pickled"
    (tmp_path / "error.pkl").chmod(0o666)
    assert failure_reason(failed) == "as text"
