"""How fast pairs come, stage by stage, beside bare processes and a torch DataLoader."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lorat.config.bounds import Bounds, Few, check_bounds
from lorat.config.fields import flag
from lorat.config.training import TrainConfig, resolve
from lorat.files.scratch import temporary_folder
from lorat_platform import cluster
from lorat_platform.data.layout import Layout
from lorat_platform.data.sources import Source, open_pairs, resolve_sources
from lorat_platform.data.stream import DecodePool, RayStream, split_stream

log = logging.getLogger(__name__)

WANTED_SHARE = 0.9
"""Share of the bare processes' speed that the stream is to reach."""
WANTED_BYTES = 1.1
"""Most bytes read per byte of the two images."""


@dataclass(frozen=True, kw_only=True)
class DataBenchmark:
    """Measure the pair stream beside bare processes and a DataLoader over loose JPEG files."""

    data: str = "synthetic"
    """Shards, as for training."""
    against: str | None = None
    """Shards of the same videos in another form, such as full frames, for comparison."""
    variant: str = "S-224"
    """Decides the size of the crops."""
    seconds: Annotated[float, Bounds(0, 3600, above=True)] = 10.0
    """Duration of each measurement, more than 0, at most 3600."""
    rounds: Annotated[int, Bounds(1, 1000)] = 2
    """Measurements of each kind, in turn, 1 to 1000; the best of each counts."""
    processes: Few | None = None
    """Processes of each kind, 1 to 1024; none means one per CPU."""
    threads: Few = 1
    """Threads in each decode actor, 1 to 1024."""
    loader: bool = True
    """Also measure a torch DataLoader over loose JPEG files of the same frames."""
    feeds: Annotated[float, Bounds(0, 1_000_000_000, above=True)] | None = None
    """Also say how many cores keep a device fed that takes so many pairs/s, more than 0, at most
    1,000,000,000."""

    def __post_init__(self) -> None:
        check_bounds(self, flag)


@dataclass(frozen=True, kw_only=True)
class BareResult:
    """What processes without Ray reach."""

    pairs_per_s: float
    bytes_per_pair: float
    """Sum of the two images' encoded sizes."""
    os_bytes_per_pair: float
    """Read by the operating system's own count (system calls of the processes)."""


def benchmark_data(options: DataBenchmark) -> dict[str, float]:
    """Run the benchmark, print its table and return its figures."""
    config = resolve(TrainConfig(variant=options.variant, data=options.data, batch_size=64))
    sources = resolve_sources(options.data, "train")
    num = options.processes or len(os.sched_getaffinity(0))
    figures = stages(config, sources)
    log.info("%-28s %10s", f"{options.variant}, one core", "µs/pair")
    for name in ("sample", "read", "decode", "crop"):
        log.info("  %-26s %10.0f", name, figures[f"{name}_us"])
    bare: list[BareResult] = []
    stream: list[float] = []
    loader: list[float] = []
    with temporary_folder() as scratch:
        files = extract(sources, scratch) if options.loader else None
        for _ in range(options.rounds):
            bare.append(run_bare(config, sources, num, options.seconds))
            stream.append(run_stream(config, sources, num, options.threads, options.seconds))
            if files is not None:
                loader.append(run_loader(config, sources, files, num, options.seconds))
    best = max(bare, key=lambda result: result.pairs_per_s)
    figures |= {
        "bare_pairs_per_s": best.pairs_per_s,
        "stream_pairs_per_s": max(stream),
        "stream_share": max(stream) / best.pairs_per_s,
        "bytes_ratio": best.os_bytes_per_pair / best.bytes_per_pair,
    }
    log.info("%-28s %10s", f"{num} processes", "pairs/s")
    log.info("  %-26s %10.1f", "bare processes (limit)", best.pairs_per_s)
    log.info(
        "  %-26s %10.1f   %.0f %% of the limit, wanted %.0f %%",
        "stream, as a worker sees it", max(stream), 100 * figures["stream_share"],
        100 * WANTED_SHARE,
    )  # fmt: skip
    # CPU time of all cores that a pair costs in the stream and not in the bare processes.
    figures["transport_us"] = 1e6 * num * (1 / max(stream) - 1 / best.pairs_per_s)
    log.info("  %-26s %10.0f   µs/pair on one core", "transport", figures["transport_us"])
    if options.feeds is not None:
        figures["feeds_cores"] = cores_for(options.feeds, max(stream), num)
        log.info(
            "  %-26s %10.1f   cores like these for %g pairs/s, one process each",
            "to keep a device fed", figures["feeds_cores"], options.feeds,
        )  # fmt: skip
    if loader:
        figures["loader_pairs_per_s"] = max(loader)
        log.info("  %-26s %10.1f", "DataLoader, loose JPEGs", max(loader))
    log.info(
        "bytes: %.1f kB per pair read, %.3f x its two images (wanted at most %.1f)",
        best.os_bytes_per_pair / 1e3, figures["bytes_ratio"], WANTED_BYTES,
    )  # fmt: skip
    if options.against is not None:
        other = run_bare(config, resolve_sources(options.against, "train"), num, options.seconds)
        figures["against_pairs_per_s"] = other.pairs_per_s
        log.info(
            "%s: %.1f pairs/s in bare processes, so --data is %.2f times as fast",
            options.against, other.pairs_per_s, best.pairs_per_s / other.pairs_per_s,
        )  # fmt: skip
    return figures


