"""A worker's batches from the crops that a search shares, made by threads ahead of their need."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Self

from lorat.data.pairs.batches import Batch
from lorat_platform.data.layout import local_range
from lorat_platform.search.trial.crop_cache import BLOCK, CropCache


class CachedSource:
    """A worker's part of every step, a :class:`lorat.data.pairs.batches.BatchSource`.

    Args:
        cache: where the pairs are.
        batch_size: pairs B in a global step; step k has the pairs [kB, (k+1)B).
        end_step: where the run ends.
        rank: this worker, of ``num_workers``.
        threads: threads that make blocks before they are needed.
    """

    def __init__(
        self,
        cache: CropCache,
        *,
        batch_size: int,
        end_step: int,
        rank: int = 0,
        num_workers: int = 1,
        threads: int = 1,
    ) -> None:
        self._cache = cache
        self._batch_size = batch_size
        self._end_step = end_step
        self._range = local_range(batch_size, num_workers, rank)
        self._threads = threads

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield the batches from a step on; closing the generator stops its threads."""
        first, last = self._range
        size = self._batch_size
        with _Ahead(
            self._cache,
            first=(start_step * size + first) // BLOCK,
            end=-(-((self._end_step - 1) * size + last) // BLOCK),
            threads=self._threads,
        ) as ahead:
            for step in range(start_step, self._end_step):
                ahead.move_to((step * size + last) // BLOCK)
                yield self._cache.read(step * size + first, step * size + last)


class _Ahead:
    """Threads that make the blocks following the one that is needed."""

    def __init__(self, cache: CropCache, *, first: int, end: int, threads: int) -> None:
        self._cache = cache
        self._next = self._current = first
        self._end = end
        self._depth = 2 + 2 * threads
        self._changed = threading.Condition()
        self._stopped = False
        self._failure: Exception | None = None
        self._threads = [
            threading.Thread(target=self._work, name="crop-cache", daemon=True)
            for _ in range(threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def move_to(self, block: int) -> None:
        """Say which block is needed now."""
        if self._failure is not None:
            raise self._failure
        with self._changed:
            self._current = block
            self._next = max(self._next, block)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and self._next > self._current + self._depth:
                    self._changed.wait()
                if self._stopped or self._next >= self._end:
                    return
                block = self._next
                self._next += 1
            try:
                self._cache.prepare(block)
            except Exception as error:
                self._failure = error
                return
