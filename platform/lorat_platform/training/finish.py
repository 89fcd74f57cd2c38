"""The end of a training: evaluation beside the baselines, registration, and where it all is."""

from __future__ import annotations

import dataclasses
import http.client
import logging
import math
import os
import shlex
import shutil
import time
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorat import errors
from lorat.config.fields import from_dict
from lorat.config.training import TrainConfig
from lorat.config.variants import VARIANTS
from lorat.data.shards.frame_index import FrameIndex
from lorat.errors import UserError
from lorat.files.scratch import temporary_folder
from lorat.files.storage import Location
from lorat.metrics.catalogue import HEADLINE, SCORES
from lorat.tracking.baselines import BASELINES
from lorat_platform.cluster.connection import Cluster
from lorat_platform.cluster.phases import Phases
from lorat_platform.data.sources import SYNTHETIC, Datasets, Source, parse_sources
from lorat_platform.runs import checkpoints
from lorat_platform.runs.record import RunRecord
from lorat_platform.training.options import MANY_SEQUENCES, RunOptions

if TYPE_CHECKING:
    from lorat.model.network import LoRAT
    from lorat_platform.evaluation.sets import DatasetResult
    from lorat_platform.recording.remote import RemoteRun

log = logging.getLogger(__name__)

RESUME_ONLY = ("optimizer.safetensors", "training_state.json", checkpoints.MANIFEST)
"""Files of a checkpoint that MLflow is not given."""
MODEL = "LoRAT"
"""Name of the trained tracker beside the baselines."""
LARGER = "S-224"
"""Variant to go on to from one without public weights."""
HUB_S = 5.0
"""Longest wait for the hub."""
HEADER = ("validation", "tracker", *(metric.label for metric in HEADLINE.values()))
"""Of the table at the end."""


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
    cluster: Cluster,
    datasets: Datasets,
    run: RemoteRun,
    record: RunRecord,
    began: float,
    phases: Phases,
) -> TrainingResult:
    """Evaluate beside the baselines, register, and say where everything is."""
    from lorat.learning.clock import duration
    from lorat_platform.recording import pages
    from lorat_platform.recording.store import tracking_uri
    from lorat_platform.registry.versions import MODEL_NAME, score_tags

    evaluated = bool(datasets.val) and options.final_evaluation
    model = None
    with temporary_folder() as scratch:
        folder = checkpoints.download(result.folder, result.checkpoint, scratch / result.checkpoint)
        if evaluated or options.register:
            from lorat import checkpoint

            model = checkpoint.load(folder)
        phases.begin(f"uploading the checkpoint of step {result.step} to MLflow")
        weights = scratch / "checkpoint"
        left_out = shutil.ignore_patterns(*RESUME_ONLY)
        shutil.copytree(folder, weights, symlinks=True, ignore=left_out)
        run.log_artifact(weights)
    config = from_dict(TrainConfig, record.config)
    scores: dict[str, float] = {}
    own: list[DatasetResult] = []
    if evaluated:
        assert model is not None
        results = evaluate_beside_baselines(model, datasets.val, options, phases)
        scores, own = _metrics(results), results[MODEL]
        phases.begin("reporting plots, tables, clips and result files")
        # One number each is no curve: as metrics they would be the page's first charts.
        run.set_tags(score_tags(scores))
        run.set_description(run_description(config, result, results))
        _log_report(model, results[MODEL], run)
    else:
        run.set_description(run_description(config, result, {}))
    phases.end()
    # Before the model is registered, which fails where MLflow does not answer.
    log.info("trained %d steps, %s in all", result.step, duration(time.perf_counter() - began))
    log.info("checkpoint  %s", result.folder.child(result.checkpoint).uri)
    run_id: str | None
    version: str | None = None
    if options.register:
        assert model is not None
        phases.begin("registering the model")
        run_id, version = _register(model, result, datasets, run, record, scores, own)
        phases.end()
    else:
        run_id = _id_of(run)
    if version:
        log.info("model       models:/lorat/%s, alias candidate", version)
    if run_id is not None:  # else the end of the run says what waits, and where
        log.info("MLflow      %s, experiment %s, run %s", tracking_uri(),
                 options.experiment, run_id)  # fmt: skip
        if page := run.page:
            log.info("open it     %s", pages.how_to_open(page))
    if version:
        log.info("model page  %s", pages.address(pages.version_page(MODEL_NAME, version)))
    for line in next_steps(config, version, larger=cluster.gpus > 0 and hub_has(LARGER)):
        log.info("%s", line)
    return dataclasses.replace(result, mlflow_run_id=run_id, model_version=version, scores=scores)


