"""Ingest with a real Ray: window and full storage, resuming, reports, and an object store."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lorat import datasets
from lorat.datasets import Entry, Finding
from lorat.errors import UserError
from lorat.frame_index import MANIFEST, WORK_FOLDER, FrameIndex
from lorat.shards import ImageReader
from lorat.verification import rebuild_index, verify
from lorat_platform import cluster, ingestion
from lorat_platform.ingestion import IngestConfig, ingest, map_tasks
from tests.lorat import layouts
from tests.object_store import KEYS, object_store

@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.delenv("RAY_ADDRESS", raising=False)
    for name, value in KEYS.items():
        patch.setenv(name, value)
    with cluster.connected(num_cpus=2):
        yield
    patch.undo()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give the address of a folder in an object store, with {} in it."""
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAT_HOME", str(tmp_path_factory.mktemp("home")))
        yield store.uri("{}")


@pytest.fixture
def got10k(tmp_path: Path) -> datasets.Got10k:
    layouts.make_got10k(tmp_path / "got")
    return datasets.Got10k(source=tmp_path / "got")


def test_training_sets_are_windowed_and_evaluation_sets_are_full(
    got10k: datasets.Got10k, tmp_path: Path
) -> None:
    train = ingest(got10k, IngestConfig(output=str(tmp_path / "train")))
    assert train.index.storage == "window"
    assert train.index.manifest["window"]["search_size"] == 224
    test = datasets.Got10k(source=got10k.source, split="test")
    evaluated = ingest(test, IngestConfig(output=str(tmp_path / "test")))
    assert evaluated.index.storage == "full"
    frame = got10k.source / "test" / "GOT-10k_Test_000001" / "00000003.jpg"
    assert ImageReader(evaluated.index).read(2) == frame.read_bytes()
    full = ingest(got10k, IngestConfig(output=str(tmp_path / "full"), full_frame=True))
    assert full.index.storage == "full"
    assert full.index.num_frames == train.index.num_frames
    np.testing.assert_array_equal(full.index.box, train.index.box)
    for result in (train, evaluated, full):
        assert verify(result.index.uri, functools.partial(map_tasks, what="verify")) == []


def test_ray_data_reads_the_shards_as_they_are(got10k: datasets.Got10k, tmp_path: Path) -> None:
    import ray

    index = ingest(got10k, IngestConfig(output=str(tmp_path / "out"))).index
    files = [str(tmp_path / "out" / name) for name in index.shard_files]
    table = ray.data.read_parquet(files).select_columns(["sequence", "jpeg"]).to_pandas()
    assert len(table) == index.num_frames
    assert sorted(table["jpeg"].map(len)) == sorted(index.length.tolist())


def test_windows_can_serve_the_larger_variants(got10k: datasets.Got10k, tmp_path: Path) -> None:
    config = IngestConfig(output=str(tmp_path / "large"), variant="L-378")
    assert ingest(got10k, config).index.manifest["window"]["search_size"] == 378
    with pytest.raises(UserError, match="no variant"):
        IngestConfig(output="x", variant="L-379")


def test_every_anomaly_is_in_the_table_and_in_the_json(
    got10k: datasets.Got10k, tmp_path: Path
) -> None:
    result = ingest(got10k, IngestConfig(output=str(tmp_path / "out")))
    table = ingestion.format_report(result.findings)
    for name in ("GOT-10k_Train_000002", "GOT-10k_Train_000003", "GOT-10k_Train_000004"):
        assert name in table
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(saved["findings"]) == len(result.findings)
    assert ingestion.read_report(str(tmp_path / "out")) == result.findings
    assert {f["action"] for f in saved["findings"]} == {"dropped", "kept"}


@pytest.mark.parametrize("name", ["lasot", "trackingnet", "coco", "tnl2k", "vasttrack"])
def test_every_training_layout_becomes_a_sound_dataset(name: str, tmp_path: Path) -> None:
    getattr(layouts, f"make_{name}")(tmp_path / "source")
    source = datasets.DATASETS[name](source=tmp_path / "source")
    result = ingest(source, IngestConfig(output=str(tmp_path / "out")))
    assert (result.index.name, result.index.storage) == (name, "window")
    assert len(result.index.valid_rows) > 0
    assert verify(result.index.uri) == []


