"""What people look at after an evaluation: tables, plots, clips, result files, an MLflow run."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorat.data.shards.images import ImageReader
from lorat.errors import UserError
from lorat.files.outputs import check_folder
from lorat.image.codec import DamagedImage
from lorat.metrics import SCORE_NAMES, Evaluation, plots, result_files
from lorat.tracking.clips import ClipWriter, annotate
from lorat.tracking.one_pass import ground_truth
from lorat_platform.evaluation.published import Published
from lorat_platform.evaluation.sets import DatasetResult
from lorat_platform.evaluation.subject import Subject
from lorat_platform.recording.inputs import dataset_inputs
from lorat_platform.recording.recorder import Recorder
from lorat_platform.runs.claim import is_mark

log = logging.getLogger(__name__)

SCORES = "scores.json"
COMMON_FILES = ("report.md", SCORES, "config.json")
"""Files of a report beside the folders of its data sets."""
NUM_CLIPS = 2
"""Clips of the worst sequences, and as many of the best."""
CLIP_FRAMES = 240
CLIP_FPS = 25.0
CLIP_SIDE = 640
MAX_NAME_BYTES = 200
"""Of a sequence's name in that of its clip; a file's name has 255 at most."""
HOW_SCORED = (
    "In brackets the 95 % interval over sequences (bootstrap). SUC, P and P_norm of `compatible` "
    "are computed as the published tables are; `plain` counts visible frames only."
)
LOST_FRAMES = 10
"""Consecutive frames without any overlap after which the target counts as lost."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; numbers with a fraction get three digits."""

    def cell(value: object) -> str:
        return f"{value:.3f}" if isinstance(value, float | np.floating) else str(value)

    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def with_interval(evaluation: Evaluation, name: str) -> str:
    """Return a score and its 95 % interval over sequences, such as ``0.612 [0.581, 0.640]``."""
    score = f"{evaluation.scores[name]:.3f}"
    if name not in evaluation.intervals:
        return score
    low, high = evaluation.intervals[name]
    return f"{score} [{low:.3f}, {high:.3f}]"


def headline(subject: Subject | Published, datasets: Sequence[DatasetResult]) -> str:
    """Return the Markdown description of an evaluation: the scores, and how they were taken."""
    rows = [
        [dataset.name, dialect, len(evaluation.sequences)]
        + [with_interval(evaluation, name) for name in SCORE_NAMES]
        for dataset in datasets
        for dialect, evaluation in dataset.evaluations.items()
    ]
    parts = [f"## {subject.name}" + (f" ({subject.variant})" if subject.variant else "")]
    if rows:
        parts.append(markdown_table(["data set", "dialect", "sequences", *SCORE_NAMES], rows))
        parts.append(HOW_SCORED)
    if measured := [dataset for dataset in datasets if dataset.single_conditions]:
        parts.append(_speed_table(measured))
        parts.append(f"Speed on one worker ({measured[0].device}), every step waited for.")
    parts += remarks(datasets)
    return "\n\n".join(parts) + "\n"


def _speed_table(datasets: Sequence[DatasetResult]) -> str:
    rows = []
    for d in datasets:
        conditions = [*d.conditions, *([d.single_conditions] if d.single_conditions else [])]
        rows.append(
            [d.name, f"{d.fps_single:.1f}", f"{d.fps:.1f}", f"{d.fps_with_decoding:.1f}",
             _range({c.batch for c in d.conditions}), _range({c.threads for c in conditions}),
             ", ".join(sorted({c.host for c in conditions}))]
        )  # fmt: skip
    header = [
        "data set", "FPS, one video", "FPS, in batches", "with decoding", "batch", "threads",
        "measured on",
    ]  # fmt: skip
    return markdown_table(header, rows)


def remarks(datasets: Sequence[DatasetResult]) -> list[str]:
    """Return what a reader of the scores must know of each data set."""
    parts = []
    for dataset in datasets:
        damaged = sum(result.damaged for result in dataset.results.values())
        if damaged:
            parts.append(f"{dataset.name}: {damaged} damaged frames, where the last box was kept.")
        if dataset.left_out:
            parts.append(f"{dataset.name}: left out {', '.join(sorted(dataset.left_out))}.")
        if not dataset.evaluations:
            parts.append(
                f"{dataset.name}: only first boxes are annotated; send the result files to the "
                "benchmark's server."
            )
    return parts


def _range(numbers: set[int]) -> str:
    """Return ``8``, or ``4-8`` where they differ."""
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low}-{high}"


