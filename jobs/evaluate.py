"""Evaluate a tracker on benchmarks and keep scores, plots, clips and result files in MLflow.

python jobs/evaluate.py --model models:/lorat@champion --data URI
python jobs/evaluate.py --model static --data synthetic
"""

from __future__ import annotations

import bootstrap

import dataclasses
import json
import logging
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

import command
import flags
import tyro

from lorat.errors import UserError
from lorat.files.home import home
from lorat.files.storage import locate
from lorat_platform import cluster
from lorat_platform.evaluation.report import check_place, record, write_report
from lorat_platform.evaluation.sets import check_distinct, evaluate
from lorat_platform.evaluation.subject import load_subject
from lorat_platform.evaluation.workers import EvaluationConfig
from lorat_platform.recording.console_log import written_to
from lorat_platform.recording.pages import how_to_open
from lorat_platform.recording.run import open_run
from lorat_platform.recording.store import tracking_uri
from lorat_platform.runs.claim import Lease

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluate a tracker on benchmarks by tracking every sequence from its first box."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model, a checkpoint folder, a
    released file, or the baselines static, mil and, where OpenCV has it, csrt."""
    data: tuple[str, ...] = ("synthetic",)
    """Shards with full frames, one URI or more; synthetic means the synthetic validation set."""
    variant: str | None = None
    """Variant of a released file, which does not name it."""
    output: Path | None = None
    """Folder for reports and result files; none means one under the home folder."""
    clips: bool = True
    """Write annotated clips of the best and the worst sequences."""
    experiment: str = "evaluation"
    """MLflow experiment."""
    address: str | None = None
    """Ray cluster, host:port; none means RAY_ADDRESS, or an embedded Ray."""
    evaluation: tyro.conf.OmitArgPrefixes[EvaluationConfig] = field(
        default_factory=EvaluationConfig
    )

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("data is empty; give at least one URI of shards with full frames.")


def dataset_uri(name: str) -> str:
    """Return the URI of a data set; ``synthetic`` is made on first use."""
    if name == "synthetic":
        from lorat.data import synthetic

        return synthetic.ensure(None, "val")
    return name


def main() -> int:
    """Run the job."""
    options = flags.parse(Options, description=__doc__)
    if options.output is not None:
        check_place(options.output)
    subject = load_subject(options.model, variant=options.variant)
    uris = [dataset_uri(name) for name in options.data]
    check_distinct(uris)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    unique = f"{stamp}-{subject.fingerprint[:8]}-{secrets.token_hex(2)}"
    folder = options.output or home() / "reports" / unique
    check_place(folder)
    location = locate(folder)
    location.make()
    with (
        Lease(location, f"The report {folder}", "give another --output").claim() as lease,
        cluster.connected(options.address) as ray_cluster,
        open_run(
            options.experiment,
            f"{subject.name} {stamp}",
            folder=home() / "journals" / f"evaluate-{unique}",
            tags={
                "job": "evaluate",
                "git_revision": command.git_revision(bootstrap.ROOT) or "unknown",
            },
        ) as run,
        written_to(run),
    ):
        log.info("Evaluating %s with %s.", subject.name, ray_cluster)
        run.log_params(dataclasses.asdict(options) | {"data": uris})
        datasets = [evaluate(subject, uri, options.evaluation) for uri in uris]
        lease.confirm()
        text = write_report(subject, datasets, folder, clips=options.clips)
        settings = {"model": options.model, "data": uris, "variant": subject.variant}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        record(run, subject, datasets, folder)
        log.info("\n%s", text)
        log.info("files   %s", folder)
    if run.page is not None:  # else the end of the run has said what waits, and where
        log.info(
            "MLflow  %s, experiment %s, run %s",
            tracking_uri(), options.experiment, run.run_id,
        )  # fmt: skip
        log.info("open it %s", how_to_open(run.page))
    return 0


if __name__ == "__main__":
    command.run(main, goes_on=True)
