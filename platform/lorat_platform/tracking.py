"""MLflow runs that never stop or slow a training.

A :class:`Run` only appends to a journal on disk; a thread brings the journal to MLflow, whenever
MLflow can take it.  What is left when the process ends is delivered by the next run on this
machine, or by ``python -m lorat_platform.tracking replay``.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import tenacity

from lorat.errors import UserError
from lorat.home import home
from lorat_platform.delivery import Delivery
from lorat_platform.journal import Journal, write_json
from lorat_platform.mlflow_store import tracking_uri, without_password

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
POLL_S = 1.0
"""Longest wait before new records are looked for."""
RETRY_S = 30.0
"""Longest pause between two attempts while MLflow does not answer."""
CLOSE_S = 60.0
"""Longest wait for MLflow at the end of a run; the rest stays in the journal."""
ID_S = 300.0
"""Longest wait for the id of a run: making a new store can take minutes on a busy machine."""
ID_ATTEMPTS = 4
"""Failed attempts after which MLflow counts as out of reach for that."""


class Recorder(ABC):
    """What a run can be told; values are checked and made plain here."""

    @abstractmethod
    def _record(self, op: str, **fields: Any) -> None: ...

    @abstractmethod
    def _store(self, source: Path | bytes, name: str, folder: str) -> None: ...

    def log_metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Record numbers at a step; NaN and infinities are kept and marked, never refused."""
        plain: dict[str, float] = {}
        for name, value in values.items():
            try:
                plain[_valid_name(name)] = float(value)
            except (TypeError, ValueError):
                log.warning("The metric %s is %r, which is no number: left out.", name, value)
        if plain:
            self._record("metrics", values=plain, step=int(step))

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; nested ones become dotted names, long ones go to an artefact too."""
        flat = {_valid_name(k): _text(v) for k, v in flatten(values).items()}
        if flat:
            self._record("params", values=flat)

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the run."""
        if values:
            self._record("tags", values={_valid_name(k): _text(v) for k, v in values.items()})

    def set_description(self, markdown: str) -> None:
        """Set what the run's page shows at its top."""
        self.set_tags({"mlflow.note.content": markdown})

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Record a copy of a file or folder, placed under ``folder`` of the run's artefacts."""
        path = Path(path)
        self._store(path, path.name, folder)

    def log_bytes(self, data: bytes, name: str) -> None:
        """Record an artefact from memory; ``name`` may hold folders, as in ``plots/a.png``."""
        folder, _, name = name.rpartition("/")
        self._store(data, name, folder)


