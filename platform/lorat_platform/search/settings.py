"""How the weights of every trial are tried as trackers: settings that need no training.

Fields below ``tracking``, such as the window penalty, change no weight.  Where a search has them,
every trial tracks the validation sequences at each rung once per setting, all trials with the same
ones, and is judged by its best: such a field costs evaluations only, and no proposal of the
searcher is spent on it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorat.config.fields import replace_path
from lorat.config.tracking import TrackingConfig
from lorat.metrics import METRICS
from lorat.metrics.catalogue import SCORES
from lorat_platform.search.dimension import Scalar, latin_hypercube
from lorat_platform.search.space import TRACKING, SearchSpace

STREAM = 83
"""Stream number of the settings, beside the searcher's seed."""


def settings_of(space: SearchSpace, number: int, seed: int) -> tuple[dict[str, Scalar], ...]:
    """Return the settings that every trial is evaluated with, the usual one first.

    They follow from the arguments alone, so that a search that is gone on with has the same.  All
    combinations where they are few enough choices, else a Latin hypercube: each field takes values
    from all parts of its range.

    Args:
        space: of the search.
        number: most settings; equal ones count once.
        seed: of the searcher.
    """
    dimensions = space.tracking
    usual = space.usual_tracking()
    choices = [d.values for d in dimensions.values() if d.kind == "choice"]
    if len(choices) == len(dimensions) and math.prod(map(len, choices)) <= number:
        found = [dict(zip(dimensions, each, strict=True)) for each in itertools.product(*choices)]
    else:
        rng = np.random.default_rng([seed, STREAM])
        found = latin_hypercube(dimensions, number - 1, rng)
    every = [usual, *found]
    return tuple(setting for place, setting in enumerate(every) if setting not in every[:place])


def tracking_of(tracking: TrackingConfig, setting: Mapping[str, Any]) -> TrackingConfig:
    """Return how to track with a setting, whose paths begin with ``tracking``."""
    for path, value in setting.items():
        tracking = replace_path(tracking, path.removeprefix(TRACKING), value)
    return dataclasses.replace(tracking)


def judge(objectives: Sequence[str]) -> str | None:
    """Return the objective that chooses among settings: the first that is a score, or none."""
    return next((name for name in objectives if name in SCORES), None)


def best_of(found: Sequence[dict[str, Any]], objectives: Sequence[str]) -> dict[str, Any]:
    """Return the best of the evaluations of one trial's weights, the first of equal ones."""
    name = judge(objectives)
    if name is None:
        return found[0]
    return max(found, key=lambda each: METRICS[name].sign * each["scores"][name])
