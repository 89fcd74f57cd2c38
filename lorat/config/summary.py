"""A training configuration on one screen: first what differs from its recipe."""

from __future__ import annotations

import textwrap
from typing import Any

from lorat.config.fields import field_paths, get_path
from lorat.config.training import TrainConfig, resolve

WIDTH = 100
MOST_LINES = 12
"""Differences that get a line each; more of them share lines."""
GIVEN = ("variant", "recipe", "data", "val_data")
"""Fields that the first line names."""


def summary(config: TrainConfig) -> str:
    """Return a resolved configuration as some 20 lines of at most :data:`WIDTH` characters.

    All fields are there: what the recipe has otherwise with a line of its own, the rest together.
    """
    usual = resolve(TrainConfig(variant=config.variant, recipe=config.recipe))
    values = {p: get_path(config, p) for p in field_paths(config) if p not in GIVEN}
    differing = {p: v for p, v in values.items() if v != get_path(usual, p)}
    validated = f"validated on {config.val_data}" if config.val_data else "without validation"
    lines = [f"{config.variant}, recipe {config.recipe}, on {config.data}, {validated}"]
    columns = [
        max(map(len, column), default=0) for column in (differing, map(_text, differing.values()))
    ]
    changes = [
        f"{p:{columns[0]}}  {_text(v):{columns[1]}}  (recipe: {_text(get_path(usual, p))})"
        for p, v in differing.items()
    ]
    if changes:
        lines.append("other than the recipe has it:")
    if len(changes) > MOST_LINES:
        changes = _packed([" ".join(change.split()) for change in changes])
    lines += [f"  {change}" for change in changes]
    lines.append("as the recipe has it:")
    rest = [f"{p} {_text(v)}" for p, v in values.items() if p not in differing]
    lines += [f"  {line}" for line in _packed(rest)]
    return "\n".join(lines)


def _packed(items: list[str]) -> list[str]:
    """Put items into lines, none of them cut at a space unless it is longer than a line."""
    hard = "\N{NO-BREAK SPACE}"
    text = " ".join(f"{item.replace(' ', hard)}," for item in items).rstrip(",")
    lines = textwrap.wrap(text, WIDTH - 2, break_on_hyphens=False, break_long_words=False)
    return [line.replace(hard, " ") for line in lines]


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
