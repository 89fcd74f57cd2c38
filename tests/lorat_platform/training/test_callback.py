"""Failures of workers are survived as long as the training gets on."""

from __future__ import annotations

from typing import cast

import pytest

from lorat.errors import UserError
from lorat_platform.cluster.console import Console
from lorat_platform.training.callback import watch_workers


class Lines:
    """A console that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def phase(self, text: str) -> None:
        self.lines.append(text)


def dead(*, preempted: bool = False) -> Exception:
    """Return what Ray Train says of a worker that was killed."""
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError("unhealthy", RayActorError(preempted=preempted))


def test_failures_are_counted_from_the_last_checkpoint_on() -> None:
    watch = watch_workers(cast(Console, Lines()), 2)
    for _ in range(3):
        watch.after_exception(None, {0: dead()})
        watch.after_exception(None, {0: dead()})
        watch.after_report(None, [{}], None)  # of no checkpoint
        watch.after_report(None, [{}], object())
    for _ in range(5):
        watch.after_exception(None, {0: dead(preempted=True)})
    watch.after_exception(None, {0: dead()})
    watch.after_exception(None, {0: dead()})
    with pytest.raises(UserError) as caught:
        watch.after_exception(None, {0: ConnectionError("closed by peer"), 1: dead()})
    assert str(caught.value) == (
        "Training workers failed 3 times without a new checkpoint in between, more than "
        "--max-failures 2, the last time worker 1: its process was killed (often because memory "
        "ran out) or its machine is gone; the same command goes on from the last checkpoint."
    )
    endless = watch_workers(cast(Console, Lines()), -1)
    for _ in range(20):
        endless.after_exception(None, {0: dead()})


def test_an_exception_beyond_the_limit_is_shown_with_its_traceback() -> None:
    console = Lines()
    error = RuntimeError("CUDA error:\nan illegal memory access was encountered")
    error.add_note("Traceback of the worker")
    with pytest.raises(UserError, match=r"failed once .* worker 0: RuntimeError: an illegal"):
        watch_workers(cast(Console, console), 0).after_exception(None, {0: error})
    assert console.lines[-1] == "Traceback of the worker"
