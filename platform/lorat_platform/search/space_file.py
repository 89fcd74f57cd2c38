"""A search space in a file: YAML or JSON, with comments; errors name the line and the field.

Each field has a range as ``--space`` takes it, a list of choices, ``{RANGE: [LOW, HIGH]}``, or one
value.  Texts are read by the type of their field, not by YAML's guess, so that ``1e-5`` is a number
and ``no`` a word.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lorat import errors
from lorat.config.fields import field_paths, unknown_field
from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat_platform.search.dimension import GRAMMAR, Dimension, Kind, make_dimension, parse_range

MAX_BYTES = 1 << 20
_JSON = re.compile(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*|#[^\n]*|/\*.*?\*/', re.DOTALL)
"""Texts and comments of JSON; YAML has only those that begin with a hash."""


def read_space_file(file: Path, base: TrainConfig) -> tuple[Dimension, ...]:
    """Read what is searched and what is fixed.

    Args:
        file: JSON where its name ends so, else YAML.
        base: configuration that has the fields.

    Raises:
        UserError: if it cannot be read, is no such text, or has anything in it that cannot be; with
            line and field, what was given and what is allowed.
    """
    root = _compose(file)
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise UserError(f"{file} holds no fields; write lines such as 'lora.rank: choice(4,8,16)'.")
    found: dict[str, tuple[int, Dimension]] = {}
    for line, path, node in _leaves(root, "", file, base, frozenset()):
        where = f"{file}, line {line}: {path}"
        if path in found:
            raise UserError(
                f"{where} is given twice, first in line {found[path][0]}; give it once."
            )
        found[path] = line, _dimension(path, node, base, where)
    return tuple(dimension for _, dimension in found.values())


def _compose(file: Path) -> Any:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise errors.cannot_read(file, error) from error
    if len(data) > MAX_BYTES:
        raise UserError(
            f"{file} has {len(data):,} bytes; a search space has {MAX_BYTES:,} at most."
        )
    try:
        text = data.decode("utf-8-sig")
        if file.suffix.lower() == ".json":
            text = _JSON.sub(_without_comment, text).replace("\t", " ")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text ({error}); give YAML or JSON.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{file}{line}: {reason}; give YAML or JSON.") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is nested too deep"
        raise UserError(f"{file} cannot be used: {reason}; give YAML or JSON.") from error


def _without_comment(match: re.Match[str]) -> str:
    """Return a text as it is, and a comment as blanks, so that lines keep their numbers."""
    found = match.group()
    return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)


def _leaves(
    node: Any, prefix: str, file: Path, base: TrainConfig, above: frozenset[int]
) -> Iterator[tuple[int, str, Any]]:
    """Yield line, path and node of every field; parts of the configuration may be nested."""
    names: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or not key.value:
            raise UserError(f"{file}, line {line}: a field's name is missing; give one, as lr.")
        path = f"{prefix}{key.value}"
        if key.value in names:
            raise UserError(
                f"{file}, line {line}: {path} is given twice, first in line {names[key.value]}; "
                "give it once."
            )
        names[key.value] = line
        is_field = path in field_paths(base)
        if isinstance(value, yaml.MappingNode) and not is_field and id(value) not in above:
            if not any(p.startswith(f"{path}.") for p in field_paths(base)):
                raise unknown_field(path, base, f"{file}, line {line}")
            yield from _leaves(value, f"{path}.", file, base, above | {id(value)})
        elif is_field:
            yield line, path, value
        else:
            raise unknown_field(path, base, f"{file}, line {line}")


def _dimension(path: str, node: Any, base: TrainConfig, where: str) -> Dimension:
    if isinstance(node, yaml.SequenceNode):
        return make_dimension(path, "choice", _tokens(node, where), base, where=where)
    if isinstance(node, yaml.ScalarNode):
        return parse_range(path, _token(node, where), base, where=where)
    if len(node.value) == 1 and isinstance(node.value[0][1], yaml.SequenceNode):
        ((name, ends),) = node.value
        return make_dimension(path, str(name.value), _tokens(ends, where), base, where=where)
    kinds = ", ".join(typing.get_args(Kind))
    raise UserError(
        f"{where} has several parts; write {GRAMMAR}, or one of {kinds} with a list: "
        "{uniform: [0, 0.2]}."
    )


def _tokens(node: Any, where: str) -> list[str]:
    """Return the texts of a list; a list in it is a tuple of names."""
    return [
        "+".join(_tokens(each, where)) if isinstance(each, yaml.SequenceNode) and each is not node
        else _token(each, where)
        for each in node.value
    ]  # fmt: skip


def _token(node: Any, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{where} has a value with parts; give texts and numbers.")
    if node.tag == "tag:yaml.org,2002:null" and node.value:
        return "none"
    if not node.value.strip():
        raise UserError(f"{where} has no value; write {GRAMMAR}.")
    return node.value.strip()