def _id_of(run: RemoteRun) -> str | None:
    """Return MLflow's run, or none where MLflow does not answer."""
    try:
        return run.wait_for_id(60.0)
    except TimeoutError as error:
        log.warning("%s", error)
        return None


def _register(
    model: LoRAT,
    result: TrainingResult,
    datasets: Datasets,
    run: RemoteRun,
    record: RunRecord,
    scores: dict[str, float],
    results: list[DatasetResult],
) -> tuple[str, str]:
    """Register the model; return MLflow's run and the model's version.

    Raises:
        UserError: if MLflow does not take it; the same command then goes on from here.
    """
    from mlflow.exceptions import MlflowException

    from lorat_platform.evaluation.version_tags import score_histogram
    from lorat_platform.registry.versions import register, registered_by

    try:
        run_id = run.wait_for_id(60.0)
        run.flush()
        # The last start of this run may have been killed between here and its end.
        version = registered_by(run_id) or register(
            model,
            run_id=run_id,
            datasets=datasets.fingerprints,
            scores={k: v for k, v in scores.items() if not _is_of_baseline(k)},
            reference_set=reference_set(record.config["val_data"], datasets),
            git_revision=record.git_revision,
            tags={"run": record.name} | score_histogram(results),
        )
    except (TimeoutError, OSError, MlflowException) as error:
        where = result.folder.child(result.checkpoint).uri
        raise UserError(
            f"MLflow does not take the model ({errors.reason(error)}); it is in {where}: "
            "give the same command again when MLflow answers."
        ) from error
    return run_id, version


def _is_of_baseline(metric: str) -> bool:
    return any(f"/{name}_" in metric for name in BASELINES)


def next_steps(config: TrainConfig, version: str | None, *, larger: bool) -> list[str]:
    """Say how to try and promote a registered tracker, and how to go on from a small variant.

    Args:
        config: of the training.
        version: of the model; none where it was not registered.
        larger: whether a GPU and the weights of larger variants can be had.
    """
    lines = []
    if version:
        lines.append(
            f"try it      python jobs/track.py VIDEO --select --model models:/lorat/{version}   "
            "(without a screen: --box LEFT,TOP,WIDTH,HEIGHT)"
        )
        lines.append(
            f"on a page   python jobs/serve.py --model models:/lorat/{version}   (live video, in "
            "the browser)"
        )
        lines.append(f"promote it  python jobs/promote.py --candidate models:/lorat/{version}")
    if larger and config.model_variant.timm_name is None:
        data = ["--data", config.data] if config.data != SYNTHETIC else ["--recipe", "small"]
        data += ["--val-data", config.val_data] if config.val_data not in (None, SYNTHETIC) else []
        lines.append(
            f"go on       python jobs/train.py --variant {LARGER} {shlex.join(data)}   (or B-224: "
            "with DINOv2's weights, on the GPU)"
        )
    return lines


