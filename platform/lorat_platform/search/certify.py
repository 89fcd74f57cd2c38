"""Does a race choose better than the search alone, and do its intervals hold?  By replay.

Logged curves of configurations over seeds (:mod:`lorat_platform.search.curves`) stand for all that
training could have given: the truth of a configuration is its mean over all seeds and sequences.
A replayed search sees one seed, and as many sequences as there are, drawn with replacement; the
race after it sees the same sequences, and other seeds.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lorat.config.bounds import Bounds, Few, Seed, check_bounds
from lorat.config.fields import flag
from lorat.errors import UserError
from lorat.metrics.catalogue import METRICS
from lorat.metrics.race import RaceRules, Verdict, standings, verdict
from lorat_platform.search.curves import FILE, Curves, read_curves

log = logging.getLogger(__name__)

STREAM = 101
"""Stream number of the replays, beside the seed."""
KEPT = np.linspace(0.5, 1.0, 26)
"""Shares of the trials that go on from a rung: half, as in a search, up to all."""
PLANTED = 0.02
"""By how much a planted configuration is better than all others, which are equal."""
CASES = ("as logged", "all are equal", "the default is best", "another is best")

WAYS = {
    "searched": "the search",
    "fuller": "a search with the race's steps",
    "ahead": "the mean of the race",
    "raced": "the race's verdict",
}
"""Who chooses the configuration, by its name in :class:`Replay`."""


@dataclass(frozen=True, kw_only=True)
class CertifyBenchmark:
    """Replay searches with logged curves: what a race finds, at what cost, and how sure it is.

    Each is replayed as logged, with the configurations made equal, and with one of them, the
    default or another, made better than the rest by 0.02.
    """

    curves: Path = FILE
    """Parquet file of 'python jobs/benchmark.py curves'."""
    searches: Annotated[int, Bounds(1, 100_000)] = 200
    """Of each case, 1 to 100,000."""
    contenders: Few = 3
    """Trials that race beside the default, 1 to 1024."""
    rules: Annotated[RaceRules, tyro.conf.arg(name="")] = field(default_factory=RaceRules)
    seed: Seed = 42
    """Of the replays, 0 to 4,294,967,295."""

    def __post_init__(self) -> None:
        check_bounds(self, flag)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What one search came to."""

    searched: int
    """Configuration that the search alone would register."""
    fuller: int
    """The same, of a search that spends the steps of the race too."""
    ahead: int
    """What was best in the race, shown to be or not."""
    raced: int
    """What the race chose."""
    steps: tuple[int, ...]
    """Of the four."""
    verdict: str
    end_holds: bool
    """The interval of the winner less the default holds the truth."""
    half_width: float
    """Of this interval."""
    all_hold: bool
    """So do all intervals that were looked at on the way."""


def benchmark_certify(benchmark: CertifyBenchmark) -> dict[str, Any]:
    """Replay the searches, print their table and return its figures by case.

    Raises:
        UserError: if there are no curves.
    """
    curves = read_curves(benchmark.curves)
    kinds, seeds, _, sequences = curves.scores.shape
    if kinds < 2 or seeds <= benchmark.rules.max_seeds:
        raise UserError(
            f"There are curves of {kinds} configurations with {seeds} seeds; give curves of two or "
            f"more, with more seeds than the {benchmark.rules.max_seeds} of --max-seeds."
        )
    log.info(
        "%d searches of %d configurations, with %d seeds and %d sequences to draw from:",
        benchmark.searches, kinds, seeds, sequences,
    )  # fmt: skip
    found = {}
    for number, case in enumerate(CASES):
        rng = np.random.default_rng([benchmark.seed, STREAM, number])
        replays, truths = [], []
        for _ in range(benchmark.searches):
            scores = planted(curves, case, rng)
            replays.append(replay(scores, curves.steps, benchmark, rng))
            truths.append(scores[:, :, -1].mean((1, 2)))
        found[case] = figures(replays, truths, benchmark.rules.within, curves.steps[-1])
    log.info("%s", table(found, benchmark.rules.within))
    return found


def planted(curves: Curves, case: str, rng: np.random.Generator) -> np.ndarray:
    """Return (configurations, seeds, steps, sequences), more is better, whose truth is known.

    What is planted is the truth alone: the spread of seeds and sequences stays as logged.
    """
    scores = curves.scores * METRICS[curves.metric].sign
    if case == "as logged":
        return scores
    means = scores.mean((1, 3), keepdims=True)
    equal = scores - means + means.mean(0, keepdims=True)
    if case != "all are equal":
        best = 0 if case == "the default is best" else int(rng.integers(1, len(scores)))
        # As a difference grows in training.
        equal[best] += PLANTED * (np.array(curves.steps) / curves.steps[-1])[:, None]
    return equal


