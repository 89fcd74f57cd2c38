"""What a run has to say, written to disk before anything is sent to MLflow.

One folder per run and store: ``run.json`` (who the run is), ``journal.jsonl`` (append only),
``delivered.json`` (how far MLflow has it), ``artifacts/`` (files waiting for upload),
``postponed.json`` (artefacts that could not be uploaded yet), ``rejected.jsonl`` (records that
MLflow refused, with its reason) and ``console.log`` (what the job printed).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import os
import re
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from lorat.config.bounds import Bounds
from lorat.config.json_files import check_shape, parse_json, read_json, write_json
from lorat.errors import UserError
from lorat.files.addresses import without_secrets
from lorat.files.storage import is_plain_name
from lorat_platform.recording.console_log import NAME as CONSOLE
from lorat_platform.recording.console_log import LogFile
from lorat_platform.recording.recorder import regular_files

_REMEDY = "delete it, or the folder; what was not delivered is lost then"
_Time = Annotated[int, Bounds(0, 2**53)]
_HEADER_SHAPE = {
    "key": str,
    "run_id": str | None,
    "experiment": str,
    "name": str,
    "parent": str | None,
    "start_ms": _Time,
    "tracking_uri": str,
    "store": str,
    "experiment_id?": str,
    "console?": str,
}
_INPUT_SHAPE = dict.fromkeys(
    ("name", "digest", "source_type", "source", "schema", "profile", "context"), str
)
_RECORD_SHAPES: dict[str, dict[str, Any]] = {
    "metrics": {"step": Annotated[int, Bounds(-(2**63), 2**63)], "values": dict[str, float]},
    "params": {"values": dict[str, str]},
    "tags": {"values": dict[str, str]},
    "status": {"status": str},
    "artifact": {"staged": str, "folder": str | None},
    "view": {"key": str, "view": str},
    "inputs": {"datasets": [_INPUT_SHAPE]},
}
"""What a record has beside ``op`` and ``time_ms``, by its ``op``."""

REJECTED = "rejected.jsonl"
"""File of the records that MLflow refused."""
ARTIFACTS = "artifacts"
"""Folder of the files that wait for upload, each in a folder of its own."""
_STAGED = re.compile(rf"{ARTIFACTS}/[0-9a-f]{{32}}/([^/]+)")
"""What :meth:`Journal.stage` returns; anything else was written by somebody else."""
MAX_WAITING = 10_000
"""Records held in memory while the disk refuses them; older ones are counted and dropped."""


class Entry(NamedTuple):
    """One journal line: the record, and the file offset behind it."""

    end: int
    record: dict[str, Any]


def _parse_record(line: bytes, where: str) -> dict[str, Any]:
    """Read a line of a journal.

    Raises:
        UserError: if it is no record.
    """
    record = parse_json(line, where, _REMEDY, shape={"op": str, "time_ms": _Time}, finite=False)
    check_shape(record, where, _REMEDY, _RECORD_SHAPES.get(record["op"], {}))
    return record


def _write_whole(file: io.FileIO, data: bytes) -> None:
    """Write all of some bytes, of which the system may take a part at a time."""
    while data:
        data = data[file.write(data) :]


class Journal:
    """Append records, read them back, and remember how many were delivered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "journal.jsonl"
        self._mutex = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self.num_dropped = 0
        """Records that neither disk nor memory could hold."""
        self.disk_error: OSError | None = None
        """Why the last append did not reach the disk, if it did not."""

    @functools.cached_property
    def console(self) -> LogFile:
        """The run's console log."""
        return LogFile(self.folder / self.header().get("console", CONSOLE))

    def header(self) -> dict[str, Any]:
        """Return ``run.json``, or an empty dictionary."""
        return read_json(self.folder / "run.json", _REMEDY, shape=_HEADER_SHAPE, missing={})

    def set_header(self, **values: Any) -> dict[str, Any]:
        """Change fields of ``run.json`` and return all of them."""
        header = self.header() | values
        write_json(header, self.folder / "run.json")
        return header

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; a full or broken disk never raises, see ``disk_error``."""
        with self._mutex:
            self._waiting.append(without_secrets(json.dumps(record)).encode() + b"\n")
            while len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self.num_dropped += 1
            self._try_to_flush()

    def log(self, text: str) -> None:
        """Append to the console log; a full or broken disk never raises, see ``disk_error``."""
        try:
            self.console.append(text)
        except OSError as error:
            self.disk_error = error

    def retry(self) -> None:
        """Write what the disk refused before, if it takes it now."""
        with self._mutex:
            if self._waiting:
                self._try_to_flush()

    def _try_to_flush(self) -> None:
        try:
            self._flush()
            self.disk_error = None
        except OSError as error:
            self.disk_error = error

    def _flush(self) -> None:
        # Without a buffer, which would write what is left of a line when the file is closed.
        with open(self._path, "ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a process was killed in the middle of its line
                    _write_whole(file, b"\n")
            while self._waiting:
                end = file.seek(0, os.SEEK_END)
                try:
                    _write_whole(file, self._waiting[0])
                except OSError:
                    # The line is written again as a whole; half of it would count as damaged.
                    file.truncate(end)
                    raise
                self._waiting.popleft()

    def read(self, limit: int) -> list[Entry]:
        """Return up to ``limit`` complete records that are not delivered yet."""
        position = self.position()
        entries: list[Entry] = []
        try:
            with open(self._path, "rb") as file:
                file.seek(position)
                for line in file:
                    if not line.endswith(b"\n") or len(entries) == limit:
                        break
                    position += len(line)
                    try:
                        record = _parse_record(line, str(self._path))
                    except UserError:
                        record = {"op": "damaged", "line": line.decode(errors="replace")}
                    entries.append(Entry(position, record))
        except FileNotFoundError:
            pass
        return entries

    def position(self) -> int:
        """Return the offset up to which MLflow has everything."""
        file, shape = self.folder / "delivered.json", {"offset": Annotated[int, Bounds(0, 2**62)]}
        return read_json(file, _REMEDY, shape=shape, missing={"offset": 0})["offset"]

    def deliver_to(self, offset: int) -> None:
        """Remember that everything before ``offset`` is delivered (or rejected)."""
        write_json({"offset": offset}, self.folder / "delivered.json")

    def is_read(self) -> bool:
        """Tell whether every record is delivered, rejected or postponed."""
        try:
            return not self._waiting and self.position() >= self._path.stat().st_size
        except FileNotFoundError:
            return not self._waiting

    def is_delivered(self) -> bool:
        """Tell whether nothing waits any more."""
        return self.is_read() and not self.postponed() and not self.console.is_ahead()

    def num_pending(self) -> int:
        """Count the records on disk that are not delivered yet; the console log is one."""
        return len(self.read(limit=1 << 62)) + len(self.postponed()) + self.console.is_ahead()

    def num_lost(self) -> int:
        """Count the records that are not on disk; those in memory are lost with the process."""
        return self.num_dropped + len(self._waiting)

    def postponed(self) -> list[dict[str, Any]]:
        """Return the records of artefacts that are tried again later."""
        file = self.folder / "postponed.json"
        return read_json(file, _REMEDY, shape=[dict], finite=False, missing=[])

    def set_postponed(self, records: list[dict[str, Any]]) -> None:
        """Replace the records of artefacts that are tried again later."""
        if records:
            write_json(records, self.folder / "postponed.json")
        else:
            (self.folder / "postponed.json").unlink(missing_ok=True)

    def reject(self, record: dict[str, Any], reason: str) -> None:
        """Keep a record that MLflow refused, with the reason."""
        with open(self.folder / REJECTED, "a") as file:
            file.write(json.dumps({"reason": reason, "record": record}) + "\n")

    def take_up_rejected(self) -> None:
        """Append the rejected records to the journal again; twice after a kill does no harm."""
        path = self.folder / REJECTED
        if not path.exists():
            return
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(UserError):  # cut by a kill; its record is still there whole
                shape = {"record": dict}
                kept = parse_json(line, str(path), _REMEDY, shape=shape, finite=False)
                self.append(kept["record"])
        path.unlink()

    def stage(self, source: Path | bytes, name: str) -> str:
        """Copy a file, folder or bytes to wait for upload; return the path inside the journal.

        Of a folder, only regular files are copied: no link is followed.

        Raises:
            OSError: if the copy cannot be made, or the source is no file or folder itself.
        """
        # Not named by the process: in a container, every start has the same number.
        place = self.folder / ARTIFACTS / uuid.uuid4().hex
        place.mkdir(parents=True)
        target = place / name
        try:
            if isinstance(source, bytes):
                target.write_bytes(source)
            else:
                _copy(source, target)
        except OSError:
            shutil.rmtree(place, ignore_errors=True)
            raise
        return str(target.relative_to(self.folder))

    def staged(self, relative: Any) -> Path:
        """Return the path of a staged file or folder, all of it made by :meth:`stage`.

        Raises:
            UserError: for any other path, and for links: whoever can write to the journal's folder
                would choose what is uploaded, or deleted, with the rights of this process.
        """
        match = _STAGED.fullmatch(relative) if isinstance(relative, str) else None
        if not match or not is_plain_name(match.group(1)):
            raise UserError(
                f"The journal in {self.folder} names the artefact {relative!r}, which is none of "
                "its own; look who else can write there."
            )
        path = self.folder / relative
        for inside in (path.parent.parent, path.parent, path, *path.rglob("*")):
            special = inside.exists() and not (inside.is_file() or inside.is_dir())
            if inside.is_symlink() or special:
                raise UserError(
                    f"The artefact {relative} of the journal in {self.folder} is not what was put "
                    f"there ({inside} is a link or a special file); remove that, and look who "
                    "else can write there."
                )
        return path

    def unstage(self, relative: str) -> None:
        """Delete a staged file or folder."""
        shutil.rmtree(self.staged(relative).parent, ignore_errors=True)

    @contextlib.contextmanager
    def owned(self) -> Iterator[bool]:
        """Hold the right to deliver; yields False when a living process has it."""
        with open(self.folder / "lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()
    for path, relative in regular_files(source):
        copy = target / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy, follow_symlinks=False)
