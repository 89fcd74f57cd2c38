"""Trajectories: where targets were in each frame of a video, found frame by frame."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lorat.tracking.first_box import FirstBox
from lorat.tracking.one_pass import SequenceTracker
from lorat.tracking.video_source import Frame


class Trajectory:
    """Boxes and scores of the targets in a video, from its first frame on.

    All that have begun advance in one batch.

    Args:
        tracker: what follows the targets.
        first: first frame of the video, not damaged.
        objects: the targets; one whose first frame is damaged begins at the next one.
    """

    def __init__(self, tracker: SequenceTracker, first: Frame, objects: Sequence[FirstBox]) -> None:
        self._tracker = tracker
        self._objects = objects
        self._targets: list[Any] = [None] * len(objects)
        self.boxes: list[np.ndarray] = []
        """(k, 4) xyxy of each frame; NaN of targets that have not begun."""
        self.scores: list[np.ndarray] = []
        """(k,) of each frame; NaN likewise."""
        self.times_s: list[float] = []
        """Seconds since the first frame."""
        self._seconds, self._num_seen = 0.0, 0
        self._follow(first)

    def follow(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Yield each frame once its boxes and scores are the last of the trajectory.

        Where a frame is damaged, the boxes before are repeated with score 0.
        """
        for frame in frames:
            self._follow(frame)
            yield frame

    def _follow(self, frame: Frame) -> None:
        num = len(self._objects)
        boxes = self.boxes[-1].copy() if self.boxes else np.full((num, 4), np.nan)
        scores = np.full(num, np.nan)
        running = [k for k, target in enumerate(self._targets) if target is not None]
        scores[running] = 0.0
        if not frame.damaged:
            if running:
                began = time.perf_counter()
                boxes[running], scores[running] = self._tracker.step(
                    [self._targets[k] for k in running], [frame.image] * len(running)
                )
                self._seconds += time.perf_counter() - began
                self._num_seen += 1
            self._begin(frame, boxes, scores)
        self.boxes.append(boxes)
        self.scores.append(scores)
        self.times_s.append(frame.time_s)

    def _begin(self, frame: Frame, boxes: np.ndarray, scores: np.ndarray) -> None:
        """Start the targets whose first frame this is, and fill in their rows."""
        new = [
            k
            for k, target in enumerate(self._targets)
            if target is None and self._objects[k].frame <= len(self.boxes)
        ]
        if not new:
            return
        given = [self._objects[k].box for k in new]
        started = self._tracker.start([frame.image] * len(new), [box.tolist() for box in given])
        for k, target, box in zip(new, started, given, strict=True):
            self._targets[k] = target
            boxes[k], scores[k] = box, 1.0

    @property
    def last(self) -> tuple[np.ndarray, np.ndarray]:
        """Boxes and scores of the last frame."""
        return self.boxes[-1], self.scores[-1]

    @property
    def fps(self) -> float:
        """Frames per second of tracking alone, without decoding and drawing; 0 before any."""
        return self._num_seen / self._seconds if self._seconds else 0.0
