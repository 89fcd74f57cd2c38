"""MLflow runs that never stop or slow a training.

A :class:`Run` only appends to a journal on disk; a thread brings the journal to MLflow, whenever
MLflow can take it.  What is left when the process ends is delivered by the next run on this
machine (:mod:`lorat_platform.recording.backlog`), or by ``python -m lorat_platform.recording
replay``.
"""

from __future__ import annotations

import getpass
import logging
import os
import re
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import tenacity

from lorat.files.home import home
from lorat_platform.recording import backlog
from lorat_platform.recording.console_log import NAME as CONSOLE
from lorat_platform.recording.delivery import Delivery, first_line
from lorat_platform.recording.journal import Journal
from lorat_platform.recording.pages import run_page, table_page
from lorat_platform.recording.recorder import Recorder
from lorat_platform.recording.store import is_sqlite, tracking_uri, unusable_store
from lorat_platform.recording.trouble import Ending, Trouble, say_what_is_left

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
SILENT_S = 12.0
"""Time without any answer of a server after which that is said, long before the call gives up."""
SENDERS = 8
"""Runs of a process that talk to MLflow at once.  Its database lets 15 in, and fails the others
after half a minute."""
UNREACHABLE: defaultdict[str, Trouble] = defaultdict(Trouble)
"""By address: MLflow does not answer."""
NOT_WRITTEN = Trouble()
"""The disk does not take the journal."""
LOST = Trouble()
"""Nor is there room in memory."""
_may_send = threading.BoundedSemaphore(SENDERS)
_may_send_others = threading.Lock()


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
        self._asked_at: float | None = None
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
    def page(self) -> str | None:
        """The run's page in MLflow, or none as long as MLflow has not answered."""
        header = self.journal.header()
        run_id, experiment_id = header.get("run_id"), header.get("experiment_id")
        return run_page(experiment_id, run_id) if run_id and experiment_id else None

    def table(self, key: str) -> str | None:
        """The page of a view of its experiment's runs, or none as long as MLflow is silent."""
        experiment_id = self.journal.header().get("experiment_id")
        return table_page(experiment_id, key) if experiment_id else None

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
                    f"MLflow at {self.uri} has not answered in {waited_s:.0f} s"
                    f"{f': {self._error}' if self._error else ''}."
                )
            if failed:
                self._wake.set()  # do not sit out the pause between two attempts
            time.sleep(0.05)
        return run_id

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until MLflow has everything; False if it does not within the time.

        An artefact that cannot be uploaded is tried once more and then waited for no longer.
        """
        deadline = time.monotonic() + timeout_s
        attempts, uploads = self._failed_attempts, self._delivery.num_failed_uploads
        self._delivery.retry_artifacts()
        self._wake.set()
        while not (self.journal.is_delivered() and self.run_id):
            if self.journal.is_read() and self._delivery.num_failed_uploads > uploads:
                return False
            closing = self._closing.is_set()
            if closing and self._failed_attempts >= attempts + 2:
                return False
            if time.monotonic() > deadline:
                return False
            if closing and self._failed_attempts > attempts:
                self._wake.set()  # do not sit out the pause between two attempts
            self.journal.retry()
            with self._idle:
                self._idle.wait(0.1)
        return True

    def close(self, status: Status = "FINISHED", timeout_s: float = CLOSE_S) -> bool:
        """End the run; what MLflow does not take in time stays in the journal, and is said."""
        ending = self.end(status, timeout_s)
        say_what_is_left([ending])
        return ending.delivered

    def end(self, status: Status = "FINISHED", timeout_s: float = CLOSE_S) -> Ending:
        """End the run as :meth:`close` does, but leave it to the caller to say what is left."""
        store, folder = self.uri, self.journal.folder
        if self._stop.is_set():
            return Ending(True, True, 0, 0, 0, folder, store, "")
        self._record("status", status=status)
        self._closing.set()
        delivered = self.flush(timeout_s)
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=1.0)
        for trouble in (UNREACHABLE[self.uri], NOT_WRITTEN, LOST):
            trouble.end(self)
        arrived, reason, waiting, disk = True, "", 0, self.journal.disk_error
        if delivered:
            backlog.forget(self.journal)
        else:
            try:
                arrived = self.run_id is not None
                waiting = self.journal.num_pending()
                reason = self._delivery.artifact_error if self.journal.is_read() else ""
            except OSError as error:  # a disk that cannot be written may not be readable either
                disk = disk or error
            reason = reason or self._error or ""
        if disk:
            reason = disk.strerror or str(disk)
        lost, refused = self.journal.num_lost(), self._delivery.num_rejected
        return Ending(delivered, arrived, waiting, lost, refused, folder, store, reason[:300])

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

    def _record(self, op: str, **fields: Any) -> None:
        self.write({"op": op, "time_ms": time.time_ns() // 1_000_000, **fields})

    def write(self, record: dict[str, Any]) -> None:
        """Append a finished record: what the methods above, here or on another node, made."""
        if record["op"] == "console":
            self.journal.log(record["text"])
        else:
            self.journal.append(record)
        if self.journal.disk_error:
            self._note_disk_error(self.journal.disk_error)
        else:
            NOT_WRITTEN.end(self, f"The journal in {self.journal.folder} is written again.")
        self._note_silence()
        if record["op"] not in ("metrics", "console"):
            self._wake.set()

    def _note_disk_error(self, error: OSError) -> None:
        why = f"The journal in {self.journal.folder} cannot be written ({error.strerror or error})"
        NOT_WRITTEN.begin(
            self, f"{why}; what the job records waits in memory, and is lost if the job ends so."
        )
        if self.journal.num_dropped:
            LOST.begin(self, f"{why}, and the memory for it is full: records are lost from now on.")

    def _store(self, source: Path | bytes, name: str, folder: str) -> None:
        try:
            staged = self.journal.stage(source, name)
        except OSError as error:
            log.warning("The artefact %s is left out: %s", name, error)
            return
        self._record("artifact", staged=staged, folder=folder)

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
                        num_sent = attempts(self._ask)
                    except Exception as error:  # only when closing: the journal keeps the rest
                        self._error = first_line(error)
                        break
                    self._error = None
                    self._failed_attempts = 0
                    UNREACHABLE[self.uri].end(self, f"MLflow at {self.uri} answers again.")
                    with self._idle:
                        self._idle.notify_all()
                    if num_sent == 0:
                        if not others_done and not self._closing.is_set():
                            others_done = True
                            if _may_send_others.acquire(blocking=False):
                                try:
                                    backlog.deliver_quietly()
                                finally:
                                    _may_send_others.release()
                        self._pause(POLL_S)
            self._pause(POLL_S)

    def _ask(self) -> int:
        with _may_send:
            self._asked_at = time.monotonic()
            try:
                return self._delivery.step()
            finally:
                self._asked_at = None

    def _note_silence(self) -> None:
        """Say that a call hangs; making a local store may take as long and is no trouble."""
        asked_at = self._asked_at
        if asked_at is None or time.monotonic() < asked_at + SILENT_S or is_sqlite(self.uri):
            return
        UNREACHABLE[self.uri].begin(
            self,
            f"MLflow at {self.uri} has not answered for {SILENT_S:.0f} s; the "
            f"job goes on, and what it records waits in {self.journal.folder}.",
        )

    def _pause(self, seconds: float) -> None:
        self._wake.wait(seconds)
        self._wake.clear()

    def _note_failure(self, state: tenacity.RetryCallState) -> None:
        self._failed_attempts += 1
        error = state.outcome.exception() if state.outcome else None
        if error is None:
            return
        self._error = first_line(error)
        if isinstance(error, OSError) and error.filename:  # it is the journal, not the network
            self._note_disk_error(error)
            return
        mendable = unusable_store(error, self.uri)
        what = (
            str(mendable).rstrip(".")
            if mendable
            else f"MLflow at {self.uri} cannot be reached ({self._error[:300]})"
        )
        UNREACHABLE[self.uri].begin(
            self,
            f"{what}; the job goes on, and what it records waits in {self.journal.folder}.",
        )


def open_run(
    experiment: str,
    name: str,
    *,
    folder: str | Path | None = None,
    run_id: str | None = None,
    parent_run_id: str | None = None,
    tags: Mapping[str, Any] | None = None,
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
    """
    uri = tracking_uri()
    key = uuid.uuid4().hex
    store = backlog.store_name(uri)
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
            # Of a run that another folder, or machine, began, MLflow has a log already.
            console=time.strftime("console-%Y-%m-%dT%H-%M-%S.log") if run_id else CONSOLE,
            tracking_uri=uri,
            store=store,
        )
    elif run_id and header.get("run_id") != run_id:
        journal.set_header(run_id=run_id)
    backlog.remember(journal)
    run = Run(journal, uri)
    if resumed or run_id:
        run._record("resume")
    run.set_tags(made_by(tags or {}) | dict(tags or {}))
    return run


def made_by(tags: Mapping[str, Any]) -> dict[str, str]:
    """Return who and what made a run, as MLflow's pages show it: user, job, commit.

    Args:
        tags: of the run; a ``git_revision`` with a commit in it gives that.
    """
    # Wherever the job was started from, it is jobs/NAME.py.
    job = "/".join(Path(sys.argv[0]).absolute().parts[-2:])
    about = {
        "mlflow.user": user_name(),
        "mlflow.source.name": job,
        "mlflow.source.type": "JOB",
    }
    commit = re.search(r"\b[0-9a-f]{40}\b", str(tags.get("git_revision", "")))
    return about | ({"mlflow.source.git.commit": commit[0]} if commit else {})


def user_name() -> str:
    """Return who runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())