def flat_metrics(datasets: Sequence[DatasetResult]) -> dict[str, float]:
    """Return metrics such as ``got10k-val/AO`` and ``got10k-val/plain/AO`` for MLflow.

    The ends of their 95 % intervals are ``got10k-val/AO_low`` and ``got10k-val/AO_high``.
    """
    metrics: dict[str, float] = {}
    for dataset in datasets:
        for dialect, evaluation in dataset.evaluations.items():
            prefix = f"{dataset.name}/" + ("" if dialect == "compatible" else f"{dialect}/")
            for name in SCORE_NAMES:
                metrics[f"{prefix}{name}"] = float(evaluation.scores[name])
            for name, (low, high) in evaluation.intervals.items():
                metrics |= {f"{prefix}{name}_low": low, f"{prefix}{name}_high": high}
        if not dataset.single_conditions:
            continue
        metrics[f"{dataset.name}/fps"] = dataset.fps
        metrics[f"{dataset.name}/fps_with_decoding"] = dataset.fps_with_decoding
        metrics[f"{dataset.name}/fps_single"] = dataset.fps_single
    return metrics


def lost_at(frame_iou: np.ndarray) -> int | None:
    """Return the first of :data:`LOST_FRAMES` frames in a row without overlap, or none.

    Args:
        frame_iou: (n,) overlap; frames below 0 (no meaning) neither count nor break a row.
    """
    start, length = None, 0
    for frame, value in enumerate(frame_iou):
        if value > 0:
            start, length = None, 0
        elif value == 0:
            start = frame if start is None else start
            length += 1
            if length == LOST_FRAMES:
                return start
    return None


