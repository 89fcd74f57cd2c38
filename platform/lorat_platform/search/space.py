"""The search space: configuration fields by path, and what each may be.

An entry is written ``PATH=uniform(0,0.2)``, ``loguniform(LOW,HIGH)``, ``int(LOW,HIGH)``,
``logint(LOW,HIGH)`` (both ends included) or ``choice(A,B,C)``; ``PATH=VALUE`` fixes the field and
takes it out of the search.  Everything is checked against the configuration before a trial starts.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorat.config.fields import field_paths, replace_path
from lorat.config.training import TrainConfig, resolve
from lorat.errors import UserError

Kind = Literal["uniform", "loguniform", "int", "logint", "choice"]
Scalar = bool | int | float | str | None

RANKS = (4, 8, 16, 32, 64, 128)
HEAD_DEPTHS = (1, 2, 3, 4)
LR_RANGE = 10.0
"""The learning rate is searched from the recipe's / 10 to the recipe's × 10."""

_CALL = re.compile(r"^([a-z]+)\((.*)\)$", re.DOTALL)
_GRAMMAR = "uniform(a,b), loguniform(a,b), int(a,b), logint(a,b), choice(a,b,...) or one value"


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """What one field may be: a range with both ends, or a list of values."""

    path: str
    kind: Kind
    values: tuple[Scalar, ...]
    """Low and high of a range, or all choices; a tuple field's choice is written q+k+v."""

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

    def __str__(self) -> str:
        inside = ",".join("none" if v is None else f"{v}" for v in self.values)
        return f"{self.path}={self.kind}({inside})"


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Dimensions by path, over a resolved base configuration."""

    base: TrainConfig
    dimensions: dict[str, Dimension]

    def configure(self, values: Mapping[str, Any]) -> TrainConfig:
        """Return the base with a trial's values set, and what none stands for filled in.

        Raises:
            UserError: if a path or a value is not possible.
        """
        config = self.base
        for path, value in values.items():
            config = replace_path(config, path, _field_value(config, path, value))
        return resolve(config)

    def prior(self) -> dict[str, Scalar]:
        """The base configuration's own values (the paper's), or the nearest that are allowed."""
        base = self.base
        if base.lora.alpha is None and self.dimensions.get("lora.alpha"):
            base = replace_path(base, "lora.alpha", base.lora.resolved_alpha)
        if base.micro_batch is None and self.dimensions.get("micro_batch"):
            base = replace_path(base, "micro_batch", base.batch_size)
        return {
            path: dimension.nearest(_get_path(base, path))
            for path, dimension in self.dimensions.items()
        }

    def to_tune(self) -> dict[str, Any]:
        """Return the space in Ray Tune's terms."""
        from ray import tune

        space: dict[str, Any] = {}
        for path, dimension in self.dimensions.items():
            if dimension.kind == "choice":
                space[path] = tune.choice(list(dimension.values))
                continue
            low, high = dimension.bounds
            if dimension.kind == "uniform":
                space[path] = tune.uniform(low, high)
            elif dimension.kind == "loguniform":
                space[path] = tune.loguniform(low, high)
            elif dimension.kind == "int":
                space[path] = tune.randint(int(low), int(high) + 1)
            else:
                space[path] = tune.lograndint(int(low), int(high) + 1)
        return space

    def to_lines(self) -> list[str]:
        """Return one line per dimension, in the form that ``--space`` takes."""
        return [str(dimension) for dimension in self.dimensions.values()]


def build_space(base: TrainConfig, entries: Sequence[str] = ()) -> SearchSpace:
    """Build the default space over ``base`` and add, replace or fix fields by ``entries``.

    The default is LoRA rank {4 ... 128} (alpha = rank), learning rate log-uniform around the
    recipe's (1e-5 to 1e-3 for the paper's recipe), head depth {1 ... 4}.

    Raises:
        UserError: if a path names no field, a range cannot be, a value is of the wrong type or
            refused by the configuration, or the field changes the number of optimisation steps.
    """
    base = resolve(base)
    assert base.lr is not None
    dimensions = {
        d.path: d
        for d in (
            Dimension(path="lora.rank", kind="choice", values=RANKS),
            Dimension(
                path="lr", kind="loguniform", values=(base.lr / LR_RANGE, base.lr * LR_RANGE)
            ),
            Dimension(path="head.depth", kind="choice", values=HEAD_DEPTHS),
        )
    }
    if base.adaptation != "lora":
        del dimensions["lora.rank"]
    for entry in entries:
        dimension = parse_entry(entry, base)
        dimensions.pop(dimension.path, None)
        if dimension.kind == "choice" and len(dimension.values) == 1:
            value = dimension.values[0]
            _check_value(base, dimension, value)
            base = replace_path(base, dimension.path, _field_value(base, dimension.path, value))
        else:
            dimensions[dimension.path] = dimension
    if not dimensions:
        raise UserError("The search space is empty; leave at least one field to search over.")
    for dimension in dimensions.values():
        for value in dimension.values:
            _check_value(base, dimension, value)
    return SearchSpace(base=base, dimensions=dimensions)


