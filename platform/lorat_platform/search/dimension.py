"""What one field of the configuration may be, and the texts that say so.

An entry is written ``PATH=uniform(0,0.2)``, ``loguniform(LOW,HIGH)``, ``int(LOW,HIGH)``,
``logint(LOW,HIGH)`` (both ends included) or ``choice(A,B,C)``; ``PATH=VALUE`` fixes the field.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lorat.config.fields import field_paths, get_path, shown, unknown_field
from lorat.config.training import TrainConfig
from lorat.errors import UserError

Kind = Literal["uniform", "loguniform", "int", "logint", "choice"]
Scalar = bool | int | float | str | None

_CALL = re.compile(r"^([a-z]+)\((.*)\)$", re.DOTALL)
GRAMMAR = "uniform(a,b), loguniform(a,b), int(a,b), logint(a,b), choice(a,b,...) or one value"


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """What one field may be: a range with both ends, or a list of values."""

    path: str
    kind: Kind
    values: tuple[Scalar, ...]
    """Low and high of a range, or all choices; a tuple field's choice is written q+k+v."""
    where: str = field(default="", compare=False)
    """What messages call it: where a user has written it; empty for the command line."""

    def __post_init__(self) -> None:
        ends = [v for v in self.values if isinstance(v, int | float) and not isinstance(v, bool)]
        if self.kind == "choice":
            possible = len(self.values) > 0
        else:
            possible = len(ends) == len(self.values) == 2 and ends[0] < ends[1]
            possible = possible and not (self.log and ends[0] <= 0)
        if not possible:
            raise UserError(
                f"The values of {self.path} are {shown(list(self.values))}, which is no "
                f"{self.kind}; give {GRAMMAR}."
            )

    @property
    def said(self) -> str:
        """How messages name it."""
        return self.where or f"--space {self}"

    @property
    def fixed(self) -> bool:
        """Whether it leaves nothing to search."""
        return self.kind == "choice" and len(self.values) == 1

    @property
    def log(self) -> bool:
        """Whether the range is searched on a logarithmic scale."""
        return self.kind in ("loguniform", "logint")

    @property
    def bounds(self) -> tuple[float, float]:
        """Low and high of a range."""
        low, high = typing.cast(tuple[float, float], self.values)
        return low, high

    def nearest(self, value: Any) -> Scalar:
        """Return ``value`` if it is allowed, else the closest allowed one (ratio for log).

        None, which is no number, becomes the middle of a range.
        """
        if isinstance(value, list | tuple):
            value = "+".join(value)
        if self.kind != "choice":
            low, high = self.bounds
            if value is None:
                value = math.sqrt(low * high) if self.log else (low + high) / 2
            clipped = min(max(value, low), high)
            return int(clipped) if self.kind in ("int", "logint") else float(clipped)
        if value in self.values or not isinstance(value, int | float):
            return value if value in self.values else self.values[0]
        numbers = [v for v in self.values if isinstance(v, int | float)]
        return min(numbers, key=lambda v: abs(v - value)) if numbers else self.values[0]

    def holding(self, values: Sequence[Scalar]) -> Dimension:
        """Return one in which these values are allowed as well, or alone where no range holds them.

        Args:
            values: of the field.
        """
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if self.kind != "choice" and len(numbers) == len(values):
            low, high = min([*numbers, self.bounds[0]]), max([*numbers, self.bounds[1]])
            if low > 0 or not self.log:
                return dataclasses.replace(self, values=(low, high))
        held = self.values if self.kind == "choice" else ()
        distinct = tuple(dict.fromkeys((*held, *values)))
        return dataclasses.replace(self, kind="choice", values=distinct)

    def at(self, position: float) -> Scalar:
        """Return the value at a place of the range or of the choices, from 0 to below 1."""
        if self.kind == "choice":
            return self.values[int(position * len(self.values))]
        low, high = self.bounds
        whole = self.kind in ("int", "logint")
        high += whole  # both ends are included
        value = low * (high / low) ** position if self.log else low + (high - low) * position
        return int(value) if whole else value

    def __str__(self) -> str:
        inside = ",".join("none" if v is None else f"{v}" for v in self.values)
        return f"{self.path}={self.kind}({inside})"


def latin_hypercube(
    dimensions: Mapping[str, Dimension], number: int, rng: np.random.Generator
) -> list[dict[str, Scalar]]:
    """Return points in which each field takes values from all parts of its range."""
    columns = [(rng.permutation(number) + rng.random(number)) / max(number, 1) for _ in dimensions]
    return [
        {path: d.at(float(x)) for (path, d), x in zip(dimensions.items(), row, strict=True)}
        for row in zip(*columns, strict=True)
    ]


