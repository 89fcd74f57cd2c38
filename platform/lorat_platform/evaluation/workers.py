"""Ray actors that track sequences: chunk by chunk, each taken by the next free worker."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray

from lorat.config.bounds import Bounds, Count, check_bounds
from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.images import ImageReader
from lorat.errors import UserError
from lorat.image.codec import DamagedImage
from lorat.tracking.one_pass import SequenceResult, track_by_all
from lorat_platform.cluster.places import num_places, what_is_there
from lorat_platform.evaluation.subject import Subject

log = logging.getLogger(__name__)

MAX_WORKER_DEATHS = 3
SPEED_FRAMES = 60
"""Frames of the run with one sequence alone that measures the speed a user sees."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How sequences are spread; what is evaluated is not here."""

    batch_size: Annotated[int, Bounds(1, 4096)] = 8
    """Sequences that a worker tracks in one batch, 1 to 4096."""
    workers: Annotated[int, Bounds(1, 4096)] | None = None
    """Workers, 1 to 4096; none means one per GPU, or per CPU where there is no GPU."""
    cpus_per_worker: Annotated[float, Bounds(0, 1024, above=True)] = 1.0
    """CPUs that each worker reserves, and torch threads on a machine without GPU, more than 0, at
    most 1024."""
    limit: Count | None = None
    """Evaluate only this many sequences, the first ones, 1 to 1,000,000,000."""
    fresh: bool = False
    """Track again what is there already."""
    cache: Path | None = None
    """Where results per sequence are kept; none means ``evaluations`` in the home folder."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under which speed was measured; results of an earlier evaluation keep theirs."""

    batch: Count
    """Sequences tracked at once, 1 to 1,000,000,000."""
    threads: Count
    """Of torch, 1 to 1,000,000,000."""
    host: str


Tracked = tuple[int, SequenceResult, Conditions]
"""A subject's number, what it found in a sequence, and how."""


