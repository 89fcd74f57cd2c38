"""What was measured of the parts that pixels decide: one GPU's step, one core's decoding."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lorat.model.complexity import describe

GPU = "one H200, 27 November 2026, torch 2.11, fp16, batch 128"
"""On what, when and how :data:`PAIRS_PER_S` was measured."""
PAIRS_PER_S = {"B-224": 2174.0, "L-224": 778.0}
"""Training pairs per second of one GPU, everything included: copy, augmentation, optimiser and
logging."""
LIKE = {"S": "B-224", "B": "B-224", "L": "L-224", "g": "L-224"}
"""The measured variant whose work per second is taken for those that were not measured."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What one CPU core does for one search size (``infra/sizing.py --measure``)."""

    pairs_per_s: float
    """Pairs read, decoded and cropped by one core, from windowed shards on a local disk."""
    bytes_per_pair: float
    """Bytes read for one pair."""


DECODING = {
    224: Decoding(pairs_per_s=467, bytes_per_pair=110_000),
    378: Decoding(pairs_per_s=206, bytes_per_pair=225_000),
}
"""By search size: one core of an AMD EPYC with AVX-512, OpenCV 5.0, windowed shards of ten real
sequences enlarged to 960 to 1920 px wide (stored windows 544 x 441 and 926 x 713 px on average)."""


@functools.cache
def pairs_per_s(variant: str) -> float:
    """Return the pairs per second of one GPU: measured, or by the work of a forward pass."""
    if variant in PAIRS_PER_S:
        return PAIRS_PER_S[variant]
    like = LIKE[variant[0]]
    return PAIRS_PER_S[like] * describe(like).macs / describe(variant).macs
