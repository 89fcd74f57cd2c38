"""The types of configuration fields: whether a value fits, and what to say if not."""

from __future__ import annotations

import json
import types
import typing
from typing import Any, Literal


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value is one of the type of a field; lists are tuples there."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments and not isinstance(value, bool)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, choice) for choice in arguments)
    if origin is tuple:  # of any length
        return isinstance(value, tuple) and all(fits(v, arguments[0]) for v in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def describe(kind: Any) -> str:
    """Say in words what a field of the type takes."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(json.dumps(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(choice) for choice in arguments)
    if origin is tuple:
        return f"a list, each {describe(arguments[0])}"
    names = {
        int: "a whole number", float: "a number", bool: "true or false", str: "a text",
        types.NoneType: "null",
    }  # fmt: skip
    return names.get(kind, getattr(kind, "__name__", str(kind)))
