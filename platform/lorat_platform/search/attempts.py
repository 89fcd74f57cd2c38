"""Whose fault a failure is, and what follows: Ray Tune itself counts all failures of trials alike.

:func:`judged` puts a controller into Ray Tune that asks the search's session about each failure,
and that a resumed search tells which failed trials to try again and how many trials there shall be.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import ray.tune.tune  # noqa: F401 (a package's function of that name hides the module)
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from lorat_platform.search.algorithms import extend, take_back
from lorat_platform.search.session import SearchSession

FOR_EVER, NEVER = -1, 0
"""Ray Tune's limits of failures with which a failed trial is, or is not, tried again."""


@contextlib.contextmanager
def judged(session: SearchSession) -> Iterator[None]:
    """Let a session decide which failed trials of what Ray Tune runs meanwhile are tried again."""

    class Controller(TuneController):
        """Ray Tune's controller, with this search's judgement of failures."""

        def _process_trial_failure(self, trial: Trial, exception: Any) -> None:
            trial.max_failures = FOR_EVER if session.tries_again(trial, exception) else NEVER
            super()._process_trial_failure(trial, exception)

        def _requeue_restored_trials(self, trials: list[Trial], resume_config: Any) -> None:
            for trial in trials:
                if trial.status == Trial.ERROR and session.reopens(trial.trial_id):
                    trial.run_metadata.error_filename = None
                    trial.run_metadata.pickled_error_filename = None
                    trial.set_status(Trial.PENDING)
                    take_back(self._search_alg, trial.trial_id)
            extend(self._search_alg, session.num_trials)
            super()._requeue_restored_trials(trials, resume_config)

    module: Any = sys.modules["ray.tune.tune"]
    module.TuneController = Controller
    try:
        yield
    finally:
        module.TuneController = TuneController