def cores_for(wanted: float, stream_pairs_per_s: float, num_processes: int) -> float:
    """Return the cores that decode so many pairs/s, by what as many processes as cores reach.

    Args:
        wanted: pairs/s of a device.
        stream_pairs_per_s: as a worker sees them.
        num_processes: that decoded these, or the cores that they shared, if those are fewer.
    """
    return wanted * min(num_processes, len(os.sched_getaffinity(0))) / stream_pairs_per_s


def stages(config: TrainConfig, sources: tuple[Source, ...]) -> dict[str, float]:
    """Return microseconds per pair of sampling, reading, decoding and cropping on one core."""
    import cv2

    from lorat.data.pairs.sampler import load_pairs

    cv2.setNumThreads(1)
    num_pairs = 200
    sampler, readers = open_pairs(config, sources)
    timed = [_TimedReader(reader) for reader in readers]
    load_pairs(sampler, timed, range(20))  # opens the shards
    for reader in timed:
        reader.reset()
    start = time.perf_counter()
    load_pairs(sampler, timed, range(20, 20 + num_pairs))
    total = time.perf_counter() - start
    read = sum(reader.read_s for reader in timed)
    decode = sum(reader.decode_s for reader in timed) - read
    start = time.perf_counter()
    for index in range(10 * num_pairs):
        sampler.sample(index)
    sample = (time.perf_counter() - start) / 10
    parts = {"sample": sample, "read": read, "decode": decode}
    parts["crop"] = total - sum(parts.values())
    return {f"{name}_us": 1e6 * seconds / num_pairs for name, seconds in parts.items()}


class _TimedReader:
    """An image reader that knows how long reading and decoding took."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.reset()
        read = reader.read

        def timed_read(row: int) -> bytes:
            start = time.perf_counter()
            data = read(row)
            self.read_s += time.perf_counter() - start
            return data

        reader.read = timed_read

    def reset(self) -> None:
        self.read_s = self.decode_s = 0.0

    def decode(self, row: int) -> np.ndarray:
        start = time.perf_counter()
        image = self._reader.decode(row)
        self.decode_s += time.perf_counter() - start
        return image

    def decode_region(self, row: int, region_px: Any) -> Any:
        start = time.perf_counter()
        part = self._reader.decode_region(row, region_px)
        self.decode_s += time.perf_counter() - start
        return part


def run_bare(
    config: TrainConfig, sources: tuple[Source, ...], num: int, seconds: float
) -> BareResult:
    """Let processes decode and crop for a while, each its own pairs, and send nothing anywhere."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(num), context.Queue()
    children = [
        context.Process(target=_bare_process, args=(config, sources, rank, seconds, ready, results))
        for rank in range(num)
    ]
    for child in children:
        child.start()
    parts = [results.get() for _ in children]
    for child in children:
        child.join()
    pairs = sum(part[0] for part in parts)
    return BareResult(
        pairs_per_s=sum(part[0] / part[3] for part in parts),
        bytes_per_pair=sum(part[1] for part in parts) / pairs,
        os_bytes_per_pair=sum(part[2] for part in parts) / pairs,
    )


