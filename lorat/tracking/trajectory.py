"""Trajectory: where one target was in each frame of a video, found frame by frame."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lorat.tracking.one_pass import SequenceTracker


class Trajectory:
    """Boxes and scores of one target, from its first frame on.

    Args:
        tracker: what follows the target.
        first: first frame, RGB uint8 (H, W, 3).
        box: target in it, xyxy in pixels.
    """

    def __init__(self, tracker: SequenceTracker, first: np.ndarray, box: Sequence[float]) -> None:
        self._tracker = tracker
        self._targets = tracker.start([first], [box])
        self.boxes = [np.array(box)]
        self.scores = [1.0]
        self._seconds = 0.0

    def follow(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield each frame once its box and score are the last of the trajectory."""
        for frame in frames:
            began = time.perf_counter()
            (box,), (score,) = self._tracker.step(self._targets, [frame])
            self._seconds += time.perf_counter() - began
            self.boxes.append(box)
            self.scores.append(float(score))
            yield frame

    @property
    def fps(self) -> float:
        """Frames per second of tracking alone, without decoding and drawing; 0 before any."""
        return (len(self.boxes) - 1) / self._seconds if self._seconds else 0.0
