"""The stream of training pairs: decoded by any CPU of the cluster, the same for any workers.

One stream serves a whole run, since starting a Ray Data pipeline takes seconds.  Optimiser step k
consumes exactly the pairs [k·B, (k+1)·B), B being the global batch, whatever the number W of
workers; resuming at step k needs nothing but k.

A row of the Ray dataset is a whole *block* of pairs, one tensor cell per array.  Row j goes to
worker j mod W: with ``preserve_order`` and an equal ``streaming_split`` Ray Data deals rows round
robin, however fast tasks and workers are.  That one row is one block also keeps Ray Data from
cutting or merging blocks, and lets a single read task name all blocks of a run while it runs
(one read task per block would take a millisecond each before the first batch).

A control loop of Ray Data is one process and spends some milliseconds on a block.  So it serves a
group of workers only, with decode actors of its own; which block is whose stays the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorat.config.training import TrainConfig
from lorat.data.pairs.batches import Batch, Decoder
from lorat_platform.cluster import ray_internals
from lorat_platform.cluster.console import Console
from lorat_platform.data.layout import Layout, local_range, pair_bytes
from lorat_platform.data.sources import Source, open_pairs

log = logging.getLogger(__name__)

PAUSE_S = 0.02
"""Rest of Ray Data's control loop after each step.  It waits for any task that can go on, and the
task that names the blocks always can: while enough is decoded, the loop would turn without a rest
and take most of a CPU from the training."""
CLOSE_S = 5.0
"""Longest wait for the block that is under way when a stream is closed."""
BLOCKS_AHEAD = 3
"""Blocks that are kept decoded ahead, per worker, beside those in the making."""
MAX_THREADS = 8
"""Threads of an actor from which they would wait for Python's lock, which drawing pairs holds."""
WORKERS_PER_LOOP = 4
"""Most workers that one control loop serves (``jobs/benchmark.py scale`` measures what it can)."""


