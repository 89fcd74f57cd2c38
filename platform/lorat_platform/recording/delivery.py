"""Bring a journal's records to MLflow, each exactly once as far as MLflow can tell.

A record that was sent but whose answer got lost is sent again: MLflow ignores a metric that it
has with the same time stamp and step, parameters and tags are set to the same value, and the
run itself is found again by its key.  A training that goes on from a checkpoint takes some steps
again, at other times: a metric keeps the first value of a step, and only gaps are filled.

Records go in order, but for artefacts that cannot be uploaded although MLflow answers: they are
put aside and tried again later, so that nothing waits for them.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorat.errors import UserError
from lorat.files.addresses import without_secrets
from lorat.files.scratch import temporary_folder
from lorat.files.storage import check_plain_name
from lorat_platform.recording.journal import REJECTED, Entry, Journal
from lorat_platform.recording.pages import VIEW_TAG
from lorat_platform.recording.store import connect, ensure_experiment
from lorat_platform.recording.trouble import replay_command

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

KEY_TAG = "lorat.key"
PARENT_TAG = "lorat.parent_key"
MLFLOW_PARENT_TAG = "mlflow.parentRunId"
MAX_METRICS = 1000
"""Metrics in one call of MLflow's batch interface; parameters and tags: 100."""
MAX_PARAMS = 100
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}
"""Answers that repeating the same call will not change."""
DOUBTFUL = "BAD_REQUEST"
"""What MLflow answers to some wrong records, but also when its database is too busy."""
DOUBTFUL_ATTEMPTS = 10
"""Attempts, about 75 s of them, after which such an answer counts as a refusal."""
ARTIFACT_RETRY_S = 300.0
"""Longest pause between two attempts at an artefact that cannot be uploaded."""


def is_refusal(error: BaseException) -> bool:
    """Tell whether MLflow will refuse this record for ever, so that repeating is useless."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS
    return isinstance(error, UserError | FileNotFoundError | TypeError | KeyError)


def is_doubtful(error: BaseException) -> bool:
    """Tell whether MLflow may take the same record later, or may never."""
    return getattr(error, "error_code", None) == DOUBTFUL


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, with its class unless it is made to be read."""
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    if lines and kind in ("UserError", "MlflowException", "RestException"):
        return lines[0]
    return f"{kind}: {lines[0]}" if lines else kind