def replay(
    scores: np.ndarray, steps: Sequence[int], benchmark: CertifyBenchmark, rng: np.random.Generator
) -> Replay:
    """Replay a search and the race after it.

    Args:
        scores: (configurations, seeds, steps, sequences); the first is the default.
        steps: of the evaluations.
        benchmark: how many contenders race, and how.
        rng: draws seeds, sequences and the order of the trials.
    """
    kinds, num_seeds, _, num = scores.shape
    truth = scores[:, :, -1].mean((1, 2))
    sequences = rng.integers(num, size=num)
    seed, *others = rng.permutation(num_seeds)
    order = rng.permutation(kinds).tolist()
    curve = scores[:, seed][:, :, sequences].mean(2)
    ranking, spent = halving(curve, steps, order, KEPT[0])
    entrants = [kind for kind in ranking if kind != 0][: benchmark.contenders]
    seeds = others[: benchmark.rules.max_seeds]
    full = {str(c): scores[c, seeds, -1][:, sequences] for c in (0, *entrants)}
    end, trained, all_hold = race(full, benchmark.rules, truth)
    total = spent + trained * steps[-1]
    fuller = min(
        (halving(curve, steps, order, kept) for kept in KEPT), key=lambda each: abs(each[1] - total)
    )
    low, high = end.interval
    return Replay(
        searched=ranking[0],
        fuller=fuller[0][0],
        ahead=int(end.winner) if end.minus_default > 0 else 0,
        raced=int(end.chosen),
        steps=(spent, fuller[1], total, total),
        verdict=end.verdict,
        end_holds=low <= truth[int(end.winner)] - truth[0] <= high,
        half_width=(high - low) / 2,
        all_hold=all_hold,
    )


def halving(
    curve: np.ndarray, steps: Sequence[int], order: Sequence[int], kept: float
) -> tuple[list[int], int]:
    """Replay successive halving, trial after trial, as ``--scheduler asha`` does.

    Args:
        curve: (configurations, steps) of the search's seed.
        steps: of the evaluations.
        order: of the trials.
        kept: a trial goes on that is among the best of those that reached the rung so far, itself
            included: this share of them.

    Returns:
        The configurations, best first, those that went on to the end before the others; and the
        steps that all took.
    """
    seen: list[list[float]] = [[] for _ in steps]
    reached, spent, values = {}, 0, curve.tolist()
    for trial in order:
        for rung in range(len(steps)):
            score, before = values[trial][rung], seen[rung]
            place = len(before) - bisect.bisect_right(before, score) + 1
            bisect.insort(before, score)
            if place > max(1, kept * len(before)):
                break
        reached[trial] = rung
        spent += steps[rung]
    best_first = sorted(reached, key=lambda c: (reached[c], curve[c, reached[c]]), reverse=True)
    return best_first, spent


def race(
    scores: dict[str, np.ndarray], rules: RaceRules, truth: np.ndarray
) -> tuple[Verdict, int, bool]:
    """Race, seed after seed.

    Args:
        scores: (seeds, sequences) of all seeds by configuration, the default first.
        rules: of the race.
        truth: of each configuration.

    Returns:
        What was shown; trainings; whether every interval on the way held the truth.
    """
    raced = {name: rows[:0] for name, rows in scores.items()}
    stand, trained, all_hold = standings(raced, rules), 0, True
    while not stand.over:
        for name in stand.left:
            raced[name] = scores[name][: stand.num_seeds + 1]
            trained += 1
        stand = standings(raced, rules)
        for each in stand.standings:
            low, high = each.interval
            all_hold &= bool(low <= truth[int(each.name)] - truth[int(stand.leader)] <= high)
    return verdict(raced, rules, default=next(iter(scores))), trained, all_hold


def figures(
    replays: Sequence[Replay], truths: Sequence[np.ndarray], within: float, full: int
) -> dict[str, Any]:
    """Return shares of the searches, mean regrets and mean steps, these in full trainings.

    The half width is the median.
    """
    found: dict[str, Any] = {
        "end_holds": float(np.mean([each.end_holds for each in replays])),
        "half_width": float(np.median([each.half_width for each in replays])),
        "all_hold": float(np.mean([each.all_hold for each in replays])),
        "verdicts": {
            text: float(np.mean([each.verdict == text for each in replays]))
            for text in sorted({each.verdict for each in replays})
        },
    }
    for place, way in enumerate(WAYS):
        chosen = [getattr(each, way) for each in replays]
        regret = np.array([t.max() - t[c] for t, c in zip(truths, chosen, strict=True)])
        worse = [t[c] < t[0] - 1e-9 for t, c in zip(truths, chosen, strict=True)]
        found[way] = {
            "best_or_within": float((regret <= within + 1e-9).mean()),
            "regret": float(regret.mean()),
            "worse_than_default": float(np.mean(worse)),
            "full_trainings": float(np.mean([each.steps[place] for each in replays]) / full),
        }
    return found


def table(found: dict[str, dict[str, Any]], within: float) -> str:
    """Write a line per case and way of choosing, and one of its intervals and verdicts."""
    head = ("case", "chosen by", "full trainings", f"best or within {within:g}", "mean regret",
            "worse than the default")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for case, of in found.items():
        for way, name in WAYS.items():
            each = of[way]
            cells = (case, name, f"{each['full_trainings']:.1f}", f"{each['best_or_within']:.0%}",
                     f"{each['regret']:.4f}", f"{each['worse_than_default']:.0%}")  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    for case, of in found.items():
        verdicts = ", ".join(f"{share:.0%} {text}" for text, share in of["verdicts"].items())
        lines.append(
            f"{case}: the interval of winner less default, ±{of['half_width']:.3f}, holds in "
            f"{of['end_holds']:.1%}, all that were looked at in {of['all_hold']:.1%} of the races; "
            f"{verdicts}"
        )
    return "\n".join(lines)
