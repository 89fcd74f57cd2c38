"""Train a search's winner in full and register it."""

from __future__ import annotations

import logging

from lorat.errors import UserError
from lorat_platform.cluster.connection import Cluster
from lorat_platform.recording.store import connect
from lorat_platform.registry.versions import MODEL_NAME
from lorat_platform.search.results.outcome import SearchOutcome
from lorat_platform.training.driver import train
from lorat_platform.training.finish import TrainingResult
from lorat_platform.training.options import RunOptions

log = logging.getLogger(__name__)


def train_winner(
    outcome: SearchOutcome, cluster: Cluster, *, git_revision: str | None = None
) -> TrainingResult:
    """Train the best configuration as jobs/train.py would, and register it as the candidate.

    The run becomes a child of the search's, and the version names the search.

    Raises:
        UserError: if the search found nothing, or the training fails for a reason to mend.
    """
    if outcome.best_config is None or outcome.best is None:
        raise UserError(
            f"The search {outcome.plan.name} has no finished trial; there is nothing to train."
        )
    options = outcome.plan.options
    result = train(
        outcome.best_config,
        RunOptions(
            name=f"{outcome.plan.name}-final",
            storage=options.storage,
            workers=str(options.workers_per_trial),
            experiment=options.experiment,
        ),
        cluster,
        git_revision=git_revision,
    )
    for name, score in result.scores.items():
        said = outcome.best.last(name.rpartition("/")[2])
        if said is not None:
            log.info(
                "%s: %.4f trained in full, the search said %.4f: the one is the final run on all "
                "validation sequences, the other trial %d after %d steps on %s of each set",
                name, score, said, outcome.best.number, outcome.best.steps,
                options.val_sequences or "all",
            )  # fmt: skip
    _link(outcome, result)
    return result


def _link(outcome: SearchOutcome, result: TrainingResult) -> None:
    """Tie the run and the model version to the search in MLflow."""
    if outcome.run_id is None or result.mlflow_run_id is None:
        log.warning("MLflow did not answer in time; the final run is not tied to the search.")
        return
    client = connect()
    client.set_tag(result.mlflow_run_id, "mlflow.parentRunId", outcome.run_id)
    client.set_tag(result.mlflow_run_id, "lorat.search", outcome.plan.name)
    client.set_tag(outcome.run_id, "lorat.final_run", result.mlflow_run_id)
    if result.model_version is not None:
        client.set_tag(outcome.run_id, "lorat.final_version", result.model_version)
        client.set_model_version_tag(
            MODEL_NAME, result.model_version, "search_run_id", outcome.run_id
        )
