"""What went wrong, in one line: errors of Ray, of a worker or a machine, boiled down."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from lorat.errors import UserError
from lorat.files.home import home, home_problem

WRAPPED = ("cause", "controller_failure", "_base_exc")
"""Where Ray's errors of tasks, of controllers and of its libraries keep what was raised; those of
worker groups have ``worker_failures``."""


def user_message(error: BaseException | None) -> str | None:
    """Return the sentence of the user error that ``error`` is or wraps, or none."""
    for one in _inside(error, *WRAPPED, "__cause__", "__context__"):
        # What Ray makes of a task's error is of the same class, but its text says where it was.
        if isinstance(one, UserError) and getattr(one, "cause", None) is None:
            return str(one).strip().splitlines()[0]
        # What an actor raised while it was made is only kept as text.
        named = re.search(r"^lorat\.errors\.UserError: (.+)$", str(one), re.MULTILINE)
        if named:
            return named.group(1)
    return None


def _inside(error: BaseException | None, *attributes: str) -> Iterator[BaseException]:
    """Yield an error and all that it wraps, the outermost first.

    Ray wraps what a task raised in several layers, more for tasks of tasks.
    """
    waiting: list[Any] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop(0)
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        failures = getattr(one, "worker_failures", None)
        waiting += failures.values() if isinstance(failures, dict) else []
        waiting += [getattr(one, name, None) for name in attributes]


def surroundings_message(error: BaseException) -> str | None:
    """Return a sentence if what failed is a machine or its files, also in a task, else none."""
    for one in _inside(error, *WRAPPED):
        name = type(one).__name__
        if "OutOfMemoryError" in name or "low on memory" in str(one):
            return (
                "A machine of the cluster ran out of memory and Ray ended a process; use fewer or "
                "smaller workers, or a machine with more memory."
            )
        if "OutOfDiskError" in name:
            return (
                "The disk on which Ray keeps its objects is full; make room there, or set "
                "RAY_TMPDIR to a folder with room, then run the same command again."
            )
        if isinstance(one, OSError) and getattr(one, "cause", None) is None:
            return _files_message(one)
    return None


def _files_message(error: OSError) -> str:
    """Return what to tell the user of an error of files or of the network."""
    lines = str(error.strerror or error).strip().splitlines()
    reason = lines[0].rstrip(".")[:300] if lines else type(error).__name__
    given = (error.filename, error.filename2)
    names = [os.fsdecode(name) for name in given if isinstance(name, str | bytes)]
    what = f"{' to '.join(names)}: {reason}" if names else reason
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            remedy = "make room there"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            remedy = "make it accessible to this user, or give another place"
        case _:
            remedy = "mend that"
    return f"{what}; {remedy}, then run the same command again."


def home_message(error: BaseException) -> str | None:
    """Return a sentence if the home folder, which most jobs need, cannot be written, else none."""
    problem = home_problem()
    if problem is None:
        return None
    lines = str(error).strip().splitlines()
    return (
        f"The home folder {home()} cannot be written ({problem}), which stopped the job "
        f"({type(error).__name__}: {lines[0][:200] if lines else ''}); set LORAT_HOME to a folder "
        "that can."
    )


def cause(error: Exception) -> str:
    """Say in one line why a worker failed."""
    text = str(error)
    if "low on memory" in text or "OutOfMemory" in type(error).__name__:
        return "its machine ran out of memory and Ray ended it"
    if _is_dead(error):
        return "its process was killed (often because memory ran out) or its machine is gone"
    lines = text.strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else repr(error)


def _actor_error(error: BaseException) -> Any:
    """Return Ray's own error about an actor that Ray Train wraps when a health check fails."""
    from ray.exceptions import RayActorError

    inner = getattr(error, "health_check_failure", error)
    return inner if isinstance(inner, RayActorError) else None


def _is_dead(error: Exception) -> bool:
    return _actor_error(error) is not None