def _bare_process(
    config: TrainConfig,
    sources: tuple[Source, ...],
    rank: int,
    seconds: float,
    ready: Any,
    results: Any,
) -> None:
    import cv2

    from lorat.data.pairs.sampler import load_pairs

    cv2.setNumThreads(1)
    sampler, readers = open_pairs(config, sources)
    first = rank * 10_000_000
    load_pairs(sampler, readers, range(first, first + 64))
    ready.wait()
    before, start = _bytes_read(), time.perf_counter()
    pairs = num_bytes = 0
    while time.perf_counter() - start < seconds:
        batch = load_pairs(sampler, readers, range(first + pairs, first + pairs + 64))
        pairs += 64
        num_bytes += int(batch["bytes_read"].sum())
    results.put((pairs, num_bytes, _bytes_read() - before, time.perf_counter() - start))


def _bytes_read() -> int:
    """Return the bytes that this process has read by system calls."""
    with open("/proc/self/io") as io:
        return int(io.readline().split()[1])


def run_stream(
    config: TrainConfig, sources: tuple[Source, ...], num: int, threads: int, seconds: float
) -> float:
    """Return pairs/s as a training worker that does nothing else sees them."""
    layout = Layout.plan(config, 1, 0, 1_000_000)
    pool = DecodePool(actors=num, threads=threads)
    with cluster.connected("local"):
        (iterator,) = split_stream(config, sources, layout, pool)
        stream = RayStream(iterator, layout, 0)
        batches = stream.batches(0)
        warm = time.perf_counter() + 3.0
        next(batches)
        while time.perf_counter() < warm:
            next(batches)
        start, pairs = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            pairs += len(next(batches)["index"])
        rate = pairs / (time.perf_counter() - start)
        stream.close()
    return rate


def extract(sources: tuple[Source, ...], folder: Path) -> list[list[str]]:
    """Write every stored image as a file of its own, as datasets come; file names by row."""
    from lorat.data.shards.frame_index import FrameIndex
    from lorat.data.shards.images import ImageReader

    files = []
    for number, source in enumerate(sources):
        index = FrameIndex.open(source.uri)
        reader = ImageReader(index)
        names = []
        for row in range(index.num_frames):
            path = folder / f"{number}" / f"{row // 1000:05d}" / f"{row:08d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(reader.read(row))
            names.append(str(path))
        files.append(names)
    return files


class _LooseReader:
    """Read images from files of their own."""

    def __init__(self, index: Any, files: Sequence[str]) -> None:
        self._index, self._files = index, files

    def decode(self, row: int) -> np.ndarray:
        from lorat.image.codec import decode_rgb

        return decode_rgb(Path(self._files[row]).read_bytes())

    def decode_region(self, row: int, region_px: Any) -> Any:
        return self.decode(row), tuple(self._index.window[row].tolist())


class _LooseDataset:
    """The same pairs from loose files, as a map-style dataset."""

    def __init__(
        self, config: TrainConfig, sources: tuple[Source, ...], files: list[list[str]]
    ) -> None:
        self._config, self._sources, self._files = config, sources, files
        self._opened: Any = None

    def __len__(self) -> int:
        return 100_000_000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        import cv2

        from lorat.data.pairs.sampler import load_pairs

        if self._opened is None:
            cv2.setNumThreads(1)
            sampler, _ = open_pairs(self._config, self._sources)
            readers = [
                _LooseReader(i, f) for i, f in zip(sampler.indexes, self._files, strict=True)
            ]
            self._opened = sampler, readers
        sampler, readers = self._opened
        batch = load_pairs(sampler, readers, [index])
        return {name: value[0] for name, value in batch.items()}


def run_loader(
    config: TrainConfig,
    sources: tuple[Source, ...],
    files: list[list[str]],
    num: int,
    seconds: float,
) -> float:
    """Return pairs/s of a torch DataLoader over loose files doing the same work."""
    import torch.utils.data

    dataset: Any = _LooseDataset(config, sources, files)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=64, num_workers=num, prefetch_factor=4,
        multiprocessing_context="spawn",
    )  # fmt: skip
    batches = iter(loader)
    warm = time.perf_counter() + 3.0
    next(batches)
    while time.perf_counter() < warm:
        next(batches)
    start, pairs = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        pairs += len(next(batches)["index"])
    return pairs / (time.perf_counter() - start)