def test_a_stopped_run_is_continued_and_makes_the_same_dataset(
    got10k: datasets.Got10k, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ingest(got10k, IngestConfig(output=str(tmp_path / "whole")))
    config = IngestConfig(output=str(tmp_path / "stopped"))

    def stop_after_two(function, arguments, what=""):  # type: ignore[no-untyped-def]
        for number, values in enumerate(arguments):
            if number == 2:
                raise KeyboardInterrupt
            yield function(*values)

    with monkeypatch.context() as patch:
        patch.setattr(ingestion, "map_tasks", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            ingest(got10k, config)
    folder = tmp_path / "stopped"
    half_written = folder / ".shard-00002.parquet.abc.part"
    half_written.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not finished"):
        FrameIndex.open(folder)
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*.parquet")}
    assert len(times) == 2

    result = ingest(got10k, config)
    assert result.num_shards_made == 2  # of the four
    assert {n: (folder / n).stat().st_mtime_ns for n in times} == times
    assert result.index.fingerprint == whole.index.fingerprint
    assert result.findings == whole.findings
    assert not half_written.exists()
    assert not (folder / WORK_FOLDER).exists()
    assert verify(str(folder)) == []


def test_a_finished_dataset_is_left_alone_and_never_overwritten(
    got10k: datasets.Got10k, tmp_path: Path
) -> None:
    config = IngestConfig(output=str(tmp_path / "out"))
    first = ingest(got10k, config)
    before = (tmp_path / "out" / MANIFEST).stat().st_mtime_ns
    again = ingest(got10k, config)
    assert again.num_shards_made == 0
    assert again.findings == first.findings
    assert (tmp_path / "out" / MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other options"):
        ingest(got10k, IngestConfig(output=str(tmp_path / "out"), full_frame=True))


def test_a_dataset_without_anything_usable_fails_as_a_whole(tmp_path: Path) -> None:
    layouts.make_got10k(tmp_path / "got")
    (tmp_path / "list.txt").write_text("GOT-10k_Train_000004")
    source = datasets.Got10k(source=tmp_path / "got", include_list=tmp_path / "list.txt")
    with pytest.raises(UserError, match="Nothing usable"):
        ingest(source, IngestConfig(output=str(tmp_path / "out")))
    assert "no such folder" in (tmp_path / "out" / "report.json").read_text()
    with pytest.raises(UserError, match="no dataset"):
        FrameIndex.open(tmp_path / "out")


def test_an_object_store_serves_like_a_folder(
    got10k: datasets.Got10k, tmp_path: Path, bucket: str
) -> None:
    uri = bucket.format("sets/got10k")
    local = ingest(got10k, IngestConfig(output=str(tmp_path / "local")))
    remote = ingest(got10k, IngestConfig(output=uri))
    assert remote.index.fingerprint == local.index.fingerprint
    here, there = ImageReader(local.index), ImageReader(remote.index)
    for row in range(local.index.num_frames):
        assert here.read(row) == there.read(row)
    assert there.bytes_read == here.bytes_read
    assert verify(uri, functools.partial(map_tasks, what="verify")) == []
    again = rebuild_index(uri, functools.partial(map_tasks, what="reindex"))
    assert again.fingerprint == local.index.fingerprint
    assert ingest(got10k, IngestConfig(output=uri)).num_shards_made == 0


def test_a_bucket_that_is_not_there_is_a_user_error(bucket: str) -> None:
    with pytest.raises(UserError, match="no dataset"):
        FrameIndex.open(bucket.format("nothing/here"))
    with pytest.raises(UserError):
        FrameIndex.open(bucket.format("x").replace("videos", "no-such-bucket"))


@pytest.mark.parametrize(("count", "hint"), [(1, 500), (10, 2500), (9335, 150), (30132, 470)])
def test_shards_are_many_enough_for_all_cpus_and_not_too_large(count: int, hint: int) -> None:
    groups = ingestion.group_entries([Entry(name=str(i)) for i in range(count)], hint)
    assert [e.name for g in groups for e in g] == [str(i) for i in range(count)]
    assert len(groups) >= min(count, 32)
    assert max(len(g) for g in groups) * hint <= max(8192, hint)


def test_the_table_of_a_large_dataset_says_where_the_rest_is() -> None:
    many = [Finding(sequence=f"s{n}", action="kept", why="odd", frames=(1,)) for n in range(500)]
    assert "100 more, all of them in report.json" in ingestion.format_report(many)
    assert ingestion.format_report([]) == "No anomalies."
