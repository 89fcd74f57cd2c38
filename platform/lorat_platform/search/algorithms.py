"""Which trials go on and which are tried: Ray Tune's schedulers made resumable, and searchers.

Ray keeps no scheduler state in a search's snapshot, so every report carries the trial's whole
history and a restored trial tells it to the scheduler again.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from lorat.errors import UserError
from lorat.metrics import METRICS
from lorat_platform.search.dimension import Dimension
from lorat_platform.search.rungs import BUDGET, HISTORY, Rungs, pareto_order
from lorat_platform.search.searcher_state import JsonOptuna
from lorat_platform.search.space import SearchSpace

SearcherName = Literal["tpe", "random"]
SchedulerName = Literal["asha", "median", "hyperband", "none"]


def _history(trial: Any) -> list[dict[str, Any]]:
    """Return copies of what a restored trial reported before."""
    return [dict(report) for report in (trial.last_result or {}).get(HISTORY, [])]


class ResumableASHA(ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020) that survives a restart."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take in what a restored trial reported before."""
        super().on_trial_add(tune_controller, trial)
        for report in _history(trial):
            super().on_trial_result(tune_controller, trial, report)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide, also where the rung was reported before but its checkpoint was lost."""
        for milestone, recorded in self._trial_info[trial.trial_id]._rungs:
            if milestone == result.get(BUDGET):
                recorded.pop(trial.trial_id, None)
        return super().on_trial_result(tune_controller, trial, result)


class ResumableMedian(MedianStoppingRule):
    """Median stopping (Golovin et al. 2017) that survives a restart."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take in what a restored trial reported before.

        Nothing is decided again: restored trials come in another order than they reported in, so
        other ones would be stopped.
        """
        super().on_trial_add(tune_controller, trial)
        if not self._results[trial]:  # or it is tried again in the same process
            self._results[trial].extend(_history(trial))


class _Synchronous:
    """Mixin for Hyperband: trials that an earlier process finished must not fill its brackets."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if not trial.is_finished():
            typing.cast(FIFOScheduler, super()).on_trial_add(tune_controller, trial)


class ResumableHyperBand(_Synchronous, HyperBandScheduler):
    """Hyperband (Li et al. 2018); unfinished trials enter new brackets after a restart."""


class ResumableHyperBandForBOHB(_Synchronous, HyperBandForBOHB):
    """Hyperband that fills its brackets in the order of BOHB (Falkner et al. 2018)."""


SLOTS: dict[str, int] = {}
"""Trials at once in every search that this process drives, by the search's identity."""


class _Slots:
    """Mixin: what limits the trials at once is this process's cluster, not that of the snapshot."""

    search = ""
    """Identity of the search."""
    _given = 0

    @property
    def max_concurrent(self) -> int:
        """Trials at once."""
        return SLOTS.get(self.search, self._given)

    @max_concurrent.setter
    def max_concurrent(self, value: int) -> None:
        self._given = value


class SlotLimiter(_Slots, ConcurrencyLimiter):
    """Asks the searcher for no more trials at once than there are slots."""


class RandomSearch(_Slots, BasicVariantGenerator):
    """Random search, or a list of points."""


def take_back(algorithm: Any, trial_id: str) -> None:
    """Let a trial whose end a searcher was told count among those that run."""
    if isinstance(algorithm, RandomSearch):
        algorithm._live_trials.add(trial_id)
    elif isinstance(algorithm.searcher, SlotLimiter):
        algorithm.searcher.live_trials.add(trial_id)
        algorithm.searcher.num_unfinished_live_trials += 1


def extend(algorithm: Any, num_trials: int) -> None:
    """Set how many trials a restored search algorithm of Ray Tune proposes in all."""
    if isinstance(algorithm, RandomSearch):
        (iterator,) = algorithm._iterators
        iterator.num_samples_left += num_trials - iterator.num_samples
        iterator.num_samples = num_trials
    algorithm._total_samples = num_trials
    algorithm._finished = False


class PausableOptuna(JsonOptuna):
    """Optuna under Hyperband in BOHB's order, which tells the searcher about pauses."""

    def on_pause(self, trial_id: str) -> None:
        """A paused trial changes nothing for Optuna."""

    def on_unpause(self, trial_id: str) -> None:
        """Nor does one that goes on."""


