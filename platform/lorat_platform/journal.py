"""What a run has to say, written to disk before anything is sent to MLflow.

One folder per run and store: ``run.json`` (who the run is), ``journal.jsonl`` (append only),
``delivered.json`` (how far MLflow has it), ``artifacts/`` (files waiting for upload),
``postponed.json`` (artefacts that could not be uploaded yet) and ``rejected.jsonl`` (records that
MLflow refused, with its reason).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lorat.addresses import without_secrets

MAX_WAITING = 10_000
"""Records held in memory while the disk refuses them; older ones are counted and dropped."""


class Entry(NamedTuple):
    """One journal line: the record, and the file offset behind it."""

    end: int
    record: dict[str, Any]


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(json.dumps(value, indent=2))
    os.replace(temporary, path)


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

    def header(self) -> dict[str, Any]:
        """Return ``run.json``, or an empty dictionary."""
        try:
            return json.loads((self.folder / "run.json").read_text())
        except FileNotFoundError:
            return {}

    def set_header(self, **values: Any) -> dict[str, Any]:
        """Change fields of ``run.json`` and return all of them."""
        header = self.header() | values
        write_json(self.folder / "run.json", header)
        return header

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; a full or broken disk never raises, see ``disk_error``."""
        with self._mutex:
            self._waiting.append(without_secrets(json.dumps(record)).encode() + b"\n")
            while len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self.num_dropped += 1
            try:
                self._flush()
                self.disk_error = None
            except OSError as error:
                self.disk_error = error

    def _flush(self) -> None:
        with open(self._path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a process was killed in the middle of its line
                    file.write(b"\n")
            while self._waiting:
                file.write(self._waiting[0])
                file.flush()
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
                        record = json.loads(line)
                    except ValueError:
                        record = {"op": "damaged", "line": line.decode(errors="replace")}
                    entries.append(Entry(position, record))
        except FileNotFoundError:
            pass
        return entries

    def position(self) -> int:
        """Return the offset up to which MLflow has everything."""
        try:
            return int(json.loads((self.folder / "delivered.json").read_text())["offset"])
        except FileNotFoundError:
            return 0

    def deliver_to(self, offset: int) -> None:
        """Remember that everything before ``offset`` is delivered (or rejected)."""
        write_json(self.folder / "delivered.json", {"offset": offset})

    def is_read(self) -> bool:
        """Tell whether every record is delivered, rejected or postponed."""
        try:
            return not self._waiting and self.position() >= self._path.stat().st_size
        except FileNotFoundError:
            return not self._waiting

    def is_delivered(self) -> bool:
        """Tell whether nothing waits any more."""
        return self.is_read() and not self.postponed()

    def num_pending(self) -> int:
        """Count the records that are not delivered yet."""
        return len(self.read(limit=1 << 62)) + len(self._waiting) + len(self.postponed())

    def postponed(self) -> list[dict[str, Any]]:
        """Return the records of artefacts that are tried again later."""
        try:
            return json.loads((self.folder / "postponed.json").read_text())
        except FileNotFoundError:
            return []

    def set_postponed(self, records: list[dict[str, Any]]) -> None:
        """Replace the records of artefacts that are tried again later."""
        if records:
            write_json(self.folder / "postponed.json", records)
        else:
            (self.folder / "postponed.json").unlink(missing_ok=True)

    def reject(self, record: dict[str, Any], reason: str) -> None:
        """Keep a record that MLflow refused, with the reason."""
        with open(self.folder / "rejected.jsonl", "a") as file:
            file.write(json.dumps({"reason": reason, "record": record}) + "\n")

    def take_up_rejected(self) -> None:
        """Append the rejected records to the journal again; twice after a kill does no harm."""
        path = self.folder / "rejected.jsonl"
        if not path.exists():
            return
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # cut by a kill; its record is still there whole
                self.append(json.loads(line)["record"])
        path.unlink()

    def stage(self, source: Path | bytes, name: str) -> str:
        """Copy a file, folder or bytes to wait for upload; return the path inside the journal."""
        # Not named by the process: in a container, every start has the same number.
        place = self.folder / "artifacts" / uuid.uuid4().hex
        place.mkdir(parents=True)
        target = place / name
        if isinstance(source, bytes):
            target.write_bytes(source)
        elif source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return str(target.relative_to(self.folder))

    def staged(self, relative: str) -> Path:
        """Return the path of a staged file or folder."""
        return self.folder / relative

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
