"""A step that is recorded once and replayed from then on, all its kernels started at once."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lorat.learning.optimisation import set_learning_rate
from lorat.model.cuda_graphs import Recorder, Replay

log = logging.getLogger(__name__)

EAGER_STEPS = 3
"""Steps before the recording.  They do what must not happen in one: compile, open libraries, make
constants and the optimiser's state."""


class CapturedStep:
    """An optimiser step that is recorded after a few eager ones.

    Steps on inputs of other shapes stay eager.

    Args:
        optimizer: whose learning rate a replay must take anew; a recording reads it from a tensor.
        recorder: makes the recording.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, recorder: Recorder) -> None:
        self._optimizer = optimizer
        self._recorder = recorder
        self.failed = False
        """Whether the step could not be recorded; then it was left half-way, without a kernel."""
        self._num_eager = 0
        self._inputs: list[Tensor] = []
        self._lr: Tensor | None = None
        self._replay: Replay | None = None

    def ready(self, step: Callable[..., Tensor], *inputs: Tensor) -> bool:
        """Say whether a step on such inputs is a replay, recording it first if it is time.

        Args:
            step: does one step on inputs and returns a tensor; it changes weights, optimiser and
                loss scale where they are, and leaves nothing else behind.
            inputs: on the device.
        """
        if self._replay is None and not self.failed:
            if self._num_eager < EAGER_STEPS:
                self._num_eager += 1
            else:
                self._record(step, inputs)
        same = [own.shape for own in self._inputs] == [given.shape for given in inputs]
        return self._replay is not None and same

    def replay(self, *inputs: Tensor, lr: float) -> Tensor:
        """Do the step, with these inputs and that learning rate; the result is the caller's."""
        assert self._replay is not None and self._lr is not None
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._lr.fill_(lr)
        return self._replay().clone()

    def _record(self, step: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        before = self._optimizer.param_groups[0]["lr"]
        try:
            self._inputs = [tensor.clone() for tensor in inputs]
            self._lr = torch.full((), before, dtype=torch.float32, device=inputs[0].device)
            set_learning_rate(self._optimizer, self._lr)
            self._replay = self._recorder.record(lambda: step(*self._inputs))
        except Exception as error:  # torch and the driver raise many unrelated classes
            lines = str(error).strip().splitlines()
            log.warning(
                "The step cannot be captured as a CUDA graph (%s: %s); training goes on without, "
                "slower.", type(error).__name__, lines[0] if lines else "",
            )  # fmt: skip
            self.failed, self._inputs = True, []
        finally:
            set_learning_rate(self._optimizer, before)
