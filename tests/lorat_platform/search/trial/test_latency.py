"""Latency of a trial: a ratio to a reference that bears the same load, once per architecture."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorat.config.training import LoraConfig, TrainConfig
from lorat.config.variants import VARIANTS
from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.images import ImageReader
from lorat.errors import UserError
from lorat.image.codec import DamagedImage
from lorat.model.network import build_model
from lorat.tracking.tracker import Tracker
from lorat_platform.search.trial import latency
from tests.small_shards import make_shards


class Load:
    """A clock of a node whose load changes, and networks that take their time on it."""

    def __init__(self, seed: int, slowest: float) -> None:
        self.now = 0.0
        self._rng = np.random.default_rng(seed)
        self._slowest = slowest
        self._factor, self._until = 1.0, 0.0

    def perf_counter(self) -> float:
        return self.now

    def network(self, seconds: float) -> latency.Step:
        def step() -> float:
            if self.now >= self._until:
                self._factor = self._rng.uniform(1.0, self._slowest)
                self._until = self.now + self._rng.exponential(0.5)
            taken = seconds * self._factor * self._rng.normal(1.0, 0.03)
            self.now += taken
            return taken

        return step


@pytest.mark.parametrize("slowest", [1.0, 4.0])
@pytest.mark.parametrize("seconds", [0.0007, 0.003, 0.05])
def test_equal_networks_agree_whatever_else_the_node_does(
    slowest: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = []
    for seed in range(20):
        load = Load(seed, slowest)
        monkeypatch.setattr(latency, "time", load)
        ratios.append(latency.compare(load.network(seconds), load.network(0.004))[0])
    assert max(ratios) / min(ratios) < 1.05
    assert np.median(ratios) == pytest.approx(seconds / 0.004, rel=0.02)


def test_a_measurement_ends_under_any_load(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    clock = SimpleNamespace(now=0.0)

    def step() -> float:
        taken = float(rng.lognormal(0.0, 3.0))
        clock.now += taken
        return taken

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    ratio, fastest = latency.compare(step, step)
    assert ratio > 0
    assert fastest > 0


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FrameIndex:
    return FrameIndex.open(make_shards(tmp_path_factory.mktemp("latency") / "val", split="val"))


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LORAT_CROP_CACHE", str(tmp_path / "crops"))
    monkeypatch.setattr(latency, "TURNS", (2, 2))
    base = TrainConfig(variant="N-112", backbone="none")
    return SimpleNamespace(
        folder=str(tmp_path / "search"), space=SimpleNamespace(base=base), objectives=("latency",)
    )


def tracker(depth: int = 1, seed: int = 0, **changes: Any) -> Tracker:
    config = TrainConfig(variant="N-112", backbone="none", seed=seed, **changes)
    head = type(config.head)(depth=depth)
    return Tracker(build_model(type(config)(**(config.__dict__ | {"head": head}))), device="cpu")


def test_equal_architectures_share_one_measurement(
    setup: Any, index: FrameIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []
    compare: Callable[..., tuple[float, float]] = latency.compare

    def noting(*steps: latency.Step, longest_s: float) -> tuple[float, float]:
        assert longest_s == latency.LONGEST_S
        measured.append(compare(*steps)[0])
        return measured[-1], 0.004

    monkeypatch.setattr(latency, "compare", noting)
    first = latency.latency_ms(tracker(), index, setup)
    assert first == pytest.approx(measured[0] * 4.0)
    others = (
        tracker(seed=1),
        tracker(lora=LoraConfig(rank=2)),
        tracker(lora=LoraConfig(rank=16)),
        tracker(adaptation="full"),
    )
    assert {latency.latency_ms(other, index, setup) for other in others} == {first}
    assert len(measured) == 1
    deeper = latency.latency_ms(tracker(depth=3), index, setup)
    assert len(measured) == 2
    assert deeper == pytest.approx(measured[1] * 4.0), "in units of the search's one reference"


def test_measurements_on_a_node_wait_for_one_another(
    setup: Any, index: FrameIndex, tmp_path: Path
) -> None:
    (tmp_path / "crops").mkdir()
    ended = threading.Event()
    with open(tmp_path / "crops" / "latency.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        network = tracker()

        def measure() -> None:
            latency.latency_ms(network, index, setup)
            ended.set()

        thread = threading.Thread(target=measure)
        thread.start()
        time.sleep(0.2)
        assert not ended.is_set()
        assert not list(tmp_path.glob("search/latencies/*"))
    thread.join()
    assert ended.is_set()


class NoTracker:
    """Counts its steps, each from the first box."""

    def __init__(self) -> None:
        self.steps = 0

    def start(self, frames: list[Any], boxes: list[Any]) -> list[Any]:
        return [list(box) for box in boxes]

    def step(self, targets: list[Any], frames: list[Any]) -> None:
        assert targets[0][-1] > 0
        targets[0][-1] = -1.0
        self.steps += 1


def test_damaged_frames_are_left_out(index: FrameIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = ImageReader.decode
    damaged = {int(index.track_start[0]), int(index.track_start[0]) + 2}

    def decode_or_fail(reader: ImageReader, row: int) -> Any:
        if row in damaged:
            raise DamagedImage(f"row {row}")
        return decode(reader, row)

    monkeypatch.setattr(ImageReader, "decode", decode_or_fail)
    counting: Any = NoTracker()
    assert latency.compare(*latency.steps((counting, counting), index))[0] > 0
    assert counting.steps >= 2 * (latency.WARM_UP + latency.TURNS[0])
    damaged |= set(range(int(index.track_start[1])))
    assert latency.steps((counting,), index), "the next sequence is taken"
    damaged |= set(range(index.num_frames))
    with pytest.raises(UserError, match="two frames that can be read"):
        latency.steps((counting,), index)


def test_every_variant_has_a_reference_network() -> None:
    assert {variant.recipe for variant in VARIANTS.values()} == latency.REFERENCE.keys()
