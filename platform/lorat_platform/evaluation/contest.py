"""Several trackers on the same sequences, published results among them: one table, one plot each.

Every tracker has a report and an MLflow run of its own, as if it had been evaluated alone; the
comparison is a run above them, so that MLflow lists them together.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorat.errors import UserError
from lorat.metrics import SCORE_NAMES, plots
from lorat.metrics.comparison import GateConfig, compare
from lorat.metrics.raw_results import PREFIX
from lorat_platform import cluster
from lorat_platform.data.sources import SYNTHETIC
from lorat_platform.evaluation import published
from lorat_platform.evaluation.published import Published
from lorat_platform.evaluation.report import (
    COMMON_FILES,
    HOW_SCORED,
    SCORES,
    check_place,
    flat_metrics,
    headline,
    markdown_table,
    record,
    remarks,
    with_interval,
    write_report,
)
from lorat_platform.evaluation.sets import (
    DatasetResult,
    check_distinct,
    evaluate_all,
    restricted,
    scored_as,
)
from lorat_platform.evaluation.subject import Subject, load_subject
from lorat_platform.evaluation.workers import EvaluationConfig
from lorat_platform.recording.run import Run, open_run
from lorat_platform.recording.store import check_answers, connect, tracking_uri

log = logging.getLogger(__name__)

MODELS = "models"
"""Folder of a comparison in which each tracker's own report lies."""

Entrant = Subject | Published


def load_entrants(addresses: Sequence[str], *, variant: str | None = None) -> list[Entrant]:
    """Load models, baselines and ``results:FOLDER``.

    Raises:
        UserError: if one is not there, or two are the same.
    """
    entrants: list[Entrant] = []
    for address in addresses:
        loaded = (
            published.published(address)
            if address.startswith(PREFIX)
            else load_subject(address, variant=variant)
        )
        for other, given in zip(entrants, addresses, strict=False):
            if other.fingerprint == loaded.fingerprint:
                raise UserError(f"{given} and {address} are the same tracker; give each once.")
        entrants.append(loaded)
    return entrants


def dataset_uris(names: Sequence[str]) -> list[str]:
    """Return the addresses of data sets; ``synthetic`` is made on first use.

    Raises:
        UserError: if results of two could not be told apart.
    """
    from lorat.data import synthetic

    uris = [synthetic.ensure(None, "val") if name == SYNTHETIC else name for name in names]
    check_distinct(uris)
    return uris


@contextlib.contextmanager
def connected(entrants: Sequence[Entrant], address: str | None) -> Iterator[object]:
    """Connect to a Ray cluster if any of the trackers is to be run; yields what says how."""
    if not any(isinstance(entrant, Subject) for entrant in entrants):
        yield "no cluster, which result files do not need"
        return
    with cluster.connected(address) as found:
        yield found


def evaluate_entrants(
    entrants: Sequence[Entrant],
    uri: str,
    config: EvaluationConfig,
    *,
    dialect: str | None = None,
    as_they_are: bool = False,
) -> list[DatasetResult]:
    """Evaluate all on the sequences of a data set that all have; each frame is decoded once.

    Args:
        entrants: the trackers.
        uri: shards with full frames.
        config: how to spread the work.
        dialect: in which they are scored as well.
        as_they_are: as of :func:`lorat_platform.evaluation.published.read`.

    Returns:
        By entrant.

    Raises:
        UserError: as :func:`lorat_platform.evaluation.sets.evaluate`, or if they have no sequence
            in common.
    """
    subjects = [entrant for entrant in entrants if isinstance(entrant, Subject)]
    tracked = iter(evaluate_all(subjects, uri, config) if subjects else [])
    results = [
        next(tracked)
        if isinstance(entrant, Subject)
        else published.read(entrant, uri, config, as_they_are=as_they_are)
        for entrant in entrants
    ]
    common = set.intersection(*(set(result.results) for result in results))
    if not common:
        raise UserError(f"No sequence of {uri} has results of all; give results of one data set.")
    results = [restricted(result, common, "not all have results of it") for result in results]
    return [scored_as(result, dialect) if dialect else result for result in results]


