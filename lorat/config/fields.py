"""Fields of configurations by their paths and types: read, replaced, written as JSON, refused."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from typing import Annotated, Any, Literal

from lorat.errors import UserError

_MAX_SHOWN = 200


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value is one of the type of a field; lists are tuples there."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments and not isinstance(value, bool)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, choice) for choice in arguments)
    if kind is Any:
        return True
    if origin is Annotated:
        return fits(value, arguments[0])
    if origin in (tuple, list):  # of any length
        return isinstance(value, origin) and all(fits(v, arguments[0]) for v in value)
    if origin is dict:  # with texts as keys, as JSON has them
        return isinstance(value, dict) and all(fits(v, arguments[1]) for v in value.values())
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def shown(value: Any) -> str:
    """Return a value for a message: as in JSON, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = json.dumps(value, default=str)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def type_name(kind: Any) -> str:
    """Say in words what a field of the type takes."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(json.dumps(choice) for choice in arguments)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(choice) for choice in arguments)
    if origin in (tuple, list):
        return f"a list, each {type_name(arguments[0])}"
    if origin is dict:
        return f"an object, each of its values {type_name(arguments[1])}"
    names = {
        int: "a whole number", float: "a number", bool: "true or false", str: "a text",
        types.NoneType: "null", dict: "an object", list: "a list", Any: "anything",
    }  # fmt: skip
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def flag(field: str) -> str:
    """Return the option of a field on the command line."""
    return f"--{field.replace('_', '-')}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries (JSON types)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[Any], values: dict[str, Any], *, path: str = "") -> Any:
    """Build ``cls`` from what :func:`to_dict` gave, or from a part of it.

    Raises:
        UserError: if a key is no field, a field that needs a value has none, or a value has another
            type than its field or is out of its bounds.
    """
    _require(
        isinstance(values, dict),
        f"The configuration{' ' * bool(path)}{path.rstrip('.')} is "
        f"{shown(values)}; give an "
        f"object with the fields {', '.join(f.name for f in dataclasses.fields(cls))}.",
    )
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    _require(
        not unknown,
        f"Unknown configuration field {path}{unknown[0] if unknown else ''}; "
        f"fields there are {', '.join(f.name for f in dataclasses.fields(cls))}.",
    )
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    _require(
        not missing, f"The configuration has no {path}{missing[0] if missing else ''}; add it."
    )
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            value = from_dict(typing.cast(type[Any], kind), value, path=f"{path}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        _require(
            fits(value, kind),
            f"Configuration field {path}{name} is {shown(value)}; give {type_name(kind)}.",
        )
        arguments[name] = value
    return cls(**arguments)


def get_path(config: Any, path: str) -> Any:
    """Return the field at a dotted path such as ``lora.rank``."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def replace_path(config: Any, path: str, value: Any) -> Any:
    """Return a copy with the field at a dotted path such as ``lora.rank`` set.

    Raises:
        UserError: if the path names no field.
    """
    name, _, rest = path.partition(".")
    if not dataclasses.is_dataclass(config) or name not in {
        f.name for f in dataclasses.fields(config)
    }:
        raise unknown_field(path, config)
    if rest:
        value = replace_path(getattr(config, name), rest, value)
    return dataclasses.replace(typing.cast(Any, config), **{name: value})


def unknown_field(path: str, config: Any, where: str = "") -> UserError:
    """Return the error about a path that names no field: with the nearest ones, or all.

    Args:
        path: of no field of ``config``.
        where: begin of the message, such as a file's line.
    """
    paths = field_paths(config)
    inside = [p for p in paths if p.startswith(f"{path}.")]
    near = inside or difflib.get_close_matches(path, paths, n=2, cutoff=0.6)
    # Somebody may know the field but not the part of the configuration that has it.
    near = near or [p for p in paths if p.rpartition(".")[2] == path.rpartition(".")[2]]
    hint = f"did you mean {' or '.join(near)}?" if near else f"fields are {', '.join(paths)}."
    begin = f"{where}: there" if where else "There"
    return UserError(f"{begin} is no configuration field {path}; {hint}")


def field_paths(config: Any) -> list[str]:
    """List the dotted paths of all leaf fields."""
    paths: list[str] = []
    if not dataclasses.is_dataclass(config):
        return paths
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, types.GenericAlias):
            paths += [f"{f.name}.{p}" for p in field_paths(value)]
        else:
            paths.append(f.name)
    return paths
