"""What a race has chosen becomes lorat@candidate, with the weights of its other seeds on record."""

from __future__ import annotations

import json
from dataclasses import dataclass

from lorat import errors
from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat_platform.cluster.phases import Phases
from lorat_platform.data.sources import open_datasets
from lorat_platform.evaluation.version_tags import score_histogram
from lorat_platform.recording.store import connect
from lorat_platform.registry import versions
from lorat_platform.search.plan import SearchPlan
from lorat_platform.search.race import report
from lorat_platform.search.race.race import Race
from lorat_platform.training.finish import (
    MODEL,
    evaluate_beside_baselines,
    metrics_of,
    reference_set,
)
from lorat_platform.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The training of the chosen contender that is registered."""

    name: str
    seed: int
    num_seeds: int
    config: TrainConfig
    checkpoint: str
    """Address of its weights."""
    trial_id: str

    @property
    def said(self) -> str:
        """Which training it is, and on what grounds."""
        return (
            f"{self.name} with seed {self.seed}, one of {self.num_seeds} that the race trained: "
            "its score is the nearest to their mean, so it is neither a lucky nor an unlucky one"
        )


def winner_of(race: Race, plan: SearchPlan) -> Winner | None:
    """Return what to register; none where all trainings failed."""
    name = race.chosen
    if name is None:
        return None
    means, of_seeds = race.means(name), race.of_seeds(name)
    middle = sum(means.values()) / len(means)
    seed = min(means, key=lambda each: abs(means[each] - middle))
    (values,) = (each.values for each in race.contenders if each.name == name)
    return Winner(
        name=name,
        seed=seed,
        num_seeds=len(means),
        config=plan.space.configure(values),
        checkpoint=of_seeds[seed].checkpoints[name],
        trial_id=of_seeds[seed].trials[name],
    )


def register(
    race: Race, winner: Winner, plan: SearchPlan, *, search_run_id: str, git_revision: str | None
) -> str:
    """Evaluate the winner and register it as the candidate; return its version.

    Raises:
        UserError: if MLflow does not take it.
    """
    from mlflow.exceptions import MlflowException

    datasets = open_datasets(winner.config)
    model = versions.load(winner.checkpoint)
    with Phases() as phases:
        alone = RunOptions(baselines=("none",))
        results = evaluate_beside_baselines(model, datasets.val, alone, phases)
        phases.begin("registering the model")
        of_seeds = race.of_seeds(winner.name)
        try:
            run_id = _run_of(plan.options.experiment, winner.trial_id)
            version = versions.registered_by(run_id) or versions.register(
                model,
                run_id=run_id,
                datasets=datasets.fingerprints,
                scores=metrics_of(results),
                reference_set=reference_set(winner.config.val_data, datasets),
                git_revision=git_revision,
                tags=report.tags_of(race)
                | score_histogram(results[MODEL])
                | {
                    "search_run_id": search_run_id,
                    "race.contender": winner.name,
                    versions.SEED_TAG: winner.seed,
                    versions.SEEDS_TAG: json.dumps(
                        {str(s): each.checkpoints[winner.name] for s, each in of_seeds.items()}
                    ),
                },
            )
            versions.add_to_description(
                connect(), versions.MODEL_NAME, version, "Race",
                f"This is {winner.said}.\n\n{report.conclusion(race)}\n",
            )  # fmt: skip
        except (TimeoutError, OSError, MlflowException) as error:
            raise UserError(
                f"MLflow does not take the model ({errors.reason(error)}); it is in "
                f"{winner.checkpoint}: go on with --resume {plan.name} when MLflow answers."
            ) from error
    return version


def _run_of(experiment: str, trial_id: str) -> str:
    """Return MLflow's run of a trial.

    Raises:
        TimeoutError: if MLflow has not heard of it yet.
    """
    client = connect()
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs(
        [found.experiment_id] if found else [], f"tags.`lorat.trial_id` = '{trial_id}'"
    )
    if not runs:
        raise TimeoutError("the run of its training has not arrived there")
    return str(runs[0].info.run_id)