def parse_entry(entry: str, base: TrainConfig) -> Dimension:
    """Parse one ``--space`` entry.

    Raises:
        UserError: if it is not of the grammar, or not of the field's type.
    """
    path, equals, text = entry.partition("=")
    path, text = path.strip(), text.strip()
    if not equals or not path or not text:
        raise UserError(f"--space {entry!r} is not PATH=RANGE; write PATH={GRAMMAR}.")
    dimension = parse_range(path, text, base, where=f"--space {entry!r}")
    return dataclasses.replace(dimension, where="")


def parse_range(path: str, text: str, base: TrainConfig, *, where: str) -> Dimension:
    """Parse what one field may be: a range, choices or a value.

    Args:
        path: of the field.
        text: such as ``uniform(0,0.2)`` or ``3``.
        base: configuration that has the field.
        where: what messages call it.

    Raises:
        UserError: if it is not of the grammar, or not of the field's type.
    """
    call = _CALL.match(text)
    if call is None:
        return make_dimension(path, "choice", [text], base, where=where)
    name, inside = call.group(1), call.group(2)
    tokens = [token.strip() for token in inside.split(",")]
    return make_dimension(path, name, tokens, base, where=where)


def make_dimension(
    path: str, name: str, tokens: Sequence[str], base: TrainConfig, *, where: str
) -> Dimension:
    """Make a dimension of the texts of its values; the arguments are those of :func:`parse_range`.

    Args:
        path, base, where: as there.
        name: of the range, or ``choice``.
        tokens: both ends, or all choices.

    Raises:
        UserError: if the range is none, or a value not of the field's type.
    """
    hint = field_type(base, path, where)
    if name == "choice":
        values = tuple(_parse(path, hint, token, where) for token in tokens)
        if len(set(values)) != len(values):
            raise UserError(f"{where} lists a value twice; give each once.")
        return Dimension(path=path, kind="choice", values=values, where=where)
    if name not in typing.get_args(Kind):
        raise UserError(f"{where} has the unknown range {name}; write {GRAMMAR}.")
    kind = typing.cast(Kind, name)
    wanted = int if kind in ("int", "logint") else float
    kinds = {t for t in _members(hint) if t in (int, float)}
    if wanted not in kinds:
        remedy = {int: "int(a,b) or logint(a,b)", float: "uniform(a,b) or loguniform(a,b)"}
        use = " or ".join(remedy[t] for t in kinds) or "choice(...)"
        raise UserError(f"{where} takes {_type_name(hint)}; use {use}.")
    if len(tokens) != 2:
        raise UserError(f"{where} needs two ends; write {name}(low,high).")
    low, high = (_number(wanted, token, where) for token in tokens)
    if not low < high:
        raise UserError(f"{where} is empty; give low < high.")
    if kind in ("loguniform", "logint") and low <= 0:
        raise UserError(f"{where} is logarithmic; give a low end above 0.")
    return Dimension(path=path, kind=kind, values=(low, high), where=where)


def field_type(config: Any, path: str, where: str = "") -> Any:
    """Return the type hint of a leaf field."""
    if path not in field_paths(config):
        raise unknown_field(path, config, where)
    *parents, name = path.split(".")
    owner = get_path(config, ".".join(parents)) if parents else config
    return typing.get_type_hints(type(owner))[name]


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the hint alone."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.get_args(hint)
    return (hint,)


def _type_name(hint: Any) -> str:
    names = []
    for member in _members(hint):
        if member is type(None):
            names.append("none")
        elif typing.get_origin(member) is Literal:
            names += [str(v) for v in typing.get_args(member)]
        elif typing.get_origin(member) is tuple:
            names.append("names joined by +")
        else:
            names.append({int: "an integer", float: "a number", bool: "true or false"}.get(
                member, "text"
            ))  # fmt: skip
    return " or ".join(names)


def _number(kind: type[int] | type[float], token: str, where: str) -> int | float:
    try:
        value = kind(token)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        noun = "an integer" if kind is int else "a finite number"
        raise UserError(f"{where}: {token!r} is not {noun}; give one.")
    return value


def _parse(path: str, hint: Any, token: str, where: str) -> Scalar:
    """Read one value of the field's type; a tuple stays text, joined by ``+``."""
    members = _members(hint)
    if type(None) in members and token.lower() == "none":
        return None
    for member in members:
        if typing.get_origin(member) is Literal and token in typing.get_args(member):
            return token
        if member is bool and token.lower() in ("true", "false"):
            return token.lower() == "true"
        if member in (int, float):
            return _number(member, token, where)
        if (typing.get_origin(member) is tuple or member is str) and token:
            return token
    raise UserError(f"{where}: {token!r} is not possible; it takes {_type_name(hint)}.")


def field_value(config: TrainConfig, path: str, value: Any) -> Any:
    """Return a trial's value as the field wants it (plain Python numbers, tuples)."""
    if hasattr(value, "item"):
        value = value.item()
    hint = field_type(config, path)
    if any(typing.get_origin(member) is tuple for member in _members(hint)):
        return tuple(value.split("+")) if isinstance(value, str) else tuple(value)
    if float in _members(hint) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