class Delivery:
    """Send the records of one journal."""

    def __init__(self, journal: Journal, uri: str) -> None:
        self._journal = journal
        self._uri = uri
        self._client: MlflowClient | None = None
        self._params: dict[str, str] | None = None
        self._nonfinite: set[str] = set()
        self._is_new = False
        self._last_step: dict[str, int] = {}
        self._steps_again: dict[str, set[int]] = {}
        self._doubtful_attempts = 0
        self._retry_at = 0.0
        self._retry_pause_s = 1.0
        self._console_at = 0.0
        self.num_rejected = 0
        """Records that MLflow refused; they are in ``rejected.jsonl``."""
        self.num_failed_uploads = 0
        """Attempts at artefacts that failed although MLflow answers."""
        self.artifact_error = ""
        """Why the last of them failed."""

    @property
    def client(self) -> MlflowClient:
        """The client, made at first use."""
        if self._client is None:
            self._client = connect(self._uri)
        return self._client

    def step(self) -> int:
        """Send the next batch and return how many records it held.

        Raises:
            Exception: whatever MLflow or the network said; nothing of the batch is lost then.
        """
        run_id = self._ensure_run()
        entries = self._next_batch()
        if not entries:
            return self._send_postponed(run_id) + self._send_console(run_id)
        record, uploaded = entries[0].record, False
        if record["op"] == "artifact":
            uploaded = self._upload_or_postpone(run_id, record)
        else:
            self._send_batch(run_id, entries)
        self._doubtful_attempts = 0
        self._journal.deliver_to(entries[-1].end)
        if uploaded:
            self._journal.unstage(record["staged"])
        return len(entries)

    def retry_artifacts(self) -> None:
        """Let the next step without records try what waits for upload at once."""
        self._retry_at = self._console_at = 0.0

    def _send_batch(self, run_id: str, entries: list[Entry]) -> None:
        try:
            self._apply(run_id, entries)
        except Exception as error:
            if not is_refusal(error):
                if not is_doubtful(error):
                    raise
                self._doubtful_attempts += 1
                if self._doubtful_attempts < DOUBTFUL_ATTEMPTS:
                    raise
            self._one_by_one(run_id, entries)

    def _next_batch(self) -> list[Entry]:
        batch: list[Entry] = []
        num_metrics = 0
        for entry in self._journal.read(limit=MAX_METRICS):
            op = entry.record["op"]
            num_metrics += len(entry.record["values"]) if op == "metrics" else 0
            if batch and (op != "metrics" or batch[0].record["op"] != op):
                break
            if batch and num_metrics > MAX_METRICS:
                break
            batch.append(entry)
        return batch

    def _one_by_one(self, run_id: str, entries: list[Entry]) -> None:
        for entry in entries:
            try:
                self._apply(run_id, [entry])
            except Exception as error:
                lasting = is_doubtful(error) and self._doubtful_attempts >= DOUBTFUL_ATTEMPTS
                if not (is_refusal(error) or lasting):
                    raise
                self._reject(entry.record, error)

    def _reject(self, record: dict[str, Any], error: Exception) -> None:
        self.num_rejected += 1
        self._journal.reject(record, without_secrets(str(error)))
        if self.num_rejected > 1:  # their number is said at the end of the run
            return
        log.warning(
            "MLflow refuses a record: %s (kept in %s; sent again by: %s)",
            first_line(error),
            self._journal.folder / REJECTED,
            replay_command(self._uri, self._journal.folder),
        )

    def _upload_or_postpone(self, run_id: str, record: dict[str, Any]) -> bool:
        try:
            return self._upload(run_id, record)
        except Exception as error:
            self.client.get_run(run_id)  # raises if it is MLflow that does not answer
            others = [other for other in self._journal.postponed() if other != record]
            self._journal.set_postponed([*others, record])
            self._note_failed_upload(error)
            self._retry_at = time.monotonic() + self._retry_pause_s
            log.warning(
                "The artefact %s of the run cannot be uploaded (%s); the metrics go on without "
                "it, and it is tried again.",
                Path(record["staged"]).name,
                self.artifact_error[:300],
            )
            return False

    def _send_postponed(self, run_id: str) -> int:
        records = self._journal.postponed()
        if not records or time.monotonic() < self._retry_at:
            return 0
        left, uploaded = [], []
        for record in records:
            try:
                if self._upload(run_id, record):
                    uploaded.append(record)
            except Exception as error:
                left.append(record)
                self._note_failed_upload(error)
        self._journal.set_postponed(left)
        for record in uploaded:
            self._journal.unstage(record["staged"])
        self._retry_pause_s = min(2 * self._retry_pause_s, ARTIFACT_RETRY_S) if left else 1.0
        self._retry_at = time.monotonic() + self._retry_pause_s
        return len(records) - len(left)

    def _send_console(self, run_id: str) -> int:
        """Upload the console log, as a whole, if it has grown and it is time."""
        console = self._journal.console
        if time.monotonic() < self._console_at or not console.is_ahead():
            return 0
        version, done = console.version(), 1
        try:
            self.client.log_artifact(run_id, str(console.checked()))
        except Exception as error:
            self.client.get_run(run_id)  # raises if it is MLflow that does not answer
            self._note_failed_upload(error)
            done = 0
        else:
            console.set_uploaded(version)
        self._console_at = time.monotonic() + console.pause_s()
        return done

    def _note_failed_upload(self, error: Exception) -> None:
        self.artifact_error = first_line(error)
        self.num_failed_uploads += 1

    def _upload(self, run_id: str, record: dict[str, Any]) -> bool:
        """Upload an artefact; False if MLflow refuses it, which is recorded."""
        try:
            self._send_artifact(run_id, record)
        except Exception as error:
            if not is_refusal(error):
                raise
            self._reject(record, error)
            return False
        return True

    def _ensure_run(self) -> str:
        header = self._journal.header()
        if header.get("run_id"):
            if not header.get("experiment_id"):  # of a run that was begun elsewhere
                info = self.client.get_run(header["run_id"]).info
                self._journal.set_header(experiment_id=info.experiment_id)
            return header["run_id"]
        experiment_id = ensure_experiment(self.client, header["experiment"], self._uri)
        found = self._runs_with(experiment_id, KEY_TAG, header["key"])
        if found:
            run_id = found[0]
        else:
            tags = {KEY_TAG: header["key"]} | self._parent_tags(experiment_id, header["parent"])
            run_id = self.client.create_run(
                experiment_id, start_time=header["start_ms"], tags=tags, run_name=header["name"]
            ).info.run_id
            self._is_new = True
            if header["parent"] and MLFLOW_PARENT_TAG not in tags:
                # One that arrived meanwhile may have looked for its children before this was one.
                for key, value in self._parent_tags(experiment_id, header["parent"]).items():
                    self.client.set_tag(run_id, key, value)
        for child in self._runs_with(experiment_id, PARENT_TAG, header["key"]):
            self.client.set_tag(child, MLFLOW_PARENT_TAG, run_id)
        self._journal.set_header(run_id=run_id, experiment_id=experiment_id)
        return run_id

    def _runs_with(self, experiment_id: str, tag: str, value: str) -> list[str]:
        runs = self.client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'")
        return [run.info.run_id for run in runs]

    def _parent_tags(self, experiment_id: str, parent: str | None) -> dict[str, str]:
        if not parent:
            return {}
        if not parent.startswith("key:"):
            return {MLFLOW_PARENT_TAG: parent}
        key = parent.removeprefix("key:")
        found = self._runs_with(experiment_id, KEY_TAG, key)
        # A parent that MLflow does not know yet adopts the child when it arrives.
        return {PARENT_TAG: key} | ({MLFLOW_PARENT_TAG: found[0]} if found else {})

    def _apply(self, run_id: str, entries: list[Entry]) -> None:
        record = entries[0].record
        match record["op"]:
            case "metrics":
                self._send_metrics(run_id, [entry.record for entry in entries])
            case "params":
                self._send_params(run_id, record["values"])
            case "tags":
                self._send_tags(run_id, record["values"])
            case "inputs":
                self._send_inputs(run_id, record["datasets"])
            case "view":
                experiment_id = self._journal.header()["experiment_id"]
                key = f"{VIEW_TAG}{record['key']}"
                self.client.set_experiment_tag(experiment_id, key, record["view"])
            case "status":
                self.client.set_terminated(run_id, record["status"], end_time=record["time_ms"])
            case "resume":
                self.client.update_run(run_id, status="RUNNING")
            case other:
                raise TypeError(f"unknown record {other}")

    def _send_metrics(self, run_id: str, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        sent: set[tuple[str, int]] = set()
        notes: dict[str, str] = {}
        for record in records:
            for name, value in record["values"].items():
                point = name, record["step"]
                if point in sent or self._has(run_id, *point):
                    continue
                sent.add(point)
                if not math.isfinite(value):
                    # MLflow turns an infinity into 1.8e308, which flattens the whole curve.
                    if name not in self._nonfinite:
                        note = f"first {value} at step {record['step']}"
                        notes.setdefault(f"nonfinite.{name}", note)
                    value = math.nan
                metrics.append(Metric(name, value, record["time_ms"], record["step"]))
        if notes:
            self._send_tags(run_id, notes)
            self._nonfinite |= {name.removeprefix("nonfinite.") for name in notes}
        for start in range(0, len(metrics), MAX_METRICS):
            self.client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])
        for name, step in sent:
            if step > self._last_step.get(name, -1):
                self._last_step[name] = step
                self._steps_again.pop(name, None)
            elif name in self._steps_again:
                self._steps_again[name].add(step)

    def _has(self, run_id: str, name: str, step: int) -> bool:
        """Tell whether MLflow has a metric of a step; it is asked where steps may come again."""
        known = self._is_new or name in self._last_step
        if known and step > self._last_step.get(name, -1):
            return False
        if name not in self._steps_again:
            steps = {metric.step for metric in self.client.get_metric_history(run_id, name)}
            self._steps_again[name] = steps
            self._last_step[name] = max(steps, default=-1)
        return step in self._steps_again[name]

    def _send_params(self, run_id: str, values: dict[str, str]) -> None:
        from mlflow.entities import Param

        if self._params is None:
            self._params = dict(self.client.get_run(run_id).data.params)
        long = {k: v for k, v in values.items() if len(v) > MAX_PARAM_LENGTH}
        values = values | {
            k: _cut(v, MAX_PARAM_LENGTH, "long-parameters.json") for k, v in long.items()
        }
        changed = {k: v for k, v in values.items() if self._params.get(k, v) != v}
        if changed:  # a parameter of MLflow never changes; a resumed run may have been given others
            self._send_tags(
                run_id,
                {f"changed.{k}": f"{self._params[k]} -> {v}" for k, v in changed.items()},
            )
        new = [Param(k, v) for k, v in values.items() if k not in self._params]
        for start in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(run_id, params=new[start : start + MAX_PARAMS])
        self._params |= {param.key: param.value for param in new}
        if long:
            self._send_text(run_id, json.dumps(long, indent=2), "long-parameters.json")

    def _send_tags(self, run_id: str, values: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        long = {k: v for k, v in values.items() if len(v) > MAX_TAG_LENGTH}
        values = values | {k: _cut(v, MAX_TAG_LENGTH, "long-tags.json") for k, v in long.items()}
        tags = [RunTag(key, value) for key, value in values.items()]
        for start in range(0, len(tags), MAX_PARAMS):
            self.client.log_batch(run_id, tags=tags[start : start + MAX_PARAMS])
        if long:
            self._send_text(run_id, json.dumps(long, indent=2), "long-tags.json")

    def _send_inputs(self, run_id: str, datasets: list[dict[str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        inputs = []
        for values in datasets:
            context = InputTag(MLFLOW_DATASET_CONTEXT, values["context"])
            stored = {name: value for name, value in values.items() if name != "context"}
            inputs.append(DatasetInput(Dataset(**stored), [context]))
        self.client.log_inputs(run_id, inputs)

    def _send_text(self, run_id: str, text: str, name: str) -> None:
        with temporary_folder() as folder:
            path = folder / name
            path.write_text(text)
            self.client.log_artifact(run_id, str(path))

    def _send_artifact(self, run_id: str, record: dict[str, Any]) -> None:
        source = self._journal.staged(record["staged"])
        folder = record["folder"] or None
        for part in (folder or "artefacts").split("/"):
            check_plain_name(part, f"the journal in {self._journal.folder}")
        if source.is_dir():
            place = f"{folder}/{source.name}" if folder else source.name
            self.client.log_artifacts(run_id, str(source), place)
        else:
            self.client.log_artifact(run_id, str(source), folder)


def _cut(value: str, limit: int, where: str) -> str:
    note = f" … [{len(value)} characters; all of it is in {where}]"
    return value[: limit - len(note)] + note
