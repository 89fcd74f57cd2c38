"""The benchmark of tracking: what it measures, and what it leaves as it was."""

from __future__ import annotations

import pytest
import torch

from lorat.errors import UserError
from lorat_platform.evaluation.benchmark import TrackBenchmark, benchmark_track


def test_one_video_and_a_batch_are_measured_by_stage() -> None:
    options = TrackBenchmark(
        variant="N-112", batch=2, frames=2, rounds=1, width=160, height=120, device="cpu",
        threads=torch.get_num_threads(),
    )  # fmt: skip
    figures = benchmark_track(options)
    stages = ("crop", "copy", "network", "read_back")
    assert set(figures) == {
        f"eager_{num}_{what}"
        for num in (1, 2)
        for what in ("fps", *(f"{stage}_ms" for stage in stages))
    }
    assert all(value > 0 for value in figures.values())
    for num in (1, 2):
        step_ms = 1e3 * num / figures[f"eager_{num}_fps"]
        assert sum(figures[f"eager_{num}_{stage}_ms"] for stage in stages) < 20 * step_ms


@pytest.mark.parametrize(
    ("given", "message"),
    [({"variant": "X-1"}, "X-1"), ({"device": "gpu"}, "this machine has none")],
)
def test_what_cannot_be_measured_is_a_user_error(
    given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        benchmark_track(TrackBenchmark(**given))  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_on_cuda_are_captured() -> None:
    options = TrackBenchmark(variant="N-112", batch=2, frames=3, rounds=1)
    figures = benchmark_track(options)
    assert figures["num_captured"] == 2
    assert figures["captured_1_fps"] > figures["eager_1_fps"]
