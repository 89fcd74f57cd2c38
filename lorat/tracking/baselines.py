"""Trackers to compare with, with the two methods that one-pass evaluation needs.

``static`` never moves its box; ``mil`` is OpenCV's multiple-instance-learning tracker (B. Babenko
et al., CVPR 2009), which the main ``opencv-python`` wheel has as ``cv2.TrackerMIL``.  OpenCV
seeds it from the clock, so its boxes differ from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from lorat.errors import UserError
from lorat.image.boxes import Box

BASELINES = ("static", "mil")


class StaticTracker:
    """Answer with the first box for ever."""

    def start(self, frames: Sequence[np.ndarray], boxes: Sequence[Sequence[float]]) -> list[Any]:
        """Make one target per first frame and box (xyxy)."""
        return [tuple(float(value) for value in box) for box in boxes]

    def step(
        self, targets: Sequence[Any], frames: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes (B, 4) xyxy and scores (B,)."""
        return np.array(targets, dtype=np.float64), np.ones(len(targets))


@dataclass
class _MilTarget:
    tracker: Any
    box: Box


class MilTracker:
    """OpenCV's MIL with its default parameters; a lost target keeps its box with score 0."""

    def start(self, frames: Sequence[np.ndarray], boxes: Sequence[Sequence[float]]) -> list[Any]:
        """Make one target per first frame and box (xyxy)."""
        targets = []
        for frame, box in zip(frames, boxes, strict=True):
            tracker = cv2.TrackerMIL.create()
            x1, y1, x2, y2 = (float(value) for value in box)
            height, width = frame.shape[:2]
            left, top = min(max(round(x1), 0), width - 2), min(max(round(y1), 0), height - 2)
            right = min(max(round(x2), left + 2), width)
            bottom = min(max(round(y2), top + 2), height)
            tracker.init(_bgr(frame), (left, top, right - left, bottom - top))
            targets.append(_MilTarget(tracker, (x1, y1, x2, y2)))
        return targets

    def step(
        self, targets: Sequence[Any], frames: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes (B, 4) xyxy and scores (B,), 1 where found and 0 where lost."""
        scores = np.zeros(len(targets))
        for row, (target, frame) in enumerate(zip(targets, frames, strict=True)):
            found, (x, y, w, h) = target.tracker.update(_bgr(frame))
            if found:
                target.box = (float(x), float(y), float(x + w), float(y + h))
                scores[row] = 1.0
        return np.array([target.box for target in targets], dtype=np.float64), scores


def baseline(name: str) -> StaticTracker | MilTracker:
    """Return the baseline tracker of that name.

    Raises:
        UserError: if there is none.
    """
    if name == "static":
        return StaticTracker()
    if name == "mil":
        return MilTracker()
    raise UserError(f"There is no baseline {name}; choose from {', '.join(BASELINES)}.")


def _bgr(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
