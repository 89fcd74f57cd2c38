"""Benchmarks are evaluated completely, once, and with the same result however they are spread."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from lorat.config.tracking import TrackingConfig
from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.images import ImageReader
from lorat.errors import UserError
from lorat.files.storage import locate
from lorat.metrics import SCORE_NAMES
from lorat.tracking.baselines import baseline
from lorat.tracking.one_pass import SequenceResult, track_sequences
from lorat_platform import cluster
from lorat_platform.evaluation import workers
from lorat_platform.evaluation.report import (
    check_place,
    flat_metrics,
    headline,
    lost_at,
    record,
    write_report,
)
from lorat_platform.evaluation.sets import (
    DatasetResult,
    check_distinct,
    evaluate,
    evaluate_all,
)
from lorat_platform.evaluation.subject import Subject, load_subject, subject_of, tracking_modules
from lorat_platform.evaluation.workers import Conditions, EvaluationConfig, SequenceWorker
from lorat_platform.failures import user_message
from lorat_platform.recording.recorder import Recorder
from lorat_platform.runs.claim import Lease
from tests.constant_trackers import random_tracker, staying_tracker
from tests.real_data import REAL_DATA
from tests.small_shards import make_shards
from tests.waiting import wait_until

pytestmark = pytest.mark.processes(minutes=1)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with cluster.connected("local", num_cpus=2):
        yield


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(tmp_path_factory.mktemp("data") / "val", num_shards=2)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(staying_tracker(), "stays")


def config(tmp_path: Path, **options: object) -> EvaluationConfig:
    return EvaluationConfig(cache=tmp_path / "cache", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the results of `evaluated` are kept."""
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture(scope="module")
def evaluated(subject: Subject, uri: str, kept: Path) -> DatasetResult:
    return evaluate(subject, uri, config(kept, batch_size=3), progress=False)


def test_every_sequence_is_tracked_as_it_is_alone(
    evaluated: DatasetResult, subject: Subject, uri: str
) -> None:
    index = FrameIndex.open(uri)
    assert list(evaluated.results) == [index.sequence(t) for t in range(index.num_tracks)]
    alone = track_sequences(subject.tracker(), index, ImageReader(index), [2], batch_size=1)[0]
    spread = evaluated.results[index.sequence(2)]
    np.testing.assert_allclose(spread.boxes, alone.boxes, atol=1e-3)


def test_both_dialects_and_attributes_are_scored(evaluated: DatasetResult) -> None:
    assert list(evaluated.evaluations) == ["compatible", "plain"]
    for evaluation in evaluated.evaluations.values():
        assert set(SCORE_NAMES) <= set(evaluation.scores)
        assert "partial exit" in evaluation.attributes
    metrics = flat_metrics([evaluated])
    assert metrics["synthetic-val/AO"] == evaluated.scores["AO"]
    assert {"synthetic-val/plain/SUC", "synthetic-val/fps_single"} <= set(metrics)
    low, high = (metrics[f"synthetic-val/AO_{end}"] for end in ("low", "high"))
    assert low < metrics["synthetic-val/AO"] < high


def test_decoding_makes_the_speed_lower(evaluated: DatasetResult) -> None:
    assert 0 < evaluated.fps_with_decoding < evaluated.fps
    assert evaluated.fps_single > 0


def test_a_second_evaluation_tracks_nothing(
    evaluated: DatasetResult,
    subject: Subject,
    uri: str,
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        workers.Workers,
        "track",
        lambda self, index, tracks: iter(asked.extend(tracks) or ()),
    )
    again = evaluate(subject, uri, config(kept, batch_size=3), progress=False)
    assert asked == []
    assert again.scores == evaluated.scores
    assert again.fps == evaluated.fps


def test_several_trackers_share_frames_and_score_as_they_do_alone(
    evaluated: DatasetResult, subject: Subject, uri: str, tmp_path: Path
) -> None:
    """What one of them has left is not tracked again."""
    static = load_subject("static")
    evaluate(static, uri, config(tmp_path, limit=3, workers=1), progress=False)
    both = evaluate_all([subject, static], uri, config(tmp_path, workers=1), progress=False)
    assert [list(result.results) for result in both] == [list(evaluated.results)] * 2
    for name, alone in evaluated.results.items():
        np.testing.assert_allclose(both[0].results[name].boxes, alone.boxes, atol=1e-3)
        boxes = both[1].results[name].boxes
        assert np.array_equal(boxes, np.repeat(boxes[:1], len(boxes), axis=0))
    assert both[0].fps_single != both[1].fps_single
    assert both[0].fps < both[1].fps, "each one's time is its own"


