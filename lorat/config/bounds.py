"""Bounds of numbers: stated in the type of a field, checked when the object is made."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from lorat.config.fields import shown
from lorat.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """From where to where a number may be; what is not finite is outside of any.

    ``rank: Annotated[int, Bounds(1, 1024)]`` is a field with bounds, also where ``| None`` follows.
    """

    low: float
    high: float
    above: bool = False
    """The number must be above ``low``."""
    below: bool = False
    """The number must be below ``high``."""

    def __contains__(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        return bool(over and (value < self.high if self.below else value <= self.high))

    def __str__(self) -> str:
        low, high = (
            f"{end:,}" if isinstance(end, int) and abs(end) >= 10_000 else f"{end:g}"
            for end in (self.low, self.high)
        )
        if not (self.above or self.below):
            return f"{low} to {high}"
        first = f"more than {low}" if self.above else f"{low} or more"
        return f"{first}, {f'below {high}' if self.below else f'at most {high}'}"


Count = Annotated[int, Bounds(1, 1_000_000_000)]
Share = Annotated[float, Bounds(0, 1)]
ShareBelowOne = Annotated[float, Bounds(0, 1, below=True)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
"""NumPy's legacy generators, which some searchers use, take no larger one."""


def check_bounds(config: Any, name: Callable[[str], str] = str) -> None:
    """Refuse numbers outside of the bounds of their fields; call it in ``__post_init__``.

    Args:
        config: an instance of a dataclass.
        name: makes of a field's name what the user knows it by.

    Raises:
        UserError: for the first such field; also for what is no number.
    """
    cls: Any = type(config)
    for field, (kind, bounds, optional) in bounded_fields(cls).items():
        value = getattr(config, field)
        if value is None and optional:
            continue
        for each in value if isinstance(value, tuple) else (value,):
            wanted: Any = numbers.Integral if kind is int else numbers.Real
            if not isinstance(each, wanted) or isinstance(each, bool):
                noun = "a whole number" if kind is int else "a number"
                raise UserError(f"{name(field)} is {shown(each)}; give {noun}, {bounds}.")
            if each not in bounds:
                raise UserError(f"{name(field)} is {shown(each)}; give {bounds}.")


@functools.cache
def bounded_fields(cls: type[Any]) -> dict[str, tuple[type[Any], Bounds, bool]]:
    """Return number type, bounds and whether none is allowed, by field, where there are bounds."""
    found = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        # A union with none, or a tuple of numbers.
        inside = typing.get_args(hint) if typing.get_origin(hint) is not Annotated else ()
        for member in (hint, *inside):
            marks = [m for m in getattr(member, "__metadata__", ()) if isinstance(m, Bounds)]
            if marks:
                found[field.name] = member.__origin__, marks[0], type(None) in inside
    return found


Few = Annotated[int, Bounds(1, 1024)]
