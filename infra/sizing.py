"""Compute the sizing table of infra/README.md.

    python infra/sizing.py                                  print the table
    python infra/sizing.py --measure DATA --variant B-224   measure decoding on this machine

Work and memory are the same estimates that ``jobs/train.py --dry-run`` prints; what is measured
is in :data:`DECODING`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from lorat.config.training import RECIPES, TrainConfig, resolve
from lorat.config.variants import VARIANTS
from lorat.learning.clock import PEAK_FLOPS
from lorat.model.complexity import describe
from lorat_platform.training.estimate import ASSUMED_MFU, FORECAST_GPU, training_memory

GIB = 1 << 30
OVERHEAD_BYTES = 2 * GIB
"""CUDA context, library work space, and what the allocator cannot use."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What one CPU core does for one search size, measured with --measure."""

    pairs_per_s: float
    """Pairs read, decoded and cropped by one core, from windowed shards on a local disk."""
    bytes_per_pair: float
    """Bytes read for one pair."""


DECODING = {
    224: Decoding(pairs_per_s=467, bytes_per_pair=110_000),
    378: Decoding(pairs_per_s=206, bytes_per_pair=225_000),
}
"""By search size: one core of an AMD EPYC with AVX-512, OpenCV 5.0, windowed shards of ten real
sequences enlarged to 960 to 1920 px wide (stored windows 544 x 441 and 926 x 713 px on average)."""

BATCH_PER_GPU = 16
"""Pairs per GPU: the paper's batch of 128 on 8 GPUs."""


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
    pairs_per_s = PEAK_FLOPS[FORECAST_GPU] * ASSUMED_MFU / about.train_flops
    decoding = DECODING[config.model_variant.search_size]
    recipe = RECIPES["paper"]
    total = recipe["epochs"] * recipe["pairs_per_epoch"]
    return Sizing(
        variant=name,
        memory_bytes=sum(memory.values()) + OVERHEAD_BYTES,
        pairs_per_s=pairs_per_s,
        cores=pairs_per_s / decoding.pairs_per_s,
        read_bytes_per_s=pairs_per_s * decoding.bytes_per_pair,
        hours=total / (8 * pairs_per_s) / 3600,
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
            f"| {name} | {row.memory_bytes / GIB:.0f} GiB | {row.pairs_per_s:,.0f} "
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
        print(table())