@pytest.mark.usefixtures("evaluated")
def test_workers_are_gone_afterwards() -> None:
    wait_until("free CPUs", lambda: ray.available_resources().get("CPU", 0) == 2)


def test_an_interrupted_evaluation_goes_on_with_the_rest(
    subject: Subject, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(subject, uri, config(tmp_path, limit=3, workers=1), progress=False)
    asked: list[int] = []
    tracked = workers.Workers.track

    def watch(self: object, index: FrameIndex, tracks: list[int]) -> Iterator[object]:
        asked.extend(tracks)
        yield from tracked(self, index, tracks)  # type: ignore[arg-type]

    monkeypatch.setattr(workers.Workers, "track", watch)
    result = evaluate(subject, uri, config(tmp_path, workers=1), progress=False)
    assert asked == [3, 4, 5, 6, 7]
    assert len(result.results) == 8


def test_a_sequence_whose_first_frame_is_damaged_is_left_out_by_name(
    subject: Subject, tmp_path: Path
) -> None:
    uri = make_shards(tmp_path / "val")
    index = FrameIndex.open(uri)
    row = int(index.track_start[1])
    shard = Path(uri) / index.shard_files[index.shard[row]]
    data = bytearray(shard.read_bytes())
    data[int(index.offset[row]) + 100] ^= 0xFF
    shard.write_bytes(data)
    result = evaluate(subject, uri, config(tmp_path, workers=1), progress=False)
    assert result.left_out == {index.sequence(1): "the first frame is damaged"}
    assert list(result.results) == [index.sequence(track) for track in (0, 2, 3)]


@pytest.mark.exhaustive
def test_speed_is_reported_as_it_was_measured(subject: Subject, uri: str, tmp_path: Path) -> None:
    host = socket.gethostname()
    evaluate(subject, uri, config(tmp_path, limit=2, batch_size=1, workers=1), progress=False)
    again = config(tmp_path, limit=4, batch_size=2, workers=1, cpus_per_worker=2)
    result = evaluate(subject, uri, again, progress=False)
    assert set(result.conditions) == {
        Conditions(batch=1, threads=1, host=host), Conditions(batch=2, threads=2, host=host),
    }  # fmt: skip
    assert result.single_conditions == Conditions(batch=1, threads=2, host=host)
    assert f"| 1-2 | 1-2 | {host} |" in headline(subject, [result])


def test_a_worker_that_fits_nowhere_is_refused_at_once(
    subject: Subject, uri: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"needs 64 CPUs but no node .* 2 CPU.*--cpus-per-worker"):
        evaluate(subject, uri, config(tmp_path, cpus_per_worker=64))


@pytest.mark.exhaustive
def test_more_workers_than_fit_wait_for_nobody(subject: Subject, uri: str, tmp_path: Path) -> None:
    options = config(tmp_path, limit=4, workers=4, batch_size=1)
    assert len(evaluate(subject, uri, options, progress=False).results) == 4


def test_two_data_sets_of_one_name_are_not_mixed(
    uri: str, subject: Subject, evaluated: DatasetResult, tmp_path: Path
) -> None:
    other = make_shards(tmp_path / "other", num_shards=1)
    with pytest.raises(UserError, match=r"are both synthetic-val.*one of them"):
        check_distinct([uri, other])
    with pytest.raises(ValueError, match="one name"):
        write_report(subject, [evaluated, evaluated], tmp_path / "report")
    labelled = [replace(evaluated, label="a"), replace(evaluated, label="b")]
    write_report(subject, labelled, tmp_path / "report", clips=False)
    assert (tmp_path / "report" / "a" / "success.png").exists()
    assert (tmp_path / "report" / "b" / "success.png").exists()


def test_every_module_that_tracks_counts_for_the_fingerprint() -> None:
    assert tracking_modules() >= {
        "config.variants", "image.codec", "image.crops", "model.adapter", "model.normalisation",
        "model.backbone", "model.embedding", "model.head", "model.network", "tracking.baselines",
        "tracking.capture", "tracking.one_pass", "tracking.postprocess", "tracking.search_crops",
        "tracking.tracker",
    }  # fmt: skip


def test_other_weights_are_not_taken_for_the_same(
    evaluated: DatasetResult, uri: str, kept: Path
) -> None:
    other = subject_of(random_tracker(1), "stays")
    result = evaluate(other, uri, config(kept, limit=1), progress=False)
    ((name, found),) = result.results.items()
    assert not np.array_equal(found.boxes, evaluated.results[name].boxes)


class _Dying(SequenceWorker):
    """Ends its process in the middle of its first chunk, once."""

    def track(  # type: ignore[override]
        self, uri: str, tracks: list[int], numbers: list[int]
    ) -> Iterator[tuple[int, SequenceResult, Conditions]]:
        for result in super().track(uri, tracks, numbers):
            yield result
            mark = Path(os.environ["LORAT_TEST_MARK"])
            if not mark.exists():
                mark.touch()
                time.sleep(0.5)  # let the first result leave
                os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_costs_nothing_but_time(
    subject: Subject, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(_Dying):
        def __init__(self, *arguments: object) -> None:
            os.environ["LORAT_TEST_MARK"] = str(tmp_path / "died")
            super().__init__(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(workers, "SequenceWorker", Dying)
    result = evaluate(subject, uri, config(tmp_path, batch_size=4, workers=1), progress=False)
    assert (tmp_path / "died").exists()
    assert len(result.results) == 8
    assert result.scores["AO"] > 0.05


def test_windowed_shards_are_refused_with_the_reason(tmp_path: Path) -> None:
    windowed = make_shards(tmp_path / "train", split="train")
    with pytest.raises(UserError, match=r"windows around the target.*--full-frame"):
        evaluate(load_subject("static"), windowed, config(tmp_path))


def test_missing_model_or_data_is_one_sentence(tmp_path: Path, uri: str) -> None:
    with pytest.raises(UserError, match="There is no dataset at"):
        evaluate(load_subject("static"), str(tmp_path / "nowhere"), config(tmp_path))
    with pytest.raises(UserError, match="There is no model"):
        load_subject("nothing")


def test_a_missing_shard_is_one_sentence(subject: Subject, uri: str, tmp_path: Path) -> None:
    copy = shutil.copytree(uri, tmp_path / "copy")
    (copy / "shard-00001.parquet").unlink()
    with pytest.raises(UserError) as caught:
        evaluate(subject, str(copy), config(tmp_path, workers=1), progress=False)
    assert user_message(caught.value) == (
        f"The shard shard-00001.parquet of {copy} is missing; ingest the dataset again."
    )


def test_report_has_what_people_look_at(
    evaluated: DatasetResult, subject: Subject, tmp_path: Path
) -> None:
    text = write_report(subject, [evaluated], tmp_path)
    assert "| synthetic-val | compatible | 8 |" in text
    assert "FPS, one video" in text
    low, high = evaluated.evaluations["plain"].intervals["AO"]
    assert f"| {evaluated.evaluations['plain'].scores['AO']:.3f} [{low:.3f}, {high:.3f}] |" in text
    place = tmp_path / "synthetic-val"
    for plot in ("success", "precision", "normalized_precision", "sequences", "attributes"):
        assert (place / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    with open(place / "sequences.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    overlaps = [float(row["AO"]) for row in rows]
    assert overlaps == sorted(overlaps), "the worst sequence comes first"
    with open(place / "failures.csv") as file:
        failures = list(csv.DictReader(file))
    assert failures
    assert all(0 < int(row["lost_at_frame"]) < int(row["frames"]) for row in failures)
    with open(place / "attributes.csv") as file:
        assert {row["dialect"] for row in csv.DictReader(file)} == {"compatible", "plain"}
    clips = sorted(path.name.rsplit("-val", 1)[0] for path in (place / "clips").iterdir())
    assert clips == ["best-1", "best-2", "worst-1", "worst-2"]
    assert json.loads((tmp_path / "scores.json").read_text()) == flat_metrics([evaluated])


class _Recorded(Recorder):
    """Keeps the names of the artefacts that a run gets."""

    def __init__(self) -> None:
        self.artifacts: list[str] = []

    def _record(self, op: str, **fields: object) -> None:
        pass

    def _store(self, source: Path | bytes, name: str, folder: str) -> None:
        self.artifacts.append(f"{folder}/{name}")


def test_a_report_mixes_neither_with_an_earlier_one_nor_with_other_files(
    evaluated: DatasetResult, subject: Subject, tmp_path: Path
) -> None:
    report = tmp_path / "report"
    write_report(subject, [evaluated], report, clips=False)
    (report / evaluated.name / "clips").mkdir()
    (report / evaluated.name / "clips" / "worst-1-of-another-model.mp4").touch()
    (report / "an-earlier-data-set").mkdir()
    write_report(subject, [evaluated], report, clips=False)
    assert not (report / evaluated.name / "clips").exists()
    run = _Recorded()
    record(run, subject, [evaluated], report)
    assert run.artifacts == [
        f"evaluation/{name}" for name in ("report.md", "scores.json", evaluated.name)
    ]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    for place, message in (("photos", "holds other files"), ("photos/holiday.jpg", "a file")):
        with pytest.raises(UserError, match=message):
            write_report(subject, [evaluated], tmp_path / place)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["holiday.jpg"]


def test_the_mark_of_a_driver_is_no_foreign_file_in_a_report(tmp_path: Path) -> None:
    with Lease(locate(tmp_path), "The report", "wait").claim():
        check_place(tmp_path)
        (tmp_path / "driver-license.json").touch()
        with pytest.raises(UserError, match="holds other files"):
            check_place(tmp_path)


def test_result_files_have_the_layouts_of_the_servers(
    evaluated: DatasetResult, subject: Subject, tmp_path: Path
) -> None:
    write_report(subject, [evaluated], tmp_path, clips=False)
    place = tmp_path / "synthetic-val" / "results"
    name = next(iter(evaluated.results))
    with zipfile.ZipFile(place / "got10k.zip") as archive:
        assert f"LoRAT/{name}/{name}_001.txt" in archive.namelist()
        assert f"LoRAT/{name}/{name}_time.txt" in archive.namelist()
    with zipfile.ZipFile(place / "trackingnet.zip") as archive:
        assert len(archive.read(f"{name}.txt").decode().splitlines()) == 60
    assert (place / "pytracking" / "lorat" / "N-112" / f"{name}_time.txt").exists()


def test_lost_target_is_found_in_the_overlaps() -> None:
    assert lost_at(np.array([1.0, 0.5] + [0.0] * 9)) is None
    assert lost_at(np.array([1.0, 0.5] + [0.0] * 10)) == 2
    assert lost_at(np.array([1.0] + [0.0] * 5 + [-1.0] * 20 + [0.0] * 5)) == 1
    assert lost_at(np.array([1.0] + [0.0] * 9 + [0.1] + [0.0] * 10)) == 11


def test_baselines_need_no_model(uri: str, tmp_path: Path) -> None:
    result = evaluate(load_subject("static"), uri, config(tmp_path, limit=1), progress=False)
    first = result.results[next(iter(result.results))]
    assert np.array_equal(first.boxes, np.repeat(first.boxes[:1], 60, axis=0))
    assert type(baseline("mil")) is type(load_subject("mil").tracker())
    assert threading.active_count() < 50


@pytest.mark.skipif(
    not (REAL_DATA / "baselines.json").exists(), reason="real sequences (LORAT_REAL_DATA) missing"
)
def test_known_scores_of_real_sequences_are_reproduced(tmp_path: Path) -> None:
    from lorat.data.datasets.got10k import Got10k
    from lorat_platform.data.ingestion import IngestConfig, ingest

    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "val").symlink_to(REAL_DATA / "sequences")
    ingest(
        Got10k(source=tmp_path / "root", split="val"), IngestConfig(output=str(tmp_path / "data"))
    )
    result = evaluate(
        load_subject("static"), str(tmp_path / "data"), config(tmp_path), progress=False
    )
    expected = json.loads((REAL_DATA / "baselines.json").read_text())
    compared = 0
    for name, sequence in result.evaluations["plain"].sequences.items():
        if name in expected:
            # The published figure leaves the given first frame out, where the overlap is 1.
            num = sequence.num_frames
            without_first = (sequence.scores["AO"] * num - 1) / (num - 1)
            assert without_first == pytest.approx(expected[name]["static"]["AO"], abs=2e-3), name
            compared += 1
    assert compared == 10
    assert list(result.evaluations) == ["compatible", "plain", "got10k"]


def test_how_to_track_is_part_of_what_results_are_kept_under() -> None:
    model = staying_tracker()
    usual = subject_of(model, "usual").fingerprint
    model.tracking = TrackingConfig(window_penalty=0.3)
    assert subject_of(model, "other").fingerprint != usual
