"""Ingest with a real Ray: window and full storage, resuming, reports, and an object store."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from lorat.data import datasets
from lorat.data.datasets import Entry, Finding
from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.images import ImageReader
from lorat.data.shards.manifest import MANIFEST, WORK_FOLDER, dataset_info
from lorat.data.shards.verification import rebuild_index, verify
from lorat.errors import UserError
from lorat.files.storage import locate
from lorat.metrics.attributes import sequences_by_attribute
from lorat_platform import cluster
from lorat_platform.data import ingestion
from lorat_platform.data.ingestion import IngestConfig, ingest, map_tasks
from lorat_platform.failures import surroundings_message, user_message
from tests.lorat import layouts
from tests.object_store import KEYS, object_store
from tests.other_driver import FOREIGN, announce

pytestmark = pytest.mark.processes(minutes=1)


@contextlib.contextmanager
def _making_no_shards() -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("shards are made again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingestion, "map_tasks", refuse)
        yield


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
    half_written = folder / ".part-shard-00002.parquet.abc"
    half_written.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not finished"):
        FrameIndex.open(folder)
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*.parquet")}
    assert len(times) == 2
    token = announce(locate(folder), FOREIGN)
    with pytest.raises(UserError, match=r"The ingest into .* is driven by process 7 on elsewhere"):
        ingest(got10k, config)
    assert half_written.exists()
    (folder / f"driver-{token}.json").unlink()

    result = ingest(got10k, config)
    assert {n: (folder / n).stat().st_mtime_ns for n in times} == times
    assert result.index.fingerprint == whole.index.fingerprint
    assert result.findings == whole.findings
    assert not half_written.exists()
    assert not (folder / WORK_FOLDER).exists()
    assert verify(str(folder)) == []


def test_relative_paths_mean_the_same_in_every_process(
    got10k: datasets.Got10k, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "names.txt").write_text("GOT-10k_Train_000001\n")
    monkeypatch.chdir(tmp_path)
    source = datasets.Got10k(source=Path("got"), include_list=Path("names.txt"))
    index = ingest(source, IngestConfig(output="out")).index
    assert index.num_tracks == 1
    assert verify("out", map_tasks) == []
    assert rebuild_index("out", map_tasks).fingerprint == index.fingerprint
    (tmp_path / "own" / "frames").mkdir(parents=True)
    layouts.make_folder(tmp_path / "own")
    own = datasets.Folder(
        source=Path("own/frames"), annotation=Path("own/track.csv"), box_format="xyxy"
    )
    assert ingest(own, IngestConfig(output="mine")).index.num_frames == 8


def test_a_machine_that_does_not_see_the_source_says_so(
    got10k: datasets.Got10k, tmp_path: Path
) -> None:
    entries = got10k.entries(datasets.Findings())
    shutil.rmtree(got10k.source)
    info = dataset_info(name="got10k", split="train", law=None)
    with pytest.raises(UserError, match=r"a --source that all of them see"):
        ingestion.write_shard(got10k, entries, str(tmp_path / "out"), 0, info, None, True)


def test_a_full_disk_is_one_sentence_and_leaves_no_parts(
    got10k: datasets.Got10k, tmp_path: Path
) -> None:
    """A child whose files may not grow beyond 4 KB writes as on a full disk."""
    code = f"""if True:
        import resource, signal, sys
        from pathlib import Path
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from lorat.data import datasets
        from lorat.files import storage
        from lorat.data.shards.manifest import dataset_info
        from lorat.errors import UserError
        from lorat_platform.data import ingestion
        source = datasets.Got10k(source=Path({str(got10k.source)!r}))
        entries = source.entries(datasets.Findings())
        info = dataset_info(name="got10k", split="train", law=None)
        storage.locate("out").child("_ingest").make()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            ingestion.write_shard(source, entries, "out", 0, info, None, True)
        except UserError as error:
            print(error)
    """
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'platform'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "File too large; make room there" in done.stdout, done.stderr
    assert done.stderr == ""
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_what_is_wrong_in_a_task_arrives_as_one_sentence(
    got10k: datasets.Got10k, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard, uri = ingestion.write_shard, str(tmp_path / "out")

    def without_room(*values: Any) -> int:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            return write_shard(*values)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(ingestion, "write_shard", without_room)
        with pytest.raises(UserError) as caught:
            ingest(got10k, IngestConfig(output=uri))
    message = user_message(caught.value) or ""
    assert message.startswith(f"Cannot write to {uri}: File too large; make room there"), message

    ingest(got10k, IngestConfig(output=uri))
    shard = next((tmp_path / "out").glob("shard-*.parquet"))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError) as caught:
        rebuild_index(uri, functools.partial(map_tasks, what="reindex"))
    assert (user_message(caught.value) or "").startswith(f"{shard} ")

    @ray.remote(num_cpus=0)
    def inner() -> None:
        Path("/nowhere/at/all").read_bytes()

    @ray.remote(num_cpus=0)
    def outer() -> None:
        ray.get(inner.remote())

    with pytest.raises(FileNotFoundError) as missing:
        ray.get(outer.remote())
    assert surroundings_message(missing.value) == (
        "/nowhere/at/all: No such file or directory; mend that, then run the same command again."
    )


def test_an_output_that_cannot_be_written_is_a_user_error(
    got10k: datasets.Got10k, tmp_path: Path, bucket: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot create the folder"):
        ingest(got10k, IngestConfig(output=str(tmp_path / "file" / "out")))
    wrong = bucket.format("x").replace("videos", "no-such-bucket")
    with pytest.raises(UserError, match=r"Cannot write to .*no-such-bucket"):
        ingest(got10k, IngestConfig(output=wrong))


def test_reindex_does_not_finish_an_ingest_that_was_stopped(
    got10k: datasets.Got10k, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = IngestConfig(output=str(tmp_path / "out"))

    def stop_after_two(function, arguments, what=""):  # type: ignore[no-untyped-def]
        for values in arguments[:2]:
            yield function(*values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ingestion, "map_tasks", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            ingest(got10k, config)
    with pytest.raises(UserError, match="is not finished; run the same ingest command"):
        rebuild_index(config.output)
    with pytest.raises(UserError, match="not finished"):
        FrameIndex.open(config.output)
    assert ingest(got10k, config).index.num_tracks == 3


def test_a_reindexed_dataset_is_still_known_for_what_it_is(
    got10k: datasets.Got10k, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = ingest(got10k, IngestConfig(output=str(out)))
    again = rebuild_index(str(out))
    assert again.manifest["plan"] == first.index.manifest["plan"]
    (out / WORK_FOLDER).mkdir()  # stopped after the very last file was written
    (out / "report.json").unlink()
    with _making_no_shards():
        assert ingest(got10k, IngestConfig(output=str(out))).findings == []
    assert not (out / WORK_FOLDER).exists()
    (out / MANIFEST).unlink()
    assert "plan" not in rebuild_index(str(out)).manifest
    test = datasets.Got10k(source=got10k.source, split="test")
    for source, options in (
        (test, {}),
        (got10k, {"full_frame": True}),
        (got10k, {"variant": "L-378"}),
    ):
        with pytest.raises(UserError, match="already holds got10k train"):
            ingest(source, IngestConfig(output=str(out), **options))
    with _making_no_shards():
        ingest(got10k, IngestConfig(output=str(out)))


def test_attributes_of_the_dataset_and_of_a_table_reach_the_evaluation(
    got10k: datasets.Got10k, tmp_path: Path
) -> None:
    layouts.make_uav123(tmp_path / "uav")
    source = datasets.Uav123(source=tmp_path / "uav")
    (tmp_path / "more.csv").write_text("bird1_2,night\ncar1_s,night,fog\nnobody,fog\n")
    config = IngestConfig(output=str(tmp_path / "out"), attributes=tmp_path / "more.csv")
    result = ingest(source, config)
    expected = {
        "night": ["bird1_2", "car1_s"],
        "scale variation": ["car1_s"],
        "camera motion": ["car1_s"],
        "fog": ["car1_s"],
    }
    assert result.index.manifest["attributes"] == expected
    found = sequences_by_attribute(result.index)
    assert {name: found[name] for name in expected} == expected
    assert any(f.sequence == "nobody" for f in result.findings)
    assert rebuild_index(config.output).manifest["attributes"] == expected
    with _making_no_shards():
        ingest(source, config)
    with pytest.raises(UserError, match="other options"):
        ingest(source, IngestConfig(output=config.output))
    got = ingest(got10k, IngestConfig(output=str(tmp_path / "got10k"), full_frame=True)).index
    assert sequences_by_attribute(got)["cut by image"] == ["GOT-10k_Train_000002"]
    assert sequences_by_attribute(got)["partial occlusion"] == ["GOT-10k_Train_000002"]


def test_a_finished_dataset_is_left_alone_and_never_overwritten(
    got10k: datasets.Got10k, tmp_path: Path
) -> None:
    config = IngestConfig(output=str(tmp_path / "out"))
    first = ingest(got10k, config)
    before = (tmp_path / "out" / MANIFEST).stat().st_mtime_ns
    with _making_no_shards():
        again = ingest(got10k, config)
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
    with _making_no_shards():
        ingest(got10k, IngestConfig(output=uri))


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
