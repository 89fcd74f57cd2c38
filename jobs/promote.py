"""Promote a candidate to champion behind a gate, or go back to the champion before.

python jobs/promote.py --candidate models:/lorat@candidate
python jobs/promote.py --candidate models:/lorat/7 --data URI --allow-equal
python jobs/promote.py --rollback
"""

from __future__ import annotations

import bootstrap

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
from lorat.metrics.comparison import GateConfig
from lorat_platform import cluster
from lorat_platform.evaluation.workers import EvaluationConfig
from lorat_platform.promotion import decision
from lorat_platform.recording.console_log import written_to
from lorat_platform.recording.run import open_run
from lorat_platform.recording.store import needing_mlflow
from lorat_platform.registry import versions

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make a registered model champion if it is better than the present one."""

    candidate: str = f"models:/{versions.MODEL_NAME}@{versions.CANDIDATE}"
    """models:/NAME@ALIAS or models:/NAME/VERSION; a checkpoint folder or a released file is
    registered first."""
    variant: str | None = None
    """Variant of a released file, which does not name it."""
    data: tuple[str, ...] = ()
    """Reference set, shards with full frames; none means the champion's."""
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


def main() -> int:
    """Run the job."""
    options = flags.parse(Options, description=__doc__)
    with needing_mlflow():
        if not options.rollback:
            return compare_and_promote(options)
        name = options.candidate.removeprefix("models:/").partition("@")[0].partition("/")[0]
        decision.roll_back(name, options.reason)
        return 0


def compare_and_promote(options: Options) -> int:
    """Register the candidate if it is not yet, compare it, and promote it if it passes."""
    name, version = versions.MODEL_NAME, ""
    if options.candidate.startswith("models:/"):
        name, version = versions.version_of(options.candidate)
    revision = command.git_revision(bootstrap.ROOT) or "unknown"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    label = f"{name} version {version}" if version else Path(options.candidate).name
    with (
        cluster.connected(options.address),
        open_run(
            "promotion",
            f"{label} {stamp}",
            folder=home() / "journals" / f"promote-{stamp}-{secrets.token_hex(4)}",
            tags={"job": "promote", "git_revision": revision},
        ) as run,
        written_to(run),
    ):
        if not version:
            model = versions.load(options.candidate, variant=options.variant)
            version = versions.register(
                model,
                run_id=run.wait_for_id(),
                reference_set=decision.whole_addresses(options.data),
                git_revision=revision,
            )
            log.info("Registered %s as version %s of %s.", options.candidate, version, name)
        candidate = decision.Candidate(
            name=name,
            version=version,
            data=options.data,
            force=options.force,
            reason=options.reason,
            gate=options.gate,
            evaluation=options.evaluation,
        )
        promoted = decision.promote(candidate, run)
    if not promoted:
        log.info("The champion stays. --force promotes nevertheless; that is recorded.")
        return command.EXIT_FAILURE
    log.info("Champion of %s: version %s (models:/%s@champion).", name, version, name)
    return 0


if __name__ == "__main__":
    command.run(main)