def parse_entry(entry: str, base: TrainConfig) -> Dimension:
    """Parse one ``--space`` entry.

    Raises:
        UserError: if it is not of the grammar, or not of the field's type.
    """
    path, equals, text = entry.partition("=")
    path, text = path.strip(), text.strip()
    if not equals or not path or not text:
        raise UserError(f"--space {entry!r} is not PATH=RANGE; write PATH={_GRAMMAR}.")
    hint = _field_type(base, path)
    call = _CALL.match(text)
    if call is None:
        return Dimension(path=path, kind="choice", values=(_parse(path, hint, text),))
    name, inside = call.group(1), call.group(2)
    tokens = [token.strip() for token in inside.split(",")]
    if name == "choice":
        values = tuple(_parse(path, hint, token) for token in tokens)
        if len(set(values)) != len(values):
            raise UserError(f"--space {entry!r} lists a value twice; give each once.")
        return Dimension(path=path, kind="choice", values=values)
    if name not in ("uniform", "loguniform", "int", "logint"):
        raise UserError(f"--space {entry!r} has the unknown range {name}; write {_GRAMMAR}.")
    kind = typing.cast(Kind, name)
    wanted = int if kind in ("int", "logint") else float
    kinds = {t for t in _members(hint) if t in (int, float)}
    if wanted not in kinds:
        remedy = {int: "int(a,b) or logint(a,b)", float: "uniform(a,b) or loguniform(a,b)"}
        use = " or ".join(remedy[t] for t in kinds) or "choice(...)"
        raise UserError(f"--space {entry!r}: {path} takes {_type_name(hint)}; use {use}.")
    if len(tokens) != 2:
        raise UserError(f"--space {entry!r} needs two ends; write {name}(low,high).")
    low, high = (_number(path, wanted, token) for token in tokens)
    if not low < high:
        raise UserError(f"--space {entry!r} is empty; give low < high.")
    if kind in ("loguniform", "logint") and low <= 0:
        raise UserError(f"--space {entry!r} is logarithmic; give a low end above 0.")
    return Dimension(path=path, kind=kind, values=(low, high))


def _check_value(base: TrainConfig, dimension: Dimension, value: Scalar) -> None:
    path = dimension.path
    if path == "seed":
        raise UserError(
            "--space seed=... would give every trial other samples; "
            "all trials share one seed, so choose it with --seed."
        )
    try:
        config = replace_path(base, path, _field_value(base, path, value))
        same = resolve(config).total_steps == base.total_steps
    except UserError as error:
        raise UserError(f"--space {dimension} cannot be: {error}") from error
    if not same:
        raise UserError(
            f"--space {dimension} changes the number of optimisation steps; trials are compared "
            f"at the same step of one schedule, so set {path} for the whole search instead."
        )


def _get_path(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _field_type(config: Any, path: str) -> Any:
    """Return the type hint of a leaf field."""
    if path not in field_paths(config):
        raise UserError(
            f"There is no configuration field {path}; fields are {', '.join(field_paths(config))}."
        )
    *parents, name = path.split(".")
    owner = _get_path(config, ".".join(parents)) if parents else config
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


def _number(path: str, kind: type[int] | type[float], token: str) -> int | float:
    try:
        value = kind(token)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        noun = "an integer" if kind is int else "a finite number"
        raise UserError(f"--space {path}: {token!r} is not {noun}; give one.")
    return value


def _parse(path: str, hint: Any, token: str) -> Scalar:
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
            return _number(path, member, token)
        if (typing.get_origin(member) is tuple or member is str) and token:
            return token
    raise UserError(f"--space {path}: {token!r} is not possible; {path} takes {_type_name(hint)}.")


def _field_value(config: TrainConfig, path: str, value: Any) -> Any:
    """Return a trial's value as the field wants it (plain Python numbers, tuples)."""
    if hasattr(value, "item"):
        value = value.item()
    hint = _field_type(config, path)
    if any(typing.get_origin(member) is tuple for member in _members(hint)):
        return tuple(value.split("+")) if isinstance(value, str) else tuple(value)
    if float in _members(hint) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
