"""Scores of tracking results, as the published toolkits compute them."""

from lorat.metrics.dialects import DIALECTS, FrameErrors, GroundTruth
from lorat.metrics.scores import (
    PRECISION_THRESHOLDS_PX,
    SCORE_NAMES,
    Evaluation,
    SequenceScores,
    evaluate,
    score_sequence,
)

__all__ = [
    "DIALECTS",
    "PRECISION_THRESHOLDS_PX",
    "SCORE_NAMES",
    "Evaluation",
    "FrameErrors",
    "GroundTruth",
    "SequenceScores",
    "evaluate",
    "score_sequence",
]
