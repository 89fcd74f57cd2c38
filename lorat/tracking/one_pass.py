"""One-pass evaluation: track whole sequences from their first box, many in one batch.

At most ``batch_size`` sequences run at the same time, each advancing by one frame per step; the
longest start first, and a finished one makes room for the next.  Nothing of a sequence depends on
which others share its batch.  Several trackers take each decoded frame one after the other, so
what they are compared on is decoded once.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lorat.data.shards.frame_index import FrameIndex
from lorat.errors import UserError
from lorat.image.codec import DamagedImage
from lorat.metrics import GroundTruth

if TYPE_CHECKING:
    from lorat.data.shards.frame_index import FrameIndex

_log = logging.getLogger(__name__)


class FrameReader(Protocol):
    """Where the frames come from, such as :class:`lorat.data.shards.images.ImageReader`."""

    def decode(self, row: int) -> np.ndarray:
        """Return a frame as RGB uint8 (H, W, 3), or raise ``DamagedImage``."""
        ...


class SequenceTracker(Protocol):
    """What tracks sequences: :class:`lorat.tracking.tracker.Tracker` or one of the baselines.

    Both methods return once the work is done, on the device too, so their time is the true one.
    """

    def start(self, frames: Sequence[np.ndarray], boxes: Sequence[Sequence[float]]) -> list[Any]:
        """Make one target per first frame and box (xyxy)."""
        ...

    def step(
        self, targets: Sequence[Any], frames: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Advance the targets by one frame each; return boxes (B, 4) xyxy and scores (B,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class SequenceResult:
    """What tracking one sequence gave."""

    track: int
    name: str
    boxes: np.ndarray
    """float64 (n, 4), xyxy frame pixels; the first is the ground truth."""
    scores: np.ndarray
    """float64 (n,); the first is 1."""
    seconds: np.ndarray
    """float64 (n,); tracking time per frame: the step's wall time over the sequences in it."""
    decode_seconds: np.ndarray
    """float64 (n,); reading and decoding time per frame, accounted likewise."""
    damaged: int = 0
    """Frames that could not be decoded; there the last box is repeated with score 0."""
    left_out: str = ""
    """Why the sequence was not tracked at all; empty if it was."""

    @property
    def fps(self) -> float:
        """Frames per second of tracking alone."""
        return 1.0 / float(self.seconds.mean())

    @property
    def fps_with_decoding(self) -> float:
        """Frames per second including reading and decoding."""
        return 1.0 / float((self.seconds + self.decode_seconds).mean())


@dataclass
class _Found:
    """What one tracker has found in a running sequence."""

    boxes: np.ndarray
    scores: np.ndarray
    seconds: np.ndarray
    target: Any = None


@dataclass
class _Running:
    track: int
    first_row: int
    length: int
    decode_seconds: np.ndarray
    found: list[_Found]
    """By tracker."""
    position: int = 0
    damaged: int = 0
    left_out: str = ""

    @property
    def ended(self) -> bool:
        return bool(self.left_out) or self.position + 1 == self.length


def track_sequences(
    tracker: SequenceTracker,
    index: FrameIndex,
    reader: FrameReader,
    tracks: Iterable[int],
    *,
    batch_size: int = 8,
    decode_threads: int | None = None,
    on_sequence: Callable[[SequenceResult], None] | None = None,
) -> list[SequenceResult]:
    """Track sequences of a data set.

    Args:
        tracker: network tracker or baseline.
        index: data set with full frames.
        reader: its images.
        tracks: numbers of the sequences.
        batch_size: most sequences in one step.
        decode_threads: threads that read and decode the frames of a step; by default one per
            core, at most 8.
        on_sequence: called with each result as soon as its sequence ends, and with one whose
            ``left_out`` says why for a sequence that cannot be tracked: its first frame is damaged.

    Returns:
        The results of the sequences that were tracked, in the order of ``tracks``.

    Raises:
        UserError: if the data set holds windows, or a first frame has no usable box.
    """
    (results,) = track_by_all(
        [tracker],
        index,
        reader,
        tracks,
        batch_size=batch_size,
        decode_threads=decode_threads,
        on_sequence=None if on_sequence is None else lambda _, result: on_sequence(result),
    )
    return results


def track_by_all(
    trackers: Sequence[SequenceTracker],
    index: FrameIndex,
    reader: FrameReader,
    tracks: Iterable[int],
    *,
    batch_size: int = 8,
    decode_threads: int | None = None,
    on_sequence: Callable[[int, SequenceResult], None] | None = None,
) -> list[list[SequenceResult]]:
    """Track sequences with several trackers, which share each decoded frame.

    The trackers work one after the other, so each one's time is its own.

    Args:
        trackers: network trackers or baselines.
        index: as of :func:`track_sequences`, and so are the others.
        on_sequence: called with the tracker's number as well.

    Returns:
        As :func:`track_sequences`, by tracker.
    """
    if index.storage == "window":
        raise UserError(
            f"Data set {index.name} stores windows around the target, which a tracker may leave; "
            "ingest it again with --full-frame to evaluate on it."
        )
    if batch_size < 1:
        raise UserError(f"The batch size is {batch_size}; give 1 or more.")
    order = list(tracks)
    opened = (_open(index, track, len(trackers)) for track in order)
    pending = deque(sorted(opened, key=lambda r: -r.length))
    running: list[_Running] = []
    results: list[dict[int, SequenceResult]] = [{} for _ in trackers]
    num_threads = decode_threads or min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(num_threads, "decode") as pool:
        while pending or running:
            new = [pending.popleft() for _ in range(min(batch_size - len(running), len(pending)))]
            if new:
                _start(trackers, index, reader, new, pool)
                running += new
            moving = [run for run in running if not run.ended]
            if moving:
                _step(trackers, reader, moving, pool)
            for run in [run for run in running if run.ended]:
                running.remove(run)
                for number, found in enumerate(run.found):
                    results[number][run.track] = result = _result(index, run, found)
                    if on_sequence is not None:
                        on_sequence(number, result)
    return [
        [by_track[track] for track in order if not by_track[track].left_out] for by_track in results
    ]


