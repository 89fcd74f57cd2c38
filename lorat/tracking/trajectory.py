"""Trajectory: where one target was in each frame of a video, found frame by frame."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lorat.tracking.one_pass import SequenceTracker
from lorat.tracking.video_source import Frame


class Trajectory:
    """Boxes and scores of one target, from its first frame on.

    Args:
        tracker: what follows the target.
        first: first frame.
        box: target in it, xyxy in pixels.
    """

    def __init__(self, tracker: SequenceTracker, first: Frame, box: Sequence[float]) -> None:
        self._tracker = tracker
        self._targets = tracker.start([first.image], [box])
        self.boxes = [np.array(box)]
        self.scores = [1.0]
        self.times_s = [first.time_s]
        """Seconds since the first frame."""
        self._seconds, self._num_seen = 0.0, 0

    def follow(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Yield each frame once its box and score are the last of the trajectory.

        Where a frame is damaged, the box before is repeated with score 0.
        """
        for frame in frames:
            box, score = self.boxes[-1], 0.0
            if not frame.damaged:
                began = time.perf_counter()
                (box,), (score,) = self._tracker.step(self._targets, [frame.image])
                self._seconds += time.perf_counter() - began
                self._num_seen += 1
            self.boxes.append(box)
            self.scores.append(float(score))
            self.times_s.append(frame.time_s)
            yield frame

    @property
    def fps(self) -> float:
        """Frames per second of tracking alone, without decoding and drawing; 0 before any."""
        return self._num_seen / self._seconds if self._seconds else 0.0
