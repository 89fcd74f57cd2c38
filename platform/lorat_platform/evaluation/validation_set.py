"""The validation sets of trainings and searches: tracked by one loop, scored in one way."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.images import ImageReader
from lorat.errors import UserError
from lorat.metrics import evaluate
from lorat.metrics.catalogue import SCORES
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

    A set is scored as it is published, with its own rules for frames without a target, and counts
    as much as another one however many sequences it has.

    Args:
        tracker: network tracker or baseline.
        indexes: the sets, with full frames.
        num_sequences: in all sets together, at least one of each, spread evenly over a set; none
            means all there are.
        threads: that read and decode.

    Returns:
        :data:`lorat.metrics.catalogue.SCORES`, by metric.

    Raises:
        UserError: if no sequence of a set can be tracked.
    """
    share = None if num_sequences is None else math.ceil(num_sequences / len(indexes))
    sums = dict.fromkeys(SCORES, 0.0)
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
        scores = evaluate(
            {result.name: result.boxes for result in results},
            {result.name: ground_truth(index, result.track) for result in results},
            dataset=index.name,
        ).scores
        for ours, theirs in SCORES.items():
            sums[ours] += scores[theirs] / len(indexes)
    return sums
