from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorat.config.training import TrainConfig
from lorat_platform.search.plan import SearchOptions, SearchPlan, make_plan
from lorat_platform.search.trial import crop_cache
from lorat_platform.search.trial.cached_source import CachedSource
from lorat_platform.search.trial.crop_cache import (
    BLOCK,
    CropCache,
    cache_folder,
    content_key,
    driven_here,
    remove_cache,
    remove_stale_caches,
)

BLOCK_BYTES = 32 * (12 * 12 * 3 + 16 + 8)


def load(indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Make up pairs whose content follows from their numbers."""
    numbers = np.asarray(indices, dtype=np.int64)
    pixels = (numbers[:, None] * 7 + np.arange(12 * 12 * 3)) % 251
    return {
        "search": pixels.reshape(-1, 12, 12, 3).astype(np.uint8),
        "search_box": np.repeat(numbers[:, None], 4, axis=1).astype(np.float32),
        "index": numbers,
    }


def batches(cache: CropCache, size: int, start: int, end: int) -> Iterator[dict[str, np.ndarray]]:
    return CachedSource(cache, batch_size=size, end_step=end).batches(start)


def assert_same(batch: dict[str, np.ndarray], start: int, stop: int) -> None:
    expected = load(range(start, stop))
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        assert batch[name].dtype == values.dtype
        np.testing.assert_array_equal(batch[name], values)


@pytest.mark.parametrize("batch_size", [1, 24, 32, 100])
def test_batches_are_what_decoding_gives(tmp_path: Path, batch_size: int) -> None:
    with CropCache(tmp_path / "c", "k", load, max_bytes=10**9) as cache:
        for step, batch in enumerate(batches(cache, batch_size, 3, 9), start=3):
            assert_same(batch, step * batch_size, (step + 1) * batch_size)


def test_workers_share_a_step_between_them(tmp_path: Path) -> None:
    with CropCache(tmp_path / "c", "k", load, max_bytes=10**9) as cache:
        sources = [
            CachedSource(cache, batch_size=50, end_step=6, rank=rank, num_workers=3, threads=2)
            for rank in range(3)
        ]
        for step, parts in enumerate(zip(*(s.batches(2) for s in sources), strict=True), start=2):
            whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
            assert_same(whole, step * 50, (step + 1) * 50)
        assert cache.num_decoded <= 6 * 50 - 100 + 2 * BLOCK


def test_the_second_trial_decodes_nothing(tmp_path: Path) -> None:
    with CropCache(tmp_path / "c", "k", load, max_bytes=10**9) as cache:
        list(batches(cache, 64, 0, 8))
        assert cache.num_decoded == 512
        assert cache.hit_rate == 0
    with CropCache(tmp_path / "c", "k", load, max_bytes=10**9) as cache:
        list(batches(cache, 64, 0, 8))
        assert cache.num_decoded == 0
        assert cache.hit_rate == 1


def test_another_key_is_another_sequence(tmp_path: Path) -> None:
    assert content_key(seed=1, data="a") != content_key(seed=2, data="a")
    with CropCache(tmp_path / "c", "one", load, max_bytes=10**9) as cache:
        cache.read(0, 64)
    with CropCache(tmp_path / "c", "two", load, max_bytes=10**9) as cache:
        cache.read(0, 64)
        assert cache.num_decoded == 64


def test_the_bound_holds_and_low_blocks_displace_high_ones(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with CropCache(folder, "k", load, max_bytes=3 * BLOCK_BYTES + 1000) as cache:
        for block in (4, 5, 6, 7, 0, 1):
            low = block * BLOCK
            assert_same(cache.read(low, low + BLOCK), low, low + BLOCK)
            assert sum(f.stat().st_size for f in folder.glob("*.npy")) <= cache.max_bytes
        kept = sorted(int(f.stem.rpartition("-")[2]) for f in folder.glob("*.npy"))
        assert kept == [0, 1, 4]


def test_without_room_every_trial_decodes_for_itself(tmp_path: Path) -> None:
    with CropCache(tmp_path / "c", "k", load, max_bytes=0) as cache:
        for step, batch in enumerate(batches(cache, 48, 0, 4)):
            assert_same(batch, step * 48, (step + 1) * 48)
        assert not list((tmp_path / "c").glob("*.npy"))
        assert len(cache._own) <= 6


def _reader(folder: Path, results: Any) -> None:
    def slow(indices: Sequence[int]) -> dict[str, np.ndarray]:
        time.sleep(0.01)
        return load(indices)

    with CropCache(folder, "k", slow, max_bytes=10**9) as cache:
        for step, batch in enumerate(batches(cache, 40, 0, 16)):
            assert_same(batch, step * 40, (step + 1) * 40)
        results.put(cache.num_decoded)


def test_processes_at_once_decode_every_pair_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_reader, args=(tmp_path / "c", results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert sum(results.get() for _ in workers) == 16 * 40


def _stuck(folder: Path, started: Any) -> None:
    def forever(_: Sequence[int]) -> dict[str, np.ndarray]:
        started.set()
        time.sleep(600)
        return {}

    CropCache(folder, "k", forever, max_bytes=10**9).read(0, BLOCK)


def test_a_killed_producer_blocks_nobody(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=_stuck, args=(tmp_path / "c", started))
    worker.start()
    assert started.wait(10)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with CropCache(tmp_path / "c", "k", load, max_bytes=10**9) as cache:
        assert_same(cache.read(0, BLOCK), 0, BLOCK)


def _full_disk(folder: Path, results: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with CropCache(folder, "k", load, max_bytes=10**9) as cache:
        for step, batch in enumerate(batches(cache, 40, 0, 4)):
            assert_same(batch, step * 40, (step + 1) * 40)
    results.put([f.name for f in folder.iterdir() if f.suffix not in ("", ".lock")])


def test_a_full_disk_only_costs_decoding(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=_full_disk, args=(tmp_path / "c", results))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert results.get() == []


def test_a_decoding_error_reaches_the_trial(tmp_path: Path) -> None:
    def broken(indices: Sequence[int]) -> dict[str, np.ndarray]:
        if indices[0] >= 64:
            raise OSError("the disk is gone")
        return load(indices)

    cache = CropCache(tmp_path / "c", "k", broken, max_bytes=10**9)
    with cache, pytest.raises(OSError, match="the disk is gone"):
        list(batches(cache, 32, 0, 8))


def test_stopping_a_trial_ends_its_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with CropCache(tmp_path / "c", "k", load, max_bytes=10**9) as cache:
        stream = batches(cache, 32, 0, 1000)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_caches_are_removed_when_nobody_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAT_CROP_CACHE", str(tmp_path))
    root = tmp_path
    assert cache_folder("used", 10**9) == root / "crops-used"
    for name in ("used", "stale", "fresh"):
        with CropCache(root / f"crops-{name}", "k", load, max_bytes=10**9) as cache:
            cache.read(0, BLOCK)
    user = CropCache(root / "crops-used", "k", load, max_bytes=10**9)
    (root / "photos").mkdir()
    (root / "crops-of-photos").mkdir()
    for folder in root.iterdir():
        if folder.name != "crops-fresh":
            os.utime(folder, (0, 0))
    assert remove_stale_caches() == [root / "crops-stale"]
    user.close()
    remove_cache("fresh")
    kept = {p.name: [f.name for f in p.iterdir()] for p in root.iterdir()}
    assert kept.keys() == {"crops-used", "photos", "crops-of-photos"}
    assert kept["photos"] == kept["crops-of-photos"] == [], "what is no cache is not touched"


def test_a_cache_lives_as_long_as_the_driver_of_its_search_or_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAT_CROP_CACHE", str(tmp_path))
    folder = tmp_path / "crops-search"
    with driven_here("search", 10**9):
        with CropCache(folder, "k", load, max_bytes=10**9) as cache:
            cache.read(0, BLOCK)
        os.utime(folder, (0, 0))
        assert not remove_stale_caches(), "the driver lives, though no trial runs"
    code = (
        "import os, signal\n"
        "from lorat_platform.search.trial.crop_cache import driven_here\n"
        "with driven_here('search', 10**9):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], env=environment)
    with CropCache(folder, "k", load, max_bytes=10**9):
        assert not remove_stale_caches(), "a trial lives, though the driver was killed"
    assert list(folder.glob("*.npy"))
    assert remove_stale_caches() == [folder]
    assert not list(tmp_path.iterdir())


def test_a_cache_that_is_removed_while_a_trial_comes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "search"
    lock = crop_cache.fcntl.flock

    def late(file: Any, kind: int) -> None:
        monkeypatch.undo()
        shutil.rmtree(folder)
        lock(file, kind)

    monkeypatch.setattr(crop_cache.fcntl, "flock", late)
    with CropCache(folder, "k", load, max_bytes=10**9) as cache:
        cache.read(0, BLOCK)
    assert list(folder.glob("*.npy"))


def test_a_cache_that_fills_the_memory_stays_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.delenv("LORAT_CROP_CACHE", raising=False)
    monkeypatch.setattr(crop_cache, "MEMORY", memory)
    monkeypatch.setattr(crop_cache.tempfile, "gettempdir", lambda: str(disk))
    free = {memory: 10**9, disk: 10**12}
    monkeypatch.setattr(
        crop_cache.shutil, "disk_usage", lambda place: SimpleNamespace(free=free[place])
    )
    folder = cache_folder("search", 10**8)
    assert folder is not None
    assert folder.is_relative_to(memory)
    folder.mkdir(parents=True)
    free[memory] = 10**8
    assert cache_folder("search", 10**8) == folder, "it is there already"
    other = cache_folder("other", 10**8)
    assert other is not None
    assert other.is_relative_to(disk)
    other.mkdir(parents=True)
    free[memory] = 10**9
    assert cache_folder("other", 10**8) == other
    (memory / other.relative_to(disk)).mkdir(parents=True)
    remove_cache("other")
    assert not other.exists()
    assert not (memory / other.relative_to(disk)).exists()
    assert folder.exists()


def test_a_place_that_somebody_else_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory, disk, others = tmp_path / "memory", tmp_path / "disk", tmp_path / "others"
    for folder in (memory, disk, others):
        folder.mkdir()
    monkeypatch.delenv("LORAT_CROP_CACHE", raising=False)
    monkeypatch.setattr(crop_cache, "MEMORY", memory)
    monkeypatch.setattr(crop_cache.tempfile, "gettempdir", lambda: str(disk))
    (memory / f"lorat-crops-{os.getuid()}").symlink_to(others)
    own = cache_folder("search", 1)
    assert own is not None
    assert own.is_relative_to(disk)
    assert own.parent.stat().st_mode & 0o777 == 0o700
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert cache_folder("search", 1) is None
    assert "LORAT_CROP_CACHE" in caplog.text
    with driven_here("search", 1), CropCache(None, "k", load, max_bytes=10**9) as cache:
        for step, batch in enumerate(batches(cache, 40, 0, 4)):
            assert_same(batch, step * 40, (step + 1) * 40)
    assert list(others.iterdir()) == []


def test_a_place_that_somebody_else_makes_anew_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORAT_CROP_CACHE", raising=False)
    root, others = tmp_path / "root", tmp_path / "others"
    others.mkdir()
    with CropCache(root / "crops-search", "k", load, max_bytes=10**9) as cache:
        cache.read(0, BLOCK)
        assert root.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(root)
        root.symlink_to(others)
        assert_same(cache.read(0, 2 * BLOCK), 0, 2 * BLOCK)
    assert list(others.iterdir()) == []


def test_a_folder_that_vanishes_again_and_again_only_costs_decoding(tmp_path: Path) -> None:
    folder = tmp_path / "crops"
    ended = threading.Event()

    def vanish() -> None:
        while not ended.wait(0.01):
            shutil.rmtree(folder, ignore_errors=True)

    def slow(indices: Sequence[int]) -> dict[str, np.ndarray]:
        time.sleep(0.002)
        return load(indices)

    thread = threading.Thread(target=vanish)
    thread.start()
    try:
        with CropCache(folder, "k", slow, max_bytes=10**9) as cache:
            source = CachedSource(cache, batch_size=40, end_step=100, threads=3)
            for step, batch in enumerate(source.batches(0)):
                assert_same(batch, step * 40, (step + 1) * 40)
            ended.set()
            thread.join()
            shutil.rmtree(folder, ignore_errors=True)
            assert_same(cache.read(8000, 8032), 8000, 8032)
            assert list(folder.glob("*.npy")), "the trials to come share it again"
    finally:
        ended.set()
        thread.join()


def test_a_damaged_block_is_decoded_again(tmp_path: Path) -> None:
    for damage in (b"", b"no block", None):
        with CropCache(tmp_path / "c", "k", load, max_bytes=10**9) as cache:
            cache.read(0, BLOCK)
            (block,) = (tmp_path / "c").glob("*.npy")
            block.write_bytes(block.read_bytes()[:-100] if damage is None else damage)
            assert_same(cache.read(0, BLOCK), 0, BLOCK)
            assert cache.num_decoded == (2 * BLOCK if damage == b"" else BLOCK)
            assert np.array_equal(np.load(block)["index"], np.arange(BLOCK))


def _denied(root: Path, results: Any) -> None:
    """Use caches that belong to another user, as another user."""
    os.chdir(root)  # who is there need not see the folders above
    os.environ["LORAT_CROP_CACHE"] = "."
    if os.geteuid() == 0:
        os.seteuid(65534)
    removed = remove_stale_caches()
    folder = cache_folder("search", 10**9)
    with driven_here("search", 10**9), CropCache(folder, "k", load, max_bytes=10**9) as cache:
        for step, batch in enumerate(batches(cache, 40, 0, 4)):
            assert_same(batch, step * 40, (step + 1) * 40)
    results.put((removed, str(folder)))


def test_another_users_folder_only_costs_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAT_CROP_CACHE", str(tmp_path))
    folder = tmp_path / "crops-search"
    with CropCache(folder, "k", load, max_bytes=10**9) as cache:
        cache.read(0, BLOCK)
    os.utime(folder, (0, 0))
    folder.chmod(0o700 if os.geteuid() == 0 else 0)
    tmp_path.chmod(0o755)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=_denied, args=(tmp_path, results))
    worker.start()
    worker.join()
    folder.chmod(0o700)
    assert worker.exitcode == 0
    assert results.get() == ([], folder.name)
    assert len(list(folder.glob("*.npy"))) == 1


def _search(plan: SearchPlan, first: Any, ended: Any, results: Any) -> None:
    """Be a search of that plan with one trial; the first one ends, and cleans up, in the midst."""
    folder = cache_folder(plan.identity, 10**9)
    key = content_key(data=plan.space.base.data)
    with driven_here(plan.identity, 10**9), CropCache(folder, key, load, max_bytes=10**9) as cache:
        for step, batch in enumerate(batches(cache, 32, 0, 16)):
            assert_same(batch, step * 32, (step + 1) * 32)
            if step == 4 and not first:
                assert ended.wait(20)
        cache.read(0, 512)
        results.put(cache.num_decoded)
    remove_stale_caches()
    remove_cache(plan.identity)
    if first:
        ended.set()


def test_two_searches_of_one_name_leave_each_others_crops_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAT_CROP_CACHE", str(tmp_path / "crops"))
    context = multiprocessing.get_context("fork")
    results, ended = context.Queue(), context.Event()
    workers = []
    for number in range(2):
        monkeypatch.setenv("LORAT_HOME", str(tmp_path / f"home-{number}"))
        plan = make_plan(TrainConfig(variant="N-112"), SearchOptions(name="same"))
        arguments = (plan, number == 0, ended, results)
        workers.append(context.Process(target=_search, args=arguments))
        workers[-1].start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [results.get() for _ in workers] == [512, 512], "each decoded every pair once"
    assert list((tmp_path / "crops").iterdir()) == []
