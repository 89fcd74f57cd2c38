"""A search while it runs: every event of a trial goes to the table, the console and MLflow.

:class:`SearchCallback` is what Ray Tune stores with the search and calls; it finds the session of
this process by the search's identity, since a session holds threads and files, which cannot be
stored.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.util.metrics import Gauge

from lorat.errors import UserError
from lorat_platform.cluster.phases import Phases
from lorat_platform.cluster.places import Reminder, num_places, what_is_there
from lorat_platform.failures import (
    TrialFailed,
    failure_reason,
    is_of_surroundings,
    is_preempted,
    last_line,
)
from lorat_platform.recording.console_log import stamped
from lorat_platform.recording.run import CLOSE_S, Run, open_run
from lorat_platform.recording.run import Status as RunStatus
from lorat_platform.recording.trouble import Ending
from lorat_platform.runs.claim import LEASE_S, Lease
from lorat_platform.search.results.board import (
    REPORT_FIELDS,
    STATUSES,
    Leaderboard,
    Status,
    TrialRow,
    trial_label,
)
from lorat_platform.search.results.console import SearchConsole
from lorat_platform.search.rungs import BUDGET

log = logging.getLogger(__name__)

AboutTrial = Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[dict[str, str]]]]
"""Returns the parameters and the data sets of a trial with these values, for its run."""
_METRICS = {"loss": "train/loss", "latency": "latency", "parameters": "parameters"} | {
    name: f"system/{name}"
    for name in (
        "train_seconds", "evaluation_seconds", "total_seconds", "crop_cache_hit_rate",
        "crops_decoded", "optimiser_steps", "pairs",
    )
}  # fmt: skip
"""Metrics of a trial's run, where they are not ``val/SCORE``; a training has the same names."""
_SESSIONS: dict[str, SearchSession] = {}
RETRIES = 2
"""How often a trial is tried again whose surroundings failed."""
CLOSERS = 32
"""Runs that are closed at once; each mostly waits."""


