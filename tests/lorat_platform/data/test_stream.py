"""The pair stream is the same for any workers, resumes anywhere, and never starves or floods."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from lorat.config.training import TrainConfig, resolve
from lorat.data.pairs.batches import Batch, Decoder
from lorat.data.shards.frame_index import FrameIndex
from lorat_platform import cluster
from lorat_platform.cluster.console import ConsolePrinter
from lorat_platform.data import stream
from lorat_platform.data.layout import Layout, local_range, pair_bytes
from lorat_platform.data.sources import Source, open_pairs
from lorat_platform.data.stream import DecodePool, RayStream, split_stream, worker_groups
from lorat_platform.scale.blocks import block_rate
from tests.lorat_platform.local_source import LocalSource
from tests.small_shards import make_shards

pytestmark = pytest.mark.processes(minutes=1)

ONE_ACTOR = DecodePool(actors=1, threads=1)
TWO_ACTORS = DecodePool(actors=2, threads=1)
FOUR_ACTORS = DecodePool(actors=4, threads=1)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with cluster.connected("local", num_cpus=2):
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, ...]:
    uri = make_shards(tmp_path_factory.mktemp("data") / "train", split="train")
    return (Source(name="synthetic", uri=uri),)


def config(batch_size: int = 10) -> TrainConfig:
    return resolve(TrainConfig(variant="N-112", batch_size=batch_size, backbone="none"))


def consume(
    settings: TrainConfig,
    sources: tuple[Source, ...],
    *,
    workers: int,
    start: int,
    end: int,
    pool: DecodePool = ONE_ACTOR,
) -> list[list[Batch]]:
    """Return the batches of every worker, consumed at random speeds."""
    layout = Layout.plan(settings, workers, start, end)
    iterators = split_stream(settings, sources, layout, pool)
    streams = [RayStream(it, layout, rank) for rank, it in enumerate(iterators)]
    taken: list[list[Batch]] = [[] for _ in streams]

    def take(rank: int) -> None:
        rng = np.random.default_rng(rank)
        for batch in streams[rank].batches(start):
            taken[rank].append({k: v.copy() for k, v in batch.items()})
            time.sleep(float(rng.random()) * 0.02)

    threads = [threading.Thread(target=take, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def joined(taken: list[list[Batch]], step: int) -> Batch:
    parts = [worker[step] for worker in taken]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("batch_size", [1, 7, 64, 300])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("variant", ["N-112", "L-378"])
def test_every_pair_of_every_step_is_in_exactly_one_block(
    batch_size: int, workers: int, variant: str
) -> None:
    if workers > batch_size:
        pytest.skip("more workers than pairs are refused before")
    settings = resolve(TrainConfig(variant=variant, batch_size=batch_size, backbone="none"))
    layout = Layout.plan(settings, workers, 3, 17)
    assert layout.num_blocks % workers == 0
    assert layout.pairs_per_block * pair_bytes(settings.model_variant) <= 96 * 2**20
    rows = np.concatenate([layout.indices(block) for block in range(layout.num_blocks)])
    assert sorted(rows[rows >= 0].tolist()) == list(range(3 * batch_size, 17 * batch_size))
    for rank in range(workers):
        first, last = local_range(batch_size, workers, rank)
        assert last > first
        own = np.concatenate(
            [layout.indices(block) for block in range(rank, layout.num_blocks, workers)]
        )
        steps = own[: 14 * layout.local_batch].reshape(14, layout.local_batch)
        for step, row in enumerate(steps, start=3):
            expected = np.arange(step * batch_size + first, step * batch_size + last)
            assert row[: last - first].tolist() == expected.tolist()
            assert (row[last - first :] == -1).all()


def test_a_control_loop_serves_few_workers_however_many_there_are() -> None:
    for workers, actors in [(1, 1), (8, 3), (9, 2), (9, 1), (64, 64), (256, 100), (250, 40)]:
        pool = DecodePool(actors=actors, threads=4, resources={"decode": 1.0})
        groups = worker_groups(workers, pool)
        assert [rank for ranks, _ in groups for rank in ranks] == list(range(workers))
        assert sum(part.actors for _, part in groups) == actors
        assert all(part.actors >= min(2, actors) and part.threads == 4 for _, part in groups)
        assert all(part.resources == pool.resources for _, part in groups)
        assert len(groups) == max(1, actors // 2) or max(len(ranks) for ranks, _ in groups) <= 4


def test_the_stream_is_the_same_for_one_two_and_three_workers(
    sources: tuple[Source, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WORKERS_PER_LOOP", 2)  # three workers have two control loops
    settings = config(batch_size=10)  # 3 does not divide it
    runs = {
        workers: consume(settings, sources, workers=workers, start=0, end=30, pool=pool)
        for workers, pool in ((1, TWO_ACTORS), (2, TWO_ACTORS), (3, FOUR_ACTORS))
    }
    for step in range(30):
        reference = joined(runs[1], step)
        assert reference["index"].tolist() == list(range(10 * step, 10 * step + 10))
        for workers in (2, 3):
            batch = joined(runs[workers], step)
            for name, values in reference.items():
                np.testing.assert_array_equal(values, batch[name], err_msg=f"{workers} {name}")


@pytest.mark.exhaustive
def test_blocks_of_several_control_loops_can_be_counted() -> None:
    rate = block_rate(5, 1.0, one_loop=False)
    assert (rate.consumers, rate.loops) == (5, 2)
    assert rate.blocks_per_s > 1
    assert 0.1 < rate.loop_ms < 1000


def test_the_stream_resumed_at_a_step_is_the_rest_of_the_uninterrupted_one(
    sources: tuple[Source, ...],
) -> None:
    settings = config(batch_size=10)
    decoder = Decoder(*open_pairs(settings, sources))
    source = LocalSource(decoder.load, batch_size=10, end_step=30)
    whole = list(source.batches(0))
    resumed = consume(settings, sources, workers=2, start=17, end=30)
    assert len(resumed[0]) == len(resumed[1]) == 13
    for step in range(17, 30):
        batch = joined(resumed, step - 17)
        for name, values in whole[step].items():
            np.testing.assert_array_equal(values, batch[name])


def test_workers_that_ask_for_all_cpus_do_not_starve_the_stream(
    sources: tuple[Source, ...],
) -> None:
    settings = config(batch_size=8)
    pool = DecodePool.plan(worker_cpus=2, cluster_cpus=2)
    layout = Layout.plan(settings, 2, 0, 20)
    iterators = split_stream(settings, sources, layout, pool)

    @ray.remote(num_cpus=1)
    def work(rank: int) -> int:
        own = RayStream(iterators[rank], layout, rank)
        time.sleep(2)  # both hold their CPU before the first batch
        return sum(len(batch["index"]) for batch in own.batches(0))

    assert ray.get([work.remote(0), work.remote(1)], timeout=300) == [80, 80]


def test_the_decode_pool_leaves_the_workers_cpus_alone() -> None:
    pool = DecodePool.plan(worker_cpus=4, cluster_cpus=12)
    assert pool.actors * pool.threads == 8
    large = DecodePool.plan(worker_cpus=256, cluster_cpus=4096)
    assert (large.actors, large.threads) == (480, 8)
    placed = DecodePool.plan(worker_cpus=8, cluster_cpus=8, decode_nodes=3)
    assert (placed.actors, placed.resources) == (3, {"decode": 1.0})
    more = DecodePool.plan(worker_cpus=8, cluster_cpus=8, decode_nodes=3, actors=5)
    assert (more.actors, more.resources) == (5, {"decode": 1.0})


def coordinators() -> list[psutil.Process]:
    """Return the processes that run control loops of Ray Data."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::SplitCoordinator" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_slow_consumer_does_not_fill_the_object_store_nor_a_cpu(
    sources: tuple[Source, ...],
) -> None:
    settings = config(batch_size=64)
    layout = Layout.plan(settings, 1, 0, 4000)
    earlier = set(coordinators())
    free = ray.available_resources()["object_store_memory"]
    (iterator,) = split_stream(settings, sources, layout, TWO_ACTORS)
    own = RayStream(iterator, layout, 0)
    batches = own.batches(0)
    next(batches)
    (coordinator,) = set(coordinators()) - earlier
    busy = coordinator.cpu_times()
    used = []
    for _ in range(12):
        time.sleep(1)
        next(batches)
        used.append(free - ray.available_resources()["object_store_memory"])
    busy_s = sum(coordinator.cpu_times()[:2]) - sum(busy[:2])
    assert busy_s < 0.35 * 12, "the control loop turns without a rest"
    own.close()
    block = layout.pairs_per_block * pair_bytes(settings.model_variant)
    assert max(used) < 20 * block  # of 500 in all


