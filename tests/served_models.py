"""Models for tests of serving, made without MLflow, and a video for them."""

from __future__ import annotations

import numpy as np

from lorat.model.network import LoRAT
from lorat.tracking.tracker import Tracker
from lorat_platform.serving.served_model import ServedModel
from tests.constant_trackers import random_tracker

BOX = (60.0, 50.0, 40.0, 30.0)
"""Left, top, width, height of a target of :func:`frames`."""


def served(number: int = 1, model: LoRAT | None = None) -> ServedModel:
    """Return a model as version ``number`` of ``lorat``."""
    tracker = Tracker(model or random_tracker(number), device="cpu")
    return ServedModel(uri=f"models:/lorat/{number}", tracker=tracker, latency_ms=1.0)


def frames(count: int, seed: int = 0, size: tuple[int, int] = (160, 120)) -> list[np.ndarray]:
    """Return frames of noise that drifts."""
    width, height = size
    rng = np.random.default_rng(seed)
    still = rng.integers(0, 256, (height, width, 3), np.uint8)
    return [np.roll(still, (number, 2 * number), (0, 1)) for number in range(count)]


def expected(
    model: ServedModel, video: list[np.ndarray], ltwh: tuple[float, ...] = BOX
) -> np.ndarray:
    """Track with the library alone; return the boxes, left, top, width, height, of every frame."""
    left, top, width, height = ltwh
    first = (left, top, left + width, top + height)
    model.tracker.init(video[0], first)
    boxes = [np.array(first), *(model.tracker.update(frame)[0] for frame in video[1:])]
    return np.array([[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes])
