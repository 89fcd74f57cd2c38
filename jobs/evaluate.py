"""Evaluate trackers on benchmarks and keep scores, plots, clips and result files in MLflow.

python jobs/evaluate.py --model models:/lorat@champion --data URI
python jobs/evaluate.py --model models:/lorat@champion models:/lorat@candidate static
python jobs/evaluate.py --model models:/lorat/3 results:FOLDER --data URI
python jobs/evaluate.py --model models:/lorat/3 --data URI --explain FOLDER
"""

from __future__ import annotations

import bootstrap

import dataclasses
import logging
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import command
import flags
import tyro

from lorat.errors import UserError
from lorat.files.home import home
from lorat.files.storage import locate
from lorat.metrics import DIALECTS
from lorat_platform.evaluation import contest, gap
from lorat_platform.evaluation.report import check_place
from lorat_platform.evaluation.session import EvaluationPlan, evaluate_plan
from lorat_platform.evaluation.workers import EvaluationConfig
from lorat_platform.recording.console_log import written_to
from lorat_platform.recording.pages import how_to_open
from lorat_platform.recording.run import open_run
from lorat_platform.recording.store import tracking_uri
from lorat_platform.runs.claim import Lease

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluate trackers on benchmarks by tracking every sequence from its first box."""

    model: tuple[str, ...]
    """One or several, which are compared on the same sequences: models:/NAME@ALIAS,
    models:/NAME/VERSION, runs:/RUN_ID/model, a checkpoint folder, a released file, the baselines
    static, mil and, where OpenCV has it, csrt, or results:FOLDER, the raw result files of a
    tracker as published (pytracking, GOT-10k, TrackingNet, OTB; a zip as well)."""
    data: tuple[str, ...] = ("synthetic",)
    """Shards with full frames, one URI or more; synthetic means the synthetic validation set."""
    variant: str | None = None
    """Variant of a released file, which does not name it."""
    explain: Path | None = None
    """Explain why the scores are not those of published result files, in this folder or zip."""
    dialect: Annotated[str | None, tyro.conf.arg(name="as")] = None
    """Score in this toolkit's dialect as well, and explain in it; one of lorat.metrics.DIALECTS."""
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
        if not self.model:
            raise UserError("model is empty; give one tracker or several.")
        if not self.data:
            raise UserError("data is empty; give at least one URI of shards with full frames.")
        if self.explain is not None:
            gap.check_explainable(self.model, self.explain)
        if self.dialect not in (None, *DIALECTS):
            raise UserError(f"There is no {self.dialect} for --as; give {', '.join(DIALECTS)}.")


def main() -> int:
    """Run the job."""
    options = flags.parse(Options, description=__doc__)
    if options.output is not None:
        check_place(options.output)
    entrants = contest.load_entrants(options.model, variant=options.variant)
    uris = contest.dataset_uris(options.data)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    unique = f"{stamp}-{entrants[0].fingerprint[:8]}-{secrets.token_hex(2)}"
    folder = options.output or home() / "reports" / unique
    check_place(folder)
    location = locate(folder)
    location.make()
    plan = EvaluationPlan(
        entrants=entrants, uris=uris, folder=folder, experiment=options.experiment,
        config=options.evaluation, clips=options.clips, dialect=options.dialect,
        explain=options.explain,
    )  # fmt: skip
    name = ", ".join(contest.labels(entrants))
    tags = {"job": "evaluate", "git_revision": command.git_revision(bootstrap.ROOT) or "unknown"}
    with (
        Lease(location, f"The report {folder}", "give another --output").claim() as lease,
        contest.connected(entrants, options.address) as ray_cluster,
        open_run(
            options.experiment, f"{name} {stamp}", tags=tags,
            folder=home() / "journals" / f"evaluate-{unique}",
        ) as run,
        written_to(run),
    ):  # fmt: skip
        log.info("Evaluating %s with %s.", name, ray_cluster)
        given = dataclasses.asdict(options)
        run.log_params(given | {"data": uris, "model": " ".join(options.model)})
        log.info("\n%s", evaluate_plan(plan, run, before_writing=lease.confirm))
        log.info("files   %s", folder)
    if run.page is not None:  # else the end of the run has said what waits, and where
        where = tracking_uri(), options.experiment, run.run_id
        log.info("MLflow  %s, experiment %s, run %s", *where)
        log.info("open it %s", how_to_open(run.page))
    return 0


if __name__ == "__main__":
    command.run(main, goes_on=True)
