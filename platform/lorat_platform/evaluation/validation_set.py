"""The validation sets of trainings and searches: tracked by one loop, scored in one way."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.images import ImageReader
from lorat.errors import UserError
from lorat.metrics import evaluate
from lorat.metrics.catalogue import SCORES
from lorat.metrics.scores import Evaluation
from lorat.tracking.one_pass import SequenceTracker, ground_truth, track_sequences, usable_tracks

BATCH = 16
"""Sequences tracked at once."""


def tracking_scores(
    tracker: SequenceTracker,
    indexes: Sequence[FrameIndex],
    *,
    num_sequences: int | None = None,
    threads: int = 1,
) -> dict[str, float]:
    """Track sequences of each set from their first boxes and return the mean scores of the sets.

    Args:
        tracker: network tracker or baseline.
        indexes: the sets, with full frames.
        num_sequences: as of :func:`tracking_evaluations`.
        threads: that read and decode.

    Returns:
        :data:`lorat.metrics.catalogue.SCORES`, by metric.

    Raises:
        UserError: if no sequence of a set can be tracked.
    """
    return mean_scores(
        tracking_evaluations(tracker, indexes, num_sequences=num_sequences, threads=threads)
    )


def tracking_evaluations(
    tracker: SequenceTracker,
    indexes: Sequence[FrameIndex],
    *,
    num_sequences: int | None = None,
    threads: int = 1,
) -> list[Evaluation]:
    """Track sequences of each set from their first boxes and score each set as it is published.

    Args:
        tracker: network tracker or baseline.
        indexes: the sets, with full frames.
        num_sequences: in all sets together, at least one of each, spread evenly over a set; none
            means all there are.
        threads: that read and decode.

    Raises:
        UserError: if no sequence of a set can be tracked.
    """
    share = None if num_sequences is None else math.ceil(num_sequences / len(indexes))
    evaluations = []
    for index in indexes:
        tracks = usable_tracks(index)
        if share is not None and share < len(tracks):
            tracks = [tracks[i * len(tracks) // share] for i in range(share)]
        results = track_sequences(
            tracker, index, ImageReader(index), tracks, batch_size=BATCH, decode_threads=threads
        )
        if not results:
            raise UserError(
                f"No sequence of {index.uri} can be tracked, for want of a first box or frame; "
                f"check it with 'python jobs/ingest.py verify {index.uri}'."
            )
        evaluation = evaluate(
            {result.name: result.boxes for result in results},
            {result.name: ground_truth(index, result.track) for result in results},
            dataset=index.name,
        )
        evaluations.append(evaluation)
    return evaluations


def mean_scores(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Return the mean scores of sets, by metric.

    A set is scored with its own rules for frames without a target, and counts as much as another
    one however many sequences it has.
    """
    return {
        ours: sum(evaluation.scores[theirs] for evaluation in evaluations) / len(evaluations)
        for ours, theirs in SCORES.items()
    }


def scores_of_sequences(evaluations: Sequence[Evaluation]) -> list[dict[str, dict[str, float]]]:
    """Return the scores of each set's sequences, by sequence and metric."""
    return [
        {
            sequence.name: {ours: sequence.scores[theirs] for ours, theirs in SCORES.items()}
            for sequence in evaluation.sequences.values()
        }
        for evaluation in evaluations
    ]
