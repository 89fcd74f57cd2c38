"""One process on the driver's node that writes a run for workers anywhere in the cluster.

A SQLite store must be written on the machine that has the file, and importing MLflow takes
seconds that the processes which train should not spend.  So workers only send plain records to
an actor, which owns the :class:`~lorat_platform.recording.run.Run` and its journal.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import tarfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lorat_platform.cluster.console import Console
from lorat_platform.recording.recorder import Recorder, regular_files
from lorat_platform.recording.run import CLOSE_S, Run, Status, made_by, open_run
from lorat_platform.recording.store import tracking_uri
from lorat_platform.recording.trouble import Ending, replay_command, say_what_is_left

log = logging.getLogger(__name__)

CHECK_EVERY = 100
"""Calls between two looks at whether the actor took the earlier ones."""


class MetricSink:
    """The actor: owns one run.  Every call returns at once, except ``flush`` and ``end``."""

    def __init__(
        self, environment: dict[str, str], arguments: dict[str, Any], console_pickle: bytes
    ) -> None:
        os.environ.update(environment)
        console: Console | None = ray.cloudpickle.loads(console_pickle)
        if console is not None:
            console.install(logging.WARNING)
        self._run: Run = open_run(**arguments)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record of :class:`~lorat_platform.recording.run.Recorder`."""
        self._run.write(record)

    def store(self, data: bytes, name: str, folder: str, is_tar: bool) -> None:
        """Record an artefact whose content another node sent."""
        if not is_tar:
            self._run.log_bytes(data, f"{folder}/{name}" if folder else name)
            return
        unpacked = self._run.journal.folder / "received" / f"{time.time_ns()}"
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(unpacked, filter="data")
        self._run.log_artifact(unpacked / name, folder)  # copies it
        shutil.rmtree(unpacked)

    def identity(self) -> tuple[str, str | None, str | None]:
        """Return the run's key and, once MLflow has answered, its id and its page."""
        return self._run.key, self._run.run_id, self._run.page

    def flush(self, timeout_s: float) -> bool:
        """Wait until MLflow has everything."""
        return self._run.flush(timeout_s)

    def end(self, status: Status, timeout_s: float) -> Ending:
        """End the run and return what it left behind."""
        return self._run.end(status, timeout_s)


class RemoteRun(Recorder):
    """A run that is written by a :class:`MetricSink`; can be sent to any worker."""

    def __init__(self, actor: Any, key: str) -> None:
        self._actor = actor
        self.key = key
        self._calls: deque[Any] = deque()
        self._check_at = CHECK_EVERY

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteRun, (self._actor, self.key)

    @property
    def reference(self) -> str:
        """What to pass as ``parent_run_id`` of children."""
        return f"key:{self.key}"

    @property
    def run_id(self) -> str | None:
        """MLflow's id, or none as long as MLflow has not answered."""
        return ray.get(self._actor.identity.remote())[1]

    @property
    def page(self) -> str | None:
        """The run's page in MLflow, or none as long as MLflow has not answered."""
        return ray.get(self._actor.identity.remote())[2]

    def wait_for_id(self, timeout_s: float = CLOSE_S) -> str:
        """Return MLflow's id, waiting for it.

        Raises:
            TimeoutError: if MLflow does not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while not (run_id := self.run_id):
            if time.monotonic() > deadline:
                raise TimeoutError(f"MLflow has not answered in {timeout_s:.0f} s.")
            time.sleep(0.1)
        return run_id

    def in_flight(self) -> list[Any]:
        """Return the calls of this process that the actor may not have taken yet."""
        return list(self._calls)

    def settle(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until the actor has taken every record of this process; False if it does not.

        Quick unless the actor restarts.  A process that may end before the run is closed needs
        it: calls that the actor has not taken are lost with their caller.
        """
        if self._calls:
            ray.wait(list(self._calls), num_returns=len(self._calls), timeout=timeout_s)
            self._check()
        return not self._calls

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until MLflow has everything; False if it does not within the time."""
        self.settle(timeout_s)
        return ray.get(self._actor.flush.remote(timeout_s), timeout=timeout_s + 30)

    def close(self, status: Status = "FINISHED", timeout_s: float = CLOSE_S) -> bool:
        """End the run and the actor; False if some records stay in the journal, which is said."""
        try:
            self.settle(timeout_s)
            ending = ray.get(self._actor.end.remote(status, timeout_s), timeout=timeout_s + 30)
            say_what_is_left([ending])
            return ending.delivered
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            log.warning(
                "The process that writes to MLflow does not answer (%s); records may wait in its "
                "journal. The next job on this machine that uses this MLflow delivers them, or "
                "now: %s",
                type(error).__name__,
                replay_command(tracking_uri()),
            )
            return False
        finally:
            ray.kill(self._actor)

    def abandon(self) -> None:
        """End the actor and leave the run as it is; what was recorded stays in the journal."""
        ray.kill(self._actor)

    def _record(self, op: str, **fields: Any) -> None:
        record = {"op": op, "time_ms": time.time_ns() // 1_000_000, **fields}
        self._send(self._actor.write.remote(record))

    def _store(self, source: Path | bytes, name: str, folder: str) -> None:
        is_tar = isinstance(source, Path) and source.is_dir()
        try:
            data = source if isinstance(source, bytes) else _content(source, name, is_tar=is_tar)
        except OSError as error:
            log.warning("The artefact %s is left out: %s", name, error)
            return
        self._send(self._actor.store.remote(data, name, folder, is_tar))

    def _send(self, call: Any) -> None:
        self._calls.append(call)
        if len(self._calls) >= self._check_at:
            self._check()
            self._check_at = len(self._calls) + CHECK_EVERY

    def _check(self) -> None:
        """Forget the calls that the actor took, and say which failed."""
        done, waiting = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        self._calls = deque(waiting)
        for ref in done:
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                log.warning("A record did not reach the metric sink: %s", error)


def _content(source: Path, name: str, *, is_tar: bool) -> bytes:
    """Return a file's bytes, or a folder's regular files as a tar archive."""
    files = list(regular_files(source))
    if not is_tar:
        return source.read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(source, name, recursive=False)
        for path, relative in files:
            tar.add(path, f"{name}/{relative}", recursive=False)
    return buffer.getvalue()


def open_remote_run(
    experiment: str, name: str, *, console: Console | None = None, **options: Any
) -> RemoteRun:
    """Open a run as :func:`~lorat_platform.recording.run.open_run` does, in an actor on this node.

    Args:
        experiment: name of the experiment.
        name: name of the run.
        console: where the actor says that MLflow or the disk does not take what is recorded.
        options: ``folder`` (on this node), ``run_id``, ``parent_run_id``, ``tags``.
    """
    if options.get("folder") is not None:
        options["folder"] = str(Path(options["folder"]).absolute())
    environment = {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", "LORAT_"))}
    environment["MLFLOW_TRACKING_URI"] = tracking_uri()
    # Not what this actor's process was started by.
    tags = options.get("tags") or {}
    options["tags"] = made_by(tags) | dict(tags)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = (
        ray.remote(MetricSink)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
        .remote(
            environment,
            {"experiment": experiment, "name": name, **options},
            # As bytes: of an actor handed to one that may restart Ray prints a warning each time.
            ray.cloudpickle.dumps(console),
        )
    )
    key, *_ = ray.get(actor.identity.remote())
    return RemoteRun(actor, key)
