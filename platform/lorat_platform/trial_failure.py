"""Why a trial failed, in one line, from what Ray Tune keeps of it."""

from __future__ import annotations

import os
import pickle
import re
import stat
from pathlib import Path
from typing import Any

import torch

from lorat_platform.command import user_message

LOW_MEMORY = re.compile("low on memory|OUT_OF_MEMORY")
"""What Ray says of a process that it ended for that."""
MEMORY_SHORT = "its machine ran low on memory and Ray ended the trial's process"


def failure_reason(trial: Any) -> str:
    """Say in one line why a trial failed."""
    error: BaseException | None = None
    path = trial.pickled_error_file
    if path and Path(path).exists():
        error = _own_error(Path(path))
    if error is None:
        text = Path(trial.error_file).read_text() if trial.error_file else ""
        return MEMORY_SHORT if LOW_MEMORY.search(text) else last_line(text) or "unknown"
    # Ray's error is of the cause's class, too, but says where it was raised.
    cause = getattr(error, "cause", None) or error
    message = user_message(cause)
    if message is not None:
        return message
    if LOW_MEMORY.search(str(cause)):
        return MEMORY_SHORT
    if isinstance(cause, torch.OutOfMemoryError):
        return f"the GPU's memory ran out: {last_line(str(cause).partition('. GPU')[0])}"
    if isinstance(cause, MemoryError):
        return f"memory ran out: {last_line(str(cause)) or 'MemoryError'}"
    if type(cause).__name__ in ("ActorDiedError", "ActorUnavailableError", "RayActorError"):
        return f"the trial's process died: {last_line(str(cause))}"
    return f"{type(cause).__name__}: {last_line(str(cause))}"


def _own_error(path: Path) -> BaseException | None:
    """Read the error that Ray Tune has just written; none if the file is not this user's alone.

    It lies in a folder of Ray's session, which every user of the machine can write to.
    """
    with open(path, "rb") as file:
        about = os.fstat(file.fileno())
        if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        return pickle.loads(file.read())


def last_line(text: str) -> str:
    """Return the last line that says something, cut if it is long."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
