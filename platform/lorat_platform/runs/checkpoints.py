"""Checkpoints in a run's storage folder: complete or absent, whatever fails while they are written.

A checkpoint is a folder ``step-00001200``.  On a file system it is written beside its place and
renamed; in an object store, which cannot rename, ``complete.json`` is written last.  In both it
lists the files with their sizes, and a folder without it, or with other files, is no checkpoint.
One that is deleted is renamed, or loses ``complete.json``, first.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import tenacity

from lorat.config.json_files import parse_json
from lorat.errors import UserError, reason
from lorat.files import scratch
from lorat.files.storage import Location, is_plain_name

log = logging.getLogger(__name__)

MANIFEST = "complete.json"
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of the checkpoints of a run."""
BETWEEN_RUNGS = "between-rungs"
"""Folder of a search with one for each trial, for the checkpoints that Ray Tune does not keep."""
ATTEMPTS = 3
_SHAPE = {"files": dict[str, int]}
_NAME = re.compile(r"step-(\d{8,})")

T = TypeVar("T")


def name_of(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's folder name, or none."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def upload(local: Path, run: Location, name: str) -> None:
    """Copy a checkpoint into the run's folder; afterwards it is complete there.

    Raises:
        UserError: if the storage refuses, is full or cannot be reached; nothing else is harmed.
    """
    files = {
        str(path.relative_to(local)): path.stat().st_size
        for path in sorted(local.rglob("*"))
        if path.is_file()
    }
    try:
        if not is_complete(run, name, files):
            _again(lambda: _copy(local, run, name, files))
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"The checkpoint {name} cannot be written to {run.uri}: {reason(error)}"
            f"{_what_is_left(run)}; make room or restore the connection and give the same command "
            "again."
        ) from error


def _what_is_left(run: Location) -> str:
    """Name the last good checkpoint, as far as the storage can still be asked."""
    try:
        last = newest(run)
    except (OSError, pa.ArrowException):
        return "; what was complete there is intact"
    return f"; {last} is intact" if last else ""


def _copy(local: Path, run: Location, name: str, files: dict[str, int]) -> None:
    manifest = json.dumps({"files": files}, indent=1).encode()
    if run.is_local:
        part = Path(run.file(f".part-{name}"))
        shutil.rmtree(part, ignore_errors=True)
        try:
            shutil.copytree(local, part)
            (part / MANIFEST).write_bytes(manifest)
            scratch.follow_umask(part)  # a temporary folder is for its owner alone
            target = Path(run.file(name))
            run.delete_folder(name)  # an earlier, broken one
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return
    run.filesystem.create_dir(run.file(name), recursive=True)
    pafs.copy_files(
        str(local), run.file(name), destination_filesystem=run.filesystem, use_threads=False
    )
    with run.filesystem.open_output_stream(run.file(f"{name}/{MANIFEST}")) as stream:
        stream.write(manifest)


def is_complete(run: Location, name: str, files: dict[str, int] | None = None) -> bool:
    """Tell whether a checkpoint is there with all its files (and has exactly ``files``)."""
    try:
        data = run.child(name).read_bytes(MANIFEST)
        listed = parse_json(data, f"{MANIFEST} of {name}", "delete that folder", shape=_SHAPE)
    except (FileNotFoundError, NotADirectoryError, UserError):
        return False
    except OSError:
        if run.filesystem.get_file_info(run.file(f"{name}/{MANIFEST}")).is_file:
            raise  # the storage cannot be reached: nothing is known of the checkpoint
        return False
    listed = listed["files"]
    if (files is not None and listed != files) or not all(map(_is_inside, listed)):
        return False
    infos = run.filesystem.get_file_info([run.file(f"{name}/{file}") for file in listed])
    return all(info.size == listed[file] for file, info in zip(listed, infos, strict=True))


def _is_inside(file: str) -> bool:
    return all(map(is_plain_name, file.split("/")))


def complete(run: Location, name: str) -> None:
    """Mark a folder, whatever its name, that another program has written as a checkpoint."""
    place = run.child(name)
    files = {name: place.filesystem.get_file_info(place.file(name)).size for name in place.names()}
    files.pop(MANIFEST, None)
    place.write_bytes(MANIFEST, json.dumps({"files": files}, indent=1).encode())


