"""A frame index of many frames: how long it takes to open and to sample, and what memory."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorat.errors import UserError
from lorat.files.scratch import temporary_folder

FRAMES_PER_TRACK = 150
FRAME_BYTES = 130
"""Of disk that a frame takes while the index is made, most of it for good."""
SAMPLES = 5_000
"""Pairs that are drawn."""
_NUMBERS = np.arange(FRAMES_PER_TRACK, dtype=np.int32)
_VALUES = {"box": (500, 300, 700, 420), "valid": True, "size_wh": (1280, 720), "length": 30_000}
"""What all frames of the synthetic index have in common; sampling looks at no other column."""


@dataclass(frozen=True, kw_only=True)
class IndexCost:
    """What an index of some size costs."""

    frames: int
    make_s: float
    """Writing it, check sum included."""
    disk_bytes: float
    open_s: float
    """Opening it and making the sampler, in a process that did not have it."""
    first_us: float
    """Drawing a pair, from pages that no process has looked at: SAMPLES pairs."""
    again_us: float
    """Drawing the same pairs again."""
    process_bytes: float
    """Memory that each process has for itself after that, above what it had before."""
    shared_bytes: float
    """Pages of the index that it looked at, which the processes of a machine share."""


def check_room(size: int, folder: Path | None = None) -> None:
    """Look whether an index has room where it will be made.

    Raises:
        UserError: if there is no such folder, or no room in it.
    """
    where, needed = folder or Path(tempfile.gettempdir()), FRAME_BYTES * size
    if not where.is_dir():
        raise UserError(f"There is no folder {where}; make it, or give another --index-folder.")
    free = shutil.disk_usage(where).free
    if free < needed:
        raise UserError(
            f"An index of {size:,} frames takes {needed / 1e9:.1f} GB to make, but {where} "
            f"has {free / 1e9:.1f} GB; give fewer --frames or another --index-folder."
        )


def measure_index(sizes: list[int], folder: Path | None = None) -> list[IndexCost]:
    """Make an index of each size, look into it from a fresh process, and remove it.

    Args:
        sizes: numbers of frames.
        folder: where they are made, one at a time, FRAME_BYTES a frame; none means where temporary
            files are.
    """
    context = multiprocessing.get_context("spawn")
    costs = []
    for size in sizes:
        with (
            temporary_folder(folder) as place,
            temporary_folder(folder) as scratch,
            ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool,
        ):
            made = pool.submit(_make, str(place), str(scratch), size).result()
            used = pool.submit(_use, str(place)).result()
            costs.append(IndexCost(frames=size, **made, **used))
    return costs


def _make(place: str, scratch: str, size: int) -> dict[str, float]:
    from lorat.data.shards.frame_index import FRAME_COLUMNS, write_index
    from lorat.data.shards.manifest import dataset_info, shard_name
    from lorat.data.shards.rows import manifest_entry
    from lorat.files.storage import locate

    began = time.perf_counter()
    columns: dict[str, np.ndarray] = {}
    for name, (kind, width) in FRAME_COLUMNS.items():
        # In files, which need no memory; what stays 0 needs no disk either.
        columns[name] = column = np.memmap(
            f"{scratch}/{name}", np.bool_ if kind == "bool" else kind, "w+",
            shape=(size, width) if width > 1 else (size,),
        )  # fmt: skip
        if name in _VALUES:
            column[:] = _VALUES[name]
    for first in range(0, size, FRAMES_PER_TRACK):
        part = columns["frame_number"][first : first + FRAMES_PER_TRACK]
        part[:] = _NUMBERS[: len(part)]
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
    times = [opened]
    for _ in range(2):
        for pair in range(SAMPLES):
            sampler.sample(pair)
        times.append(time.perf_counter())
    first, again = np.diff(times) / SAMPLES
    after = _memory()
    return {
        "open_s": opened - began,
        "first_us": 1e6 * float(first),
        "again_us": 1e6 * float(again),
        "process_bytes": after["RssAnon"] - before["RssAnon"],
        "shared_bytes": after["RssFile"] - before["RssFile"],
    }


def _memory() -> dict[str, float]:
    """Return the resident memory of this process: its own, and pages of files."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    fields: dict[str, Any] = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: 1024.0 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")}
