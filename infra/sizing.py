"""Compute the tables of sizes and limits in infra/README.md.

    python infra/sizing.py                                  print the tables
    python infra/sizing.py --measure DATA --variant B-224   measure decoding on this machine

Memory is the same estimate that ``jobs/train.py --dry-run`` prints; what was measured of GPUs and
decoding is in ``lorat_platform/scale/measured.py``, the rest in :data:`CAPACITY`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from lorat.config.training import RECIPES, TrainConfig, resolve
from lorat.config.variants import VARIANTS
from lorat.model.complexity import describe
from lorat_platform.scale import limits
from lorat_platform.scale.limits import Capacity
from lorat_platform.scale.measured import DECODING, PAIRS_PER_S, Decoding, pairs_per_s
from lorat_platform.training.estimate import training_memory

GIB = 1 << 30
OVERHEAD_BYTES = 2 * GIB
"""CUDA context, library work space, and what the allocator cannot use."""


BATCH_PER_GPU = 16
"""Pairs per GPU: the paper's batch of 128 on 8 GPUs."""
CAPACITY = Capacity(loop_ms=10.9, gcs_ms=0.32, records_per_s=134.0)
"""Measured on 2 busy cores of an Intel Xeon: the parts of ``jobs/benchmark.py scale``, singly."""


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """One row of the table."""

    variant: str
    memory_bytes: float
    """Of the GPU, for BATCH_PER_GPU pairs in one pass."""
    pairs_per_s: float
    """Of one GPU."""
    cores: float
    """Decoding cores per GPU."""
    read_bytes_per_s: float
    """From the store, per GPU."""
    hours: float
    """Of the paper's recipe on 8 GPUs."""


def size(name: str) -> Sizing:
    """Compute one row."""
    config = resolve(TrainConfig(variant=name))
    about = describe(config.model_variant, config)
    memory = training_memory(config, about, BATCH_PER_GPU)
    rate = pairs_per_s(name)
    decoding = DECODING[config.model_variant.search_size]
    recipe = RECIPES["paper"]
    total = recipe["epochs"] * recipe["pairs_per_epoch"]
    return Sizing(
        variant=name,
        memory_bytes=sum(memory.values()) + OVERHEAD_BYTES,
        pairs_per_s=rate,
        cores=rate / decoding.pairs_per_s,
        read_bytes_per_s=rate * decoding.bytes_per_pair,
        hours=total / (8 * rate) / 3600,
    )


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        f"| variant | GPU memory, {BATCH_PER_GPU} pairs | pairs/s per GPU | decode cores per GPU "
        "| storage per GPU | full recipe, 8 GPUs |",
        "|---|---|---|---|---|---|",
    ]
    for name in (f"{letter}-{side}" for side in (224, 378) for letter in "SBLg"):
        row = size(name)
        lines.append(
            f"| {name} | {row.memory_bytes / GIB:.0f} GiB "
            f"| {row.pairs_per_s:,.0f}{' (m)' if name in PAIRS_PER_S else ''} "
            f"| {row.cores:.1f} | {row.read_bytes_per_s / 1e6:,.0f} MB/s | {row.hours:,.1f} h |"
        )
    return "\n".join(lines)


def measure(uri: str, name: str, *, seconds: float = 10.0) -> Decoding:
    """Load pairs of a dataset with one core and count."""
    import cv2

    from lorat.config.training import AugmentConfig, SamplingConfig
    from lorat.data.pairs.sampler import PairSampler, load_pairs
    from lorat.data.shards.frame_index import FrameIndex
    from lorat.data.shards.images import ImageReader

    cv2.setNumThreads(1)
    index = FrameIndex.open(uri)
    sampler = PairSampler([index], [1.0], VARIANTS[name], SamplingConfig(), AugmentConfig(), seed=1)
    readers = [ImageReader(index)]
    load_pairs(sampler, readers, range(32))
    done, read, start = 32, 0, time.process_time()
    while time.process_time() - start < seconds:
        batch = load_pairs(sampler, readers, range(done, done + 32))
        done += 32
        read += int(batch["bytes_read"].sum())
    return Decoding(
        pairs_per_s=(done - 32) / (time.process_time() - start),
        bytes_per_pair=read / (done - 32),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", metavar="DATA", help="windowed shards to measure with")
    parser.add_argument("--variant", default="B-224", choices=list(VARIANTS))
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(arguments.measure, arguments.variant))
    else:
        print(table(), limits.table(CAPACITY), sep="\n\n")