@dataclass(frozen=True, kw_only=True)
class DecodePool:
    """Processes that read, decode and crop.

    They ask Ray for no CPU: actors that do stay pending for ever, without an error, once training
    workers hold every CPU, be it from the start or because a node was lost.
    """

    actors: int
    threads: int
    """Threads in each; OpenCV works outside Python's lock."""
    resources: dict[str, float] = dataclasses.field(default_factory=dict)
    """Custom resources that each asks for, such as one ``decode`` of a CPU node."""

    @classmethod
    def plan(
        cls,
        *,
        worker_cpus: float,
        cluster_cpus: float,
        decode_nodes: float = 0.0,
        actors: int | None = None,
        threads: int | None = None,
    ) -> DecodePool:
        """Fit the pool into what the training workers leave, and say so.

        Args:
            worker_cpus: CPUs that all training workers together ask for.
            cluster_cpus: CPUs of the cluster.
            decode_nodes: amount of the custom resource ``decode`` in the cluster; if there is
                any, actors run only on nodes that have it, and take one each.
            actors: instead of what fits; more than there is ``decode`` makes a cluster that
                scales by itself add nodes.
            threads: instead of what fits.
        """
        free = max(0.0, cluster_cpus - worker_cpus)
        if decode_nodes:
            pool = cls(
                actors=actors or max(1, int(decode_nodes)),
                threads=threads or 4,
                resources={"decode": 1.0},
            )
            why = f"on nodes with the resource decode ({decode_nodes:g})"
        elif free >= 1:
            actors = actors or max(min(int(free), 64), math.ceil(free / MAX_THREADS))
            pool = cls(actors=actors, threads=threads or max(1, round(free / actors)))
            why = f"on {free:g} free CPUs"
        else:
            actors = actors or max(1, int(cluster_cpus) // 2)
            pool = cls(actors=actors, threads=threads or 2)
            why = "sharing the CPUs of the training workers, which ask for all"
        log.info("decoding: %d actors of %d threads, %s", pool.actors, pool.threads, why)
        return pool


class BlockDecoder:
    """Decode the blocks of a stream; one per decode actor."""

    def __init__(
        self,
        config: TrainConfig,
        sources: tuple[Source, ...],
        layout: Layout,
        threads: int,
        console: Console | None,
    ) -> None:
        if console is not None:
            console.install(logging.WARNING)
        self._layout = layout
        self._decoder = Decoder(*open_pairs(config, sources), threads)
        self._batch: Batch | None = None

    def __call__(self, row: Batch) -> Batch:
        """Decode the one block that ``row`` names; every array gets a leading axis of 1.

        The arrays are those of the call before, filled anew: Ray Data has copied them into the
        object store by then.
        """
        (block,) = row["block"].tolist()
        self._batch = self._decoder.load(self._layout.indices(block), self._batch)
        return {name: array[None] for name, array in self._batch.items()}


def split_stream(
    config: TrainConfig,
    sources: tuple[Source, ...],
    layout: Layout,
    pool: DecodePool,
    console: Console | None = None,
) -> list[Any]:
    """Start the stream and return one iterator of blocks per worker, to be sent to them.

    Args:
        config: variant, sampling, augmentation, seed.
        sources: the datasets.
        layout: which pairs are in which block.
        pool: who decodes.
        console: where damaged images are named.
    """
    arguments = (config, sources, layout, pool.threads, console)
    num_bytes = layout.pairs_per_block * pair_bytes(config.model_variant)
    groups = worker_groups(layout.num_workers, pool)
    return [
        iterator
        for ranks, part in groups
        for iterator in split_blocks(
            layout, ranks, part, BlockDecoder, arguments, num_bytes, num_loops=len(groups)
        )
    ]


def worker_groups(num_workers: int, pool: DecodePool) -> list[tuple[range, DecodePool]]:
    """Return the ranks that share a control loop, and who decodes for them, group by group.

    A group has two actors at least, if there are as many: it must not stand still with one of them.
    """
    num = min(math.ceil(num_workers / WORKERS_PER_LOOP), max(1, pool.actors // 2))
    workers, actors = ([i * n // num for i in range(num + 1)] for n in (num_workers, pool.actors))
    return [
        (range(*ranks), dataclasses.replace(pool, actors=last - first))
        for ranks, (first, last) in zip(
            itertools.pairwise(workers), itertools.pairwise(actors), strict=True
        )
    ]


def split_blocks(
    layout: Layout,
    ranks: range,
    pool: DecodePool,
    decoder: type,
    arguments: tuple[Any, ...],
    num_bytes: int,
    *,
    num_loops: int = 1,
) -> list[Any]:
    """Start a control loop and return an iterator of blocks for each worker that it serves.

    Args:
        layout: names the blocks.
        ranks: of the workers.
        pool: who decodes.
        decoder: class whose instances turn the row that names a block into the block.
        arguments: of its constructor.
        num_bytes: of a block.
        num_loops: that share the object store.
    """
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current().copy()
    context.target_max_block_size = 1  # one row, one block
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [_rest()]
    # What may be decoded ahead; never more than half of the object store, Ray Data's own limit.
    ahead = BLOCKS_AHEAD * len(ranks) + 3 * pool.actors
    half = ray.cluster_resources()["object_store_memory"] / 2
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=min(2 * ahead * num_bytes, half / num_loops)
    )
    previous = DataContext.get_current()
    ray_internals.set_data_context(context)
    try:
        blocks = ray.data.read_datasource(
            _block_numbers(layout, ranks),
            override_num_blocks=1,
            num_cpus=0,
            memory=1,  # differs from the decoders' request, or Ray would fuse both into one task
        )
        dataset = blocks.map_batches(
            decoder,
            fn_constructor_args=arguments,
            batch_size=None,
            compute=ActorPoolStrategy(size=pool.actors, max_tasks_in_flight_per_actor=2),
            num_cpus=0,
            resources=pool.resources or None,
        )
        return dataset.streaming_split(len(ranks), equal=True)
    finally:
        ray_internals.set_data_context(previous)


def _rest() -> type:
    """Return the callback that lets the control loop rest."""
    base: Any = ray_internals.execution_callback()

    class Rest(base):
        """Sleep after every step of the loop."""

        def on_execution_step(self, executor: Any) -> None:
            time.sleep(PAUSE_S)

    return Rest


def _block_numbers(layout: Layout, ranks: range) -> Any:
    """Return a Ray datasource whose single read task names the blocks of some workers."""
    import pyarrow as pa
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    count = layout.num_blocks // layout.num_workers * len(ranks)

    class BlockNumbers(Datasource):
        """The numbers of the blocks, in the order of :meth:`Layout.blocks_of`."""

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[Any]:
            size = BlockMetadata(
                num_rows=count, size_bytes=8 * count, input_files=None, exec_stats=None
            )
            return [
                ReadTask(lambda: (pa.table({"block": [i]}) for i in layout.blocks_of(ranks)), size)
            ]

        def estimate_inmemory_data_size(self) -> int | None:
            return 8 * count

    return BlockNumbers()


class RayStream:
    """One worker's end of the stream, a :class:`BatchSource`.

    It begins to fetch when it is made, so that the pipeline starts while the model is built.
    """

    def __init__(self, iterator: Any, layout: Layout, rank: int) -> None:
        self._layout = layout
        self._rank = rank
        self._blocks: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._fetch, args=(iterator,), name="pair-stream", daemon=True
        )
        self._thread.start()

    def _fetch(self, iterator: Any) -> None:
        try:
            rows = iterator.iter_batches(
                batch_size=None, batch_format="numpy", prefetch_batches=BLOCKS_AHEAD - 1
            )
            for row in rows:
                self._put({name: cell[0] for name, cell in row.items()})
                if self._stop.is_set():
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._blocks.put(item, timeout=0.5)
            except queue.Full:
                continue
            return

    def _take(self) -> Iterator[Batch]:
        while (item := self._blocks.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """End the stream, and let its thread go before the connection to Ray does."""
        self._stop.set()
        self._thread.join(CLOSE_S)

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield this worker's batches; the stream was made for one starting step."""
        if start_step != self._layout.start_step:
            raise ValueError(f"the stream starts at {self._layout.start_step}, not {start_step}")
        first, last = local_range(self._layout.batch_size, self._layout.num_workers, self._rank)
        steps = self._layout.end_step - self._layout.start_step
        try:
            yield from rebatch(self._take(), self._layout.local_batch, last - first, steps)
        finally:
            self.close()


def rebatch(
    blocks: Iterator[Batch], rows_per_step: int, num_pairs: int, num_steps: int
) -> Iterator[Batch]:
    """Cut blocks into steps and drop the padding at the end of each; copies only across blocks."""
    left: Batch | None = None
    for _ in range(num_steps):
        while left is None or len(left["index"]) < rows_per_step:
            block = next(blocks, None)
            if block is None:
                raise RuntimeError("the pair stream ended early")
            if left is None or len(left["index"]) == 0:
                left = block
            else:
                left = {k: np.concatenate([v, block[k]]) for k, v in left.items()}
        yield {k: v[:num_pairs] for k, v in left.items()}
        left = {k: v[rows_per_step:] for k, v in left.items()}
