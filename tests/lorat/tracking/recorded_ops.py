"""Recordings of the operations of a call, replayed as a CUDA graph replays kernels.

Every operation runs again on the tensors that it had, and writes into those that it made: what the
host decided meanwhile is not seen, and what the host must wait for cannot be recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorat.tracking.capture import Capture
from lorat.tracking.search_crops import DeviceCrops
from lorat.tracking.tracker import Tracker

WAITING = {torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default}
"""Operations for whose result the host waits."""


class Tape(TorchDispatchMode):
    """Notes the operations: what was called with what, and what came of it.

    It is no class of a call's own, which would hold the tensors until garbage is collected.
    """

    def __init__(self, tape: list[tuple[Any, Any, Any, list[Tensor]]]) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self._tape.append((func, args, kwargs or {}, _tensors(result)))
        return result


class RecordedOps:
    """A recorder for the CPU."""

    def __init__(self) -> None:
        self.num_records = 0
        self.num_resets = 0

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record a call by running it."""
        self.num_records += 1
        tape: list[tuple[Any, Any, Any, list[Tensor]]] = []

        with Tape(tape):
            result = work()

        def replay() -> Tensor:
            for func, args, kwargs, made in tape:
                for old, new in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():  # views and what works in place share it
                        old.copy_(new)
            return result

        return replay

    def reset(self) -> None:
        """Begin anew."""
        self.num_resets += 1


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def as_on_a_gpu(tracker: Tracker) -> RecordedOps:
    """Let a tracker on the CPU take the way of a GPU; return what records its steps."""
    recorder = RecordedOps()
    tracker._crops = DeviceCrops(tracker.variant.search_size, tracker.device)
    tracker._capture = Capture(tracker.model, recorder)
    tracker._turn = threading.Lock()
    return recorder
