"""A function of tensors, recorded once per shape of its inputs and replayed from then on.

A recording is a CUDA graph: a replay starts all kernels of a call at once, where a network spends
most of the time of a small batch starting them one by one.  Numbers that the host gives are part of
a recording, so there is one for each of these, too.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lorat.model.cuda_graphs import Recorder

log = logging.getLogger(__name__)

EAGER_CALLS = 2
"""Calls of a new kind that are not recorded, since one that comes once is not worth it."""
MOST_RECORDINGS = 64
"""Recordings that are kept; the one that was replayed longest ago goes first."""

_Kind = tuple[torch.Size | tuple[float, ...], ...]
"""Shapes of all tensors, and the constants."""


class Capture:
    """A function that is recorded once per shape of its inputs, where there is a recorder.

    Where recording fails, that is said once, and every call runs as usual from then on.

    It does not hold the function, whose owner may hold it.

    Args:
        model: whose weights the function reads where they are.  New values count at once; weights
            that have moved, such as to another type, drop all recordings.  Where there are
            recordings, the old ones' memory is free after the next call that would be a replay.
        recorder: none means that every call runs as usual.
    """

    def __init__(self, model: nn.Module, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._holders = [
            holder
            for module in model.modules()
            for holder in (module._parameters, module._buffers)
            if holder
        ]
        self._read: list[Tensor] = []
        """What the recordings read, held, since it is noticed after a replay that it has moved."""
        self._places: list[int] = []
        self._calls: Counter[_Kind] = Counter()
        self._recordings: OrderedDict[_Kind, _Recording] = OrderedDict()

    @property
    def num_recordings(self) -> int:
        """Number of kinds of calls that are replayed."""
        return len(self._recordings)

    @torch.inference_mode()
    def __call__(
        self,
        function: Callable[..., Tensor],
        *inputs: Tensor,
        fixed: Tensor,
        constants: tuple[float, ...] = (),
    ) -> Tensor:
        """Call the function, the same one at every call.

        Args:
            function: takes inputs, ``fixed`` and constants, and returns a tensor; it writes to none
                of them.
            inputs: on the device, anywhere in its memory.  One that was given last time, too, and
                not written to since is not copied again.
            fixed: on the device; where it has moved, all recordings are dropped.
            constants: numbers that the function takes after the tensors.

        Returns:
            What the function returns; the next call may change it.
        """
        if self._recorder is None:
            return function(*inputs, fixed, *constants)
        kind = (*(tensor.shape for tensor in inputs), fixed.shape, constants)
        recording = self._recordings.get(kind)
        if recording is not None:
            answer = recording.replay(inputs)
            # Asked while the device works.  It has read the old weights in vain if they moved.
            if not self._has_moved(fixed):
                self._recordings.move_to_end(kind)
                return answer
        self._calls[kind] += 1
        if self._calls[kind] <= EAGER_CALLS:
            return function(*inputs, fixed, *constants)
        if self._has_moved(fixed):
            if self._recordings:
                self._recorder.reset()
                self._recordings.clear()
            self._read = [tensor.detach() for tensor in self._now_read(fixed)]
            self._places = [tensor.data_ptr() for tensor in self._read]
        recording = self._record(
            self._recorder, lambda *tensors: function(*tensors, *constants), inputs, fixed
        )
        if recording is None:
            return function(*inputs, fixed, *constants)
        self._recordings[kind] = recording
        return recording.replay(inputs)

    def _now_read(self, fixed: Tensor) -> list[Tensor]:
        return [fixed] + [
            weight for holder in self._holders for weight in holder.values() if weight is not None
        ]

    def _has_moved(self, fixed: Tensor) -> bool:
        return [tensor.data_ptr() for tensor in self._now_read(fixed)] != self._places

    def _record(
        self,
        recorder: Recorder,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        fixed: Tensor,
    ) -> _Recording | None:
        while len(self._recordings) >= MOST_RECORDINGS:
            self._recordings.popitem(last=False)
        try:
            return _Recording(function, inputs, fixed, recorder)
        except Exception as error:  # torch and the driver raise many unrelated classes
            lines = str(error).strip().splitlines()
            log.warning(
                "The network cannot be captured as a CUDA graph (%s: %s); it runs without, slower.",
                type(error).__name__, lines[0] if lines else "",
            )  # fmt: skip
            self._recorder = None
            self._recordings.clear()
            self._read.clear()
            return None


class _Input:
    """A tensor that a recorded call reads, and which one it was copied from."""

    def __init__(self, given: Tensor) -> None:
        self.own = given.clone()
        self._note(given)

    def take(self, given: Tensor) -> None:
        """Copy a tensor, unless it is the one before and was not written to since."""
        version = _version(given)
        if version is None or version != self._version or self._source() is not given:
            self.own.copy_(given)
            self._note(given)

    def _note(self, given: Tensor) -> None:
        self._source, self._version = weakref.ref(given), _version(given)


def _version(tensor: Tensor) -> int | None:
    """Return a number that every write to the tensor changes; none if torch does not count them."""
    return None if tensor.is_inference() else tensor._version


class _Recording:
    """One recorded call and the copies of its inputs that it reads."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        fixed: Tensor,
        recorder: Recorder,
    ) -> None:
        self._inputs = [_Input(tensor) for tensor in inputs]
        own = [each.own for each in self._inputs]
        # Does what must not happen in a recording: libraries open once per thread, constants are
        # made at the first call.
        function(*own, fixed)
        self._replay = recorder.record(lambda: function(*own, fixed))

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """Repeat the call, with other values where the inputs are others."""
        for each, given in zip(self._inputs, inputs, strict=True):
            each.take(given)
        return self._replay()
