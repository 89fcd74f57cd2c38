"""Where the tests that need recorded videos and published results find them.

The environment variable ``LORAT_REAL_DATA`` names the folder; without it, it is the folder
``shared/data`` beside the checkout.  Tests are skipped where what they need is not there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from lorat.image.boxes import xywh_from_xyxy, xyxy_from_xywh
from lorat.image.codec import decode_rgb
from lorat.metrics.overlap import iou
from lorat.tracking.one_pass import SequenceTracker

_BESIDE = Path(__file__).resolve().parents[1].parent / "shared" / "data"
REAL_DATA = Path(os.environ.get("LORAT_REAL_DATA") or _BESIDE)
SEQUENCES = REAL_DATA / "sequences"


def overlaps(tracker: SequenceTracker) -> dict[str, float]:
    """Track every real sequence from its first box; return the mean overlap (AO) of each."""
    return {folder.name: _overlap(tracker, folder) for folder in sorted(SEQUENCES.glob("*/"))}


def baselines() -> dict[str, float]:
    """Return the mean AO over the real sequences of each tracker that was measured on them."""
    measured = json.loads((REAL_DATA / "baselines.json").read_text())
    names = ("static", "KCF", "MIL", "CSRT")
    return {n: float(np.mean([row[n]["AO"] for row in measured.values()])) for n in names}


def _overlap(tracker: SequenceTracker, folder: Path) -> float:
    truth = np.loadtxt(folder / "groundtruth.txt", delimiter=",")
    frames = [decode_rgb(file.read_bytes()) for file in sorted(folder.glob("*.jpg"))]
    targets = tracker.start(frames[:1], xyxy_from_xywh(truth[:1]).tolist())
    found = np.stack([tracker.step(targets, [frame])[0][0] for frame in frames[1:]])
    return float(np.nanmean(iou(xywh_from_xyxy(found), truth[1:])))
