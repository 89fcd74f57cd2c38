"""The record of a training run, ``run.json`` in its storage folder.

It ties a name to a configuration, to data and to one MLflow run, so that the same command, given
again after any kind of death, goes on where the run stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from lorat.config import TrainConfig, to_dict
from lorat.errors import UserError
from lorat.storage import Location
from lorat_platform.checkpoint_store import reason
from lorat_platform.recorder import flatten

FILE = "run.json"
OWNER = "driver.json"

Resume = Literal["auto", "never", "must"]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run is, and how far it came."""

    name: str
    config: dict[str, Any]
    """Resolved training configuration."""
    data: dict[str, str]
    """Dataset name -> fingerprint."""
    created: str
    git_revision: str | None = None
    start_weights: str | None = None
    """What ``config.init_from`` meant when the run began; an alias may move later."""
    mlflow_run_id: str | None = None
    finished: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    format: int = 1

    def write(self, folder: Location) -> None:
        """Write the record.

        Raises:
            UserError: if the storage cannot be written.
        """
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        try:
            folder.make()
            folder.write_bytes(FILE, text.encode())
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"The run's folder {folder.uri} cannot be written: {reason(error)}; give another "
                "--storage, or make room or the connection."
            ) from error


def read(folder: Location) -> RunRecord | None:
    """Return the record of a run's folder, or none.

    Raises:
        UserError: if the storage cannot be reached, or the record is of another format or folder.
    """
    try:
        if not folder.exists(FILE):
            return None
        content = json.loads(folder.read_bytes(FILE))
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"The run's folder {folder.uri} cannot be read: {reason(error)}; check --storage."
        ) from error
    if content.get("format") != 1:
        raise UserError(f"{folder.uri} was written by another version; give another --name.")
    # The name becomes part of paths: of the run's checkpoints, and of its journal here.
    if content.get("name") != folder.path.rpartition("/")[2]:
        raise UserError(
            f"The run's folder {folder.uri} holds the record of a run {content.get('name')!r}; "
            "give the folder its run's name again, or give another --name."
        )
    return RunRecord(**content)


def automatic_name(config: TrainConfig, data: dict[str, str]) -> str:
    """Name a run by its variant and everything that decides what it learns."""
    text = json.dumps([to_dict(config), data], sort_keys=True)
    return f"{config.variant}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def choose(
    storage: Location,
    name: str | None,
    config: TrainConfig,
    data: dict[str, str],
    resume: Resume,
    git_revision: str | None,
) -> tuple[Location, RunRecord, bool]:
    """Find the run to go on with, or begin one.

    Without a name, a finished run of the same configuration is left alone and a new one begun;
    with a name it is an error.

    Returns:
        The run's folder, its record, and whether it existed.

    Raises:
        UserError: if the named run cannot be gone on with, for the reason said.
    """
    base = name or automatic_name(config, data)
    for number in range(1, 10_000):
        candidate = base if number == 1 else f"{base}-{number}"
        folder = storage.child(candidate)
        found = read(folder)
        if found is None:
            if resume == "must":
                raise UserError(
                    f"There is no unfinished run {base} in {storage.uri} to resume; check --name "
                    "and --storage, or leave --resume away."
                )
            record = RunRecord(
                name=candidate,
                config=to_dict(config),
                data=data,
                created=time.strftime("%Y-%m-%dT%H:%M:%S"),
                git_revision=git_revision,
            )
            return folder, record, False
        problem = _problem(found, config, data, folder, resume)
        if problem is None:
            return folder, found, True
        if name is not None:
            raise UserError(problem)
    raise UserError(f"There are too many runs {base} in {storage.uri}; give a --name.")


def _problem(
    found: RunRecord, config: TrainConfig, data: dict[str, str], folder: Location, resume: Resume
) -> str | None:
    if resume == "never":
        return f"The run {found.name} exists in {folder.uri}; give another --name."
    if found.finished:
        return f"The run {found.name} in {folder.uri} is finished; give another --name."
    old, new = flatten(found.config), flatten(to_dict(config))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return (
                f"The run {found.name} was begun with {key} = {old.get(key)}, now it is "
                f"{new.get(key)}; give the same options, or another --name."
            )
    if found.data != data:
        return (
            f"The run {found.name} was begun on other data ({found.data}, now {data}); give the "
            "same data, or another --name."
        )
    if alive := owner(folder):
        return (
            f"The run {found.name} is being trained by process {alive} on this machine; wait for "
            "it, or give another --name."
        )
    return None


def claim(folder: Location) -> None:
    """Mark a folder, of a run or a search, as being driven by this process."""
    mark = {"host": socket.gethostname(), "pid": os.getpid(), "start": start_time(os.getpid())}
    folder.write_bytes(OWNER, json.dumps(mark).encode())


def release(folder: Location) -> None:
    """Take the mark away."""
    folder.delete(OWNER)


def owner(folder: Location) -> int | None:
    """Return the living process on this machine that drives a folder, other than this one."""
    if not folder.exists(OWNER):
        return None
    try:
        mark = json.loads(folder.read_bytes(OWNER))
    except ValueError:
        return None
    if mark["host"] != socket.gethostname() or mark["pid"] == os.getpid():
        return None
    return mark["pid"] if start_time(mark["pid"]) == mark["start"] else None


def start_time(pid: int) -> str | None:
    """Return when a process began, in the kernel's ticks; none if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state == "Z" else rest[18]
