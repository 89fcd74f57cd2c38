"""One-pass evaluation of whole benchmarks, spread over the cluster.

Sequences go to workers in chunks of similar length, longest first, and each worker takes the next
chunk when it is done.  Every finished sequence is written to disk at once, so an interrupted
evaluation goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from tqdm import tqdm

from lorat.config.json_files import parse_json, read_json, write_json
from lorat.data.shards.frame_index import FrameIndex
from lorat.errors import UserError
from lorat.files.home import home
from lorat.files.scratch import sweep, whole_file
from lorat.metrics import Evaluation
from lorat.metrics import evaluate as score
from lorat.metrics.attributes import sequences_by_attribute
from lorat.metrics.catalogue import SCORES
from lorat.tracking.one_pass import SequenceResult, ground_truth, usable_tracks
from lorat_platform.evaluation.subject import Subject
from lorat_platform.evaluation.workers import Conditions, EvaluationConfig, Workers

log = logging.getLogger(__name__)

REPORTED = ("compatible", "plain")
"""Metric dialects of every data set; its own toolkit's is added where there is one."""
TOOLKITS = {"got10k": "got10k", "trackingnet": "trackingnet", "otb100": "otb", "lasot": "lasot"}


@contextlib.contextmanager
def _said_when_stopped(found: Sized, num: int) -> Iterator[None]:
    """Say how many sequences are kept where an interrupt ends the tracking."""
    try:
        yield
    except KeyboardInterrupt:
        log.info("%d of %d sequences are tracked and kept.", len(found), num)
        raise


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
    single_conditions: Conditions
    """Under which that was measured."""
    conditions: list[Conditions]
    """All under which the sequences were tracked."""
    device: str
    label: str | None = None
    """Name in tables and files, instead of data set and split."""

    @property
    def name(self) -> str:
        """The label, or data set and split, such as ``got10k-val``."""
        return self.label or name_of(self.index)

    @property
    def scores(self) -> dict[str, float]:
        """Headline scores, in the compatible dialect."""
        return self.evaluations["compatible"].scores if self.evaluations else {}

    @property
    def overlaps(self) -> dict[str, float]:
        """AO of every sequence, in the compatible dialect."""
        return self.of_sequences("ao")

    def of_sequences(self, metric: str) -> dict[str, float]:
        """Return a score of every sequence in the compatible dialect, by its name as a metric."""
        if not self.evaluations:
            return {}
        sequences = self.evaluations["compatible"].sequences
        return {name: each.scores[SCORES[metric]] for name, each in sequences.items()}

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


def name_of(index: FrameIndex) -> str:
    """Return data set and split, such as ``got10k-val``."""
    return f"{index.name}-{index.split}" if index.split else index.name


def check_distinct(uris: Sequence[str]) -> None:
    """Check that results of several data sets can stand beside each other.

    Raises:
        UserError: if two have the same name and split.
    """
    seen: dict[str, str] = {}
    for uri in uris:
        name = name_of(FrameIndex.open(uri))
        if name in seen:
            raise UserError(
                f"{seen[name]} and {uri} are both {name}, and results are kept by that name; give "
                "one of them at a time."
            )
        seen[name] = uri


