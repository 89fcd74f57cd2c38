"""Trackers to compare with, with the two methods that one-pass evaluation needs.

``static`` never moves its box; ``mil`` is OpenCV's multiple-instance-learning tracker (B. Babenko
et al., CVPR 2009), which the main ``opencv-python`` wheel has as ``cv2.TrackerMIL``; ``csrt`` is
its discriminative correlation filter (A. Lukezic et al., CVPR 2017), which only some builds have.
All are seeded: the same frames and first box give the same boxes, whatever is tracked beside.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from lorat.errors import UserError
from lorat.image.boxes import Box

BASELINES = ("static", "mil", "csrt")
"""Names of all baselines; :func:`available` tells which ones this machine can run."""
_OPENCV = {"mil": "TrackerMIL", "csrt": "TrackerCSRT"}
_SEED = 20230607


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
class _Target:
    tracker: Any
    box: Box


class OpenCvTracker:
    """A tracker of OpenCV with its default parameters; a lost target keeps its box with score 0.

    Args:
        name: ``mil`` or ``csrt``.

    Raises:
        UserError: if the OpenCV that is installed was built without it.
    """

    def __init__(self, name: str) -> None:
        if not _has(name):
            raise UserError(
                f"OpenCV {cv2.__version__} was built without {_OPENCV[name]}, which the baseline "
                f"{name} is; choose from {', '.join(available())}, or install "
                "opencv-contrib-python in the place of opencv-python."
            )
        self._kind = getattr(cv2, _OPENCV[name])

    def start(self, frames: Sequence[np.ndarray], boxes: Sequence[Sequence[float]]) -> list[Any]:
        """Make one target per first frame and box (xyxy)."""
        targets = []
        for frame, box in zip(frames, boxes, strict=True):
            x1, y1, x2, y2 = (float(value) for value in box)
            height, width = frame.shape[:2]
            left, top = min(max(round(x1), 0), width - 2), min(max(round(y1), 0), height - 2)
            right = min(max(round(x2), left + 2), width)
            bottom = min(max(round(y2), top + 2), height)
            _seed()
            tracker = self._kind.create()
            tracker.init(_bgr(frame), (left, top, right - left, bottom - top))
            targets.append(_Target(tracker, (x1, y1, x2, y2)))
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


def available() -> tuple[str, ...]:
    """Return the names of the baselines that the OpenCV of this machine has."""
    return tuple(name for name in BASELINES if name not in _OPENCV or _has(name))


def baseline(name: str) -> StaticTracker | OpenCvTracker:
    """Return the baseline tracker of that name.

    Raises:
        UserError: if there is none, or OpenCV was built without it.
    """
    if name == "static":
        return StaticTracker()
    if name in _OPENCV:
        return OpenCvTracker(name)
    raise UserError(f"There is no baseline {name}; choose from {', '.join(available())}.")


def _has(name: str) -> bool:
    return hasattr(cv2, _OPENCV[name])


def _seed() -> None:
    """Seed what a new tracker draws from: MIL its features from the C library, its samples from a
    copy of this thread's generator of OpenCV."""
    ctypes.CDLL(None).srand(_SEED)
    cv2.setRNGSeed(_SEED)


def _bgr(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
