"""Whether a candidate becomes champion: compared on a reference set, decided, and written down."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from lorat.config.json_files import parse_json
from lorat.data.shards.frame_index import FrameIndex
from lorat.errors import UserError
from lorat.files.scratch import temporary_folder
from lorat.files.storage import locate
from lorat.metrics import METRICS, plots
from lorat.metrics.comparison import Comparison, GateConfig, compare_seeds
from lorat_platform.data.sources import SYNTHETIC
from lorat_platform.evaluation.report import markdown_table
from lorat_platform.evaluation.sets import DatasetResult, check_distinct, evaluate
from lorat_platform.evaluation.subject import load_subject
from lorat_platform.evaluation.version_tags import headline_scores, score_histogram
from lorat_platform.evaluation.workers import EvaluationConfig
from lorat_platform.promotion import champion
from lorat_platform.promotion.shadows import found_of
from lorat_platform.recording import pages
from lorat_platform.recording.inputs import dataset_inputs
from lorat_platform.recording.run import Run, user_name
from lorat_platform.recording.store import connect
from lorat_platform.registry import versions
from lorat_platform.registry.versions import SEED_TAG, SEEDS_TAG

log = logging.getLogger(__name__)

MAX_ROUNDS = 5
"""Comparisons, each with a newer champion, before the candidate is given up."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A registered version that may become champion, and on what grounds."""

    name: str
    """Registered model."""
    version: str
    data: tuple[str, ...] = ()
    """Reference set, shards with full frames; empty means what is on record of the champion."""
    force: bool = False
    """Promote whatever the comparison says; this is recorded."""
    reason: str = ""
    """Why, for the record."""
    gate: GateConfig = field(default_factory=GateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def reference_set(client: Any, candidate: Candidate, numbers: Sequence[str]) -> list[str]:
    """Return the URIs to compare on: the given ones, or those on record.

    Raises:
        UserError: if there are none.
    """
    uris = whole_addresses(candidate.data)
    for number in numbers:
        if not uris:
            tags = client.get_model_version(candidate.name, number).tags
            uris = parse_json(
                tags.get("reference_set", "[]"),
                f"The tag reference_set of {candidate.name} version {number}",
                "give --data, or correct the tag in MLflow",
                shape=[str],
            )
    if not uris:
        raise UserError(
            f"No reference set is on record for {candidate.name}; give --data with shards of full "
            "frames."
        )
    return uris


def whole_addresses(uris: Sequence[str]) -> list[str]:
    """Return addresses that hold wherever a later job starts."""
    return [uri if uri == SYNTHETIC else locate(uri).uri for uri in uris]


def made(uris: Sequence[str]) -> list[str]:
    """Return addresses where data lies: the synthetic set is made on first use."""
    from lorat.data import synthetic

    return [synthetic.ensure(None, "val") if uri == SYNTHETIC else uri for uri in uris]


def results_on(
    uri_of_model: str, data: Sequence[str], config: EvaluationConfig
) -> list[DatasetResult]:
    """Evaluate a model on every data set."""
    data = made(data)
    check_distinct(data)
    subject = load_subject(uri_of_model)
    results = []
    for uri in data:
        results.append(evaluate(subject, uri, config))
        if not results[-1].evaluations:
            raise UserError(f"{uri} has no annotation after the first frames; give another --data.")
    return results


def of_sequences(results: Sequence[DatasetResult], metric: str) -> dict[str, float]:
    """Return a metric of every sequence, named with its data set."""
    return {
        f"{result.name}/{name}": value
        for result in results
        for name, value in result.of_sequences(metric).items()
    }


def evaluated(client: Any, candidate: Candidate, data: Sequence[str]) -> list[DatasetResult]:
    """Evaluate the candidate; the version is given what that says, unless it says so already."""
    name, version = candidate.name, candidate.version
    results = results_on(f"models:/{name}/{version}", data, candidate.evaluation)
    versions.add_evaluation(
        client, name, version, headline_scores(results), score_histogram(results)
    )
    return results


@dataclass(frozen=True, kw_only=True)
class Trainings:
    """What there is of a version: its own weights, and those of the other seeds of its race."""

    version: str
    models: dict[str, str]
    """Addresses by seed; of a version that did not race, its own alone, whose seed is empty."""
    gone: tuple[str, ...]
    """Seeds whose weights cannot be had any more."""

    @property
    def said(self) -> str:
        """How many seeds are seen."""
        if len(self.models) == 1:
            seen = f"one seed of version {self.version} was seen"
        else:
            seeds = ", ".join(self.models)
            seen = f"{len(self.models)} seeds of version {self.version} were seen ({seeds})"
        if self.gone:
            seen += f"; its race's weights of {', '.join(self.gone)} are gone"
        return seen


def trainings_of(client: Any, name: str, version: str) -> Trainings:
    """Return a version's own weights and what its race has left of other seeds."""
    tags = client.get_model_version(name, version).tags
    own = tags.get(SEED_TAG, "")
    others = parse_json(
        tags.get(SEEDS_TAG, "{}"),
        f"The tag {SEEDS_TAG} of {name} version {version}",
        "correct or delete it in MLflow",
        shape=dict[str, str],
    )
    models, gone = {own: f"models:/{name}/{version}"}, []
    for seed, address in others.items():
        if seed == own:
            continue
        if _is_there(address):
            models[seed] = address
        else:
            gone.append(seed)
    return Trainings(version=version, models=models, gone=tuple(gone))


def _is_there(checkpoint: str) -> bool:
    try:
        return locate(checkpoint).exists(versions.CONFIG_FILE)
    except (OSError, pa.ArrowException):
        return False


def compare_with(
    candidate: Candidate, trainings: Sequence[Trainings], data: Sequence[str]
) -> Comparison:
    """Compare all trainings of a candidate with all of the champion.

    Args:
        candidate: what is asked.
        trainings: of the candidate, and of the champion.
        data: the reference set.
    """
    own = f"models:/{candidate.name}/{candidate.version}"

    def scores_of(address: str) -> dict[str, float]:
        if address == own:
            results = evaluated(connect(), candidate, data)
        else:
            results = results_on(address, data, candidate.evaluation)
        return of_sequences(results, candidate.gate.metric)

    ours, theirs = (
        {seed: scores_of(address) for seed, address in each.models.items()} for each in trainings
    )
    return compare_seeds(ours, theirs, candidate.gate)


def promote(candidate: Candidate, run: Run) -> bool:
    """Compare, decide, move the alias, and record all that; True if promoted."""
    client = connect()
    name, version = candidate.name, candidate.version
    for found in found_of(client, f"{name}/{version}"):
        log.info("Version %s %s.", version, found)
    for _ in range(MAX_ROUNDS):
        present = champion.champion_of(client, name)
        if present == version:
            log.info("Version %s of %s is champion already.", version, name)
            return True
        comparison, data, note = None, [], ""
        trainings = [trainings_of(client, name, each) for each in (version, present) if each]
        try:
            data = reference_set(client, candidate, [present, version] if present else [version])
            indexes = [FrameIndex.open(uri) for uri in made(data)]
            run.log_inputs(
                dataset_inputs((i, "evaluation", f"{i.name}-{i.split}") for i in indexes)
            )
            if present is not None:
                comparison = compare_with(candidate, trainings, data)
            elif not versions.has_scores(versions.tags_of(name, version)):
                evaluated(client, candidate, data)  # else a server could not tell drift
        except UserError as error:
            if not candidate.force and present is not None:
                raise
            note = f"not compared: {error}"
        passed = present is None or (comparison is not None and comparison.passed)
        reason = note if comparison is None else comparison.reason
        if present is None:
            reason = "there was no champion"
        decision = "promoted" if passed else "forced" if candidate.force else "refused"
        record = {
            "gate.decision": decision,
            "gate.reason": reason,
            "gate.metric": candidate.gate.metric,
            "gate.champion": present or "none",
            "gate.numbers": json.dumps(comparison.numbers() if comparison else {}),
            "gate.by": user_name(),
            "gate.note": candidate.reason,
            "gate.at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "gate.run_id": run.wait_for_id(),
        }
        if decision == "refused":
            for key, value in record.items():
                client.set_model_version_tag(name, version, key, value)
            done = True
        else:
            done = champion.promote(
                name,
                version,
                expected_champion=present,
                tags=record | ({"reference_set": json.dumps(data)} if data else {}),
                by="force" if decision == "forced" else "gate",
            )
        if done:
            write_down(client, run, candidate, present, record, comparison, trainings)
            return decision != "refused"
        log.info("The champion changed meanwhile; comparing with the new one.")
    raise UserError(f"The champion of {name} changed {MAX_ROUNDS} times meanwhile; try again.")


def write_down(
    client: Any, run: Run, candidate: Candidate, present: str | None,
    record: dict[str, str], comparison: Comparison | None, trainings: Sequence[Trainings],
) -> None:  # fmt: skip
    """Record a decision in the run, in the version's description and among its files."""
    name, version = candidate.name, candidate.version
    numbers = comparison.numbers() if comparison else {}
    experiment = client.get_run(run.wait_for_id()).info.experiment_id
    page = pages.run_page(experiment, run.wait_for_id())
    heading = f"{record['gate.at']}: {record['gate.decision']}"
    text = (
        f"Version {version} against champion {present or '(none)'}: {record['gate.reason']}."
        f"{' ' + record['gate.note'] if record['gate.note'] else ''}\n\n"
    )
    for found in found_of(client, f"{name}/{version}"):
        text += f"It was seen {found}.\n\n"
    if comparison is not None:
        seen = "; ".join(each.said for each in trainings)
        text += f"{seen[0].upper()}{seen[1:]}.\n\n{_seeds_table(comparison)}"
    if numbers:
        text += markdown_table(list(numbers), [list(numbers.values())]) + "\n\n"
    run.log_metrics(numbers, step=0)
    run.set_tags(record | {"model": name, "version": version})
    run.set_description(f"### {heading}\n\n{text}")
    versions.add_to_description(client, name, version, heading, f"{text}Details: [run]({page})\n")
    if comparison is not None:
        figure = plots.comparison_plot(
            comparison.differences,
            comparison.resampled_means,
            comparison.interval,
            f"{name} version {version} against version {present}: {record['gate.decision']}",
            label=METRICS[comparison.metric].label,
        )
        run.log_bytes(plots.png(figure), "comparison.png")
        rows = zip(comparison.names, comparison.differences, strict=True)
        table = "sequence,difference\n" + "".join(f"{n},{d:.6f}\n" for n, d in rows)
        run.log_bytes(table.encode(), "comparison.csv")
        if model_id := client.get_model_version(name, version).tags.get("model_id"):
            with temporary_folder() as folder:
                (folder / "comparison.png").write_bytes(plots.png(figure))
                client.log_model_artifacts(model_id, str(folder), artifact_path="promotion")
    log.info("\n%s", text)
    log.info("open it     %s", pages.how_to_open(page))
    log.info("model page  %s", pages.address(pages.version_page(name, version)))


def _seeds_table(comparison: Comparison) -> str:
    """Return the score of each training where there are several."""
    ours, theirs = comparison.candidate_seeds, comparison.champion_seeds
    if len(ours) == len(theirs) == 1:
        return ""
    label = METRICS[comparison.metric].label
    rows = [
        [seed or "its own", *(f"{of[seed]:.4f}" if seed in of else "" for of in (ours, theirs))]
        for seed in sorted({*ours, *theirs}, key=lambda seed: (not seed, seed))
    ]
    return markdown_table(["seed", f"{label}, candidate", f"{label}, champion"], rows) + "\n\n"


def roll_back(name: str, reason: str) -> None:
    """Make the previous champion champion again, and record who did and why."""
    why = {"rolled_back.by": user_name(), "rolled_back.note": reason}
    old, new = champion.roll_back(name, tags=why)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = f"Version {new} is champion again. {reason}".rstrip() + "\n"
    versions.add_to_description(connect(), name, old, f"{stamp}: rolled back", text)
    log.info("Champion of %s: version %s again, instead of version %s.", name, new, old)
    log.info("open it     %s", pages.how_to_open(pages.version_page(name, new)))
