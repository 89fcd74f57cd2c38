"""One-pass evaluation of whole benchmarks, spread over the cluster.

Sequences go to workers in chunks of similar length, longest first, and each worker takes the next
chunk when it is done.  Every finished sequence is written to disk at once, so an interrupted
evaluation goes on where it stopped.  Several trackers share each frame once it is decoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
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
from lorat.metrics.uncertainty import Interval
from lorat.tracking.one_pass import SequenceResult, ground_truth, usable_tracks
from lorat_platform.evaluation.subject import Subject
from lorat_platform.evaluation.workers import Conditions, EvaluationConfig, Workers

log = logging.getLogger(__name__)

REPORTED = ("compatible", "plain")
"""Metric dialects of every data set; its own toolkit's is added where there is one."""
TOOLKITS = {"got10k": "got10k", "trackingnet": "trackingnet", "otb100": "otb", "lasot": "lasot"}


@contextlib.contextmanager
def _said_when_stopped(found: Sequence[_Found], num: int) -> Iterator[None]:
    """Say how many sequences are kept where an interrupt ends the tracking."""
    try:
        yield
    except KeyboardInterrupt:
        kept = sum(len(results) for results in found)
        log.info("%d of %d sequences are tracked and kept.", kept, num * len(found))
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
    fps_single: float = math.nan
    """Frames per second with one sequence alone in the batch, without decoding."""
    single_conditions: Conditions | None = None
    """Under which that was measured; none of published results, whose speed nobody knows."""
    conditions: list[Conditions] = dataclasses.field(default_factory=list)
    """All under which the sequences were tracked."""
    device: str = ""
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
    def intervals(self) -> dict[str, Interval]:
        """95 % intervals of the headline scores over sequences."""
        return self.evaluations["compatible"].intervals if self.evaluations else {}

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
    (result,) = evaluate_all([subject], uri, config, label=label, progress=progress)
    return result


def evaluate_all(
    subjects: Sequence[Subject],
    uri: str,
    config: EvaluationConfig | None = None,
    *,
    label: str | None = None,
    progress: bool = True,
) -> list[DatasetResult]:
    """Track and score one data set with several trackers, each frame decoded once for all.

    What an earlier evaluation has left is not tracked again, so a frame is decoded once for those
    that still need it.

    Args:
        subjects: the trackers.
        uri: as of :func:`evaluate`, and so are the others.

    Returns:
        By subject, on the same sequences.
    """
    config = config or EvaluationConfig()
    index = open_full_frames(uri)
    tracks, left_out = chosen_tracks(index, config)
    device, num_gpus = ("cuda", 1.0) if ray.cluster_resources().get("GPU") else ("cpu", 0.0)
    stores = [_Store(subject, index, device, config.cache) for subject in subjects]
    found: list[_Found] = [{} if config.fresh else store.load(tracks) for store in stores]
    waiting = {
        track: numbers
        for track in tracks
        if (numbers := [number for number, kept in enumerate(found) if track not in kept])
    }
    for subject, kept in zip(subjects, found, strict=True):
        if kept:
            of_whom = f" of {subject.name}" if len(subjects) > 1 else ""
            log.info("%d of %d sequences%s are there already.", len(kept), len(tracks), of_whom)
    with contextlib.closing(Workers(subjects, config, device, num_gpus, len(waiting))) as workers:
        bar = tqdm(
            total=len(tracks) * len(subjects), initial=sum(map(len, found)), unit="seq",
            disable=not progress,
            desc=f"{', '.join(subject.name for subject in subjects)} on {index.name}",
        )  # fmt: skip
        with bar, _said_when_stopped(found, len(tracks)):
            for number, result, conditions in workers.track(index, waiting):
                bar.update()
                if result.left_out:
                    left_out[result.name] = result.left_out
                    continue
                stores[number].save(result, conditions)
                found[number][result.track] = result, conditions
        tracks = [track for track in tracks if all(track in kept for kept in found)]
        if not tracks:
            raise UserError(f"No sequence of {uri} can be tracked; all first frames are damaged.")
        speeds = [
            store.speed(
                workers.threads, functools.partial(workers.speed, index, tracks, number),
                fresh=config.fresh,
            )
            for number, store in enumerate(stores)
        ]  # fmt: skip
    return [
        dataclasses.replace(
            scored(index, {index.sequence(track): kept[track][0] for track in tracks}, left_out),
            fps_single=fps_single,
            single_conditions=single_conditions,
            conditions=[*dict.fromkeys(kept[track][1] for track in tracks)],
            device=device,
            label=label,
        )
        for kept, (fps_single, single_conditions) in zip(found, speeds, strict=True)
    ]


