"""Promote a candidate to champion behind a gate, or go back to the champion before.

python jobs/promote.py --candidate models:/lorat@candidate
python jobs/promote.py --candidate models:/lorat/7 --data URI --allow-equal
python jobs/promote.py --rollback
"""

from __future__ import annotations

import bootstrap

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import command
import tyro

from lorat.config.json_files import parse_json
from lorat.errors import UserError
from lorat.files.home import home
from lorat.files.scratch import temporary_folder
from lorat.files.storage import locate
from lorat.metrics import plots
from lorat.metrics.comparison import Comparison, GateConfig, compare
from lorat_platform import cluster
from lorat_platform.data.sources import SYNTHETIC
from lorat_platform.evaluation.report import markdown_table
from lorat_platform.evaluation.sets import check_distinct, evaluate
from lorat_platform.evaluation.subject import load_subject
from lorat_platform.evaluation.workers import EvaluationConfig
from lorat_platform.promotion import champion as promotion
from lorat_platform.recording.run import Run, open_run, user_name
from lorat_platform.recording.store import connect, tracking_uri
from lorat_platform.registry import versions as registry

log = logging.getLogger(__name__)

MAX_ROUNDS = 5
"""Comparisons, each with a newer champion, before the job gives up."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make a registered model champion if it is better than the present one."""

    candidate: str = f"models:/{registry.MODEL_NAME}@{registry.CANDIDATE}"
    """models:/NAME@ALIAS or models:/NAME/VERSION; a checkpoint folder or a released file is
    registered first."""
    variant: str | None = None
    """Variant of a released file, which does not name it."""
    data: tuple[str, ...] = ()
    """Benchmark, shards with full frames; none means the champion's benchmark."""
    force: bool = False
    """Promote whatever the comparison says; this is recorded."""
    reason: str = ""
    """Why, for the record."""
    rollback: bool = False
    """Make the previous champion champion again."""
    address: str | None = None
    """Ray cluster, host:port; none means RAY_ADDRESS, or an embedded Ray."""
    gate: tyro.conf.OmitArgPrefixes[GateConfig] = field(default_factory=GateConfig)
    evaluation: tyro.conf.OmitArgPrefixes[EvaluationConfig] = field(
        default_factory=EvaluationConfig
    )

    def __post_init__(self) -> None:
        if self.rollback and self.force:
            raise UserError("--rollback and --force were both given; give one of them.")


def benchmark_of(client: Any, options: Options, name: str, versions: Sequence[str]) -> list[str]:
    """Return the URIs to compare on: the given ones, or those on record.

    Raises:
        UserError: if there are none.
    """
    uris = whole_addresses(options.data)
    for version in versions:
        if not uris:
            tags = client.get_model_version(name, version).tags
            uris = parse_json(
                tags.get("benchmark", "[]"),
                f"The tag benchmark of {name} version {version}",
                "give --data, or correct the tag in MLflow",
                shape=[str],
            )
    if not uris:
        raise UserError(
            f"No benchmark is on record for {name}; give --data with shards of full frames."
        )
    return uris


def whole_addresses(uris: Sequence[str]) -> list[str]:
    """Return addresses that hold wherever a later job starts."""
    return [uri if uri == SYNTHETIC else locate(uri).uri for uri in uris]


def overlaps_on(
    uri_of_model: str, data: Sequence[str], config: EvaluationConfig
) -> dict[str, float]:
    """Evaluate a model and return AO per sequence, named with its data set."""
    from lorat.data import synthetic

    data = [synthetic.ensure(None, "val") if uri == SYNTHETIC else uri for uri in data]
    check_distinct(data)
    subject = load_subject(uri_of_model)
    overlaps: dict[str, float] = {}
    for uri in data:
        result = evaluate(subject, uri, config)
        if not result.evaluations:
            raise UserError(f"{uri} has no annotation after the first frames; give another --data.")
        overlaps |= {f"{result.name}/{name}": ao for name, ao in result.overlaps.items()}
    return overlaps


def decide(
    options: Options, name: str, version: str, champion: str | None, data: Sequence[str]
) -> Comparison | None:
    """Compare with the champion; none if there is none."""
    if champion is None or champion == version:
        return None
    return compare(
        overlaps_on(f"models:/{name}/{version}", data, options.evaluation),
        overlaps_on(f"models:/{name}/{champion}", data, options.evaluation),
        options.gate,
    )


