"""Blocks per second through the split stream, with blocks of a few bytes."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass

import numpy as np
import psutil

from lorat.data.pairs.batches import Batch
from lorat_platform import cluster
from lorat_platform.data.layout import Layout
from lorat_platform.data.stream import (
    WORKERS_PER_LOOP,
    DecodePool,
    RayStream,
    split_blocks,
    worker_groups,
)

WARM_S = 1.0
"""Time after every consumer's first block that is left out."""
END_S = 20.0
"""Longest wait for consumers to end."""


@dataclass(frozen=True, kw_only=True)
class BlockRate:
    """What control loops of Ray Data do for some consumers."""

    consumers: int
    loops: int
    blocks_per_s: float
    """Of all loops together, with consumers, decoders and loops on the CPUs of this machine."""
    loop_ms: float
    """CPU time of the control loops per block."""
    gcs_ms: float
    """CPU time of Ray's control plane, of which a cluster has one, per block."""


class TinyDecoder:
    """Makes a block of its number."""

    def __call__(self, row: Batch) -> Batch:
        """Return a block of one pair."""
        return {"index": row["block"][:, None]}


def measure_blocks(sizes: list[int], seconds: float, *, one_loop: bool = True) -> list[BlockRate]:
    """Measure blocks per second for each number of consumers.

    Args:
        sizes: numbers of consumers, each a thread of this process.
        seconds: duration of each measurement.
        one_loop: all consumers share a control loop; else as many serve them as in a training.
    """
    with cluster.connected("local", num_cpus=2):
        return [block_rate(size, seconds, one_loop=one_loop) for size in sizes]


def block_rate(size: int, seconds: float, *, one_loop: bool) -> BlockRate:
    """Measure one number of consumers as :func:`measure_blocks` does, on the connected Ray."""
    layout = Layout(
        batch_size=size, num_workers=size, start_step=0, end_step=10_000_000, pairs_per_block=1
    )
    pool = DecodePool(actors=2 if one_loop else 2 * math.ceil(size / WORKERS_PER_LOOP), threads=1)
    groups = [(range(size), pool)] if one_loop else worker_groups(size, pool)
    iterators = [
        iterator
        for ranks, part in groups
        for iterator in split_blocks(
            layout, ranks, part, TinyDecoder, (), 1024, num_loops=len(groups)
        )
    ]
    streams = [RayStream(iterator, layout, rank) for rank, iterator in enumerate(iterators)]
    counts, stop = np.zeros(size, np.int64), threading.Event()

    def consume(rank: int) -> None:
        for _ in streams[rank].batches(0):
            counts[rank] += 1
            if stop.is_set():
                return

    threads = [threading.Thread(target=consume, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    while counts.min() == 0 and all(thread.is_alive() for thread in threads):
        time.sleep(0.05)
    if counts.min() == 0:
        raise RuntimeError("A consumer ended before its first block; its thread says why.")
    time.sleep(WARM_S)
    before, first, began = _cpu_times(), counts.sum(), time.perf_counter()
    time.sleep(seconds)
    blocks, elapsed = int(counts.sum() - first), time.perf_counter() - began
    after = _cpu_times()
    stop.set()
    for thread in threads:
        thread.join(END_S)
    used = {name: 1e3 * (after[name] - before[name]) / max(blocks, 1) for name in before}
    return BlockRate(
        consumers=size,
        loops=len(groups),
        blocks_per_s=blocks / elapsed,
        loop_ms=used["ray::SplitCoordinator"],
        gcs_ms=used["gcs_server"],
    )


def _cpu_times() -> dict[str, float]:
    """Return the CPU seconds so far of this process's children by what they are."""
    used = {"ray::SplitCoordinator": 0.0, "gcs_server": 0.0}
    for child in psutil.Process().children(recursive=True):
        try:
            command = " ".join(child.cmdline())
            seconds = sum(child.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
        for name in used:
            used[name] += seconds if name in command else 0.0
    return used
