"""The end of a training: evaluation beside the baselines, registration, and where it all is."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorat import errors
from lorat.config.fields import from_dict
from lorat.config.training import TrainConfig
from lorat.data.shards.frame_index import FrameIndex
from lorat.errors import UserError
from lorat.files.scratch import temporary_folder
from lorat.files.storage import Location
from lorat.learning.clock import duration
from lorat.tracking.baselines import BASELINES
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
HEADLINE = {"ao": "AO", "sr50": "SR0.5", "sr75": "SR0.75"}
"""Scores in the table at the end, by their names as metrics."""


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
        log.info("uploading  the checkpoint of step %d to MLflow", result.step)
        weights = scratch / "checkpoint"
        left_out = shutil.ignore_patterns(*RESUME_ONLY)
        shutil.copytree(folder, weights, symlinks=True, ignore=left_out)
        run.log_artifact(weights)
    config = from_dict(TrainConfig, record.config)
    scores: dict[str, float] = {}
    if evaluated:
        assert model is not None
        results = evaluate_beside_baselines(model, datasets.val, options)
        scores = _metrics(results)
        log.info("reporting  plots, tables, clips and result files")
        # One number each is no curve: as metrics they would be the page's first charts.
        run.set_tags(score_tags(scores))
        run.set_description(run_description(config, result, results))
        _log_report(model, results[MODEL], run)
    else:
        run.set_description(run_description(config, result, {}))
    # Before the model is registered, which fails where MLflow does not answer.
    log.info("trained %d steps, %s in all", result.step, duration(time.perf_counter() - began))
    log.info("checkpoint  %s", result.folder.child(result.checkpoint).uri)
    run_id: str | None
    version: str | None = None
    if options.register:
        assert model is not None
        log.info("registering the model")
        run_id, version = _register(model, result, datasets, run, record, scores)
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
    for line in next_steps(config, version):
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
) -> tuple[str, str]:
    """Register the model; return MLflow's run and the model's version.

    Raises:
        UserError: if MLflow does not take it; the same command then goes on from here.
    """
    from mlflow.exceptions import MlflowException

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
            tags={"run": record.name},
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


def next_steps(config: TrainConfig, version: str | None) -> list[str]:
    """Say how to try a registered tracker, and how to go on from one of the small variants."""
    lines = []
    if version:
        lines.append(
            f"try it      python jobs/track.py VIDEO --select --model models:/lorat/{version}   "
            "(without a screen: --box LEFT,TOP,WIDTH,HEIGHT)"
        )
    if config.model_variant.timm_name is None:
        lines.append(
            "go on       python jobs/train.py --variant S-224 --data URI   or B-224: DINOv2's "
            "weights, where a GPU and a network are; jobs/ingest.py makes URI of a dataset"
        )
    return lines


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
    model: LoRAT, sources: tuple[Source, ...], options: RunOptions
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
            log.info(
                "evaluating %s on %d sequences of %s",
                subject.name, num_sequences[source.name], source.name,
            )  # fmt: skip
            # Each finished sequence is a line's worth of news only where there are many.
            many = num_sequences[source.name] > MANY_SEQUENCES
            result = evaluate(subject, source.uri, label=source.name, progress=many)
            results[subject.name].append(result)
    log.info("%-16s %-8s %6s %6s %6s", "validation", "tracker", "AO", "SR50", "SR75")
    for dataset, tracker, *numbers in _rows(results):
        log.info("%-16s %-8s %6.3f %6.3f %6.3f", dataset, tracker, *numbers)
    return results


def _rows(results: dict[str, list[DatasetResult]]) -> list[list[Any]]:
    """Return data set, tracker, AO, SR50 and SR75 of every result, by data set."""
    of_dataset = zip(*results.values(), strict=True)
    return [
        [
            result.name,
            tracker,
            *(float(result.scores.get(key, math.nan)) for key in HEADLINE.values()),
        ]
        for row in of_dataset
        for tracker, result in zip(results, row, strict=True)
    ]


def _metrics(results: dict[str, list[DatasetResult]]) -> dict[str, float]:
    """Return ``eval/DATASET/ao`` and so on of the model, ``eval/DATASET/static_ao``, ``mil_ao``."""
    return {
        f"eval/{dataset}/{'' if tracker == MODEL else tracker + '_'}{name}": number
        for dataset, tracker, *numbers in _rows(results)
        for name, number in zip(HEADLINE, numbers, strict=True)
    }


def run_description(
    config: TrainConfig, result: TrainingResult, results: dict[str, list[DatasetResult]]
) -> str:
    """Return the Markdown at the top of the run's page: the scores, and what was trained how."""
    from lorat_platform.evaluation.report import markdown_table

    parts = []
    if results:
        parts.append(
            markdown_table(["validation", "tracker", "AO", "SR50", "SR75"], _rows(results))
        )
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
