"""Batches of training pairs, and the decoding that makes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lorat.errors import UserError

if TYPE_CHECKING:
    from lorat.data.pairs.sampler import PairSampler
    from lorat.data.shards.images import ImageReader

Batch = dict[str, np.ndarray]
"""What :func:`lorat.data.pairs.sampler.load_pairs` gives."""


class BatchSource(Protocol):
    """Where a training worker gets its batches from."""

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield this worker's part of every global step from ``start_step`` on.

        A batch is what :func:`lorat.data.pairs.sampler.load_pairs` gives, without padding rows.
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

    def load(self, indices: np.ndarray, out: Batch | None = None) -> Batch:
        """Return what :func:`lorat.data.pairs.sampler.load_pairs` gives.

        Args:
            indices: pairs to load.
            out: arrays of an earlier call for as many pairs, to be filled anew; none for new ones.

        Raises:
            UserError: if one image after the other is damaged.
        """
        from lorat.data.pairs.sampler import empty_pairs

        batch = empty_pairs(self._sampler.variant, len(indices)) if out is None else out
        if self._pool is None or len(indices) < 2:
            self._fill(indices, batch)
            return batch
        cuts = [i * len(indices) // self._threads for i in range(self._threads + 1)]
        parts = [slice(*cut) for cut in itertools.pairwise(cuts)]
        list(
            self._pool.map(
                lambda part: self._fill(indices[part], {k: v[part] for k, v in batch.items()}),
                parts,
            )
        )
        return batch

    def _fill(self, indices: np.ndarray, batch: Batch) -> None:
        from lorat.data.pairs.sampler import load_pairs
        from lorat.image.codec import DamagedImage

        try:
            load_pairs(self._sampler, self._readers, indices.tolist(), batch)
        except DamagedImage as error:
            raise UserError(
                f"One image after the other is damaged, the last because {error}; check the data "
                "with 'python jobs/ingest.py verify URI', and ingest it again."
            ) from error
