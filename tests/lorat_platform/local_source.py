"""Batches decoded by threads of this process, without Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lorat.data.pairs.batches import Batch
from lorat_platform.data.layout import local_range


class LocalSource:
    """Pairs decoded by threads of this process, a :class:`BatchSource` without Ray Data.

    Args:
        load: gives the pairs of an int64 array of indices, such as ``Decoder.load``.
        batch_size: pairs in a global step.
        end_step: where the run ends.
        rank: this worker, of ``num_workers``.
        threads: batches that are loaded at the same time, ahead of the consumer.
    """

    def __init__(
        self,
        load: Callable[[np.ndarray], Batch],
        *,
        batch_size: int,
        end_step: int,
        rank: int = 0,
        num_workers: int = 1,
        threads: int = 2,
    ) -> None:
        self._load = load
        self._batch_size = batch_size
        self._end_step = end_step
        self._range = local_range(batch_size, num_workers, rank)
        self._threads = threads

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield this worker's batches, loaded ahead in order."""
        first, last = self._range
        steps = range(start_step, self._end_step)

        def load(step: int) -> Batch:
            base = step * self._batch_size
            return self._load(np.arange(base + first, base + last))

        with ThreadPoolExecutor(self._threads) as pool:
            ahead = [pool.submit(load, step) for step in steps[: self._threads + 1]]
            try:
                for step in steps:
                    batch = ahead.pop(0).result()
                    following = step + self._threads + 1
                    if following < self._end_step:
                        ahead.append(pool.submit(load, following))
                    yield batch
            finally:
                for waiting in ahead:
                    waiting.cancel()
