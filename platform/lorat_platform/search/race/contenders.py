"""Who races: the best trials of a search, and the default configuration always."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorat_platform.search.results.board import Leaderboard
from lorat_platform.search.space import SearchSpace

DEFAULT = "default"
"""Name of the contender that is the base configuration."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A configuration that is trained with several seeds."""

    name: str
    """``default``, or ``trial`` and its number."""
    values: dict[str, Any]
    """Of every field that was searched, by path."""


def contenders_of(space: SearchSpace, board: Leaderboard, top: int) -> tuple[Contender, ...]:
    """Return the default and the best trials among those that got as far as any.

    A trial races with the tracking that it was judged best with.  Equal configurations count once,
    the default as such.

    Args:
        space: of the search.
        board: of the search.
        top: most trials.
    """
    found = [Contender(name=DEFAULT, values=space.own_values())]
    configs = [space.configure(found[0].values)]
    best = board.best()
    rungs = best.num_rungs if best is not None else 1
    for row in board.ranked():
        if row.status == "failed" or row.num_rungs < rungs or len(found) > top:
            break
        values = {path: row.found[path] for path in space.dimensions}
        config = space.configure(values)
        if config not in configs:
            found.append(Contender(name=f"trial {row.number}", values=values))
            configs.append(config)
    return tuple(found)
