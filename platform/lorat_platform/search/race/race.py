"""A race: seed after seed, every contender that is left is trained and compared.

Only what rounds have measured is kept; who leads, who has left and whether it is over follow from
that, so that a race which was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorat.config.fields import from_dict
from lorat.config.json_files import read_json_at
from lorat.errors import UserError
from lorat.files.storage import Location
from lorat.metrics import METRICS
from lorat.metrics.race import RaceRules, Standings, Verdict, standings, verdict
from lorat_platform.search.race.contenders import DEFAULT, Contender
from lorat_platform.search.race.options import RACE_FILE, RaceOptions

SEEDS = 2**32
"""Seeds that there are."""


@dataclass(kw_only=True)
class Round:
    """What came of the contenders with one seed."""

    seed: int
    search: str
    """Name of the search whose trials they were."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """By contender and sequence, of those that were trained to the end."""
    trials: dict[str, str] = field(default_factory=dict)
    """Ids of these trials, by contender."""
    checkpoints: dict[str, str] = field(default_factory=dict)
    """Addresses of what is left of their weights."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why the others failed."""
    steps: int = 0
    """That were trained, also of those that failed."""
    seconds: float = 0.0


@dataclass(kw_only=True)
class Race:
    """A race, as far as it has come."""

    metric: str
    """Score of the sequences that decides."""
    seed: int
    """Of the search, whose trials have seen it: the race has others."""
    options: RaceOptions
    contenders: tuple[Contender, ...]
    rounds: list[Round] = field(default_factory=list)
    version: str | None = None
    """Of the model that was registered at the end."""
    _standings: dict[int, Standings | None] = field(default_factory=dict, repr=False)
    """After so many rounds."""

    @property
    def rules(self) -> RaceRules:
        """When a contender leaves, and when it is over."""
        options = self.options
        return RaceRules(within=options.certify_within, max_seeds=options.certify_seeds)

    @property
    def failed(self) -> dict[str, str]:
        """Contenders that are out since a training of theirs failed, with the reason."""
        return {
            name: f"seed {each.seed}: {reason}"
            for each in self.rounds
            for name, reason in each.failed.items()
        }

    @property
    def sequences(self) -> tuple[str, ...]:
        """Names of the sequences, the number of their set in front.

        Raises:
            UserError: if rounds had different ones.
        """
        of_all = [set(scores) for each in self.rounds for scores in each.scores.values()]
        if any(each != of_all[0] for each in of_all):
            raise UserError(
                "The validation sequences have changed while the race went on, so its rounds "
                "cannot be compared; put the data back as it was, or search again under another "
                "--name."
            )
        return tuple(sorted(of_all[0])) if of_all else ()

    @property
    def weights(self) -> np.ndarray:
        """Each sequence's share of the score (sequences,): every set counts as much."""
        sets = [name.partition(" ")[0] for name in self.sequences]
        return np.array([1 / (len(set(sets)) * sets.count(each)) for each in sets])

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds so far."""
        return tuple(dict.fromkeys(each.seed for each in self.rounds))

    def of_seeds(self, name: str) -> dict[int, Round]:
        """Return the rounds that trained a contender to the end, by seed."""
        found = {each.seed: each for each in self.rounds if name in each.scores}
        return {seed: found[seed] for seed in self.seeds if seed in found}

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """Scores (seeds, sequences), signed so that more is better, of who has not failed."""
        sequences, sign = self.sequences, METRICS[self.metric].sign
        return {
            each.name: sign
            * np.array(
                [
                    [of_round.scores[each.name][name] for name in sequences]
                    for of_round in self.of_seeds(each.name).values()
                ]
            )
            for each in self.contenders
            if self.rounds and each.name not in self.failed
        }

    def means(self, name: str) -> dict[int, float]:
        """Return a contender's score by seed."""
        weights, sequences = self.weights, self.sequences
        return {
            seed: float(weights @ [each.scores[name][s] for s in sequences])
            for seed, each in self.of_seeds(name).items()
        }

    @property
    def standings(self) -> Standings | None:
        """Who is where; none where fewer than two can be compared."""
        if len(self.rounds) not in self._standings:
            scores = self.scores
            self._standings[len(self.rounds)] = (
                standings(scores, self.rules, weights=self.weights) if len(scores) > 1 else None
            )
        return self._standings[len(self.rounds)]

    @property
    def verdict(self) -> Verdict | None:
        """What it has shown; none where nothing can be compared with the default."""
        scores = self.scores
        if DEFAULT not in scores or len(scores) < 2:
            return None
        return verdict(scores, self.rules, default=DEFAULT, weights=self.weights)

    @property
    def chosen(self) -> str | None:
        """Who is to be registered: the default unless a trial is better; none where all failed."""
        if (found := self.verdict) is not None:
            return found.chosen
        return (
            self.standings.leader if self.standings is not None else next(iter(self.scores), None)
        )

    @property
    def said(self) -> str:
        """The verdict in words."""
        if (found := self.verdict) is not None:
            return found.verdict
        if DEFAULT in self.failed:
            return f"not compared with the default, whose training failed ({self.failed[DEFAULT]})"
        return "not distinguishable from the default"

    @property
    def p_best(self) -> dict[str, float]:
        """Probability of each who has not failed to be the best."""
        if self.standings is None:
            return dict.fromkeys(self.scores, 1.0)
        return {each.name: each.p_best for each in self.standings.standings}

    @property
    def running(self) -> tuple[Contender, ...]:
        """The contenders that are left."""
        if not self.rounds:
            return self.contenders
        found = self.standings
        left = self.scores if found is None else found.left
        return tuple(each for each in self.contenders if each.name in left)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to find out."""
        return bool(self.rounds) and (self.standings is None or self.standings.over)

    @property
    def steps(self) -> int:
        """Optimisation steps of all rounds."""
        return sum(each.steps for each in self.rounds)

    def next_round(self) -> tuple[int, tuple[Contender, ...]]:
        """Return the seed that comes next, and who lacks it.

        It is a new one, unless who had left races again since the one it was behind has failed.
        """
        for seed in self.seeds:
            lacking = tuple(c for c in self.running if seed not in self.of_seeds(c.name))
            if lacking:
                return seed, lacking
        return (self.seed + 1 + len(self.seeds)) % SEEDS, self.running

    def save(self, search: Location) -> None:
        """Write what the race has decided into the search's folder."""
        values = {name: getattr(self, name) for name in ("metric", "seed", "version")} | {
            "options": dataclasses.asdict(self.options),
            "contenders": [dataclasses.asdict(each) for each in self.contenders],
            "rounds": [dataclasses.asdict(each) for each in self.rounds],
        }
        search.write_bytes(RACE_FILE, json.dumps(values, indent=1).encode())


def read_race(search: Location) -> Race:
    """Read what a race has decided.

    Raises:
        UserError: if it is damaged.
    """
    values = read_json_at(
        search,
        RACE_FILE,
        "delete it, and the race begins anew",
        shape={
            "metric": str,
            "seed": int,
            "version": str | None,
            "options": dict,
            "contenders": [dict],
            "rounds": [Round],
        },
    )
    return Race(
        **values
        | {
            "options": from_dict(RaceOptions, values["options"]),
            "contenders": tuple(from_dict(Contender, each) for each in values["contenders"]),
            "rounds": [Round(**each) for each in values["rounds"]],
        }
    )


def run_race(
    race: Race,
    train: Callable[[int, Sequence[Contender]], Round | None],
    after_round: Callable[[Race], None],
) -> bool:
    """Go on with a race until it is over; false if it was interrupted.

    Args:
        race: as far as it has come.
        train: trains contenders with a seed; returns none if it was interrupted.
        after_round: is called with what each round has added.
    """
    while not race.is_over:
        found = train(*race.next_round())
        if found is None:
            return False
        race.rounds.append(found)
        after_round(race)
    return True
