"""The mean of the weights over the last steps: what a trial is worth before its schedule ends.

While the learning rate is high, the weights swing around what they will settle at, the wider the
higher it is; so a trial is judged by their mean (B. T. Polyak and A. B. Juditsky, "Acceleration of
stochastic approximation by averaging", 1992; P. Izmailov et al., "Averaging weights leads to wider
optima and better generalization", UAI 2018), else the rungs drop the learning rates that are best
in the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

from lorat.files import checksums
from lorat.files.tensors import read_safetensors, write_tensors

AVERAGE_FILE = "average.safetensors"


class TailAverage:
    """The equal-weight mean of the trained weights after every step of a span.

    Args:
        parameters: the weights, which training changes in place.
        after: steps taken before the first that counts.
    """

    def __init__(self, parameters: Sequence[Tensor], *, after: int) -> None:
        self._parameters = list(parameters)
        self._after = after
        self._mean: list[Tensor] = []
        self._update = get_swa_multi_avg_fn()
        self.num_steps = 0
        """Steps in the mean."""

    def add(self, step: int) -> None:
        """Take in the weights as they are when that many steps were taken."""
        if step <= self._after:
            return
        current = [p.detach() for p in self._parameters]
        if self.num_steps:
            self._update(self._mean, current, self.num_steps)
        else:
            self._mean = [p.clone() for p in current]
        self.num_steps += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the mean where the weights are, for a while; nothing changes if it holds no step."""
        if not self.num_steps:
            yield
            return
        current = [p.detach().clone() for p in self._parameters]
        try:
            self._copy(self._mean)
            yield
        finally:
            self._copy(current)

    def _copy(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)

    def save(self, folder: Path) -> None:
        """Write the mean, if it holds a step."""
        if self.num_steps:
            tensors = {str(number): mean for number, mean in enumerate(self._mean)}
            tensors["num_steps"] = torch.tensor(self.num_steps)
            write_tensors(tensors, folder / AVERAGE_FILE)
            checksums.seal(folder, AVERAGE_FILE)

    def load(self, folder: Path) -> None:
        """Go on from what :meth:`save` wrote, if it wrote anything."""
        if (folder / AVERAGE_FILE).exists():
            checksums.check(folder, AVERAGE_FILE)
            tensors = read_safetensors(folder / AVERAGE_FILE)
            self.num_steps = int(tensors.pop("num_steps"))
            self._mean = [
                tensors[str(number)].to(parameter.device)
                for number, parameter in enumerate(self._parameters)
            ]