class Run(Recorder):
    """One MLflow run, written through a journal.  Made by :func:`open_run`."""

    def __init__(self, journal: Journal, uri: str) -> None:
        self.journal = journal
        self.uri = uri
        self._delivery = Delivery(journal, uri)
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._stop = threading.Event()
        self._idle = threading.Condition()
        self._error: str | None = None
        self._failed_attempts = 0
        self._warned_at = -math.inf
        self._thread = threading.Thread(target=self._send, name="mlflow-sender", daemon=True)
        self._thread.start()

    @property
    def key(self) -> str:
        """The name of this run that does not need MLflow; also a tag of it."""
        return self.journal.header()["key"]

    @property
    def run_id(self) -> str | None:
        """MLflow's id, or none as long as MLflow has not answered."""
        return self.journal.header().get("run_id")

    @property
    def reference(self) -> str:
        """What to pass as ``parent_run_id`` of children, whether or not MLflow has answered."""
        return f"key:{self.key}"

    def wait_for_id(self, timeout_s: float = ID_S) -> str:
        """Return MLflow's id, waiting for it.

        Raises:
            TimeoutError: if MLflow does not answer in time, or several attempts fail.
        """
        began, attempts = time.monotonic(), self._failed_attempts
        while not (run_id := self.run_id):
            waited_s = time.monotonic() - began
            failed = self._failed_attempts - attempts
            if waited_s > timeout_s or failed >= ID_ATTEMPTS:
                raise TimeoutError(
                    f"MLflow at {without_password(self.uri)} has not answered in {waited_s:.0f} s"
                    f"{f': {self._error}' if self._error else ''}."
                )
            if failed:
                self._wake.set()  # do not sit out the pause between two attempts
            time.sleep(0.05)
        return run_id

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until MLflow has everything; False if it does not within the time."""
        deadline = time.monotonic() + timeout_s
        attempts = self._failed_attempts
        self._wake.set()
        while not (self.journal.is_delivered() and self.run_id):
            closing = self._closing.is_set()
            if closing and self._failed_attempts >= attempts + 2:
                return False
            if time.monotonic() > deadline:
                return False
            if closing and self._failed_attempts > attempts:
                self._wake.set()  # do not sit out the pause between two attempts
            with self._idle:
                self._idle.wait(0.1)
        return True

    def close(self, status: Status = "FINISHED", timeout_s: float = CLOSE_S) -> bool:
        """End the run; what MLflow does not take in time stays in the journal, and is said."""
        if self._stop.is_set():
            return True
        self._record("status", status=status)
        self._closing.set()
        delivered = self.flush(timeout_s)
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=1.0)
        if delivered:
            _forget(self.journal)
        else:
            log.warning(
                "MLflow at %s did not take everything: %d records wait in %s. The next run "
                "delivers them, or now: python -m lorat_platform.tracking replay %s",
                without_password(self.uri),
                self.journal.num_pending(),
                self.journal.folder,
                self.journal.folder,
            )
        return delivered

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    # -- writing -----------------------------------------------------------------------------

    def _record(self, op: str, **fields: Any) -> None:
        self.write({"op": op, "time_ms": time.time_ns() // 1_000_000, **fields})

    def write(self, record: dict[str, Any]) -> None:
        """Append a finished record: what the methods above, here or on another node, made."""
        self.journal.append(record)
        if self.journal.disk_error and time.monotonic() > self._warned_at + 60:
            self._warned_at = time.monotonic()
            log.warning(
                "The journal in %s cannot be written (%s); records wait in memory, %d are lost.",
                self.journal.folder,
                self.journal.disk_error,
                self.journal.num_dropped,
            )
        if record["op"] != "metrics":
            self._wake.set()

    def _store(self, source: Path | bytes, name: str, folder: str) -> None:
        try:
            staged = self.journal.stage(source, name)
        except OSError as error:
            log.warning("The artefact %s is left out: %s", name, error)
            return
        self._record("artifact", staged=staged, folder=folder)

    # -- sending -----------------------------------------------------------------------------

    def _send(self) -> None:
        attempts = tenacity.Retrying(
            wait=tenacity.wait_random_exponential(multiplier=1.0, max=RETRY_S),
            stop=tenacity.stop_when_event_set(self._stop),
            sleep=self._pause,
            before_sleep=self._note_failure,
            reraise=True,
        )
        others_done = False
        while not self._stop.is_set():
            with self.journal.owned() as mine:
                while mine and not self._stop.is_set():
                    try:
                        num_sent = attempts(self._delivery.step)
                    except Exception as error:  # only when closing: the journal keeps the rest
                        self._error = str(error)
                        break
                    self._error = None
                    self._failed_attempts = 0
                    with self._idle:
                        self._idle.notify_all()
                    if num_sent == 0:
                        if not others_done and not self._closing.is_set():
                            others_done = True
                            _replay_quietly()
                        self._pause(POLL_S)
            self._pause(POLL_S)

    def _pause(self, seconds: float) -> None:
        self._wake.wait(seconds)
        self._wake.clear()

    def _note_failure(self, state: tenacity.RetryCallState) -> None:
        self._failed_attempts += 1
        error = state.outcome.exception() if state.outcome else None
        self._error = str(error).splitlines()[0] if error and str(error) else repr(error)
        if state.attempt_number == 1 or time.monotonic() > self._warned_at + 300:
            self._warned_at = time.monotonic()
            log.warning(
                "MLflow at %s cannot be reached (%s); training goes on, the metrics wait in %s.",
                without_password(self.uri),
                self._error[:300],
                self.journal.folder,
            )


def open_run(
    experiment: str,
    name: str,
    *,
    folder: str | Path | None = None,
    run_id: str | None = None,
    parent_run_id: str | None = None,
    tags: Mapping[str, Any] | None = None,
    description: str | None = None,
) -> Run:
    """Open an MLflow run, or go on with the one that ``folder`` already has.  Never waits.

    Args:
        experiment: name of the experiment, made if it is missing.
        name: name of the run in the UI.
        folder: the run's folder; a restart with the same folder continues the same MLflow run.
            None makes a new one under the home folder.
        run_id: continue this MLflow run.
        parent_run_id: an MLflow run id, or another run's :attr:`Run.reference`.
        tags: tags of the run.
        description: Markdown shown at the top of the run's page.
    """
    uri = tracking_uri()
    key = uuid.uuid4().hex
    store = hashlib.sha256(uri.encode()).hexdigest()[:8]
    base = Path(folder) if folder is not None else home() / "journals" / key
    journal = Journal((base / f"mlflow-{store}").absolute())
    header = journal.header()
    resumed = bool(header)
    if not header:
        journal.set_header(
            key=key,
            run_id=run_id,
            experiment=experiment,
            name=name,
            parent=parent_run_id,
            start_ms=time.time_ns() // 1_000_000,
            tracking_uri=without_password(uri),
            store=store,
        )
    elif run_id and header.get("run_id") != run_id:
        journal.set_header(run_id=run_id)
    _remember(journal)
    run = Run(journal, uri)
    if resumed or run_id:
        run._record("resume")
    about = {"mlflow.user": _user(), "mlflow.source.name": sys.argv[0], "mlflow.source.type": "JOB"}
    note = {"mlflow.note.content": description} if description else {}
    run.set_tags(about | dict(tags or {}) | note)
    return run


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())


# -- names and values --------------------------------------------------------------------------


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _valid_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", str(name), flags=re.ASCII)[:250]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, default=str)
    return str(value)


# -- journals that other processes left ---------------------------------------------------------


def _waiting_folder() -> Path:
    return home() / "journals" / "waiting"


def _remember(journal: Journal) -> None:
    folder = _waiting_folder()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{_waiting_name(journal)}.json", {"journal": str(journal.folder)})


def _forget(journal: Journal) -> None:
    (_waiting_folder() / f"{_waiting_name(journal)}.json").unlink(missing_ok=True)


def _waiting_name(journal: Journal) -> str:
    return hashlib.sha256(str(journal.folder).encode()).hexdigest()[:16]


def waiting() -> list[Path]:
    """List the journals of this machine that may hold undelivered records."""
    folders = []
    for entry in sorted(_waiting_folder().glob("*.json")):
        folder = Path(json.loads(entry.read_text())["journal"])
        if (folder / "run.json").exists():
            folders.append(folder)
        else:
            entry.unlink(missing_ok=True)  # the run's folder was deleted
    return folders


def replay(folder: Path) -> int | None:
    """Deliver what a journal still holds and return the number of records.

    None means that the journal is left alone, since its process is still alive.

    Raises:
        UserError: if there is no journal, or it belongs to another MLflow store.
        Exception: if MLflow does not take the records; they stay in the journal.
    """
    if not (folder / "run.json").exists():
        raise UserError(f"There is no journal in {folder}; give a folder that has a run.json.")
    journal = Journal(folder)
    header = journal.header()
    uri = tracking_uri()
    if hashlib.sha256(uri.encode()).hexdigest()[:8] != header["store"]:
        raise UserError(
            f"The journal in {folder} belongs to {header['tracking_uri']} but MLflow is "
            f"{without_password(uri)}; set MLFLOW_TRACKING_URI."
        )
    with journal.owned() as mine:
        if not mine:
            return None
        delivery = Delivery(journal, uri)
        total = 0
        while sent := delivery.step():
            total += sent
    _forget(journal)
    return total


def _replay_quietly() -> None:
    for folder in waiting():
        try:
            sent = replay(folder)
        except Exception as error:
            log.info("%s stays as it is: %s", folder, error)
        else:
            if sent:
                log.warning("Delivered %d records that an earlier run left in %s.", sent, folder)


def main(arguments: list[str]) -> int:
    """Run ``python -m lorat_platform.tracking replay [FOLDER ...]``."""
    if not arguments or arguments[0] != "replay":
        print("usage: python -m lorat_platform.tracking replay [FOLDER ...]")
        print("Delivers the metrics that MLflow could not take when they were recorded.")
        return 2
    failed = 0
    for folder in [Path(a).absolute() for a in arguments[1:]] or waiting():
        try:
            sent = replay(folder)
        except Exception as error:
            failed += 1
            print(f"error: {folder}: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            print(f"{folder}: " + ("still in use" if sent is None else f"{sent} records delivered"))
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    sys.exit(main(sys.argv[1:]))
