"""Scores of tracking results, as the published toolkits compute them."""

from lorat.metrics.catalogue import METRICS, Metric
from lorat.metrics.dialects import DIALECTS, FrameErrors, GroundTruth
from lorat.metrics.scores import (
    SCORE_NAMES,
    Evaluation,
    SequenceScores,
    evaluate,
)

__all__ = [
    "DIALECTS",
    "METRICS",
    "SCORE_NAMES",
    "Evaluation",
    "FrameErrors",
    "GroundTruth",
    "Metric",
    "SequenceScores",
    "evaluate",
]
