"""One-pass evaluation of whole benchmarks, spread over the cluster.

Sequences go to workers in chunks of similar length, longest first, and each worker takes the next
chunk when it is done.  Every finished sequence is written to disk at once, so an interrupted
evaluation goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from tqdm import tqdm

from lorat.attributes import sequences_by_attribute
from lorat.errors import UserError
from lorat.frame_index import FrameIndex
from lorat.home import home
from lorat.metrics import Evaluation, GroundTruth
from lorat.metrics import evaluate as score
from lorat.one_pass import SequenceResult, track_sequences
from lorat.shards import ImageReader
from lorat_platform.subject import Subject

log = logging.getLogger(__name__)

DIALECTS = ("compatible", "plain")
"""Metric dialects of every data set; its own toolkit's is added where there is one."""
TOOLKITS = {"got10k": "got10k", "trackingnet": "trackingnet", "otb100": "otb", "lasot": "lasot"}
MAX_WORKER_DEATHS = 3
SPEED_FRAMES = 60
"""Frames of the run with one sequence alone that measures the speed a user sees."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How sequences are spread; what is evaluated is not here."""

    batch_size: int = 8
    """Sequences that a worker tracks in one batch."""
    workers: int | None = None
    """Workers; none means one per GPU, or per CPU where there is no GPU."""
    cpus_per_worker: float = 1.0
    """CPUs that each worker reserves, and torch threads on a machine without GPU."""
    limit: int | None = None
    """Evaluate only this many sequences, the first ones."""
    fresh: bool = False
    """Track again what is there already."""
    cache: Path | None = None
    """Where results per sequence are kept; none means ``evaluations`` in the home folder."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "workers", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; give 1 or more.")
        if self.cpus_per_worker <= 0:
            raise UserError(f"cpus_per_worker is {self.cpus_per_worker}; give more than 0.")


@dataclass(frozen=True, kw_only=True)
class DatasetResult:
    """All about one tracker on one data set."""

    index: FrameIndex
    results: dict[str, SequenceResult]
    """By sequence name, in the data set's order."""
    evaluations: dict[str, Evaluation]
    """By dialect, the data set's own toolkit last; empty where only first boxes are annotated."""
    attributes: dict[str, list[str]]
    left_out: dict[str, str]
    """Sequences that cannot be tracked, with the reason."""
    fps_single: float
    """Frames per second with one sequence alone in the batch, without decoding."""
    wall_seconds: float
    """Time of this evaluation; 0 if everything was there already."""
    batch_size: int
    device: str

    @property
    def name(self) -> str:
        """Data set and split, such as ``got10k-val``."""
        return f"{self.index.name}-{self.index.split}" if self.index.split else self.index.name

    @property
    def scores(self) -> dict[str, float]:
        """Headline scores, in the compatible dialect."""
        return self.evaluations["compatible"].scores if self.evaluations else {}

    @property
    def overlaps(self) -> dict[str, float]:
        """AO of every sequence, in the compatible dialect."""
        if not self.evaluations:
            return {}
        sequences = self.evaluations["compatible"].sequences
        return {name: sequence.scores["AO"] for name, sequence in sequences.items()}

    def _fps(self, *, decoding: bool) -> float:
        seconds = sum(
            float(r.seconds.sum() + (r.decode_seconds.sum() if decoding else 0.0))
            for r in self.results.values()
        )
        return sum(len(r.boxes) for r in self.results.values()) / max(seconds, 1e-9)

    @property
    def fps(self) -> float:
        """Frames per second of one worker in batches, without decoding."""
        return self._fps(decoding=False)

    @property
    def fps_with_decoding(self) -> float:
        """Frames per second of one worker in batches, reading and decoding included."""
        return self._fps(decoding=True)