def test_a_damaged_image_is_counted_replaced_and_named(
    tmp_path: Path, sources: tuple[Source, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    uri = make_shards(tmp_path / "train", split="train")
    index = FrameIndex.open(uri)
    for row in range(0, index.num_frames, 7):
        shard = Path(uri) / index.shard_files[index.shard[row]]
        with open(shard, "r+b") as file:
            file.seek(int(index.offset[row]) + int(index.length[row]) // 2)
            file.write(b"\x00" * 32)
    damaged = (Source(name="synthetic", uri=uri),)
    settings = config(batch_size=10)
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lorat_platform.workers").addHandler(handler)
    layout = Layout.plan(settings, 1, 0, 12)
    with ConsolePrinter() as console:
        (iterator,) = split_stream(settings, damaged, layout, ONE_ACTOR, console)
        first = list(RayStream(iterator, layout, 0).batches(0))
    again = consume(settings, damaged, workers=2, start=0, end=12)
    found = sum(int(batch["damaged"].sum()) for batch in first)
    assert found > 5
    assert any("synthetic/train-" in line and "damaged" in line for line in lines)
    for step, batch in enumerate(first):
        assert batch["index"].tolist() == list(range(10 * step, 10 * step + 10))
        other = joined(again, step)
        np.testing.assert_array_equal(batch["search"], other["search"])
        np.testing.assert_array_equal(batch["damaged"], other["damaged"])


def test_a_decode_error_reaches_the_worker(sources: tuple[Source, ...]) -> None:
    missing = (Source(name="gone", uri="/nowhere/at/all"),)
    settings = config()
    layout = Layout.plan(settings, 1, 0, 4)
    (iterator,) = split_stream(settings, missing, layout, ONE_ACTOR)
    from lorat_platform.failures import user_message

    with pytest.raises(Exception, match="nowhere") as caught:
        list(RayStream(iterator, layout, 0).batches(0))
    assert "/nowhere/at/all" in (user_message(caught.value) or "")
