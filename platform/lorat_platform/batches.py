"""Batches of training pairs, and the decoding that makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lorat.errors import UserError

if TYPE_CHECKING:
    from lorat.pairs import PairSampler
    from lorat.shards import ImageReader

Batch = dict[str, np.ndarray]
"""What :func:`lorat.pairs.load_pairs` gives."""


class BatchSource(Protocol):
    """Where a training worker gets its batches from."""

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield this worker's part of every global step from ``start_step`` on.

        A batch is what :func:`lorat.pairs.load_pairs` gives, without padding rows.
        """
        ...


class Decoder:
    """Load pairs with the threads of one process.

    Args:
        sampler: draws the pairs.
        readers: read its datasets' images.
        threads: that share the pairs of a call.
    """

    def __init__(
        self, sampler: PairSampler, readers: Sequence[ImageReader], threads: int = 1
    ) -> None:
        import cv2

        cv2.setNumThreads(1)
        self._sampler, self._readers = sampler, readers
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def load(self, indices: np.ndarray) -> Batch:
        """Return what :func:`lorat.pairs.load_pairs` gives.

        Raises:
            UserError: if one image after the other is damaged.
        """
        if self._pool is None or len(indices) < 2:
            return self._load(indices)
        parts = list(
            self._pool.map(self._load, np.array_split(indices, min(self._threads, len(indices))))
        )
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _load(self, indices: np.ndarray) -> Batch:
        from lorat.images import DamagedImage
        from lorat.pairs import load_pairs

        try:
            return load_pairs(self._sampler, self._readers, indices.tolist())
        except DamagedImage as error:
            raise UserError(
                f"One image after the other is damaged, the last because {error}; check the data "
                "with 'python jobs/ingest.py verify URI', and ingest it again."
            ) from error