class SequenceWorker:
    """A Ray actor that tracks chunks of sequences."""

    def __init__(self, subject: Subject, batch_size: int, device: str, threads: int) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(threads)
        self._threads = threads
        self._batch_size = batch_size
        self._tracker = subject.tracker(device)

    def track(self, uri: str, tracks: Sequence[int]) -> Iterator[SequenceResult]:
        """Yield the result of each sequence as soon as it ends."""
        index = FrameIndex.open(uri)
        finished: queue.Queue[SequenceResult | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                track_sequences(
                    self._tracker,
                    index,
                    ImageReader(index),
                    tracks,
                    batch_size=self._batch_size,
                    decode_threads=self._threads,
                    on_sequence=finished.put,
                )
                finished.put(None)
            except BaseException as error:
                finished.put(error)

        threading.Thread(target=work, daemon=True).start()
        while (item := finished.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def speed(self, uri: str, track: int) -> float:
        """Return frames per second of one sequence alone, without decoding."""
        index = FrameIndex.open(uri)
        reader = ImageReader(index)
        first, end = int(index.track_start[track]), int(index.track_start[track + 1])
        rows = range(first, min(end, first + SPEED_FRAMES))
        frames = [reader.decode(row) for row in rows]
        targets = self._tracker.start([frames[0]], [tuple(index.box[first].tolist())])
        for frame in frames[1:4]:  # warm up
            self._tracker.step(targets, [frame])
        began = time.perf_counter()
        for frame in frames[1:]:
            self._tracker.step(targets, [frame])
        return max(len(frames) - 1, 1) / (time.perf_counter() - began)


def evaluate(
    subject: Subject, uri: str, config: EvaluationConfig | None = None, *, progress: bool = True
) -> DatasetResult:
    """Track and score one data set on the Ray cluster that this process is connected to.

    Args:
        subject: the tracker.
        uri: shards with full frames.
        config: how to spread the work.
        progress: show a progress bar.

    Raises:
        UserError: if the shards hold windows, or no sequence can be tracked.
    """
    config = config or EvaluationConfig()
    index = FrameIndex.open(uri)
    if index.storage == "window":
        raise UserError(
            f"{uri} stores windows around the target, which a tracker may leave; ingest it again "
            "with --full-frame to evaluate on it."
        )
    tracks, left_out = _usable(index, config.limit)
    if not tracks:
        raise UserError(f"No sequence of {uri} has a usable box in its first frame.")
    device, num_gpus = ("cuda", 1.0) if ray.cluster_resources().get("GPU") else ("cpu", 0.0)
    store = _Store(subject, index, device, config.cache)
    found = {} if config.fresh else store.load(tracks)
    waiting = [track for track in tracks if track not in found]
    if found:
        log.info("%d of %d sequences are there already.", len(found), len(tracks))
    began = time.perf_counter()
    with contextlib.closing(_Workers(subject, config, device, num_gpus, len(waiting))) as workers:
        bar = tqdm(
            total=len(tracks), initial=len(found), unit="seq", disable=not progress,
            desc=f"{subject.name} on {index.name}",
        )  # fmt: skip
        with bar:
            for result in workers.track(index, waiting):
                store.save(result)
                found[result.track] = result
                bar.update()
        wall_seconds = time.perf_counter() - began if waiting else 0.0
        fps_single = store.speed(lambda: workers.speed(index, tracks))
    results = {index.sequence(track): found[track] for track in tracks}
    attributes = {
        name: kept
        for name, names in sequences_by_attribute(index).items()
        if (kept := [sequence for sequence in names if sequence in results])
    }
    return DatasetResult(
        index=index,
        results=results,
        evaluations=_score(index, results, attributes),
        attributes=attributes,
        left_out=left_out,
        fps_single=fps_single,
        wall_seconds=wall_seconds,
        batch_size=config.batch_size,
        device=device,
    )


def ground_truth(index: FrameIndex, track: int) -> GroundTruth:
    """Return the annotation of a sequence."""
    rows = slice(int(index.track_start[track]), int(index.track_start[track + 1]))
    cover = index.cover[rows]
    return GroundTruth(
        boxes=index.box[rows].astype(np.float64),
        visible=index.visible[rows],
        cover=cover if (cover >= 0).all() else None,
        size_wh=index.size_wh[rows],
    )


def _usable(index: FrameIndex, limit: int | None) -> tuple[list[int], dict[str, str]]:
    tracks, left_out = [], {}
    for track in range(index.num_tracks):
        row = int(index.track_start[track])
        if np.isfinite(index.box[row]).all() and index.valid[row]:
            tracks.append(track)
        else:
            left_out[index.sequence(track)] = "no usable box in the first frame"
    return tracks[:limit], left_out


def _score(
    index: FrameIndex, results: dict[str, SequenceResult], attributes: dict[str, list[str]]
) -> dict[str, Evaluation]:
    truths = {name: ground_truth(index, result.track) for name, result in results.items()}
    if not any(np.isfinite(truth.boxes[1:]).all(axis=1).any() for truth in truths.values()):
        return {}  # a test set whose server keeps the annotation
    dialects = list(DIALECTS)
    if index.name in TOOLKITS:
        dialects.append(TOOLKITS[index.name])
    return {
        dialect: score(
            {name: result.boxes for name, result in results.items()},
            truths,
            dialect=dialect,
            dataset=index.name,
            attributes=attributes,
        )
        for dialect in dialects
    }


class _Store:
    """Results per sequence on disk, under the fingerprints of tracker and data."""

    def __init__(self, subject: Subject, index: FrameIndex, device: str, cache: Path | None):
        base = cache if cache is not None else home() / "evaluations"
        self._folder = base / f"{subject.fingerprint[:16]}-{device}" / index.fingerprint[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._index = index

    def _file(self, track: int) -> Path:
        return self._folder / f"{track:06d}.npz"

    def save(self, result: SequenceResult) -> None:
        """Write a result; it is there as a whole or not at all."""
        part = self._file(result.track).with_suffix(f".{os.getpid()}.part")
        with open(part, "wb") as file:
            np.savez(
                file,
                boxes=result.boxes,
                scores=result.scores,
                seconds=result.seconds,
                decode_seconds=result.decode_seconds,
                damaged=result.damaged,
            )
        part.replace(self._file(result.track))

    def load(self, tracks: Sequence[int]) -> dict[int, SequenceResult]:
        """Return the results that are there."""
        found = {}
        for track in tracks:
            with contextlib.suppress(FileNotFoundError), np.load(self._file(track)) as data:
                found[track] = SequenceResult(
                    track=track,
                    name=self._index.sequence(track),
                    boxes=data["boxes"],
                    scores=data["scores"],
                    seconds=data["seconds"],
                    decode_seconds=data["decode_seconds"],
                    damaged=int(data["damaged"]),
                )
        return found

    def speed(self, measure: Any) -> float:
        """Return the measured speed of one sequence alone, measuring it the first time."""
        file = self._folder / "fps.txt"
        if not file.exists():
            file.write_text(f"{measure():.6f}")
        return float(file.read_text())


@dataclass
class _Running:
    worker: Any
    results: Any
    unfinished: set[int] = field(default_factory=set)


class _Workers:
    """Actors that take chunks of sequences until none is left; dead ones are replaced."""

    def __init__(
        self, subject: Subject, config: EvaluationConfig, device: str, num_gpus: float, num: int
    ) -> None:
        self._config = config
        cluster = ray.cluster_resources()
        room = cluster["GPU"] if num_gpus else cluster.get("CPU", 1) / config.cpus_per_worker
        self._num = max(1, min(config.workers or int(room), max(num, 1)))
        threads = max(1, int(config.cpus_per_worker))
        if num_gpus:
            threads = max(2, threads)
        self._subject = ray.put(subject)
        self._actor = ray.remote(SequenceWorker).options(
            num_cpus=config.cpus_per_worker, num_gpus=num_gpus
        )
        self._arguments = (config.batch_size, device, threads)
        self._actors: list[Any] = []

    def _new(self) -> Any:
        actor = self._actor.remote(self._subject, *self._arguments)
        self._actors.append(actor)
        return actor

    def close(self) -> None:
        """End all workers."""
        for actor in self._actors:
            ray.kill(actor)

    def speed(self, index: FrameIndex, tracks: Sequence[int]) -> float:
        """Measure the speed of one sequence alone, with no other worker at work."""
        lengths = np.diff(index.track_start)[list(tracks)]
        median = tracks[int(np.argsort(lengths)[len(lengths) // 2])]
        worker = self._actors[-1] if self._actors else self._new()
        return ray.get(worker.speed.remote(index.uri, median))

    def track(self, index: FrameIndex, tracks: Sequence[int]) -> Iterator[SequenceResult]:
        """Yield the result of each sequence as soon as it is there."""
        lengths = np.diff(index.track_start)
        order = sorted(tracks, key=lambda track: -int(lengths[track]))
        size = max(1, min(self._config.batch_size, -(-len(order) // self._num)))
        chunks = deque(order[i : i + size] for i in range(0, len(order), size))
        running: dict[Any, _Running] = {}
        deaths = 0

        def give(worker: Any) -> None:
            if chunks:
                chunk = chunks.popleft()
                stream = worker.track.options(num_returns="streaming").remote(index.uri, chunk)
                running[stream] = _Running(worker, stream, set(chunk))

        for _ in range(min(self._num, len(chunks))):
            give(self._new())
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            run = running[ready]
            try:
                result = ray.get(next(run.results))
            except StopIteration:
                del running[ready]
                give(run.worker)
                continue
            except ray.exceptions.RayActorError as error:
                del running[ready]
                deaths += 1
                if deaths > MAX_WORKER_DEATHS:
                    raise
                log.warning("A worker died (%s); its sequences start again.", error)
                chunks.appendleft([track for track in order if track in run.unfinished])
                give(self._new())
                continue
            run.unfinished.discard(result.track)
            yield result
