"""What 8, 64 and 256 GPUs ask of every part, beside what the part was measured to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorat.config.training import TrainConfig, resolve
from lorat_platform.data.layout import Layout, pair_bytes
from lorat_platform.data.stream import DecodePool, worker_groups
from lorat_platform.runs.claim import RENEW_S
from lorat_platform.scale.measured import DECODING, PAIRS_PER_S, pairs_per_s

VARIANTS = ("B-224", "L-378")
GPUS = (8, 64, 256)
BATCH_PER_GPU = 128
STEPS_PER_RECORD = 50
"""Optimiser steps between two records of a run."""
CORES_PER_GPU = 16
"""Of the machine whose GPU was measured."""
PREFIX_READS_PER_S = 5_500
PREFIX_WRITES_PER_S = 3_500
"""Requests per second that S3 promises for a prefix, by its documentation."""
WRITES_PER_RENEWAL = 3
"""Requests with which PyArrow writes a file of a few bytes to S3: begin, one part, end."""
NODE_GPUS = 8
NETWORK_BYTES_PER_S = 100e9 / 8
"""Of a node with NODE_GPUS GPUs."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the parts do, as measured on some machine."""

    loop_ms: float
    """CPU time of a control loop of the stream per block."""
    gcs_ms: float
    """CPU time of Ray's control plane per block."""
    records_per_s: float
    """Taken by MLflow from one process that drives many trials."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What some GPUs ask for; every ``..._use`` is a share of what there is."""

    variant: str
    gpus: int
    pairs_per_s: float
    cores: float
    """That decode."""
    read_bytes_per_s: float
    reads_per_s: float
    """Ranges of shards, two per pair."""
    crop_bytes_per_s: float
    """From decoders to the node of NODE_GPUS workers."""
    loops: int
    blocks_per_s: float
    """Of one control loop."""
    loop_use: float
    """Of one core."""
    gcs_use: float
    """Of one core."""
    records_use: float
    """Of MLflow, if every GPU has a trial of its own."""
    claims_use: float
    """Of one prefix of S3, if every GPU has a training of its own."""

    def uses(self) -> dict[str, float]:
        """Return the share of each part that is in use, the parts of the first limit first."""
        network = self.crop_bytes_per_s + self.read_bytes_per_s * NODE_GPUS / self.gpus
        shares = {
            f"cores, {CORES_PER_GPU} per GPU": self.cores / (CORES_PER_GPU * self.gpus),
            "network of a node": network / NETWORK_BYTES_PER_S,
            "control loop": self.loop_use,
            "Ray's control plane": self.gcs_use,
            "MLflow": self.records_use,
            "claims": self.claims_use,
        }
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


def demand(variant: str, gpus: int, capacity: Capacity) -> Demand:
    """Compute what a training, or as many trials, of a variant on some GPUs ask for."""
    config = resolve(TrainConfig(variant=variant, batch_size=BATCH_PER_GPU * gpus))
    decoding = DECODING[config.model_variant.search_size]
    layout = Layout.plan(config, gpus, 0, 1_000_000)
    one = pairs_per_s(variant)
    total = gpus * one
    cores = total / decoding.pairs_per_s
    loops = len(worker_groups(gpus, DecodePool(actors=max(1, int(cores)), threads=1)))
    blocks = total / layout.pairs_per_block
    steps_per_s = one / BATCH_PER_GPU
    return Demand(
        variant=variant,
        gpus=gpus,
        pairs_per_s=total,
        cores=cores,
        read_bytes_per_s=total * decoding.bytes_per_pair,
        reads_per_s=2 * total,
        crop_bytes_per_s=NODE_GPUS * one * pair_bytes(config.model_variant),
        loops=loops,
        blocks_per_s=blocks / loops,
        loop_use=blocks / loops * capacity.loop_ms / 1e3,
        gcs_use=blocks * capacity.gcs_ms / 1e3,
        records_use=gpus * steps_per_s / STEPS_PER_RECORD / capacity.records_per_s,
        claims_use=gpus / RENEW_S * WRITES_PER_RENEWAL / PREFIX_WRITES_PER_S,
    )


def demands(capacity: Capacity) -> Iterator[Demand]:
    """Yield a row for every variant and number of GPUs."""
    for variant in VARIANTS:
        for gpus in GPUS:
            yield demand(variant, gpus, capacity)


def table(capacity: Capacity) -> str:
    """Return the table of limits in Markdown: (m) is measured, (c) computed."""
    lines = [
        "| variant, GPUs | pairs/s | decode cores | from the storage | reads, prefixes of S3 "
        "| crops into a node | control loops | use of one | Ray's control plane | MLflow | claims "
        "| first limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in demands(capacity):
        part, use = next(iter(row.uses().items()))
        cells = [
            f"{row.pairs_per_s:,.0f}",
            f"{row.cores:,.0f}",
            f"{row.read_bytes_per_s / 1e9:.1f} GB/s",
            f"{row.reads_per_s:,.0f}/s, {row.reads_per_s / PREFIX_READS_PER_S:.0f}",
            f"{row.crop_bytes_per_s / 1e9:.1f} GB/s",
            f"{row.loops} x {row.blocks_per_s:.0f} blocks/s",
            f"{100 * row.loop_use:.0f} %",
            f"{100 * row.gcs_use:.0f} %",
            f"{100 * row.records_use:.0f} %",
            f"{100 * row.claims_use:.0f} %",
            f"{part} {100 * use:.0f} %",
        ]
        lines.append(f"| {row.variant}, {row.gpus} | " + " (c) | ".join(cells) + " (c) |")
    return "\n".join(lines)


def note() -> str:
    """Say in Markdown from what the table is computed."""
    measured = ", ".join(f"{name} {rate:,.0f}" for name, rate in PAIRS_PER_S.items())
    return f"pairs/s of one GPU: {measured} (m)"