def names(run: Location) -> list[str]:
    """List the complete checkpoints, oldest first."""
    return [name for name in _folders(run) if is_complete(run, name)]


def parts(run: Location) -> list[str]:
    """List the folders of checkpoints that were not written, or not deleted, to the end.

    Those with all their files are none, damaged as they may be.
    """
    left = []
    for name in _folders(run):
        try:
            listed = json.loads(run.child(name).read_bytes(MANIFEST))["files"]
            paths = [run.file(f"{name}/{file}") for file in listed]
        except FileNotFoundError:
            left.append(name)
        except (UserError, ValueError, KeyError, TypeError):  # damaged, and not by a kill
            continue
        else:
            infos = run.filesystem.get_file_info(paths)
            if any(info.type == pafs.FileType.NotFound for info in infos):
                left.append(name)
    if run.is_local:
        left += [path.name for path in Path(run.path).glob(".part-step-*")]
    return left


def _folders(run: Location) -> list[str]:
    return [name for name in run.folders() if step_of(name) is not None]


def delete(run: Location, name: str) -> None:
    """Delete a checkpoint; whatever ends this half-way, what is left does not look like one."""
    if not run.is_local:
        run.child(name).delete(MANIFEST)
    run.delete_folder(name)


def newest(run: Location) -> str | None:
    """Return the complete checkpoint with the most steps, or none."""
    complete = names(run)
    return complete[-1] if complete else None


def download(run: Location, name: str, target: Path) -> Path:
    """Return a local folder with a checkpoint's files: the place itself if it is local."""
    if run.is_local:
        return Path(run.file(name))
    target.mkdir(parents=True, exist_ok=True)
    _again(
        lambda: pafs.copy_files(
            run.file(name), str(target), source_filesystem=run.filesystem, use_threads=False
        )
    )
    return target


def repair(run: Location) -> None:
    """Make the run's folder fit to go on after any kind of death; only for who drives the run.

    What was not written, or not deleted, to the end is removed.  Ray Train's list of checkpoints,
    which it does not write atomically, is removed if it cannot be read or names a folder that is
    gone; training then resumes from the newest complete checkpoint all the same.
    """
    sweep_parts(run)
    if not run.exists(SNAPSHOT):
        return
    try:
        missing = [name for name in registered(run) if not run.exists(name)]
    except UserError:
        missing = ["(unreadable)"]
    if missing:
        log.warning("the list of checkpoints in %s is damaged and is made anew", run.uri)
        run.delete(SNAPSHOT)


def sweep_parts(run: Location) -> None:
    """Remove what was not written, or not deleted, to the end; only where nobody else writes."""
    for name in parts(run):
        delete(run, name)
    if run.is_local:
        scratch.sweep(Path(run.path))


def sweep(run: Location) -> None:
    """Remove checkpoints that Ray Train does not know of (it died in between), but the newest."""
    known = registered(run)
    for name in names(run)[:-1]:
        if name not in known:
            delete(run, name)


def _again(call: Callable[[], T]) -> T:
    """Try a storage call a few times; a full disk is not tried again."""
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=5),
        retry=tenacity.retry_if_exception(_may_pass),
        reraise=True,
    )(call)


def _may_pass(error: BaseException) -> bool:
    import errno

    lasting = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR)
    if isinstance(error, OSError) and error.errno in lasting:
        return False
    return isinstance(error, OSError | pa.ArrowException)


def registered(run: Location) -> dict[str, dict[str, Any]]:
    """Return the metrics of every checkpoint that Ray Train keeps, by name.

    Raises:
        UserError: if its list is damaged.
    """
    if not run.exists(SNAPSHOT):
        return {}
    entries = parse_json(
        run.read_bytes(SNAPSHOT),
        f"{SNAPSHOT} in {run.uri}",
        "delete it, the checkpoints themselves are intact",
        shape={"checkpoint_results": [{"checkpoint_dir_name": str, "metrics": dict}]},
        finite=False,
    )["checkpoint_results"]
    return {entry["checkpoint_dir_name"]: entry["metrics"] for entry in entries}
