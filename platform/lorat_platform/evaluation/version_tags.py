"""What a registered version says of its evaluation, whoever evaluated it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from lorat.metrics.catalogue import HEADLINE, SCORES
from lorat.metrics.confidence import histogram
from lorat_platform.evaluation.sets import DatasetResult
from lorat_platform.registry.versions import SCORE_HISTOGRAM


def headline_scores(results: Sequence[DatasetResult], tracker: str = "") -> dict[str, float]:
    """Return ``eval/DATASET/ao`` and so on, or ``eval/DATASET/TRACKER_ao``.

    The ends of their 95 % intervals are ``eval/DATASET/ao_low`` and ``eval/DATASET/ao_high``.
    """
    scores = {}
    for result in results:
        for name in HEADLINE:
            score = SCORES[name]
            key = f"eval/{result.name}/{tracker + '_' if tracker else ''}{name}"
            scores[key] = float(result.scores.get(score, math.nan))
            if score in result.intervals:
                low, high = result.intervals[score]
                scores |= {f"{key}_low": low, f"{key}_high": high}
    return scores


def score_histogram(results: Sequence[DatasetResult]) -> dict[str, str]:
    """Return the tag with the tracker's scores of all frames but the first ones, in bins.

    A server compares the scores of its sessions with them.
    """
    scores = [score for each in results for r in each.results.values() for score in r.scores[1:]]
    return {SCORE_HISTOGRAM: json.dumps(histogram(scores).tolist())} if scores else {}
