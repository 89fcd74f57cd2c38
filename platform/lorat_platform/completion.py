"""The end of a training: evaluation beside the baselines, registration, and where it all is."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorat.errors import UserError
from lorat.storage import Location
from lorat_platform import checkpoint_store
from lorat_platform.run_options import RunOptions
from lorat_platform.run_record import RunRecord
from lorat_platform.sources import Datasets, Source
from lorat_platform.telemetry import duration

if TYPE_CHECKING:
    from lorat.model import LoRAT
    from lorat_platform.metric_sink import RemoteRun

log = logging.getLogger(__name__)

RESUME_ONLY = ("optimizer.safetensors", "training_state.json", checkpoint_store.MANIFEST)
"""Files of a checkpoint that MLflow is not given."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished training gave."""

    name: str
    folder: Location
    checkpoint: str
    """Name of the last checkpoint in the folder."""
    step: int
    metrics: dict[str, float]
    seconds: float
    mlflow_run_id: str | None = None
    model_version: str | None = None
    scores: dict[str, float] = dataclasses.field(default_factory=dict)


def finish(
    result: TrainingResult,
    options: RunOptions,
    datasets: Datasets,
    run: RemoteRun,
    record: RunRecord,
    began: float,
) -> TrainingResult:
    """Evaluate beside the baselines, register, and say where everything is."""
    from lorat import checkpoint
    from lorat_platform.mlflow_store import tracking_uri, without_password

    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint_store.download(
            result.folder, result.checkpoint, Path(scratch) / result.checkpoint
        )
        model = checkpoint.load(folder)
        weights = Path(scratch) / "checkpoint"
        shutil.copytree(folder, weights, ignore=shutil.ignore_patterns(*RESUME_ONLY))
        run.log_artifact(weights)
    scores: dict[str, float] = {}
    if datasets.val and options.final_evaluation:
        scores = evaluate_beside_baselines(model, datasets.val)
        run.log_metrics(scores, result.step)
    run_id, version = _register(model, result, options, datasets, run, record, scores)
    log.info("trained %d steps, %s in all", result.step, duration(time.perf_counter() - began))
    log.info("checkpoint  %s", result.folder.child(result.checkpoint).uri)
    if version:
        log.info("model       models:/lorat/%s, alias candidate", version)
    log.info("MLflow      %s, experiment %s, run %s", without_password(tracking_uri()),
             options.experiment, run_id)  # fmt: skip
    log.info("open it     %s", ui_command())
    return dataclasses.replace(result, mlflow_run_id=run_id, model_version=version, scores=scores)


def _register(
    model: LoRAT,
    result: TrainingResult,
    options: RunOptions,
    datasets: Datasets,
    run: RemoteRun,
    record: RunRecord,
    scores: dict[str, float],
) -> tuple[str | None, str | None]:
    """Register the model, if that is wanted; return MLflow's run and the model's version.

    Raises:
        UserError: if MLflow does not take it; the same command then goes on from here.
    """
    from mlflow.exceptions import MlflowException

    from lorat_platform.registry import register

    try:
        run_id = run.wait_for_id(60.0)
        if not options.register:
            return run_id, None
        run.flush()
        version = register(
            model,
            run_id=run_id,
            datasets=datasets.fingerprints,
            scores={k: v for k, v in scores.items() if "/static_" not in k and "/mil_" not in k},
            git_revision=record.git_revision,
            tags={"run": record.name},
        )
    except (TimeoutError, OSError, MlflowException) as error:
        if not options.register:
            log.warning("%s", error)
            return None, None
        where = result.folder.child(result.checkpoint).uri
        raise UserError(
            f"MLflow does not take the model ({checkpoint_store.reason(error)}); it is in {where}: "
            "give the same command again when MLflow answers."
        ) from error
    return run_id, version


def ui_command() -> str:
    """Return what opens the MLflow UI on the store in use."""
    from lorat_platform.mlflow_store import is_sqlite, tracking_uri, without_password

    uri = tracking_uri()
    if not is_sqlite(uri):
        return without_password(uri)
    return f"mlflow server --backend-store-uri {uri} --port 5000   then http://127.0.0.1:5000"


def evaluate_beside_baselines(model: LoRAT, sources: tuple[Source, ...]) -> dict[str, float]:
    """Track every validation sequence with the model, a static box and OpenCV's MIL; print a table.

    Returns:
        ``eval/DATASET/ao`` and so on for the model, ``eval/DATASET/static_ao`` and ``mil_ao``.
    """
    from lorat_platform.evaluation import evaluate
    from lorat_platform.subject import load_subject, subject_of

    rows: list[str] = []
    metrics: dict[str, float] = {}
    for source in sources:
        for subject in (subject_of(model, "LoRAT"), load_subject("static"), load_subject("mil")):
            scores = evaluate(subject, source.uri, progress=False).scores
            ao, sr50, sr75 = (scores[k] for k in ("AO", "SR0.5", "SR0.75"))
            rows.append(f"{source.name:<16} {subject.name:<8} {ao:6.3f} {sr50:6.3f} {sr75:6.3f}")
            prefix = f"eval/{source.name}/" + (
                "" if subject.model is not None else subject.name + "_"
            )
            metrics |= {f"{prefix}ao": ao, f"{prefix}sr50": sr50, f"{prefix}sr75": sr75}
    log.info("%-16s %-8s %6s %6s %6s", "validation", "tracker", "AO", "SR50", "SR75")
    for row in rows:
        log.info("%s", row)
    return metrics
