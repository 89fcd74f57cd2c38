from __future__ import annotations

import cloudpickle
import pytest
import ray.exceptions
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from lorat.errors import UserError
from lorat_platform.failures import (
    TrialFailed,
    failure_reason,
    is_of_surroundings,
    trial_failures,
)

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of "
    "which 1.10 GiB is free.\nSee documentation for Memory Management"
)
RAY = (
    "2 worker(s) were killed due to the node running low on memory. Memory on the node was 31 GB.\n"
    "Refer to the documentation on how to address the out of memory issue."
)


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
def test_what_a_trial_raised_is_one_line(error: Exception, reason: str) -> None:
    assert failure_reason(_raised(error)) == reason


def test_a_process_that_ray_ended_for_memory_is_said_so() -> None:
    said = "its machine ran low on memory and Ray ended the trial's process"
    assert failure_reason(ray.exceptions.OutOfMemoryError(RAY)) == said
    assert failure_reason(RayActorError(error_msg=RAY)) == said


def test_a_process_that_was_killed_is_said_so() -> None:
    reason = failure_reason(RayActorError(error_msg="It received SIGKILL."))
    assert reason == "the trial's process died: It received SIGKILL."


def _caused(cause: Exception) -> UserError:
    error = UserError("There is no /data; give another.")
    error.__cause__ = cause
    return error


SURROUNDINGS = [
    FileNotFoundError(2, "No such file or directory", "/dev/shm/crops/block.lock"),
    PermissionError(13, "Permission denied", "/data"),
    ConnectionResetError("reset by peer"),
    OSError(116, "Stale file handle"),
    _caused(FileNotFoundError(2, "No such file or directory", "/data")),
    RayActorError(error_msg="It received SIGKILL."),
    ray.exceptions.NodeDiedError("the node is gone"),
    ray.exceptions.ObjectLostError("00", None, ""),
    ray.exceptions.WorkerCrashedError(),
]
OWN = [
    UserError("The loss is not finite at step 3."),
    _caused(ValueError("no number")),
    ValueError("a fault of the program"),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
    torch.OutOfMemoryError(CUDA),
    ray.exceptions.OutOfMemoryError(RAY),
    RayActorError(error_msg=RAY),
    RayActorError(error_msg="died in its creation:\nlorat.errors.UserError: It cannot be."),
]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(error, True) for error in SURROUNDINGS] + [(error, False) for error in OWN],
)
def test_what_is_the_trials_fault_and_what_its_surroundings(
    error: Exception, expected: bool
) -> None:
    assert is_of_surroundings(error) == expected
    with pytest.raises(TrialFailed) as raised, trial_failures(lambda: 7):
        raise error
    told = cloudpickle.loads(cloudpickle.dumps(_raised(raised.value)))
    assert is_of_surroundings(told) == expected, "the driver says the same"
    inside = TrialFailed.inside(told)
    assert inside is not None
    assert inside.step == 7
    assert failure_reason(told) == failure_reason(error) == str(inside)


def test_workers_of_a_group_are_judged_together() -> None:
    disconnected = RuntimeError("Connection closed by peer [127.0.0.1]:7")
    killed = WorkerGroupError("failed", {0: disconnected, 1: RayActorError(error_msg="SIGKILL")})
    diverged = WorkerGroupError("failed", {0: disconnected, 1: _raised(UserError("not finite"))})
    assert is_of_surroundings(killed)
    assert not is_of_surroundings(diverged)