def _open(index: FrameIndex, track: int, num_trackers: int) -> _Running:
    first, end = int(index.track_start[track]), int(index.track_start[track + 1])
    if not np.isfinite(index.box[first]).all() or not index.valid[first]:
        raise UserError(
            f"Sequence {index.sequence(track)} of {index.name} has no usable box in its first "
            "frame; leave it out or correct its annotation."
        )
    length = end - first
    found = [
        _Found(np.full((length, 4), np.nan), np.zeros(length), np.zeros(length))
        for _ in range(num_trackers)
    ]
    return _Running(track, first, length, np.zeros(length), found)


def _start(
    trackers: Sequence[SequenceTracker],
    index: FrameIndex,
    reader: FrameReader,
    runs: list[_Running],
    pool: ThreadPoolExecutor,
) -> None:
    frames, decode_seconds = _decode(reader, runs, pool)
    seen = [(run, frame) for run, frame in zip(runs, frames, strict=True) if frame is not None]
    for run, frame in zip(runs, frames, strict=True):
        run.decode_seconds[0] = decode_seconds
        if frame is None:
            run.left_out = "the first frame is damaged"
            name = index.sequence(run.track)
            _log.warning("%s of %s is left out: %s", name, index.name, run.left_out)
    if not seen:
        return
    boxes = [tuple(index.box[run.first_row].tolist()) for run, _ in seen]
    for number, tracker in enumerate(trackers):
        began = time.perf_counter()
        targets = tracker.start([frame for _, frame in seen], boxes)
        seconds = (time.perf_counter() - began) / len(seen)
        for (run, _), target, box in zip(seen, targets, boxes, strict=True):
            found = run.found[number]
            found.target, found.boxes[0], found.scores[0] = target, box, 1.0
            found.seconds[0] = seconds


def _step(
    trackers: Sequence[SequenceTracker],
    reader: FrameReader,
    runs: list[_Running],
    pool: ThreadPoolExecutor,
) -> None:
    for run in runs:
        run.position += 1
    frames, decode_seconds = _decode(reader, runs, pool)
    seen = [(run, frame) for run, frame in zip(runs, frames, strict=True) if frame is not None]
    for run, frame in zip(runs, frames, strict=True):
        run.decode_seconds[run.position] = decode_seconds
        run.damaged += frame is None
    for number, tracker in enumerate(trackers):
        began = time.perf_counter()
        if seen:
            boxes, scores = tracker.step(
                [run.found[number].target for run, _ in seen], [frame for _, frame in seen]
            )
            for (run, _), box, score in zip(seen, boxes, scores, strict=True):
                found = run.found[number]
                found.boxes[run.position], found.scores[run.position] = box, score
        seconds = (time.perf_counter() - began) / len(runs)
        for run, frame in zip(runs, frames, strict=True):
            found = run.found[number]
            found.seconds[run.position] = seconds
            if frame is None:
                found.boxes[run.position] = found.boxes[run.position - 1]


def _decode(
    reader: FrameReader, runs: list[_Running], pool: ThreadPoolExecutor
) -> tuple[list[np.ndarray | None], float]:
    """Decode each sequence's present frame; none for a damaged one."""

    def decode(run: _Running) -> np.ndarray | None:
        try:
            return reader.decode(run.first_row + run.position)
        except DamagedImage as error:
            _log.warning("a frame is skipped, its image is damaged: %s", error)
            return None

    began = time.perf_counter()
    frames = list(pool.map(decode, runs)) if len(runs) > 1 else [decode(runs[0])]
    return frames, (time.perf_counter() - began) / len(runs)


def _result(index: FrameIndex, run: _Running, found: _Found) -> SequenceResult:
    return SequenceResult(
        track=run.track,
        name=index.sequence(run.track),
        boxes=found.boxes,
        scores=found.scores,
        seconds=found.seconds,
        decode_seconds=run.decode_seconds,
        damaged=run.damaged,
        left_out=run.left_out,
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


def usable_tracks(index: FrameIndex) -> list[int]:
    """Return the tracks with a box in their first frame, which tracking needs."""
    first = index.track_start[:-1]
    usable = np.isfinite(index.box[first]).all(axis=1) & index.valid[first].astype(bool)
    return np.flatnonzero(usable).tolist()
