"""Why a score is not the published one: explained for each data set, as files and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from lorat.errors import UserError, named
from lorat.metrics import plots
from lorat.metrics.explanation import (
    OURS,
    SPLIT,
    THEIRS,
    Explanation,
    explain,
    scores_by_dialect,
)
from lorat.metrics.raw_results import RawResults, read_results
from lorat.tracking.one_pass import ground_truth
from lorat_platform.evaluation.published import Published, published
from lorat_platform.evaluation.report import markdown_table
from lorat_platform.evaluation.sets import TOOLKITS, DatasetResult
from lorat_platform.evaluation.subject import Subject
from lorat_platform.recording.recorder import Recorder

FOLDER = "explanation"
"""Of a data set's report."""
Scores = dict[str, dict[str, dict[str, float]]]
"""By dialect and side."""
SHOWN = 10
"""Sequences in the Markdown, which MLflow takes up to 8,000 characters of; the file has all."""


def check_explainable(models: Sequence[str], results: Path) -> None:
    """Refuse what cannot be explained, before the work.

    Raises:
        UserError: for several models, or results that are not there.
    """
    if len(models) > 1:
        raise UserError("Several models are given with --explain; give one of them.")
    published(str(results))


def explain_gaps(
    entrant: Subject | Published,
    datasets: Sequence[DatasetResult],
    files: Path,
    folder: Path,
    *,
    dialect: str | None = None,
    run: Recorder | None = None,
) -> str:
    """Compare an evaluation with published result files; write why they differ.

    Each data set's folder gets ``explanation/`` with ``explanation.md``, ``account.csv``,
    ``sequences.csv``, ``dialects.csv`` and ``gap.png``.

    Args:
        entrant: what was evaluated.
        datasets: its results; of published ones, scored as they are.
        files: folder or zip of the other tracker.
        folder: of the report.
        dialect: in which both are scored; none means the data set's own toolkit.
        run: gets the gap and what is left of it as metrics.

    Returns:
        The Markdown.

    Raises:
        UserError: if the files cannot be read, or only first boxes are annotated.
    """
    files = published(str(files)).folder
    texts = []
    for dataset in datasets:
        if not dataset.evaluations:
            raise UserError(
                f"{dataset.name} has no annotation after the first frames, so no gap can be "
                "explained; give another --data."
            )
        index = dataset.index
        truths = {name: ground_truth(index, r.track) for name, r in dataset.results.items()}
        theirs = read_results(files, list(truths), index.name)
        ours: RawResults | dict = {name: r.boxes for name, r in dataset.results.items()}
        if isinstance(entrant, Published):
            ours = read_results(entrant.folder, list(truths), index.name)
        found = explain(
            ours, theirs, truths, dataset=index.name,
            dialect=dialect or TOOLKITS.get(index.name, "compatible"),
        )  # fmt: skip
        scores = scores_by_dialect(found, truths, dataset=index.name)
        text = described(found, scores, entrant.name, named(files), dataset.name)
        place = folder / dataset.name / FOLDER
        place.mkdir(parents=True, exist_ok=True)
        title = f"{entrant.name} and {named(files.name)}, {dataset.name}"
        _write(found, scores, text, title, place)
        if run is not None:
            run.log_metrics(
                {f"{dataset.name}/gap_{name}": found.gap[name] for name in SPLIT}
                | {f"{dataset.name}/gap_left_{n}": found.parts[-1].gap[n] for n in SPLIT},
                step=0,
            )
        texts.append(text)
    return "\n".join(texts)


def described(found: Explanation, by_dialect: Scores, ours: str, theirs: str, dataset: str) -> str:
    """Return the Markdown of an explanation."""
    gap = ", ".join(f"{name} {found.gap[name]:+.4f}" for name in SPLIT)
    rows: list[list[object]] = [
        [part.cause, part.side, part.num_sequences,
         *(f"{part.gap[name]:+.4f}" for name in SPLIT), part.text]
        for part in found.parts
    ]  # fmt: skip
    rows.append(["the gap", "", "", *(f"{found.gap[name]:+.4f}" for name in SPLIT), ""])
    parts = [
        f"## {theirs} beside {ours} on {dataset}",
        f"Theirs in `{found.dialect}` less ours in `compatible`: {gap}. Each line says what its "
        "cause makes of that; one cause after the other is mended, from the top.",
        markdown_table(["cause", "whose", "sequences", *SPLIT, "what"], rows),
        "Scores under each dialect, as the files are:",
        markdown_table(
            ["dialect", *(f"{side} {n}" for side in (OURS, THEIRS) for n in ("AO", "SUC", "P"))],
            [
                [dialect, *(float(scores[side][name])
                            for side in (OURS, THEIRS) for name in ("AO", "SUC", "P"))]
                for dialect, scores in by_dialect.items()
            ],
        ),
    ]  # fmt: skip
    shown = found.sequences[:SHOWN]
    parts.append(
        f"Sequences, in `{found.dialect}`, where ours are furthest behind first"
        + (f" ({SHOWN} of {len(found.sequences)})" if len(found.sequences) > SHOWN else "")
        + "; *apart at* is the first frame where the mended boxes of both overlap by less than 0.5:"
    )
    header = ["sequence", *(f"{n}, {s}" for n in SPLIT for s in ("ours", "theirs", "difference"))]
    parts.append(
        markdown_table(
            [*header, "left AO", "apart at", "causes"],
            [
                [s.name]
                + [v for n in SPLIT for v in (s.ours[n], s.theirs[n], s.ours[n] - s.theirs[n])]
                + [s.left["AO"], "" if s.apart_at is None else s.apart_at, "; ".join(s.causes)]
                for s in shown
            ],
        )
    )
    return "\n\n".join(parts) + "\n"


def _write(found: Explanation, scores: Scores, text: str, title: str, place: Path) -> None:
    (place / "explanation.md").write_text(text)
    account = [
        [part.cause, part.side, part.num_sequences,
         *(f"{part.gap[name]:.6f}" for name in SPLIT), part.text]
        for part in found.parts
    ]  # fmt: skip
    header = ["cause", "whose", "sequences", *SPLIT, "what"]
    (place / "account.csv").write_text(_csv([header, *account]))
    by_dialect = [
        [dialect, side, *(f"{value:.4f}" for value in of_side.values())]
        for dialect, by_side in scores.items()
        for side, of_side in by_side.items()
    ]
    names = list(next(iter(scores.values()))[OURS])
    (place / "dialects.csv").write_text(_csv([["dialect", "whose", *names], *by_dialect]))
    columns = [f"{name}_{what}" for name in SPLIT for what in ("ours", "theirs", "difference")]
    sequences = [
        [s.name, s.num_frames]
        + [f"{v:.4f}" for n in SPLIT for v in (s.ours[n], s.theirs[n], s.ours[n] - s.theirs[n])]
        + [f"{s.left[n]:.4f}" for n in SPLIT]
        + ["" if s.apart_at is None else s.apart_at, "; ".join(s.causes)]
        for s in found.sequences
    ]
    left = [f"{name}_left" for name in SPLIT]
    header = ["sequence", "frames", *columns, *left, "apart_at_frame", "causes"]
    (place / "sequences.csv").write_text(_csv([header, *sequences]))
    figure = plots.gap_plot(
        [
            (
                f"{part.cause} ({part.side})" if part.side else part.text or part.cause,
                part.gap["AO"],
            )
            for part in found.parts
        ],
        [s.theirs["AO"] - s.ours["AO"] for s in found.sequences],
        title,
    )
    (place / "gap.png").write_bytes(plots.png(figure))


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