class ParetoHalving(FIFOScheduler):
    """Asynchronous successive halving for several objectives.

    A trial goes on from a rung if it is among the best 1 / reduction there, ordered by
    non-dominated front, and within a front by crowding distance (NSGA-II, Deb et al. 2002).
    """

    def __init__(self, objectives: Sequence[str], rungs: Rungs) -> None:
        super().__init__()
        self._signs = {name: METRICS[name].sign for name in objectives}
        self._rungs = rungs
        self._recorded: dict[int, dict[str, list[float]]] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take in what a restored trial reported before."""
        for report in _history(trial):
            self.on_trial_result(tune_controller, trial, report)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop the trial unless it belongs to the best of its rung."""
        if BUDGET not in result:
            return TrialScheduler.CONTINUE
        if result[BUDGET] >= self._rungs.max_budget:
            return TrialScheduler.STOP
        recorded = self._recorded.setdefault(result[BUDGET], {})
        recorded[trial.trial_id] = [s * result[name] for name, s in self._signs.items()]
        order = pareto_order(np.array(list(recorded.values())))
        place = order.index(list(recorded).index(trial.trial_id))
        goes_on = place < math.ceil(len(recorded) / self._rungs.reduction)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP


def build_scheduler(
    name: SchedulerName, objectives: Sequence[str], rungs: Rungs, *, searcher: SearcherName = "tpe"
) -> TrialScheduler:
    """Build the scheduler.

    Raises:
        UserError: if it does not work with several objectives, or not with the searcher.
    """
    if name == "none" or rungs.num_rungs == 1:
        return FIFOScheduler()
    if len(objectives) > 1:
        if name == "asha":
            return ParetoHalving(objectives, rungs)
        raise UserError(
            f"--scheduler {name} compares one objective but {', '.join(objectives)} are given; "
            "use asha or none."
        )
    metric: dict[str, Any] = {"metric": objectives[0], "mode": METRICS[objectives[0]].better}
    if name == "asha":
        return ResumableASHA(
            time_attr=BUDGET,
            max_t=rungs.max_budget,
            grace_period=1,
            reduction_factor=rungs.reduction,
            **metric,
        )
    if name == "median":
        return ResumableMedian(time_attr=BUDGET, grace_period=1, min_samples_required=3, **metric)
    # Proposals come one by one but for random search; only BOHB's order of filling the brackets
    # compares trials that are not all there from the beginning.
    kind = ResumableHyperBand if searcher == "random" else ResumableHyperBandForBOHB
    return kind(
        time_attr=BUDGET, max_t=rungs.max_budget, reduction_factor=rungs.reduction, **metric
    )


def build_searcher(
    name: SearcherName,
    space: SearchSpace,
    objectives: Sequence[str],
    *,
    num_trials: int,
    seed: int,
    max_concurrent: int,
) -> Searcher | BasicVariantGenerator:
    """Build the searcher; its first trial is always the base configuration's own values."""
    prior = [space.prior()]
    if name == "random" or not prior[0]:  # nothing is left to propose
        return RandomSearch(
            points_to_evaluate=prior, max_concurrent=max_concurrent, random_state=seed
        )
    modes: list[str] = [METRICS[objective].better for objective in objectives]
    several = len(objectives) > 1

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(
        multivariate=True,
        constant_liar=True,
        n_startup_trials=max(4, min(10, num_trials // 3)),
        seed=seed,
    )
    return PausableOptuna(
        space={path: distribution(d) for path, d in space.trained.items()},
        metric=list(objectives) if several else objectives[0],
        mode=modes if several else modes[0],
        points_to_evaluate=prior,
        sampler=sampler,
    )


def distribution(dimension: Dimension) -> Any:
    """Return a dimension in Optuna's terms."""
    import optuna.distributions as od

    if dimension.kind == "choice":
        return od.CategoricalDistribution(dimension.values)
    low, high = dimension.bounds
    if dimension.kind in ("int", "logint"):
        return od.IntDistribution(int(low), int(high), log=dimension.log)
    return od.FloatDistribution(low, high, log=dimension.log)