def hub_has(variant: str) -> bool:
    """Tell whether the hub that timm asks for the weights of a variant answers this machine."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        return False
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    file = f"{hub}/timm/{VARIANTS[variant].timm_name}/resolve/main/config.json"
    try:
        with urllib.request.urlopen(urllib.request.Request(file, method="HEAD"), timeout=HUB_S):
            return True
    except (OSError, ValueError, http.client.HTTPException):  # no address, or no network
        return False


def reference_set(val_data: str | None, datasets: Datasets) -> list[str]:
    """Return the addresses on which promotion compares the model: its validation sets.

    The synthetic set keeps its name, under which any machine can make it.
    """
    if not val_data or not datasets.val:
        return []
    given = [source.uri for source in parse_sources(val_data)]
    return [
        SYNTHETIC if uri == SYNTHETIC else source.uri
        for uri, source in zip(given, datasets.val, strict=True)
    ]


def evaluate_beside_baselines(
    model: LoRAT, sources: tuple[Source, ...], options: RunOptions, phases: Phases
) -> dict[str, list[DatasetResult]]:
    """Track every validation sequence with the model and the baselines; print a table.

    Returns:
        The results by tracker, the model's first; of each one per data set.
    """
    from lorat_platform.evaluation.sets import evaluate
    from lorat_platform.evaluation.subject import load_subject, subject_of

    num_sequences = {source.name: FrameIndex.open(source.uri).num_tracks for source in sources}
    names = options.chosen_baselines(sum(num_sequences.values()))
    subjects = [subject_of(model, MODEL), *(load_subject(name) for name in names)]
    results: dict[str, list[DatasetResult]] = {subject.name: [] for subject in subjects}
    for source in sources:
        for subject in subjects:
            phases.begin(
                f"evaluating {subject.name} on {num_sequences[source.name]} sequences of "
                f"{source.name}"
            )
            # Each finished sequence is a line's worth of news only where there are many.
            many = num_sequences[source.name] > MANY_SEQUENCES
            result = evaluate(subject, source.uri, label=source.name, progress=many)
            results[subject.name].append(result)
    phases.end()
    log.info("%-16s %-8s" + " %6s" * len(HEADLINE), *HEADER)
    for dataset, tracker, *numbers in _rows(results):
        log.info("%-16s %-8s" + " %6.3f" * len(HEADLINE), dataset, tracker, *numbers)
    return results


def _rows(results: dict[str, list[DatasetResult]]) -> list[list[Any]]:
    """Return data set, tracker and headline scores of every result, by data set."""
    of_dataset = zip(*results.values(), strict=True)
    return [
        [
            result.name,
            tracker,
            *(float(result.scores.get(key, math.nan)) for key in map(SCORES.get, HEADLINE)),
        ]
        for row in of_dataset
        for tracker, result in zip(results, row, strict=True)
    ]


def _metrics(results: dict[str, list[DatasetResult]]) -> dict[str, float]:
    """Return ``eval/DATASET/ao`` and so on of the model, ``eval/DATASET/static_ao``, ``mil_ao``."""
    from lorat_platform.evaluation.version_tags import headline_scores

    metrics: dict[str, float] = {}
    for tracker, datasets in results.items():
        metrics |= headline_scores(datasets, "" if tracker == MODEL else tracker)
    return metrics


def run_description(
    config: TrainConfig, result: TrainingResult, results: dict[str, list[DatasetResult]]
) -> str:
    """Return the Markdown at the top of the run's page: the scores, and what was trained how."""
    from lorat_platform.evaluation.report import markdown_table, with_interval

    parts = []
    if results:
        rows = [
            [dataset.name, tracker]
            + [
                with_interval(dataset.evaluations["compatible"], SCORES[name])
                if dataset.evaluations
                else "nan"
                for name in HEADLINE
            ]
            for of_dataset in zip(*results.values(), strict=True)
            for tracker, dataset in zip(results, of_dataset, strict=True)
        ]
        parts.append(markdown_table(HEADER, rows))
        parts.append("In brackets the 95 % interval over sequences (bootstrap).")
    rank = f" rank {config.lora.rank}" if config.adaptation == "lora" else ""
    parts.append(
        f"{config.variant}, {config.adaptation}{rank}, head depth {config.head.depth}, lr "
        f"{config.lr:g}, batch {config.batch_size}, {result.step} steps ({config.epochs} epochs of "
        f"{config.pairs_per_epoch} pairs), seed {config.seed}; trained on {config.data}, "
        f"validated on {config.val_data or 'nothing'}."
    )
    return "\n\n".join(parts) + "\n"


def _log_report(model: LoRAT, results: list[DatasetResult], run: RemoteRun) -> None:
    """Log what jobs/evaluate.py writes of a model: plots, tables, clips and result files."""
    from lorat_platform.evaluation.report import write_report
    from lorat_platform.evaluation.subject import subject_of

    with temporary_folder() as scratch:
        folder = scratch / "evaluation"
        write_report(subject_of(model, MODEL), results, folder)
        run.log_artifact(folder)
