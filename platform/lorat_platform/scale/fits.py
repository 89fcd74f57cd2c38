"""A measured figure as a function of the size that it was measured at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law that goes through measured points."""

    law: Literal["linear", "power law"]
    """``a + b n`` or ``a n^b``."""
    a: float
    b: float
    error: float
    """Largest relative distance of a measured point from the law."""

    def __call__(self, size: float) -> float:
        """Return what the law gives at a size."""
        return self.a + self.b * size if self.law == "linear" else self.a * size**self.b

    @property
    def text(self) -> str:
        """The law in words."""
        formula = (
            f"{self.a:.3g} {'+' if self.b >= 0 else '-'} {abs(self.b):.3g} n"
            if self.law == "linear"
            else f"{self.a:.3g} n^{self.b:.2f}"
        )
        return f"{self.law} {formula}, within {100 * self.error:.0f} % of what was measured"


def fit(sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """Fit both laws by least squares of relative distances, and return the one that is nearer.

    Args:
        sizes: more than 0, at least two different ones.
        values: more than 0.
    """
    n, y = np.asarray(sizes, np.float64), np.asarray(values, np.float64)
    design = np.stack([1 / y, n / y], axis=1)
    a, b = np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0].tolist()
    exponent, logarithm = np.polyfit(np.log(n), np.log(y), 1).tolist()
    laws = [
        Fit(law="linear", a=a, b=b, error=0.0),
        Fit(law="power law", a=float(np.exp(logarithm)), b=exponent, error=0.0),
    ]
    points = list(zip(n.tolist(), y.tolist(), strict=True))
    errors = [max(abs(law(size) / value - 1) for size, value in points) for law in laws]
    error, law = min(zip(errors, laws, strict=True), key=lambda pair: pair[0])
    return dataclasses.replace(law, error=error)