def evaluate(
    subject: Subject,
    uri: str,
    config: EvaluationConfig | None = None,
    *,
    label: str | None = None,
    progress: bool = True,
) -> DatasetResult:
    """Track and score one data set on the Ray cluster that this process is connected to.

    Args:
        subject: the tracker.
        uri: shards with full frames.
        config: how to spread the work.
        label: name in tables and files; none means data set and split.
        progress: show a progress bar.

    Raises:
        UserError: if the shards hold windows, no sequence can be tracked, or no node of the
            cluster can hold a worker.
    """
    config = config or EvaluationConfig()
    index = FrameIndex.open(uri)
    if index.storage == "window":
        raise UserError(
            f"{uri} stores windows around the target, which a tracker may leave; ingest it again "
            "with --full-frame to evaluate on it."
        )
    usable = usable_tracks(index)
    tracks = usable[: config.limit]
    left_out = {
        index.sequence(track): "no usable box in the first frame"
        for track in sorted(set(range(index.num_tracks)) - set(usable))
    }
    if not tracks:
        raise UserError(f"No sequence of {uri} has a usable box in its first frame.")
    device, num_gpus = ("cuda", 1.0) if ray.cluster_resources().get("GPU") else ("cpu", 0.0)
    store = _Store(subject, index, device, config.cache)
    found = {} if config.fresh else store.load(tracks)
    waiting = [track for track in tracks if track not in found]
    if found:
        log.info("%d of %d sequences are there already.", len(found), len(tracks))
    with contextlib.closing(Workers(subject, config, device, num_gpus, len(waiting))) as workers:
        bar = tqdm(
            total=len(tracks), initial=len(found), unit="seq", disable=not progress,
            desc=f"{subject.name} on {index.name}",
        )  # fmt: skip
        with bar, _said_when_stopped(found, len(tracks)):
            for result, conditions in workers.track(index, waiting):
                bar.update()
                if result.left_out:
                    left_out[result.name] = result.left_out
                    continue
                store.save(result, conditions)
                found[result.track] = result, conditions
        tracks = [track for track in tracks if track in found]
        if not tracks:
            raise UserError(f"No sequence of {uri} can be tracked; all first frames are damaged.")
        fps_single, single_conditions = store.speed(
            workers.threads, lambda: workers.speed(index, tracks), fresh=config.fresh
        )
    results = {index.sequence(track): found[track][0] for track in tracks}
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
        single_conditions=single_conditions,
        conditions=[*dict.fromkeys(found[track][1] for track in tracks)],
        device=device,
        label=label,
    )


def _score(
    index: FrameIndex, results: dict[str, SequenceResult], attributes: dict[str, list[str]]
) -> dict[str, Evaluation]:
    truths = {name: ground_truth(index, result.track) for name, result in results.items()}
    if not any(np.isfinite(truth.boxes[1:]).all(axis=1).any() for truth in truths.values()):
        return {}  # a test set whose server keeps the annotation
    dialects = list(REPORTED)
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
        sweep(self._folder)
        self._index = index

    def _file(self, track: int) -> Path:
        return self._folder / f"{track:06d}.npz"

    def save(self, result: SequenceResult, conditions: Conditions) -> None:
        """Write a result; it is there as a whole or not at all."""
        with whole_file(self._file(result.track)) as part, open(part, "wb") as file:
            np.savez(
                file,
                boxes=result.boxes,
                scores=result.scores,
                seconds=result.seconds,
                decode_seconds=result.decode_seconds,
                damaged=result.damaged,
                conditions=json.dumps(dataclasses.asdict(conditions)),
            )

    def load(self, tracks: Sequence[int]) -> dict[int, tuple[SequenceResult, Conditions]]:
        """Return the results that are there; what is damaged is tracked again."""
        found = {}
        for track in tracks:
            try:
                found[track] = self._read(track)
            except FileNotFoundError:
                continue
            except Exception as error:  # a dozen classes, of zipfile and NumPy
                log.warning("%s is damaged and tracked again: %s", self._file(track), error)
        return found

    def _read(self, track: int) -> tuple[SequenceResult, Conditions]:
        file = self._file(track)
        with open(file, "rb") as stream, np.load(stream) as data:
            noted = parse_json(
                str(data["conditions"]), str(file), "delete that file", shape=Conditions
            )
            result = SequenceResult(
                track=track,
                name=self._index.sequence(track),
                boxes=data["boxes"],
                scores=data["scores"],
                seconds=data["seconds"],
                decode_seconds=data["decode_seconds"],
                damaged=int(data["damaged"]),
            )
        return result, Conditions(**noted)

    def speed(
        self, threads: int, measure: Callable[[], tuple[float, Conditions]], *, fresh: bool
    ) -> tuple[float, Conditions]:
        """Return the speed of one sequence alone, measured once per number of threads."""
        file = self._folder / f"fps-{threads}-threads.json"
        if fresh or not file.exists():
            fps, conditions = measure()
            write_json({"fps": fps, "conditions": dataclasses.asdict(conditions)}, file)
        shape = {"fps": float, "conditions": Conditions}
        stored = read_json(file, "delete that file, or give --fresh", shape=shape)
        return stored["fps"], Conditions(**stored["conditions"])