def promote(options: Options, name: str, version: str, run: Run) -> bool:
    """Compare, decide, move the alias, and record all that; True if promoted."""
    client = connect()
    for _ in range(MAX_ROUNDS):
        champion = promotion.champion_of(client, name)
        if champion == version:
            log.info("Version %s of %s is champion already.", version, name)
            return True
        comparison, data, note = None, [], ""
        try:
            data = benchmark_of(
                client, options, name, [champion, version] if champion else [version]
            )
            comparison = decide(options, name, version, champion, data)
        except UserError as error:
            if not options.force and champion is not None:
                raise
            note = f"not compared: {error}"
        passed = champion is None or (comparison is not None and comparison.passed)
        reason = note if comparison is None else comparison.reason
        if champion is None:
            reason = "there was no champion"
        decision = "promoted" if passed else "forced" if options.force else "refused"
        record = {
            "gate.decision": decision,
            "gate.reason": reason,
            "gate.champion": champion or "none",
            "gate.numbers": json.dumps(comparison.numbers() if comparison else {}),
            "gate.by": user_name(),
            "gate.note": options.reason,
            "gate.at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "gate.run_id": run.wait_for_id(),
        }
        if decision == "refused":
            for key, value in record.items():
                client.set_model_version_tag(name, version, key, value)
            done = True
        else:
            done = promotion.promote(
                name,
                version,
                expected_champion=champion,
                tags=record | ({"benchmark": json.dumps(data)} if data else {}),
                by="force" if decision == "forced" else "gate",
            )
        if done:
            write_down(client, run, name, version, champion, record, comparison)
            return decision != "refused"
        log.info("The champion changed meanwhile; comparing with the new one.")
    raise UserError(f"The champion of {name} changed {MAX_ROUNDS} times meanwhile; try again.")


def write_down(
    client: Any, run: Run, name: str, version: str, champion: str | None,
    record: dict[str, str], comparison: Comparison | None,
) -> None:  # fmt: skip
    """Record a decision in the run, in the version's description and among its files."""
    numbers = comparison.numbers() if comparison else {}
    experiment = client.get_run(run.wait_for_id()).info.experiment_id
    heading = f"{record['gate.at']}: {record['gate.decision']}"
    text = (
        f"Version {version} against champion {champion or '(none)'}: {record['gate.reason']}."
        f"{' ' + record['gate.note'] if record['gate.note'] else ''}\n\n"
    )
    if numbers:
        text += markdown_table(list(numbers), [list(numbers.values())]) + "\n\n"
    run.log_metrics(numbers, step=0)
    run.set_tags(record | {"model": name, "version": version})
    run.set_description(f"### {heading}\n\n{text}")
    link = f"[run](#/experiments/{experiment}/runs/{run.wait_for_id()})"
    registry.add_to_description(client, name, version, heading, f"{text}Details: {link}\n")
    if comparison is not None:
        figure = plots.comparison_plot(
            comparison.differences,
            comparison.resampled_means,
            comparison.interval,
            f"{name} version {version} against version {champion}: {record['gate.decision']}",
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


def roll_back(options: Options) -> int:
    """Make the previous champion champion again, and record who did and why."""
    name = options.candidate.removeprefix("models:/").partition("@")[0].partition("/")[0]
    why = {"rolled_back.by": user_name(), "rolled_back.note": options.reason}
    old, new = promotion.roll_back(name, tags=why)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = f"Version {new} is champion again. {options.reason}".rstrip() + "\n"
    registry.add_to_description(connect(), name, old, f"{stamp}: rolled back", text)
    log.info("Champion of %s: version %s again, instead of version %s.", name, new, old)
    return 0


@contextlib.contextmanager
def needing_mlflow() -> Iterator[None]:
    """Say in a sentence that MLflow does not answer: nothing here can be done without it."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, TimeoutError) as error:
        where = tracking_uri()
        raise UserError(
            f"MLflow at {where} did not do it ({str(error).splitlines()[0][:200]}); correct "
            "MLFLOW_TRACKING_URI or start the server, and give the same command again."
        ) from error


def main() -> int:
    """Run the job."""
    options = command.parse(Options, description=__doc__)
    with needing_mlflow():
        return roll_back(options) if options.rollback else compare_and_promote(options)


def compare_and_promote(options: Options) -> int:
    """Register the candidate if it is not yet, compare it, and promote it if it passes."""
    name, version = registry.MODEL_NAME, ""
    if options.candidate.startswith("models:/"):
        name, version = registry.version_of(options.candidate)
    revision = command.git_revision(bootstrap.ROOT) or "unknown"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    label = f"{name} version {version}" if version else Path(options.candidate).name
    with (
        cluster.connected(options.address),
        open_run(
            "promotion",
            f"{label} {stamp}",
            folder=home() / "journals" / f"promote-{stamp}-{os.getpid()}",
            tags={"job": "promote", "git_revision": revision},
        ) as run,
    ):
        if not version:
            model = registry.load(options.candidate, variant=options.variant)
            version = registry.register(
                model,
                run_id=run.wait_for_id(),
                benchmark=whole_addresses(options.data),
                git_revision=revision,
            )
            log.info("Registered %s as version %s of %s.", options.candidate, version, name)
        promoted = promote(options, name, version, run)
    if not promoted:
        log.info("The champion stays. --force promotes nevertheless; that is recorded.")
        return command.EXIT_FAILURE
    log.info("Champion of %s: version %s (models:/%s@champion).", name, version, name)
    return 0


if __name__ == "__main__":
    command.run(main)