class SequenceWorker:
    """A Ray actor that tracks chunks of sequences."""

    def __init__(
        self, subjects: Sequence[Subject], batch_size: int, device: str, threads: int
    ) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(threads)
        self._threads = threads
        self._batch_size = batch_size
        self._trackers = [subject.tracker(device) for subject in subjects]

    def conditions(self, batch: int) -> Conditions:
        """Return what a speed measured here depends on."""
        return Conditions(batch=batch, threads=self._threads, host=socket.gethostname())

    def track(self, uri: str, tracks: Sequence[int], numbers: Sequence[int]) -> Iterator[Tracked]:
        """Yield what each of the numbered subjects found in a sequence as soon as it ends."""
        index = FrameIndex.open(uri)
        conditions = self.conditions(min(self._batch_size, len(tracks)))
        finished: queue.Queue[tuple[int, SequenceResult] | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                track_by_all(
                    [self._trackers[number] for number in numbers],
                    index,
                    ImageReader(index),
                    tracks,
                    batch_size=self._batch_size,
                    decode_threads=self._threads,
                    on_sequence=lambda place, result: finished.put((numbers[place], result)),
                )
                finished.put(None)
            except BaseException as error:
                finished.put(error)

        threading.Thread(target=work, daemon=True).start()
        while (item := finished.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield *item, conditions

    def speed(self, uri: str, track: int, number: int) -> tuple[float, Conditions]:
        """Return a subject's frames per second in one sequence alone, without decoding."""
        tracker = self._trackers[number]
        index = FrameIndex.open(uri)
        reader = ImageReader(index)
        first, end = int(index.track_start[track]), int(index.track_start[track + 1])
        rows = range(first, min(end, first + SPEED_FRAMES))
        frames = []
        for row in rows:
            with contextlib.suppress(DamagedImage):  # never the first, the sequence was tracked
                frames.append(reader.decode(row))
        targets = tracker.start([frames[0]], [tuple(index.box[first].tolist())])
        for frame in frames[1:4]:  # warm up
            tracker.step(targets, [frame])
        began = time.perf_counter()
        for frame in frames[1:]:
            tracker.step(targets, [frame])
        fps = max(len(frames) - 1, 1) / (time.perf_counter() - began)
        return fps, self.conditions(1)


@dataclass
class _Running:
    worker: Any
    results: Any
    unfinished: set[tuple[int, int]] = field(default_factory=set)
    """Tracks, each with the number of a subject."""


class Workers:
    """Actors that take chunks of sequences until none is left; dead ones are replaced."""

    def __init__(
        self, subjects: Sequence[Subject], config: EvaluationConfig, device: str, num_gpus: float,
        num: int,
    ) -> None:  # fmt: skip
        self._config = config
        need = {"CPU": config.cpus_per_worker, "GPU": num_gpus}
        room = num_places(need) or 0
        if not room:
            wanted = f"{config.cpus_per_worker:g} CPUs" + (" and a GPU" if num_gpus else "")
            raise UserError(
                f"A worker needs {wanted} but no node has them (the nodes have "
                f"{what_is_there(need)}); lower --cpus-per-worker, or add nodes."
            )
        self._num = max(1, min(config.workers or room, room, num))
        threads = max(1, int(config.cpus_per_worker))
        if num_gpus:
            threads = max(2, threads)
        self.threads = threads
        self._subjects = ray.put(list(subjects))
        self._actor = ray.remote(SequenceWorker).options(
            num_cpus=config.cpus_per_worker, num_gpus=num_gpus
        )
        self._arguments = (config.batch_size, device, threads)
        self._actors: list[Any] = []

    def _new(self) -> Any:
        actor = self._actor.remote(self._subjects, *self._arguments)
        self._actors.append(actor)
        return actor

    def close(self) -> None:
        """End all workers."""
        for actor in self._actors:
            ray.kill(actor)

    def speed(
        self, index: FrameIndex, tracks: Sequence[int], number: int = 0
    ) -> tuple[float, Conditions]:
        """Measure a subject's speed in one sequence alone, with no other worker at work."""
        lengths = np.diff(index.track_start)[list(tracks)]
        median = tracks[int(np.argsort(lengths)[len(lengths) // 2])]
        worker = self._actors[-1] if self._actors else self._new()
        return ray.get(worker.speed.remote(index.uri, median, number))

    def track(self, index: FrameIndex, waiting: Mapping[int, Sequence[int]]) -> Iterator[Tracked]:
        """Yield what each subject found in each sequence as soon as it is there.

        Args:
            index: the data set.
            waiting: the numbers of the subjects that are to track a sequence, by its track.
        """
        lengths = np.diff(index.track_start)
        chunks = deque(self._chunks(waiting, lengths))
        running: dict[Any, _Running] = {}
        deaths = 0

        def give(worker: Any) -> None:
            if chunks:
                chunk, numbers = chunks.popleft()
                stream = worker.track.options(num_returns="streaming").remote(
                    index.uri, chunk, numbers
                )
                pairs = {(track, number) for track in chunk for number in numbers}
                running[stream] = _Running(worker, stream, pairs)

        for _ in range(min(self._num, len(chunks))):
            give(self._new())
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            run = running[ready]
            try:
                number, result, conditions = ray.get(next(run.results))
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
                again: dict[int, list[int]] = {}
                for track, number in sorted(run.unfinished):
                    again.setdefault(track, []).append(number)
                chunks.extendleft(self._chunks(again, lengths))
                give(self._new())
                continue
            run.unfinished.discard((result.track, number))
            yield number, result, conditions

    def _chunks(
        self, waiting: Mapping[int, Sequence[int]], lengths: np.ndarray
    ) -> list[tuple[list[int], list[int]]]:
        """Return tracks of similar length, longest first, that wait for the same subjects."""
        size = max(1, min(self._config.batch_size, -(-len(waiting) // self._num)))
        alike: dict[tuple[int, ...], list[int]] = {}
        for track in sorted(waiting, key=lambda track: -int(lengths[track])):
            alike.setdefault(tuple(waiting[track]), []).append(track)
        return [
            (tracks[start : start + size], list(numbers))
            for numbers, tracks in alike.items()
            for start in range(0, len(tracks), size)
        ]
