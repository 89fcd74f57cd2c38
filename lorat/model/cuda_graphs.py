"""CUDA graphs: calls that are recorded once and replayed, all their kernels started at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_ONE_AT_A_TIME = threading.Lock()
"""CUDA records one graph at a time in a process."""

Replay = Callable[[], Tensor]
"""Repeat a recorded call; the result is the same tensor, with new values, every time."""


class Recorder(Protocol):
    """What makes recordings, such as :class:`CudaGraphs`."""

    def record(self, work: Callable[[], Tensor]) -> Replay:
        """Record a call whose tensors stay where they are; that it has run is not promised.

        Raises:
            Exception: of any kind, if it cannot be recorded.
        """
        ...

    def reset(self) -> None:
        """Begin anew; all recordings are gone."""
        ...


class CudaGraphs:
    """Records calls as CUDA graphs of one device, which share their memory.

    So a result must be read before another graph is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.reset()

    def record(self, work: Callable[[], Tensor]) -> Replay:
        """Record a call; see :class:`Recorder`."""
        graph = torch.cuda.CUDAGraph()
        cause: Exception | None = None
        try:
            with (
                _ONE_AT_A_TIME,
                torch.cuda.device(self._device),
                # Comes back to the caller's stream also where torch, before 2.15, does not.
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                # Other threads of the process may allocate while this one records.
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    result = work()
                except Exception as error:
                    cause = error
                    raise
        except Exception as error:  # to end a recording that has failed raises one that hides it
            raise cause or error from None

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def reset(self) -> None:
        """Begin anew: memory that all graphs have left cannot be shared again."""
        torch.cuda.current_stream(self._device).synchronize()  # a replay may be under way
        self._pool = torch.cuda.graph_pool_handle()