def is_preempted(error: BaseException) -> bool:
    """Tell whether a process died because its node was taken away, which is no failure."""
    actor_error = _actor_error(error)
    return actor_error is not None and actor_error.preempted


LOW_MEMORY = re.compile("low on memory|OUT_OF_MEMORY")
"""What Ray says of a process that it ended for that."""


MEMORY_SHORT = "its machine ran low on memory and Ray ended the trial's process"


class TrialFailed(UserError):
    """What ended a trial, as its process tells the driver.

    Args:
        reason: one line.
        of_surroundings: as :func:`is_of_surroundings` says where everything about it is known.
        step: that the trial had reached; none if nobody knows.
    """

    def __init__(self, reason: str, of_surroundings: bool, step: int | None) -> None:
        super().__init__(reason, of_surroundings, step)  # which is what a pickle keeps
        self.of_surroundings = of_surroundings
        self.step = step

    def __str__(self) -> str:
        return str(self.args[0])

    @staticmethod
    def inside(error: BaseException) -> TrialFailed | None:
        """Return the one that an error is or wraps, or none."""
        for one in _inside(error, *WRAPPED):
            if isinstance(one, TrialFailed) and getattr(one, "cause", None) is None:
                return one
        return None


@contextlib.contextmanager
def trial_failures(step: Callable[[], int | None]) -> Iterator[None]:
    """Turn what a trial raises into :class:`TrialFailed`, with the step that it had reached."""
    try:
        yield
    except Exception as error:
        raise TrialFailed(failure_reason(error), is_of_surroundings(error), step()) from error


def is_of_surroundings(error: BaseException) -> bool:
    """Tell whether a machine, a process or a file failed, and not what a trial was asked to do.

    A file that is missing or cannot be read or written, a connection, a process that was killed, a
    node that is gone, and everything else that Ray says of itself are surroundings.  Memory that
    ran out, also where Ray ended the process for it, a loss that is not finite, a configuration
    that cannot be, and everything unknown are the trial's own: they would fail again.
    """
    from ray.exceptions import RayError, RayTaskError

    parts = list(_inside(error, *WRAPPED))
    if any(_is_of_memory(part) for part in parts):
        return False
    for part in parts:
        if isinstance(part, TrialFailed) and getattr(part, "cause", None) is None:
            return part.of_surroundings
        if isinstance(part, UserError):
            behind = _inside(part, "__cause__", "__context__")
            if getattr(part, "cause", None) is None:
                return any(isinstance(one, OSError) for one in behind)
        elif isinstance(part, OSError):
            return True
        elif isinstance(part, RayTaskError):
            continue  # wraps what counts
        elif isinstance(part, RayError) or _actor_error(part) is not None:
            return user_message(part) is None
    return False


def _is_of_memory(error: BaseException) -> bool:
    named = "OutOfMemory" in type(error).__name__ or isinstance(error, MemoryError)
    full = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return named or full or LOW_MEMORY.search(str(error)) is not None


def failure_reason(error: BaseException) -> str:
    """Say in one line why a trial failed."""
    import torch

    # Ray's error is of the cause's class, too, but says where it was raised.
    raised = getattr(error, "cause", None) or error
    message = user_message(raised)
    if message is not None:
        return message
    if LOW_MEMORY.search(str(raised)):
        return MEMORY_SHORT
    if isinstance(raised, torch.OutOfMemoryError):
        return f"the GPU's memory ran out: {last_line(str(raised).partition('. GPU')[0])}"
    if isinstance(raised, MemoryError):
        return f"memory ran out: {last_line(str(raised)) or 'MemoryError'}"
    if type(raised).__name__ in ("ActorDiedError", "ActorUnavailableError", "RayActorError"):
        return f"the trial's process died: {last_line(str(raised))}"
    return f"{type(raised).__name__}: {last_line(str(raised))}"


def last_line(text: str) -> str:
    """Return the last line that says something, cut if it is long."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
