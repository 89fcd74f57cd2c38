"""What a person is told, once, when MLflow or the disk does not take what runs record."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import lorat_platform
from lorat_platform.recording.journal import REJECTED

log = logging.getLogger(__name__)

AGAIN_S = 60.0
"""Shortest time between two lines of the same trouble, however often it comes and goes."""


class Trouble:
    """One kind of trouble, which all runs of a process have together: said when it begins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._having: set[int] = set()
        self._said = False
        self._said_at = float("-inf")

    def begin(self, run: object, message: str) -> None:
        """Note that a run has it, and say so unless that was said."""
        with self._lock:
            self._having.add(id(run))
            if self._said or time.monotonic() < self._said_at + AGAIN_S:
                return
            self._said, self._said_at = True, time.monotonic()
        log.warning("%s", message)

    def end(self, run: object, message: str = "") -> None:
        """Note that a run has it no longer; ``message`` is said if no run has it any more."""
        with self._lock:
            self._having.discard(id(run))
            if self._having or not self._said:
                return
            self._said = False
        if message:
            log.warning("%s", message)


class Ending(NamedTuple):
    """What the end of a run left behind."""

    delivered: bool
    """Whether MLflow has everything."""
    arrived: bool
    """Whether MLflow has the run at all."""
    waiting: int
    """Records that wait in the journal."""
    lost: int
    """Records that the disk did not take."""
    refused: int
    """Records that MLflow refused; the journal's folder keeps them."""
    folder: Path
    """The journal's folder."""
    store: str
    """Address of MLflow, without a password."""
    reason: str
    """Why MLflow or the disk did not take them, as far as known."""


def say_what_is_left(endings: Sequence[Ending]) -> None:
    """Say how many records of the ended runs wait, where, and what delivers them."""
    waiting = [ending for ending in endings if ending.waiting]
    if waiting:
        first, several = waiting[0], len(waiting) > 1
        # In one form for all reasons: a server that refuses the password has answered.
        what = (
            f"MLflow at {first.store} did not take everything"
            if any(ending.arrived for ending in endings)
            else f"Nothing of {'these runs' if several else 'this run'} has arrived in MLflow at "
            f"{first.store}"
        )
        log.warning(
            "%s%s: %d records wait in %s. The next job on this machine that uses this MLflow "
            "delivers them, or now: %s",
            what,
            f" ({first.reason})" if first.reason else "",
            sum(ending.waiting for ending in waiting),
            f"{len(waiting)} journals, the first one {first.folder}" if several else first.folder,
            replay_command(first.store, *([] if several else [first.folder])),
        )
    lost = [ending for ending in endings if ending.lost]
    if lost:
        log.warning(
            "%d records are lost, since the journal in %s could not be written (%s).",
            sum(ending.lost for ending in lost),
            lost[0].folder,
            lost[0].reason,
        )
    refused = [ending for ending in endings if ending.refused]
    if refused:
        log.warning(
            "MLflow refused %d records; they are in %s. Sent again by: %s",
            sum(ending.refused for ending in refused),
            " ".join(str(ending.folder / REJECTED) for ending in refused),
            replay_command(refused[0].store, *(ending.folder for ending in refused)),
        )


def replay_command(store: str, *folders: Path) -> str:
    """Return the command that delivers what waits, whatever MLFLOW_TRACKING_URI is then.

    Args:
        store: address of the MLflow to which the journals belong.
        folders: of the journals; none means all of this machine that belong to the store.
    """
    fixed = {"MLFLOW_TRACKING_URI": store}
    if not folders and (place := os.environ.get("LORAT_HOME")):  # it has the list of the journals
        fixed["LORAT_HOME"] = str(Path(place).absolute())
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in fixed.items())
    return f"{variables} {recording_command('replay', *map(str, folders))}"


def recording_command(*arguments: str) -> str:
    """Return how ``python -m lorat_platform.recording`` is called, from wherever it is."""
    try:
        metadata.distribution("lorat")
        path = ""
    except metadata.PackageNotFoundError:  # run from a checkout
        platform = Path(lorat_platform.__file__).parents[1]
        path = f"PYTHONPATH={shlex.quote(f'{platform.parent}:{platform}')} "
    return path + shlex.join([sys.executable, "-m", "lorat_platform.recording", *arguments])
