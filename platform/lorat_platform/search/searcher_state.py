"""The state of a searcher that uses Optuna, as JSON: Ray Tune's own way is a pickle."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search.optuna import OptunaSearch


class JsonOptuna(OptunaSearch):
    """Optuna whose proposals, results and random numbers are saved as JSON.

    The space, the objectives and the kind of sampler are those with which it is made again.
    """

    _ot_study: Any

    def save(self, checkpoint_path: str) -> None:
        """Write the state; Ray Tune calls this for every snapshot."""
        state = {
            "trials": [_plain(trial) for trial in self._ot_study.get_trials(deepcopy=False)],
            "numbers": {trial_id: trial.number for trial_id, trial in self._ot_trials.items()},
            "completed": sorted(self._completed_trials),
            "random": [_random_state(rng) for rng in self._random_numbers()],
        }
        Path(checkpoint_path).write_text(json.dumps(state))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Take in what a trial gave, also one that had failed and was tried again."""
        import optuna

        if trial_id not in self._completed_trials:
            super().on_trial_complete(trial_id, result, error)
            return
        (failed,) = [
            trial
            for trial in self._ot_study.get_trials(deepcopy=False)
            if trial.number == self._ot_trials[trial_id].number
        ]
        metrics = self.metric if isinstance(self.metric, list) else [self.metric]
        if result and not error and all(metric in result for metric in metrics):
            again = optuna.trial.create_trial(
                params=failed.params,
                distributions=failed.distributions,
                values=[result[metric] for metric in metrics],
            )
            self._ot_study.add_trial(again)

    def restore(self, checkpoint_path: str) -> None:
        """Read the state back.

        Raises:
            ValueError: for anything else than what :meth:`save` wrote.
        """
        import optuna

        try:
            state = json.loads(Path(checkpoint_path).read_text())
            study = optuna.create_study(
                sampler=self._sampler,
                pruner=optuna.pruners.NopPruner(),
                directions=self._ot_study.directions,
            )
            for trial in state["trials"]:
                study.add_trial(_frozen(trial))
            ids = [trial._trial_id for trial in study.get_trials(deepcopy=False)]
            self._ot_trials = {
                trial_id: optuna.trial.Trial(study, ids[number])
                for trial_id, number in state["numbers"].items()
            }
            self._completed_trials = set(state["completed"])
            for rng, (name, keys, *rest) in zip(
                self._random_numbers(), state["random"], strict=True
            ):
                rng.set_state((name, np.array(keys, np.uint32), *rest))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{checkpoint_path} is no state of a searcher: {error!r}") from error
        self._ot_study = study

    def _random_numbers(self) -> list[np.random.RandomState]:
        sampler: Any = self._sampler
        return [sampler._rng.rng, sampler._random_sampler._rng.rng]


def _random_state(rng: np.random.RandomState) -> list[Any]:
    name, keys, *rest = rng.get_state(legacy=True)
    return [name, np.asarray(keys).tolist(), *rest]


def _plain(trial: Any) -> dict[str, Any]:
    """Return one of Optuna's trials as plain values."""
    import optuna.distributions as od

    began, ended = trial.datetime_start, trial.datetime_complete
    return {
        "state": trial.state.name,
        "values": trial.values,
        "params": trial.params,
        "distributions": {k: od.distribution_to_json(d) for k, d in trial.distributions.items()},
        "system_attrs": trial.system_attrs,
        "intermediate_values": trial.intermediate_values,
        "datetime_start": began and began.isoformat(),
        "datetime_complete": ended and ended.isoformat(),
    }


def _frozen(values: dict[str, Any]) -> Any:
    """Return the trial that :func:`_plain` took apart."""
    import optuna
    import optuna.distributions as od

    began, ended = values["datetime_start"], values["datetime_complete"]
    return optuna.trial.FrozenTrial(
        number=-1,  # given by the study, as the id is
        trial_id=-1,
        state=optuna.trial.TrialState[values["state"]],
        value=None,
        values=values["values"],
        params=values["params"],
        distributions={k: od.json_to_distribution(d) for k, d in values["distributions"].items()},
        user_attrs={},
        system_attrs=values["system_attrs"],
        intermediate_values={int(k): v for k, v in values["intermediate_values"].items()},
        datetime_start=began and datetime.datetime.fromisoformat(began),
        datetime_complete=ended and datetime.datetime.fromisoformat(ended),
    )
