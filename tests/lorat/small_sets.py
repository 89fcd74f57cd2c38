"""Small datasets in memory for the tests of shards."""

from __future__ import annotations

import cv2
import numpy as np

from lorat.data.shards.from_memory import MemoryTrack


def tracks(
    num_tracks: int = 4, num_frames: int = 6, size_wh: tuple[int, int] = (160, 120), seed: int = 0
) -> list[MemoryTrack]:
    """Return tracks of smooth noise; the target of every third frame is absent."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(num_tracks):
        coarse = rng.integers(0, 255, (num_frames, 12, 16, 3), dtype=np.uint8)
        images = [cv2.resize(c, size_wh, interpolation=cv2.INTER_CUBIC) for c in coarse]
        corner = rng.uniform(20, 60, (num_frames, 2))
        box = np.concatenate([corner, corner + rng.uniform(15, 40, (num_frames, 2))], axis=1)
        box[2::3] = np.nan
        made.append(MemoryTrack(name=f"track-{number}", images=images, box=box, category="thing"))
    return made
