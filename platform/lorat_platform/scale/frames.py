"""A frame index of many frames: how long it takes to open and to sample, and what memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorat.files.scratch import temporary_folder

FRAMES_PER_TRACK = 150
SAMPLES = 5_000
"""Pairs that are drawn."""
_VALUES = {
    "box": (500, 300, 700, 420), "valid": True, "visible": True, "size_wh": (1280, 720),
    "window": (380, 140, 828, 588), "stored_wh": 448, "length": 30_000,
}  # fmt: skip
"""What all frames of the synthetic index have in common; other columns are 0."""


@dataclass(frozen=True, kw_only=True)
class IndexCost:
    """What an index of some size costs."""

    frames: int
    make_s: float
    """Writing it, check sum included."""
    make_bytes: float
    """Memory of the process that wrote it, at most."""
    disk_bytes: float
    open_s: float
    """Opening it and making the sampler, in a process that did not have it."""
    sample_us: float
    """Drawing one pair."""
    process_bytes: float
    """Memory that each process has for itself after that, above what it had before."""
    shared_bytes: float
    """Pages of the index that it looked at, which the processes of a machine share."""


def measure_index(sizes: list[int], folder: Path | None = None) -> list[IndexCost]:
    """Make an index of each size, look into it from a fresh process, and remove it.

    Args:
        sizes: numbers of frames.
        folder: where they are made, one at a time, 95 bytes a frame; none means where temporary
            files are.
    """
    context = multiprocessing.get_context("spawn")
    costs = []
    for size in sizes:
        with (
            temporary_folder(folder) as place,
            ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool,
        ):
            made = pool.submit(_make, str(place), size).result()
            used = pool.submit(_use, str(place)).result()
            costs.append(IndexCost(frames=size, **made, **used))
    return costs


def _make(place: str, size: int) -> dict[str, float]:
    from lorat.data.shards.frame_index import FRAME_COLUMNS, write_index
    from lorat.data.shards.manifest import dataset_info, shard_name
    from lorat.data.shards.rows import manifest_entry
    from lorat.files.storage import locate

    began = time.perf_counter()
    columns = {
        name: np.broadcast_to(
            np.asarray(_VALUES.get(name, 0), np.bool_ if kind == "bool" else kind),
            (size, width) if width > 1 else (size,),
        )
        for name, (kind, width) in FRAME_COLUMNS.items()
    }
    number = np.arange(size, dtype=np.int64)
    columns["frame_number"] = (number % FRAMES_PER_TRACK).astype(np.int32)
    columns["offset"] = 30_000 * (number % FRAMES_PER_TRACK)
    tracks = -(-size // FRAMES_PER_TRACK)
    index = write_index(
        locate(place),
        columns=columns,
        track_start=np.minimum(np.arange(tracks + 1) * FRAMES_PER_TRACK, size),
        sequences=[f"sequence-{track:09d}" for track in range(tracks)],
        categories=[""] * tracks,
        shards=[manifest_entry(shard_name(0), 1, size, checked=True)],
        info=dataset_info(name="many", split="train", law=None),
    )
    return {
        "make_s": time.perf_counter() - began,
        "make_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "disk_bytes": float(sum(index.manifest["index"]["bytes"].values())),
    }


def _use(place: str) -> dict[str, float]:
    from lorat.config.training import AugmentConfig, SamplingConfig
    from lorat.config.variants import VARIANTS
    from lorat.data.pairs.sampler import PairSampler
    from lorat.data.shards.frame_index import FrameIndex

    before = _memory()
    began = time.perf_counter()
    sampler = PairSampler(
        [FrameIndex.open(place)], [1.0], VARIANTS["B-224"], SamplingConfig(), AugmentConfig(), 1
    )
    opened = time.perf_counter()
    for pair in range(SAMPLES):
        sampler.sample(pair)
    sampled = time.perf_counter()
    after = _memory()
    return {
        "open_s": opened - began,
        "sample_us": 1e6 * (sampled - opened) / SAMPLES,
        "process_bytes": after["RssAnon"] - before["RssAnon"],
        "shared_bytes": after["RssFile"] - before["RssFile"],
    }


def _memory() -> dict[str, float]:
    """Return the resident memory of this process: its own, and pages of files."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    fields: dict[str, Any] = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: 1024.0 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")}
