"""JSON that was written by this program: read through one door, written whole or not at all.

What is read may have been damaged, cut, or written by somebody else.  Whatever is wrong with it is
a user's error that names the place and what to do; nothing else is ever raised by a text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorat.config.bounds import Bounds
from lorat.config.fields import fits, shown, type_name
from lorat.errors import UserError, cannot_read
from lorat.files.scratch import whole_file

if TYPE_CHECKING:
    from lorat.files.storage import Location

MAX_BYTES = 256 << 20
"""Of a text; the largest that is written, the manifest of a dataset of 10,000 shards, has 2 MB."""
MAX_DIGITS = 20
"""Of a whole number."""
MAX_DEPTH = 64
"""Of objects and lists inside one another; what is written has 8 at most."""


def parse_json(
    data: bytes | str, where: str, remedy: str, *, shape: Any = dict, finite: bool = True
) -> Any:
    """Read a JSON text.

    Args:
        data: the text, UTF-8.
        where: names it in messages.
        remedy: what a user can do if it cannot be used, such as "give another folder".
        shape: what it must be: a type; ``{"step": int}``, an object with at least these keys, each
            of its own shape, ``"step?"`` where it may be missing; ``[shape]``, a list; a number
            with bounds; or a dataclass, an object with its fields.
        finite: refuse numbers that are not finite; JSON has none, but Python writes them.

    Raises:
        UserError: if it is damaged or anything else; what was given, what is wrong, what to do.
    """
    try:
        value = _parse(data, finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be used: {_reason(error)}; {remedy}.") from error
    check_shape(value, where, remedy, shape)
    return value


def check_shape(value: Any, where: str, remedy: str, shape: Any) -> None:
    """Refuse a JSON value that is not of a shape; the arguments are those of :func:`parse_json`.

    Raises:
        UserError: for the first place that is not.
    """
    if problem := _misfit(value, shape, ""):
        raise UserError(f"{where} cannot be used: {problem}; {remedy}.")


def read_json(
    path: Path, remedy: str, *, shape: Any = dict, finite: bool = True, missing: Any = ...
) -> Any:
    """Read a JSON file as :func:`parse_json` does.

    Args:
        path: of the file.
        remedy, shape, finite: as there.
        missing: what to return where there is no file; none given, it is an error.

    Raises:
        UserError: if it cannot be read or is anything else.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        if missing is not ...:
            return missing
        raise UserError(f"There is no {path}; {remedy}.") from error
    except PermissionError as error:
        raise cannot_read(path, error) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}; {remedy}.") from error
    return parse_json(data, str(path), remedy, shape=shape, finite=finite)


def read_json_at(
    location: Location, name: str, remedy: str, *, shape: Any = dict, finite: bool = True
) -> Any:
    """Read a JSON file in a folder of any storage as :func:`parse_json` does.

    Raises:
        FileNotFoundError: if there is none.
        UserError: if it cannot be read or is anything else.
    """
    where = f"{name} in {location.uri}"
    try:
        data = location.read_bytes(name)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise cannot_read(where, error) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read: {_reason(error)}; {remedy}.") from error
    return parse_json(data, where, remedy, shape=shape, finite=finite)


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file; a reader sees the old file or the whole new one."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def _parse(data: bytes | str, finite: bool) -> Any:
    raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    if len(raw) > MAX_BYTES:
        raise ValueError(f"it has {len(raw):,} bytes, more than {MAX_BYTES:,}")
    text = raw.decode("utf-8")

    def number(digits: str) -> float:
        value = float(digits)
        if finite and not math.isfinite(value):
            raise ValueError(f"it has the number {digits[:20]}, which is not finite")
        return value

    value = json.loads(
        text,
        parse_int=_whole_number,
        parse_float=number,
        parse_constant=number,
        object_pairs_hook=_unique_keys,
    )
    if b"\\ud" in raw.lower():  # halves of characters, which can be neither printed nor written
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level := [each for outer in level for each in _inside(outer)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return value


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def _inside(value: Any) -> Iterable[Any]:
    """Return the objects and lists directly inside of one."""
    members = value.values() if isinstance(value, dict) else value
    return [m for m in members if isinstance(m, dict | list)] if value else []


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {shown(twice)} twice")
    return values


def _misfit(value: Any, shape: Any, path: str) -> str | None:
    """Say where a value is not of a shape, none if it is."""
    name = path or "it"
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name} is {shown(value)}, no object"
        for mark, kind in shape.items():
            key = mark.removesuffix("?")
            place = f"{path}.{key}" if path else key
            if key not in value:
                if key == mark:
                    return f"{place} is missing"
            elif problem := _misfit(value[key], kind, place):
                return problem
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is {shown(value)}, no list"
        problems = (_misfit(each, shape[0], f"{path}[{n}]") for n, each in enumerate(value))
        return next(filter(None, problems), None)
    if dataclasses.is_dataclass(shape):
        return _misfit_fields(value, typing.cast(type[Any], shape), path)
    if typing.get_origin(shape) is typing.Annotated:
        kind, *marks = typing.get_args(shape)
        if problem := _misfit(value, kind, path):
            return problem
        outside = [m for m in marks if isinstance(m, Bounds) and value not in m]
        return f"{name} is {shown(value)}, not {outside[0]}" if outside else None
    if isinstance(value, list) and typing.get_origin(shape) is tuple:
        value = tuple(value)
    if not fits(value, shape):
        return f"{name} is {shown(value)}, not {type_name(shape)}"
    return None


def _misfit_fields(value: Any, cls: type[Any], path: str) -> str | None:
    hints = typing.get_type_hints(cls, include_extras=True)
    shape = {}
    for field in dataclasses.fields(cls):
        needed = field.default is field.default_factory is dataclasses.MISSING
        shape[field.name if needed else f"{field.name}?"] = hints[field.name]
    if problem := _misfit(value, shape, path):
        return problem
    unknown = sorted(set(value) - set(hints))
    return f"{path}{'.' * bool(path)}{unknown[0]} is not known" if unknown else None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error})"
    if isinstance(error, UnicodeError):
        return f"it is not UTF-8 text ({error})"
    if isinstance(error, OSError):
        return (error.strerror or str(error)).splitlines()[0][:300]
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return str(error)
