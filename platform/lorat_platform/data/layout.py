"""Which pairs of a run are decoded together, and which worker takes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lorat.config.training import TrainConfig
from lorat.config.variants import Variant

PAIRS_PER_BLOCK = 512
"""Pairs that a block aims at: the fewer, the more a pair pays for its task."""
BLOCK_BYTES = 96 * 2**20
"""Most bytes of one block."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which pairs are in which block; a pure function, so that every process agrees."""

    batch_size: int
    """Pairs in a global step, B."""
    num_workers: int
    """Workers W, at most B."""
    start_step: int
    end_step: int
    pairs_per_block: int

    @classmethod
    def plan(cls, config: TrainConfig, num_workers: int, start_step: int, end_step: int) -> Layout:
        """Choose the block length: whole steps of a worker, or a whole part of one."""
        assert config.batch_size is not None
        local = math.ceil(config.batch_size / num_workers)
        limit = max(1, min(PAIRS_PER_BLOCK, BLOCK_BYTES // pair_bytes(config.model_variant)))
        if local <= limit:
            pairs = local * max(1, min(limit // local, end_step - start_step))
        else:
            pairs = math.ceil(local / math.ceil(local / limit))
        return cls(
            batch_size=config.batch_size,
            num_workers=num_workers,
            start_step=start_step,
            end_step=end_step,
            pairs_per_block=pairs,
        )

    @property
    def local_batch(self) -> int:
        """Rows of a step in a worker's blocks; workers with fewer pairs have padding."""
        return math.ceil(self.batch_size / self.num_workers)

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole stream, a multiple of W."""
        rows = (self.end_step - self.start_step) * self.local_batch
        return math.ceil(rows / self.pairs_per_block) * self.num_workers

    def blocks_of(self, ranks: range) -> Iterator[int]:
        """Yield the blocks of some workers, dealt to them in turn."""
        for first in range(0, self.num_blocks, self.num_workers):
            yield from (first + rank for rank in ranks)

    def indices(self, block: int) -> np.ndarray:
        """Return the pairs of a block, int64 (pairs_per_block,), -1 for padding."""
        group, rank = divmod(block, self.num_workers)
        position = group * self.pairs_per_block + np.arange(self.pairs_per_block, dtype=np.int64)
        step = self.start_step + position // self.local_batch
        first, last = local_range(self.batch_size, self.num_workers, rank)
        pair = first + position % self.local_batch
        inside = (pair < last) & (step < self.end_step)
        return np.where(inside, step * self.batch_size + pair, -1)


def local_range(batch_size: int, num_workers: int, rank: int) -> tuple[int, int]:
    """Return the part [first, last) of a global batch that a worker takes; never empty."""
    return rank * batch_size // num_workers, (rank + 1) * batch_size // num_workers


def pair_bytes(variant: Variant) -> int:
    """Return the bytes of one decoded pair."""
    return 3 * (variant.template_size**2 + variant.search_size**2) + 128