def comparison(entrants: Sequence[Entrant], results: Sequence[Sequence[DatasetResult]]) -> str:
    """Return the Markdown table of a comparison, the best AO first.

    Args:
        entrants: the trackers.
        results: by entrant, of each one per data set.
    """
    parts = ["## " + ", ".join(label for label in labels(entrants))]
    for row in zip(*results, strict=True):
        for dialect in row[0].evaluations:
            parts += [f"**{row[0].name}**, {dialect}", _table(entrants, row, dialect)]
    parts.append(
        f"{HOW_SCORED} Behind the best: the mean difference of AO, sequence by sequence (paired "
        "bootstrap); where its interval holds 0, the sequences do not tell the two apart."
    )
    parts += list(dict.fromkeys(remark for each in results for remark in remarks(each)))
    return "\n\n".join(parts) + "\n"


def _table(entrants: Sequence[Entrant], row: Sequence[DatasetResult], dialect: str) -> str:
    ranked = sorted(
        zip(labels(entrants), row, strict=True),
        key=lambda item: -item[1].evaluations[dialect].scores["AO"],
    )
    best = _overlaps(ranked[0][1], dialect)
    lines: list[list[object]] = []
    for place, (name, result) in enumerate(ranked):
        behind = ""
        if place and len(best) > 1:
            paired = compare(_overlaps(result, dialect), best, GateConfig())
            low, high = paired.interval
            behind = f"{paired.mean_difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        evaluation = result.evaluations[dialect]
        scores = [with_interval(evaluation, score) for score in SCORE_NAMES]
        lines.append([name, len(evaluation.sequences), *scores, behind])
    return markdown_table(["tracker", "sequences", *SCORE_NAMES, "behind the best"], lines)


def _overlaps(result: DatasetResult, dialect: str) -> dict[str, float]:
    sequences = result.evaluations[dialect].sequences
    return {name: sequence.scores["AO"] for name, sequence in sequences.items()}


def labels(entrants: Sequence[Entrant]) -> list[str]:
    """Return short names that tell the trackers apart: the end of a path, where that does."""
    whole = [entrant.name for entrant in entrants]
    short = [_short(name) for name in whole]
    return [s if short.count(s) == 1 else w for s, w in zip(short, whole, strict=True)]


def _short(name: str) -> str:
    if name.startswith(("models:/", "runs:/")):
        return name
    parts = name.removeprefix(PREFIX).rstrip("/").split("/")
    return "/".join(parts[-2:])


def write_comparison(
    entrants: Sequence[Entrant],
    results: Sequence[Sequence[DatasetResult]],
    folder: Path,
    *,
    clips: bool = True,
) -> str:
    """Write the report of each tracker, and of several their comparison; return the Markdown.

    Of several, ``report.md``, ``scores.json`` (by tracker) and a folder per data set with
    ``comparison.csv``, ``sequences.csv`` and the plots of all compare them; ``models/`` holds what
    :func:`lorat_platform.evaluation.report.write_report` writes of each.
    """
    if len(entrants) == 1:
        return write_report(entrants[0], results[0], folder, clips=clips)
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SCORES).write_text("{}\n")  # tells a report that was not finished from other files
    shutil.rmtree(folder / MODELS, ignore_errors=True)
    for entrant, place, each in zip(entrants, _places(entrants, folder), results, strict=True):
        write_report(entrant, each, place, clips=clips)
    for row in zip(*results, strict=True):
        place = folder / row[0].name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if row[0].evaluations:
            _write_tables(entrants, row, place)
            _write_plots(entrants, row, place)
    text = comparison(entrants, results)
    (folder / "report.md").write_text(text)
    scores = dict(zip(labels(entrants), map(flat_metrics, results), strict=True))
    (folder / SCORES).write_text(json.dumps(scores, indent=2) + "\n")
    return text


def _places(entrants: Sequence[Entrant], folder: Path) -> list[Path]:
    """Return the folder of each one's own report."""
    return [
        folder / MODELS / f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[-80:]}"
        for number, name in enumerate(labels(entrants), start=1)
    ]


