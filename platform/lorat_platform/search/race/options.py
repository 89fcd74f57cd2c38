"""Whether and how the best trials of a search race against the default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from lorat.config.bounds import Bounds, Share, check_bounds
from lorat.config.fields import flag
from lorat.errors import UserError

RACE_FILE = "race.json"
"""Where a search's folder keeps what its race has decided."""


@dataclass(frozen=True, kw_only=True)
class RaceOptions:
    """Whether and how the best trials of a search race against the default."""

    certify: bool = False
    """Let the best trials and the default configuration race afterwards, each trained in full with
    the same new seeds, and register the winner as lorat@candidate, or the default where it is not
    shown to be worse."""
    certify_top: Annotated[int, Bounds(1, 100)] = 3
    """Trials in that race beside the default, 1 to 100: the best that got as far as any."""
    certify_within: Share = 0.005
    """The race ends when all that are left are within so much of each other, 0 to 1."""
    certify_seeds: Annotated[int, Bounds(2, 20)] = 5
    """Most seeds of the race, 2 to 20, one after the other."""

    def __post_init__(self) -> None:
        check_bounds(self, flag)
        others = [each for each in dataclasses.fields(self) if each.name != "certify"]
        given = [flag(each.name) for each in others if getattr(self, each.name) != each.default]
        if given and not self.certify:
            raise UserError(
                f"{' and '.join(given)} say how trials race; give --certify as well, or leave "
                f"{'it' if len(given) == 1 else 'them'} out."
            )