class SearchSession:
    """What one process keeps of the search that it drives.

    Args:
        name: of the search.
        identity: of the search, which no other one has.
        folder: the search's local folder.
        board: table to fill; a resumed search replaces its rows by the snapshot's.
        parent: MLflow run of the search.
        experiment: name of the MLflow experiment.
        num_trials: trials to propose in all.
        remember_parent: stores the parent's MLflow id, once it is known, with the search.
        lease: right over the search, without which nothing more is written.
        on_resume: called where this process goes on with a snapshot, once that is back.
        need: what a worker of a trial asks for, such as ``{"CPU": 1}``.
        about: parameters and data sets of a trial, for its run, from its values; none gives the
            values alone.
        git_revision: of the code.
    """

    def __init__(
        self,
        name: str,
        *,
        identity: str,
        folder: Path,
        board: Leaderboard,
        parent: Run,
        experiment: str,
        num_trials: int,
        remember_parent: Callable[[str], None],
        lease: Lease,
        on_resume: Callable[[], None] | None = None,
        need: Mapping[str, float] | None = None,
        about: AboutTrial = lambda values: (dict(values), []),
        git_revision: str | None = None,
    ) -> None:
        self.name = name
        self.identity = identity
        self.folder = folder
        self.board = board
        self.parent = parent
        self.experiment = experiment
        self.lease = lease
        self.console = SearchConsole(board, num_trials=num_trials)
        self.num_trials = num_trials
        self._remember_parent: Callable[[str], None] | None = remember_parent
        self._runs: dict[str, Run] = {}
        self._run_ids: dict[str, str] = {}
        self._closer = ThreadPoolExecutor(CLOSERS, "close-runs")
        self._deadline = math.inf
        self._closing: list[Future[Ending]] = []
        self._on_resume = on_resume
        self._restored = False
        self._need = dict(need or {})
        self._about = about
        self._git_revision = git_revision
        self._phases = Phases()
        self._reminder = Reminder(self._phases)
        self._failed_resume = _FailedResume()
        self._gauge = Gauge(
            "lorat_search_trials", description="Trials of a search", tag_keys=("search", "status")
        )
        self._shown: dict[Status, int] = {}
        _SESSIONS[identity] = self

    @property
    def interrupted(self) -> bool:
        """Whether trials are left to run."""
        return self.board.count("waiting", "running") > 0 or len(self.board.rows) < self.num_trials

    def start(self) -> None:
        """Begin to show, once the trials of a snapshot are back.

        Raises:
            UserError: if they are not, where Ray Tune would search anew, or are more than wanted.
        """
        if self._on_resume is not None:
            failed = self._failed_resume.reason
            if failed is not None or not self._restored:
                raise UserError(
                    f"The snapshot of the search {self.name} cannot be taken up "
                    f"({failed or 'it lacks the table of trials'}) and is left as it is; put its "
                    "folder back from a copy, or search again under another --name."
                )
            if len(self.board.rows) > self.num_trials:
                raise UserError(
                    f"--trials is {self.num_trials} but the search {self.name} has begun "
                    f"{len(self.board.rows)}; give that many or more."
                )
            self._on_resume()
            self.close_forgotten()
        self.console.start()

    def end(self, *, close: bool = True) -> list[Ending]:
        """Stop showing, and end the trials' MLflow runs (interrupted ones as killed).

        All runs together wait for MLflow no longer than one would.  Returns what they left behind.

        Args:
            close: false where the runs are another driver's by now.
        """
        self._failed_resume.close()
        self._phases.end()
        self.console.stop()
        self._show(dict.fromkeys(STATUSES, 0))
        self._deadline = time.monotonic() + CLOSE_S
        for trial_id in list(self._runs) if close else ():
            self._runs[trial_id].set_tags({"lorat.trial_status": "interrupted"})
            self._close(trial_id, "KILLED")
        self._closer.shutdown(wait=True)
        _SESSIONS.pop(self.identity, None)
        return [future.result() for future in self._closing]

    def _row(self, trial: Any) -> TrialRow:
        values = {path: _plain(value) for path, value in trial.config.items()}
        return self.board.add(trial.trial_id, values)

    def take_note(self, trials: list[Any]) -> None:
        """Add the trials that were proposed since, and export how many there are by status."""
        for trial in trials:
            row = self._row(trial)
            row.proposed_at = row.proposed_at or time.time()
            if trial.status == "PAUSED":  # by a synchronous scheduler
                row.status = "waiting"
        self._show({status: self.board.count(status) for status in STATUSES})

    def remind(self, trials: list[Any]) -> None:
        """Say what the trials wait for where none of them runs."""
        pending = sum(trial.status == "PENDING" for trial in trials)
        running = any(trial.status == "RUNNING" for trial in trials)
        if running and self._reminder.waits:
            self._reminder.tell(None)
        if not pending or running or not self._reminder.due():
            return
        lacking = not num_places(self._need)
        wanted = " and ".join(f"{v:g} {k}" for k, v in self._need.items() if v > 0)
        self._reminder.tell(
            f"{pending} trials, each with {wanted} on one node, which have "
            f"{what_is_there(self._need)}"
            if lacking
            else None
        )

    def _show(self, counts: dict[Status, int]) -> None:
        for status, count in counts.items():
            if self._shown.get(status) != count:
                self._gauge.set(count, tags={"search": self.name, "status": status})
        self._shown = counts

    def begin(self, trial: Any, trials: list[Any]) -> None:
        """A trial starts, or goes on from a checkpoint; ``trials`` are all in their order."""
        for proposed in trials:
            self._row(proposed)
        row = self._row(trial)
        row.status = "running"
        row.starts += 1
        row.started_at = row.started_at or time.time()
        row.counted_at = time.time()
        run = self._open(row)
        run.set_tags({"lorat.trial_status": row.status})
        if row.troubles:
            run.set_description("Tried again after: " + "; ".join(row.troubles))

    def report(self, trial: Any, result: dict[str, Any]) -> None:
        """A trial reached a rung."""
        row = self._row(trial)
        row.report({k: _plain(result[k]) for k in REPORT_FIELDS if k in result})
        row.worker = f"{result.get('hostname')}:{result.get('pid')}"
        metrics = {
            metric_name(name): value
            for name, value in row.reports[-1].items()
            if name not in ("step", BUDGET) and not isinstance(value, dict | list)
        } | {name: value for name, value in result.items() if name.startswith("system/")}
        self._open(row).log_metrics(metrics, row.steps)
        best = self.board.best()
        if best is row:
            objectives = {f"best_{n}": row.last(n) for n in self.board.objectives}
            self.parent.log_metrics(objectives, self.board.cost().steps)
        reached = ", ".join(f"{n} {row.last(n):.4g}" for n in self.board.objectives)
        reached += "".join(f", {path} {value:.3g}" for path, value in row.tracking.items())
        self._say(row, f"rung {row.num_rungs}/{self.board.rungs.num_rungs}, {reached}")

    def finish(self, trial: Any) -> None:
        """A trial ended by itself or was stopped by the scheduler."""
        row = self.board.rows[trial.trial_id]
        completed = row.steps >= self.board.rungs.max_steps
        row.status = "completed" if completed else "stopped"
        row.ended_at = time.time()
        self._say(row, f"{row.status} after {row.steps} steps")
        run = self._open(row)
        run.set_tags({"lorat.trial_status": row.status})
        run.log_params(row.tracking)
        if not completed:
            run.set_description(
                f"Stopped early, after {row.steps} of {self.board.rungs.max_steps} steps."
            )
        self._close(trial.trial_id, "FINISHED" if completed else "KILLED")

    def tries_again(self, trial: Any, error: BaseException) -> bool:
        """Judge why a trial failed; return whether it is tried again, from its last state.

        It is if a machine, a process or a file failed, and not the trial: :data:`RETRIES` times,
        or any number of times where a node said beforehand that it would be gone.
        """
        row = self._row(trial)
        row.reason, row.is_own_fault = failure_reason(error), not is_of_surroundings(error)
        told = TrialFailed.inside(error)
        self.board.lose(row, told.step if told is not None else None)
        preempted = is_preempted(error)
        if row.is_own_fault or (row.retries >= RETRIES and not preempted):
            return False
        trouble, row.reason = row.reason, None
        row.troubles.append(trouble)
        row.status = "waiting"
        row.retries += not preempted
        count = "its node was taken away" if preempted else f"try {row.retries} of {RETRIES}"
        said = f"tried again ({count}), for a failure that is not its own: {trouble}"
        self._say(row, said)
        return True

    def reopens(self, trial_id: str) -> bool:
        """Tell whether a trial of a snapshot failed by its surroundings, and take it up again."""
        row = self.board.rows.get(trial_id)
        if row is None or not row.can_be_tried_again:
            return False
        row.troubles.append(row.reason or "unknown")
        row.status, row.reason, row.ended_at = "waiting", None, None
        return True

    def fail(self, trial: Any) -> None:
        """A trial failed for good."""
        row = self._row(trial)
        row.status = "failed"
        row.ended_at = time.time()
        tried = f" (tried {row.retries + 1} times)" if row.retries else ""
        self._say(row, f"failed: {row.reason}{tried}")
        run = self._open(row)
        run.set_tags({"lorat.trial_status": "failed", "lorat.failure": row.reason})
        run.set_description(f"Failed: {row.reason}")
        self._close(trial.trial_id, "FAILED")

    def _say(self, row: TrialRow, text: str) -> None:
        """Show what happened to a trial, and write it to the logs of the search and the trial."""
        self.console.line(row, text)
        line = stamped(f"{trial_label(row, self.num_trials)}: {text}")
        self.parent.log_console(line)
        if run := self._runs.get(row.trial_id):
            run.log_console(line)

    def _open(self, row: TrialRow) -> Run:
        """Return the trial's run, a nested child of the search's."""
        run = self._runs.get(row.trial_id)
        if run is None:
            run = open_run(
                self.experiment,
                trial_label(row, self.num_trials),
                folder=self.folder / "mlflow" / row.trial_id,
                run_id=self._run_ids.get(row.trial_id),
                parent_run_id=self.parent.reference,
                tags={
                    "lorat.search": self.name,
                    "lorat.trial": row.number,
                    "lorat.trial_id": row.trial_id,
                    "lorat.trial_status": row.status,
                    "git_revision": self._git_revision or "unknown",
                },
            )
            params, inputs = self._about(row.values)
            run.log_params(params)
            run.log_inputs(inputs)
            self._runs[row.trial_id] = run
        return run

    def _close(self, trial_id: str, status: RunStatus) -> None:
        run = self._runs.pop(trial_id, None)
        if run is not None:
            self._closing.append(self._closer.submit(self._close_run, run, status))

    def _close_run(self, run: Run, status: RunStatus) -> Ending:
        left_s = self._deadline - time.monotonic()
        return run.end(status, timeout_s=max(0.0, min(CLOSE_S, left_s)))

    def close_forgotten(self) -> None:
        """Mark the runs of trials that started after the last snapshot: they will be redone."""
        for folder in (self.folder / "mlflow").glob("*"):
            if folder.name not in self.board.rows:
                run = open_run(self.experiment, folder.name, folder=folder)
                run.set_tags({"lorat.trial_status": "redone after the restart"})
                self._closing.append(self._closer.submit(self._close_run, run, "KILLED"))

    def state(self) -> dict[str, Any]:
        """Return what a resumed search needs."""
        for trial_id, run in self._runs.items():
            if run.run_id:
                self._run_ids[trial_id] = run.run_id
        if self._remember_parent is not None and self.parent.run_id is not None:
            self._remember_parent(self.parent.run_id)
            self._remember_parent = None
        return {"board": self.board.to_dict(), "run_ids": dict(self._run_ids)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the rows of a snapshot."""
        self.board.rows = Leaderboard.from_dict(state["board"]).rows
        for row in self.board.rows.values():
            row.retries = 0
            if row.status == "running":
                row.counted_at = None  # nobody knows when it ended
                self.board.lose(row, None)
                row.status = "waiting"
            if not row.starts:
                row.proposed_at = None
        self._run_ids = dict(state["run_ids"])
        self._restored = True


class SearchCallback(Callback):
    """Brings Ray Tune's events to the session of this process."""

    def __init__(self, identity: str) -> None:
        self.identity = identity

    @property
    def _session(self) -> SearchSession:
        return _SESSIONS[self.identity]

    def setup(self, *args: Any, **info: Any) -> None:
        """Begin to show; called once Ray Tune took up a snapshot, or failed to and swallowed it."""
        self._session.start()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Stop before anything is written if another driver has taken the search over."""
        self._session.lease.check(within_s=LEASE_S / 2)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Note which trials there are, and redraw."""
        self._session.take_note(trials)
        self._session.remind(trials)
        self._session.console.refresh()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass on."""
        self._session.begin(trial, trials)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Pass on the report of a rung."""
        if BUDGET in result:
            self._session.report(trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass on."""
        self._session.finish(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass on."""
        self._session.fail(trial)

    def get_state(self) -> dict[str, Any] | None:
        """Return the session's part of the snapshot."""
        return self._session.state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Give the session its part of the snapshot."""
        self._session.restore(state)


class _FailedResume(logging.Filter):
    """Keeps why Ray Tune could not take up a snapshot: it only logs that, and searches anew."""

    def __init__(self) -> None:
        super().__init__()
        self.reason: str | None = None
        self._logger = logging.getLogger("ray.tune.execution.tune_controller")
        self._logger.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Note the reason, and keep the traceback from the console."""
        said = record.getMessage()
        if said.startswith("Failed to restore the run state"):
            error = record.exc_info[1] if record.exc_info else None
            self.reason = f"{type(error).__name__} {last_line(str(error))}".strip()
            return False
        return not said.startswith("Restarting experiment")

    def close(self) -> None:
        """Listen no more."""
        self._logger.removeFilter(self)


def metric_name(name: str) -> str:
    """Return the metric of a trial's run that has a number of its reports."""
    return _METRICS.get(name, f"val/{name}")


def _plain(value: Any) -> Any:
    """Return a NumPy number as Python's own."""
    return value.item() if hasattr(value, "item") else value