def _write_tables(entrants: Sequence[Entrant], row: Sequence[DatasetResult], place: Path) -> None:
    names = labels(entrants)
    lines = [
        [name, dialect, len(evaluation.sequences), score, f"{evaluation.scores[score]:.4f}",
         *(f"{end:.4f}" for end in evaluation.intervals.get(score, ()))]
        for name, result in zip(names, row, strict=True)
        for dialect, evaluation in result.evaluations.items()
        for score in SCORE_NAMES
    ]  # fmt: skip
    header = ["tracker", "dialect", "sequences", "score", "value", "low", "high"]
    (place / "comparison.csv").write_text(_csv([header, *lines]))
    overlaps = [result.overlaps for result in row]
    by_sequence = [
        [name, *(f"{each[name]:.4f}" for each in overlaps)] for name in sorted(overlaps[0])
    ]
    (place / "sequences.csv").write_text(_csv([["sequence", *names], *by_sequence]))


def _write_plots(entrants: Sequence[Entrant], row: Sequence[DatasetResult], place: Path) -> None:
    title = row[0].name
    named = dict(zip(labels(entrants), row, strict=True))
    all_of = {name: result.evaluations["compatible"] for name, result in named.items()}
    success = {n: (e.success_curve, e.scores["SUC"]) for n, e in all_of.items()}
    precision = {n: (e.precision_curve, e.scores["P"]) for n, e in all_of.items()}
    norm = {n: (e.norm_precision_curve, e.scores["P_norm"]) for n, e in all_of.items()}
    figures = {
        "success": plots.success_plot(success, title),
        "precision": plots.precision_plot(precision, title),
        "normalized_precision": plots.precision_plot(norm, title, normalized=True),
    }
    if row[0].attributes:
        by_attribute = {
            n: {attribute: scores["AO"] for attribute, scores in e.attributes.items()}
            for n, e in all_of.items()
        }
        counts = {attribute: len(names) for attribute, names in row[0].attributes.items()}
        figures["attributes"] = plots.attribute_bars(
            by_attribute, counts, f"AO per attribute (sequences), {title}"
        )
    for name, figure in figures.items():
        (place / f"{name}.png").write_bytes(plots.png(figure))


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def record_all(
    run: Run,
    entrants: Sequence[Entrant],
    results: Sequence[Sequence[DatasetResult]],
    folder: Path,
    *,
    experiment: str,
    explanation: str = "",
) -> None:
    """Put an evaluation into an MLflow run; of several, each tracker into a run below it.

    Versions of the registry get their scores as tags.

    Args:
        run: of the evaluation.
        entrants: the trackers.
        results: by entrant, of each one per data set.
        folder: what :func:`write_comparison` has written.
        experiment: of the run.
        explanation: Markdown of a gap, below the scores of one tracker.
    """
    if len(entrants) == 1:
        record(run, entrants[0], results[0], folder)
        if explanation:
            run.set_description(f"{headline(entrants[0], results[0])}\n{explanation}")
    else:
        run.set_description(comparison(entrants, results))
        run.set_tags({"subjects": ", ".join(entrant.name for entrant in entrants)})
        for name in [*COMMON_FILES, *(dataset.name for dataset in results[0])]:
            if (folder / name).exists():
                run.log_artifact(folder / name, "evaluation")
        named = zip(entrants, labels(entrants), _places(entrants, folder), results, strict=True)
        for entrant, label, place, each in named:
            tags = {"job": "evaluate"}
            with open_run(experiment, label, parent_run_id=run.reference, tags=tags) as child:
                child.log_params({"model": entrant.name})
                record(child, entrant, each, place)
    for entrant, each in zip(entrants, results, strict=True):
        _tag_version(entrant, each)


def _tag_version(entrant: Entrant, datasets: Sequence[DatasetResult]) -> None:
    """Write the headline scores of a registered model, and their intervals, on its version."""
    match = re.fullmatch(r"models:/([^/@]+)/([0-9]+)", entrant.name)
    if not match:
        return
    from mlflow.exceptions import MlflowException

    compatible = tuple(f"{d.name}/{name}" for d in datasets for name in SCORE_NAMES)
    scores = {
        key: value
        for key, value in flat_metrics(datasets).items()
        if key.removesuffix("_low").removesuffix("_high") in compatible
    }
    try:
        check_answers(tracking_uri())
        client = connect()
        for key, value in scores.items():
            client.set_model_version_tag(match[1], match[2], f"score.{key}", f"{value:.4f}")
    except (MlflowException, UserError) as error:
        log.warning("The scores are not on version %s of %s: %s", match[2], match[1], error)
