"""A shadow: another model that tracks a share of the sessions beside, and never answers."""

from __future__ import annotations

import hashlib
import logging
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lorat.errors import UserError
from lorat.metrics.confidence import BINS, histogram
from lorat.metrics.overlap import iou
from lorat_platform.serving.served_model import ServedModel
from lorat_platform.serving.session import Session

if TYPE_CHECKING:
    from lorat.tracking.tracker import Target

log = logging.getLogger(__name__)

_Targets = dict[str, tuple[object, "Target"]]
"""Kept first view and target, by name: a name that is used again has another view."""
LATENCIES_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Upper ends of the bins of latencies; one more holds what took longer."""


@dataclass
class Agreement:
    """What a shadow found beside a model that serves, since the start."""

    frames: int = 0
    sessions: int = 0
    failures: int = 0
    """Frames that the shadow could not track."""
    overlap: float = 0.0
    """Sum over frames of the overlap of both boxes, 0 to 1 each."""
    overlaps: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    served_scores: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    latencies: np.ndarray = field(default_factory=lambda: np.zeros(len(LATENCIES_MS) + 1, np.int64))

    def metrics(self) -> dict[str, float]:
        """Return what is recorded of it."""
        frames = max(self.frames, 1)
        middle = (np.arange(BINS) + 0.5) / BINS
        return {
            "shadow/frames": self.frames,
            "shadow/sessions": self.sessions,
            "shadow/failures": self.failures,
            "shadow/overlap": self.overlap / frames,
            "shadow/share_apart": float(self.overlaps[: BINS // 2].sum()) / frames,
            "shadow/score": float(self.scores @ middle) / frames,
            "shadow/served_score": float(self.served_scores @ middle) / frames,
        }


class Shadow:
    """Tracks beside.

    Args:
        model: which tracks.
        share: of the sessions that it sees, 0 to 1.
    """

    def __init__(self, model: ServedModel, share: float) -> None:
        self.model, self.share = model, share
        self.agreements: dict[str, Agreement] = {}
        """By the model that serves."""
        self._seen: weakref.WeakKeyDictionary[Session, _Targets] = weakref.WeakKeyDictionary()

    def sees(self, session: Session) -> bool:
        """Tell whether a session is in the share, which its id decides."""
        number = int.from_bytes(hashlib.sha256(session.id.encode()).digest()[:4])
        return number < self.share * 2**32

    def observe(self, session: Session, image: np.ndarray, answer: dict[str, Any]) -> None:
        """Track the frame of an answer, and compare; in the thread that tracks."""
        if not self.sees(session):
            return
        agreement = self.agreements.setdefault(answer["model"], Agreement())
        seen = self._seen.get(session)
        if seen is None:
            agreement.sessions += 1
            seen = self._seen[session] = {}
        began = time.perf_counter()
        try:
            compared = self._step(session, image, seen)
        except UserError as error:
            log.warning("The shadow %s cannot track a frame: %s", self.model.name, error)
            agreement.failures += 1
            return
        took_ms = 1000 * (time.perf_counter() - began)
        for name, (box, score) in compared.items():
            followed = session.followed[name]
            overlap = _overlap(box, followed.box)
            agreement.frames += 1
            agreement.overlap += overlap
            agreement.overlaps += histogram([overlap])
            agreement.scores += histogram([score])
            agreement.served_scores += histogram([followed.score])
            agreement.latencies[np.searchsorted(LATENCIES_MS, took_ms)] += 1

    def _step(
        self, session: Session, image: np.ndarray, seen: _Targets
    ) -> dict[str, tuple[list[float], float]]:
        """Begin with what is new, step the rest; return box and score of those by name."""
        old: dict[str, Target] = {}
        for name, followed in session.followed.items():
            known = seen.get(name)
            if known is not None and known[0] is followed.view:
                old[name] = known[1]
                continue
            (target,) = self.model.tracker.start_from([followed.view])
            target.box = followed.target.box
            seen[name] = followed.view, target
        for name in seen.keys() - session.followed.keys():
            del seen[name]
        if not old:
            return {}
        boxes, scores = self.model.step(list(old.values()), [image] * len(old))
        return {
            name: (box, score)
            for name, box, score in zip(old, boxes.tolist(), scores.tolist(), strict=True)
        }


def _overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the overlap of two boxes, xyxy, 0 to 1; 0 where both are empty."""
    boxes = np.array([first, second])
    boxes[:, 2:] -= boxes[:, :2]
    return float(np.nan_to_num(iou(boxes[:1], boxes[1:]))[0])
