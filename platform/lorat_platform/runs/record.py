"""The record of a training run, ``run.json`` in its storage folder.

It ties a name to a configuration, to data and to one MLflow run, so that the same command, given
again after any kind of death, goes on where the run stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from lorat.config.fields import to_dict
from lorat.config.json_files import check_shape, parse_json
from lorat.config.training import TrainConfig
from lorat.errors import UserError, reason
from lorat.files.storage import Location
from lorat_platform.recording.recorder import flatten
from lorat_platform.runs.claim import Driven, Lease

FILE = "run.json"

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
        data = folder.read_bytes(FILE)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"The run's folder {folder.uri} cannot be read: {reason(error)}; check --storage."
        ) from error
    where, remedy = f"{FILE} in {folder.uri}", "give another --name, or restore that file"
    content = parse_json(data, where, remedy, shape={"format": int}, finite=False)
    if content["format"] != 1:
        raise UserError(f"{folder.uri} was written by another version; give another --name.")
    check_shape(content, where, remedy, RunRecord)
    # The name becomes part of paths: of the run's checkpoints, and of its journal here.
    if content["name"] != folder.path.rpartition("/")[2]:
        raise UserError(
            f"The run's folder {folder.uri} holds the record of a run {content['name']!r}; "
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
) -> tuple[Lease, Location, RunRecord, bool]:
    """Find the run to go on with, or begin one, and take the right to drive it.

    Without a name, a run of the same configuration that is finished, or that another process
    drives, is left alone and a new one begun; with a name it is an error.

    Returns:
        The right over the run, its folder, its record, and whether it existed.

    Raises:
        UserError: if the named run cannot be gone on with, for the reason said.
    """
    base = name or automatic_name(config, data)
    for number in range(1, 10_000):
        candidate = base if number == 1 else f"{base}-{number}"
        folder = storage.child(candidate)
        found = read(folder)
        if found is None and resume == "must":
            raise UserError(
                f"There is no unfinished run {base} in {storage.uri} to resume; check --name "
                "and --storage, or leave --resume away."
            )
        problem = _problem(found, config, data, folder, resume)
        if problem is None:
            folder.make()
            lease = Lease(folder, f"The run {candidate}", "give another --name")
            try:
                lease.claim(patient=name is None)
            except Driven:
                if name is not None or resume == "must":
                    raise
                continue
            with contextlib.ExitStack() as stack:
                stack.enter_context(lease)
                # Who had the right until now may have begun or finished it.
                found = read(folder)
                problem = _problem(found, config, data, folder, resume)
                if problem is None:
                    stack.pop_all()
                    record = found or RunRecord(
                        name=candidate,
                        config=to_dict(config),
                        data=data,
                        created=time.strftime("%Y-%m-%dT%H:%M:%S"),
                        git_revision=git_revision,
                    )
                    return lease, folder, record, found is not None
        if name is not None:
            raise UserError(problem)
    raise UserError(f"There are too many runs {base} in {storage.uri}; give a --name.")


def _problem(
    found: RunRecord | None,
    config: TrainConfig,
    data: dict[str, str],
    folder: Location,
    resume: Resume,
) -> str | None:
    if found is None:
        return None
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
    return None
