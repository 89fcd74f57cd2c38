"""Captured calls: what a replay gives, when recordings are made, kept and dropped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorat.model.cuda_graphs import CudaGraphs
from lorat.tracking import capture
from lorat.tracking.capture import EAGER_CALLS, Capture
from tests.lorat.tracking.recorded_ops import RecordedOps


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).requires_grad_(False)


def function_of(layer: nn.Linear) -> Callable[..., Tensor]:
    return lambda x, fixed: layer(x).relu() + fixed


def recorded(layer: nn.Linear) -> tuple[RecordedOps, Capture, Tensor, Tensor]:
    """Return a capture whose next call is a replay, its recorder, its input and fixed tensor."""
    recorder, x, fixed = RecordedOps(), torch.randn(2, 4), torch.zeros(3)
    captured = Capture(layer, recorder)
    for _ in range(EAGER_CALLS + 1):
        captured(function_of(layer), x, fixed=fixed)
    return recorder, captured, x, fixed


def test_replays_give_what_calls_give(layer: nn.Linear) -> None:
    recorder, fixed = RecordedOps(), torch.zeros(3)
    function = function_of(layer)
    captured = Capture(layer, recorder)
    for number in range(EAGER_CALLS + 3):
        for batch in (1, 5, 2):
            x = torch.randn(batch, 4)
            fixed.fill_(number)
            assert torch.equal(captured(function, x, fixed=fixed), function(x, fixed))
        assert recorder.num_records == (0 if number < EAGER_CALLS else 3)
    assert captured.num_recordings == 3
    assert recorder.num_resets == 0


def test_constants_are_those_of_the_call(layer: nn.Linear) -> None:
    def function(x: Tensor, fixed: Tensor, factor: float) -> Tensor:
        return layer(x) * factor + fixed

    recorder, fixed, x = RecordedOps(), torch.zeros(3), torch.randn(2, 4)
    captured = Capture(layer, recorder)
    for _ in range(EAGER_CALLS + 2):
        for factor in (0.5, 2.0):
            found = captured(function, x, fixed=fixed, constants=(factor,))
            assert torch.equal(found, function(x, fixed, factor))
    assert recorder.num_records == captured.num_recordings == 2


def test_a_shape_that_comes_rarely_is_not_recorded(layer: nn.Linear) -> None:
    recorder = RecordedOps()
    captured = Capture(layer, recorder)
    for batch in range(1, 9):
        for _ in range(EAGER_CALLS):
            captured(function_of(layer), torch.randn(batch, 4), fixed=torch.zeros(3))
    assert recorder.num_records == 0


def test_the_number_of_recordings_is_bounded(
    layer: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "MOST_RECORDINGS", 2)
    recorder, fixed = RecordedOps(), torch.zeros(3)
    captured = Capture(layer, recorder)

    def call(batch: int) -> int:
        for _ in range(EAGER_CALLS + 1):
            captured(function_of(layer), torch.randn(batch, 4), fixed=fixed)
        return recorder.num_records

    assert [call(batch) for batch in (1, 2, 1, 3)] == [1, 2, 2, 3]
    assert captured.num_recordings == 2
    # The one of 2 was replayed longest ago.
    assert [call(batch) for batch in (1, 3, 2)] == [3, 3, 4]


@pytest.mark.parametrize(
    ("change", "dropped"),
    [
        (lambda layer: layer.weight.mul_(2), False),
        (lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
         False),
        (lambda layer: layer.load_state_dict(
            {k: v + 1 for k, v in layer.state_dict().items()}, assign=True), True),
        (lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(3), requires_grad=False)),
         True),
        (lambda layer: layer.double().float(), True),
        (lambda layer: setattr(layer.weight, "data", layer.weight + 1), True),
    ],
    ids=["in place", "loaded in place", "loaded and assigned", "one replaced", "converted",
         "moved in place"],
)  # fmt: skip
def test_new_weights_count_at_once(
    layer: nn.Linear, change: Callable[[nn.Linear], object], dropped: bool
) -> None:
    recorder, captured, x, fixed = recorded(layer)
    function = function_of(layer)
    change(layer)
    assert torch.equal(captured(function, x, fixed=fixed), function(x, fixed))
    assert recorder.num_resets == dropped
    assert recorder.num_records == 1 + dropped
    assert captured.num_recordings == 1


def test_what_a_replay_reads_is_held_until_it_is_noticed_that_it_moved(layer: nn.Linear) -> None:
    _, captured, x, fixed = recorded(layer)
    function = function_of(layer)
    old = layer.weight.data_ptr()
    layer.weight.data = layer.weight + 1
    for held in (True, False):
        assert (old in [tensor.data_ptr() for tensor in captured._read]) == held
        captured(function, x, fixed=fixed)


def test_an_input_that_is_given_again_is_copied_only_if_it_was_written_to(
    layer: nn.Linear,
) -> None:
    recorder, fixed, function = RecordedOps(), torch.zeros(3), function_of(layer)
    captured = Capture(layer, recorder)
    x = torch.randn(2, 4)
    copied: list[int] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.copy_.default:
                copied.append(args[1].data_ptr())
            return func(*args, **(kwargs or {}))

    def num_copies(x: Tensor) -> int:
        copied.clear()
        with Copies():
            found = captured(function, x, fixed=fixed)
        assert torch.equal(found, function(x, fixed))
        return copied.count(x.data_ptr())

    for _ in range(EAGER_CALLS + 1):
        captured(function, x, fixed=fixed)
    assert [num_copies(x) for _ in range(3)] == [0, 0, 0]
    x.mul_(-2)
    assert [num_copies(x), num_copies(x)] == [1, 0]
    other = torch.randn(2, 4)
    assert [num_copies(each) for each in (other, x, x)] == [1, 1, 0]
    with torch.inference_mode():  # where nothing counts what is written
        uncounted = torch.randn(2, 4)
    assert [num_copies(uncounted), num_copies(uncounted)] == [1, 1]


def test_a_fixed_tensor_that_moved_is_read_where_it_is(layer: nn.Linear) -> None:
    recorder, function = RecordedOps(), function_of(layer)
    captured = Capture(layer, recorder)
    x, held = torch.randn(2, 4), [torch.full((3,), float(number)) for number in range(3)]
    for fixed in held:
        for _ in range(EAGER_CALLS + 1):
            assert torch.equal(captured(function, x, fixed=fixed), function(x, fixed))
    assert recorder.num_resets == 2
    assert captured.num_recordings == 1


def test_what_cannot_be_recorded_runs_as_usual_and_is_said_once(
    layer: nn.Linear, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, calls = RecordedOps(), 0

    def waits(x: Tensor, fixed: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x * float(x.sum()) + fixed

    captured, fixed = Capture(layer, recorder), torch.ones(2)
    with caplog.at_level(logging.WARNING):
        for number in range(EAGER_CALLS + 4):
            x = torch.full((2, 2), float(number))
            assert torch.equal(captured(waits, x, fixed=fixed), x * float(x.sum()) + 1)
    assert recorder.num_records == 1
    (line,) = caplog.messages
    assert "cannot be captured as a CUDA graph (RuntimeError: operation not permitted" in line
    assert captured.num_recordings == 0
    # Once more before and once within the attempt.
    assert calls == EAGER_CALLS + 6


def test_without_a_recorder_every_call_runs_as_usual(layer: nn.Linear) -> None:
    function = function_of(layer)
    captured = Capture(layer, None)
    for _ in range(EAGER_CALLS + 2):
        x, fixed = torch.randn(2, 4), torch.randn(3)
        assert torch.equal(captured(function, x, fixed=fixed), function(x, fixed))
    assert captured.num_recordings == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_replay_and_what_fails_leaves_cuda_usable(
    layer: nn.Linear, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cuda")
    layer = layer.cuda()
    function, fixed = function_of(layer), torch.zeros(3, device=device)
    captured = Capture(layer, CudaGraphs(device))
    for number in range(EAGER_CALLS + 3):
        for batch in (1, 5):
            x = torch.randn(batch, 4, device=device)
            fixed.fill_(number)
            torch.testing.assert_close(captured(function, x, fixed=fixed), function(x, fixed))
    assert captured.num_recordings == 2
    layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}, assign=True)
    for _ in range(2):
        torch.testing.assert_close(captured(function, x, fixed=fixed), function(x, fixed))
    assert not caplog.messages

    stream = torch.cuda.current_stream()
    failing = Capture(layer, CudaGraphs(device))
    for _ in range(EAGER_CALLS + 3):
        torch.testing.assert_close(
            failing(lambda x, fixed: x * float(x.sum()) + fixed, x, fixed=fixed[:1]),
            x * float(x.sum()) + fixed[:1],
        )
    assert torch.cuda.current_stream() == stream
    assert len(caplog.messages) == 1