def check_place(folder: Path) -> None:
    """Refuse a folder in which a report would mix with other files, or that cannot be written.

    Raises:
        UserError: if it holds anything and no earlier report, is a file, or cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output is {folder}, a file; give a folder for the report.")
    check_folder(folder)
    others = folder.is_dir() and any(not is_mark(path.name) for path in folder.iterdir())
    if others and not (folder / SCORES).exists():
        raise UserError(
            f"output is {folder}, which holds other files and no earlier report; give a new or "
            "an empty folder."
        )


def write_report(
    subject: Subject | Published,
    datasets: Sequence[DatasetResult],
    folder: Path,
    *,
    clips: bool = True,
) -> str:
    """Write all files of an evaluation into ``folder`` and return the Markdown description.

    ``report.md`` and ``scores.json`` are common; each data set has a folder with
    ``sequences.csv``, ``failures.csv``, plots, ``clips/`` and ``results/``, which replaces that
    of an earlier report there.
    """
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise ValueError(f"Results of two data sets of one name would be mixed: {names}.")
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SCORES).write_text("{}\n")  # tells a report that was not finished from other files
    text = headline(subject, datasets)
    for dataset in datasets:
        place = folder / dataset.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        _write_result_files(subject, dataset, place / "results")
        if dataset.evaluations:
            _write_tables(dataset, place)
            _write_plots(subject, dataset, place)
            if clips:
                _write_clips(dataset, place / "clips")
    (folder / "report.md").write_text(text)
    (folder / SCORES).write_text(json.dumps(flat_metrics(datasets), indent=2) + "\n")
    return text


def record(
    run: Recorder, subject: Subject | Published, datasets: Sequence[DatasetResult], folder: Path
) -> None:
    """Put an evaluation into an MLflow run: metrics, description, and its files in ``folder``."""
    run.log_metrics(flat_metrics(datasets), step=0)
    run.set_description(headline(subject, datasets))
    run.log_inputs(dataset_inputs((d.index, "evaluation", d.name) for d in datasets))
    run.set_tags(
        {"subject": subject.name, "subject_fingerprint": subject.fingerprint}
        | ({"variant": subject.variant} if subject.variant else {})
        | {f"dataset.{d.name}": d.index.fingerprint for d in datasets}
    )
    for name in sorted([*COMMON_FILES, *(dataset.name for dataset in datasets)]):
        if (folder / name).exists():
            run.log_artifact(folder / name, "evaluation")


def _write_tables(dataset: DatasetResult, folder: Path) -> None:
    compatible, plain = dataset.evaluations["compatible"], dataset.evaluations["plain"]
    of_sequence: dict[str, list[str]] = {name: [] for name in dataset.results}
    for attribute, names in dataset.attributes.items():
        for name in names:
            of_sequence[name].append(attribute)
    header = ["sequence", "frames", *SCORE_NAMES, "AO_plain", "FPS", "damaged", "attributes"]
    rows, failures = [], []
    ranked = sorted(dataset.results, key=lambda name: compatible.sequences[name].scores["AO"])
    for name in ranked:
        result, scores = dataset.results[name], compatible.sequences[name].scores
        digits = [f"{scores[key]:.4f}" for key in SCORE_NAMES]
        ao_plain = f"{plain.sequences[name].scores['AO']:.4f}"
        rows.append(
            [name, len(result.boxes), *digits, ao_plain,
             f"{result.fps:.1f}" if math.isfinite(result.fps) else "", result.damaged,
             "; ".join(of_sequence[name])]
        )  # fmt: skip
        lost = lost_at(plain.sequences[name].frame_iou)
        if lost is not None:
            failures.append(
                [name, len(result.boxes), lost, digits[3], "; ".join(of_sequence[name])]
            )
    (folder / "sequences.csv").write_text(_csv(header, rows))
    lost_header = ["sequence", "frames", "lost_at_frame", "AO", "attributes"]
    (folder / "failures.csv").write_text(_csv(lost_header, failures))
    if compatible.attributes:
        by_attribute = [
            [name, dialect, len(dataset.attributes[name]),
             *(f"{evaluation.attributes[name][key]:.4f}" for key in SCORE_NAMES)]
            for name in compatible.attributes
            for dialect, evaluation in dataset.evaluations.items()
        ]  # fmt: skip
        (folder / "attributes.csv").write_text(
            _csv(["attribute", "dialect", "sequences", *SCORE_NAMES], by_attribute)
        )


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _write_plots(subject: Subject | Published, dataset: DatasetResult, folder: Path) -> None:
    title = f"{subject.name} on {dataset.name}"
    evaluations = dataset.evaluations
    success = {d: (e.success_curve, e.scores["SUC"]) for d, e in evaluations.items()}
    precision = {d: (e.precision_curve, e.scores["P"]) for d, e in evaluations.items()}
    norm = {d: (e.norm_precision_curve, e.scores["P_norm"]) for d, e in evaluations.items()}
    figures = {
        "success": plots.success_plot(success, title),
        "precision": plots.precision_plot(precision, title),
        "normalized_precision": plots.precision_plot(norm, title, normalized=True),
        "sequences": plots.sequence_plot(dataset.overlaps, title),
    }
    by_attribute = evaluations["compatible"].attributes
    if len(by_attribute) >= 3:
        radar = {subject.name: {name: scores["AO"] for name, scores in by_attribute.items()}}
        figures["attributes"] = plots.attribute_radar(radar, f"AO per attribute, {dataset.name}")
    worst = sorted(dataset.overlaps, key=lambda name: dataset.overlaps[name])[:3]
    timeline = {name: evaluations["plain"].sequences[name].frame_iou for name in worst}
    figures["worst_overlap"] = plots.overlap_timeline(timeline, f"worst sequences, {dataset.name}")
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(plots.png(figure))


def _write_result_files(subject: Subject | Published, dataset: DatasetResult, folder: Path) -> None:
    boxes = {name: result.boxes for name, result in dataset.results.items()}
    timed = dataset.single_conditions is not None
    seconds = {name: r.seconds for name, r in dataset.results.items()} if timed else None
    parameters = subject.variant or "default"
    result_files.write_pytracking(
        folder / "pytracking" / "lorat" / parameters, boxes, dataset=dataset.index.name,
        seconds=seconds,
    )  # fmt: skip
    result_files.write_got10k(
        folder / "got10k.zip",
        [boxes],
        tracker="LoRAT",
        seconds=None if seconds is None else [seconds],
    )
    result_files.write_trackingnet(folder / "trackingnet.zip", boxes)


def _write_clips(dataset: DatasetResult, folder: Path) -> None:
    ranked = sorted(dataset.overlaps, key=lambda name: dataset.overlaps[name])
    num = min(NUM_CLIPS, (len(ranked) + 1) // 2)
    chosen = [(f"worst-{i + 1}", name) for i, name in enumerate(ranked[:num])]
    chosen += [(f"best-{i + 1}", name) for i, name in enumerate(ranked[: num - 1 : -1][:num])]
    for label, name in chosen:
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        short = safe.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
        write_clip(dataset, name, folder / f"{label}-{short}.mp4")


def write_clip(dataset: DatasetResult, name: str, path: Path) -> None:
    """Write one sequence with predicted (red) and annotated (green) boxes, around its failure."""
    index, result = dataset.index, dataset.results[name]
    truth = ground_truth(index, result.track)
    overlap = dataset.evaluations["plain"].sequences[name].frame_iou
    lost = lost_at(overlap) or 0
    start = max(0, min(lost - CLIP_FRAMES // 4, len(result.boxes) - CLIP_FRAMES))
    reader, first = ImageReader(index), int(index.track_start[result.track])
    with ClipWriter(path, fps=CLIP_FPS, max_side=CLIP_SIDE) as clip:
        for frame in range(start, min(start + CLIP_FRAMES, len(result.boxes))):
            try:
                image = reader.decode(first + frame)
            except DamagedImage as error:
                log.warning("A frame is missing in %s: %s", path.name, error)
                continue
            shown = f"{name} #{frame}  IoU {max(overlap[frame], 0):.2f}"
            visible = truth.boxes[frame] if truth.visibility[frame] else None
            clip.write(
                annotate(image, result.boxes[frame], truth=visible, text=shown),
                (frame - start) / CLIP_FPS,
            )
