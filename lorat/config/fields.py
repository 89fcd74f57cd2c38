"""The types of configuration fields: whether a value fits, and what to say if not."""

from __future__ import annotations

import json
import types
import typing
from typing import Annotated, Any, Literal

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


def describe(kind: Any) -> str:
    """Say in words what a field of the type takes."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(json.dumps(choice) for choice in arguments)
    if origin is Annotated:
        return describe(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(choice) for choice in arguments)
    if origin in (tuple, list):
        return f"a list, each {describe(arguments[0])}"
    if origin is dict:
        return f"an object, each of its values {describe(arguments[1])}"
    names = {
        int: "a whole number", float: "a number", bool: "true or false", str: "a text",
        types.NoneType: "null", dict: "an object", list: "a list", Any: "anything",
    }  # fmt: skip
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def flag(field: str) -> str:
    """Return the option of a field on the command line."""
    return f"--{field.replace('_', '-')}"
