"""Compute the sizing table of infra/README.md.

    python infra/sizing.py                                  print the table
    python infra/sizing.py --measure DATA --variant B-224   measure decoding on this machine

Work and parameters come from :mod:`lorat.complexity`; everything assumed is a field of
:class:`Machine`, everything measured a value of :data:`DECODING`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from lorat.complexity import describe
from lorat.config import RECIPES, TrainConfig
from lorat.variants import VARIANTS, Variant

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPU that the table assumes."""

    name: str = "A100 80 GB"
    peak_flops: float = 312e12
    """Dense fp16 of the maker's data sheet, in floating-point operations per second."""
    mfu: float = 0.3
    """Share of the peak that training reaches."""
    overhead_bytes: int = 2 * GIB
    """CUDA context, library work space and what the allocator cannot use."""


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


def memory_bytes(variant: Variant, machine: Machine, *, pairs: int = BATCH_PER_GPU) -> float:
    """Estimate the GPU memory of LoRA training with fp16 autocast.

    Weights 4 bytes and their fp16 copies 2; gradients 4 and AdamW 8 for what is trained.
    Activations per token and block: 34 D bytes (Korthikanti et al. 2022, equation 2, with
    attention that keeps no N x N map), and 12 r for each of the six adapters' inner products,
    kept in fp16 and fp32 with their inputs shared.
    """
    config = TrainConfig(variant=variant.name)
    size = describe(variant, config)
    tokens = variant.template_grid**2 + variant.search_grid**2
    weights = 6 * size.total_training_params + 12 * size.trainable_params
    per_token = variant.depth * (34 * variant.dim + 6 * 2 * config.lora.rank)
    return weights + pairs * tokens * per_token + machine.overhead_bytes


def size(name: str, machine: Machine) -> Sizing:
    """Compute one row."""
    variant = VARIANTS[name]
    flops = describe(variant, TrainConfig(variant=name)).train_flops
    pairs_per_s = machine.peak_flops * machine.mfu / flops
    decoding = DECODING[variant.search_size]
    recipe = RECIPES["paper"]
    total = recipe["epochs"] * recipe["pairs_per_epoch"]
    return Sizing(
        variant=name,
        memory_bytes=memory_bytes(variant, machine),
        pairs_per_s=pairs_per_s,
        cores=pairs_per_s / decoding.pairs_per_s,
        read_bytes_per_s=pairs_per_s * decoding.bytes_per_pair,
        hours=total / (8 * pairs_per_s) / 3600,
    )


def table(machine: Machine | None = None) -> str:
    """Return the table in Markdown."""
    machine = machine or Machine()
    lines = [
        f"| variant | GPU memory, {BATCH_PER_GPU} pairs | pairs/s per GPU | decode cores per GPU "
        "| storage per GPU | full recipe, 8 GPUs |",
        "|---|---|---|---|---|---|",
    ]
    for name in (f"{letter}-{side}" for side in (224, 378) for letter in "SBLg"):
        row = size(name, machine)
        lines.append(
            f"| {name} | {row.memory_bytes / GIB:.0f} GiB | {row.pairs_per_s:,.0f} "
            f"| {row.cores:.1f} | {row.read_bytes_per_s / 1e6:,.0f} MB/s | {row.hours:,.1f} h |"
        )
    return "\n".join(lines)


def measure(uri: str, name: str, *, seconds: float = 10.0) -> Decoding:
    """Load pairs of a dataset with one core and count."""
    import cv2

    from lorat.config import AugmentConfig, SamplingConfig
    from lorat.frame_index import FrameIndex
    from lorat.pairs import PairSampler, load_pairs
    from lorat.shards import ImageReader

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