def open_full_frames(uri: str) -> FrameIndex:
    """Open a data set on which a tracker can be evaluated.

    Raises:
        UserError: if its shards hold windows.
    """
    index = FrameIndex.open(uri)
    if index.storage == "window":
        raise UserError(
            f"{uri} stores windows around the target, which a tracker may leave; ingest it again "
            "with --full-frame to evaluate on it."
        )
    return index


def chosen_tracks(index: FrameIndex, config: EvaluationConfig) -> tuple[list[int], dict[str, str]]:
    """Return the sequences to evaluate on, and why others cannot be.

    Raises:
        UserError: if there is none.
    """
    usable = usable_tracks(index)
    left_out = {
        index.sequence(track): "no usable box in the first frame"
        for track in sorted(set(range(index.num_tracks)) - set(usable))
    }
    if not usable:
        raise UserError(f"No sequence of {index.uri} has a usable box in its first frame.")
    return usable[: config.limit], left_out


def scored(
    index: FrameIndex, results: dict[str, SequenceResult], left_out: dict[str, str]
) -> DatasetResult:
    """Score what a tracker found in sequences of a data set, without its speed."""
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
    )


def restricted(result: DatasetResult, names: Collection[str], why: str) -> DatasetResult:
    """Score fewer of the sequences, such as those that others have as well."""
    if set(names) >= set(result.results):
        return result
    kept = {name: found for name, found in result.results.items() if name in names}
    lost = {name: why for name in result.results if name not in names}
    fewer = scored(result.index, kept, result.left_out | lost)
    return dataclasses.replace(
        result,
        results=kept,
        evaluations=fewer.evaluations,
        attributes=fewer.attributes,
        left_out=fewer.left_out,
    )


def scored_as(result: DatasetResult, dialect: str) -> DatasetResult:
    """Score a result in one more dialect."""
    if dialect in result.evaluations or not result.evaluations:
        return result
    more = _score_in(result.index, result.results, result.attributes, dialect)
    return dataclasses.replace(result, evaluations=result.evaluations | {dialect: more})


def _score(
    index: FrameIndex, results: dict[str, SequenceResult], attributes: dict[str, list[str]]
) -> dict[str, Evaluation]:
    truths = {name: ground_truth(index, result.track) for name, result in results.items()}
    if not any(np.isfinite(truth.boxes[1:]).all(axis=1).any() for truth in truths.values()):
        return {}  # a test set whose server keeps the annotation
    dialects = list(REPORTED)
    if index.name in TOOLKITS:
        dialects.append(TOOLKITS[index.name])
    return {dialect: _score_in(index, results, attributes, dialect) for dialect in dialects}


def _score_in(
    index: FrameIndex,
    results: dict[str, SequenceResult],
    attributes: dict[str, list[str]],
    dialect: str,
) -> Evaluation:
    return score(
        {name: result.boxes for name, result in results.items()},
        {name: ground_truth(index, result.track) for name, result in results.items()},
        dialect=dialect,
        dataset=index.name,
        attributes=attributes,
    )


_Found = dict[int, tuple[SequenceResult, Conditions]]
"""By track, of one subject."""


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

    def load(self, tracks: Sequence[int]) -> _Found:
        """Return the results that are there; what is damaged is tracked again."""
        found: _Found = {}
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
