"""An in-memory stand-in for a frame index and its reader, for tests of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorat.image.codec import DamagedImage


class FakeIndex:
    """The attributes of a frame index, with random boxes in frames of one size."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        name: str = "fake",
        frame_wh: tuple[int, int] = (320, 240),
        valid_share: float = 1.0,
        stride: int = 1,
        window: np.ndarray | None = None,
        stored_wh: tuple[int, int] | None = None,
        seed: int = 0,
    ):
        rng = np.random.default_rng(seed)
        num = int(np.sum(lengths))
        self.name, self.split, self.fingerprint = name, "train", f"fake-{seed}"
        self.storage = "full" if window is None else "window"
        self.num_tracks, self.num_frames = len(lengths), num
        self.track_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.valid = rng.random(num) < valid_share
        self.visible = self.valid.copy()
        self.valid_rows = np.flatnonzero(self.valid).astype(np.int64)
        self.valid_start = np.searchsorted(self.valid_rows, self.track_start).astype(np.int64)
        within = np.arange(num) - np.repeat(self.track_start[:-1], lengths)
        self.frame_number = (within * stride).astype(np.int32)
        width, height = frame_wh
        sides = rng.uniform(20, 80, (num, 2))
        corner = rng.uniform(0, 1, (num, 2)) * (np.array([width, height]) - sides)
        self.box = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
        self.size_wh = np.tile(np.array([width, height], np.int32), (num, 1))
        self.mean_rgb = rng.uniform(0, 255, (num, 3)).astype(np.float32)
        whole = np.tile(np.array([0, 0, width, height], np.float32), (num, 1))
        self.window = whole if window is None else window
        self.stored_wh = np.tile(np.array(stored_wh or frame_wh, np.int32), (num, 1))
        self.length = rng.integers(100, 1000, num).astype(np.int32)

    def sequence(self, track: int) -> str:
        return f"{self.name}-{track:04d}"


class FakeReader:
    """Give a noise image per row; rows named as damaged raise."""

    def __init__(self, index: Any, damaged: Sequence[int] = ()):
        self.index = index
        self.damaged = set(damaged)
        self.read_rows: list[int] = []

    def decode(self, row: int) -> np.ndarray:
        self.read_rows.append(row)
        if row in self.damaged:
            raise DamagedImage(f"{self.index.name} row {row}")
        width, height = self.index.stored_wh[row]
        return np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)

    def decode_region(
        self, row: int, region_px: tuple[float, float, float, float]
    ) -> tuple[np.ndarray, tuple[float, ...]]:
        return self.decode(row), tuple(self.index.window[row].tolist())
