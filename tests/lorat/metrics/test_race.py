"""A race's intervals hold while it is looked at, and it finds what is there to be found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorat.errors import UserError
from lorat.metrics.race import RaceRules, standings, verdict
from lorat.metrics.uncertainty import student_quantile

RULES = RaceRules()
NAMES = ("default", "a", "b", "c")


def scores_of(
    means: tuple[float, ...],
    rng: np.random.Generator,
    *,
    spread: tuple[float, float, float] = (0.005, 0.01, 0.02),
    num: int = 12,
    heavy: bool = False,
) -> dict[str, np.ndarray]:
    """Draw scores of five seeds; ``spread`` is that of seeds, of sequences and of the rest."""

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_t(3, shape) / math.sqrt(3) if heavy else rng.standard_normal(shape)

    scores = {}
    difficulty, luck = 0.15 * draw(1, num), 0.02 * draw(5, 1)  # the same for all contenders
    for name, mean in zip(NAMES, means, strict=False):
        own = spread[0] * draw(5, 1) + spread[1] * draw(1, num) + spread[2] * draw(5, num)
        scores[name] = 0.6 + mean + difficulty + luck + own
    return scores


def seen(scores: dict[str, np.ndarray], seeds: int) -> dict[str, np.ndarray]:
    return {name: rows[:seeds] for name, rows in scores.items()}


@pytest.mark.parametrize(
    ("means", "spread", "heavy"),
    [
        ((0, 0, 0, 0), (0.01, 0.02, 0.03), False),
        ((0, 0, 0, 0), (0.01, 0.0, 0.0), False),
        ((0, 0.02, 0.01, -0.04), (0.005, 0.02, 0.01), True),
    ],
)
def test_19_of_20_races_hold_in_every_interval_that_is_looked_at(
    means: tuple[float, ...], spread: tuple[float, float, float], heavy: bool
) -> None:
    rng = np.random.default_rng([int(100 * sum(spread)), heavy])
    truth = dict(zip(NAMES, means, strict=True))
    missed = 0
    for _ in range(50):
        scores = scores_of(means, rng, spread=spread, heavy=heavy)
        wrong = False
        for seeds in (2, 3, 5):
            stand = standings(seen(scores, seeds), RULES)
            for each in stand.standings:
                low, high = each.interval
                wrong |= not low <= truth[each.name] - truth[stand.leader] <= high
            if stand.over:
                break
        end = verdict(scores, RULES, default="default")
        low, high = end.interval
        wrong |= not low <= truth[end.winner] - truth["default"] <= high
        missed += wrong
    assert missed <= 5  # half of that is allowed, and chance


def test_nothing_is_known_after_one_seed() -> None:
    scores = scores_of((0, 0.3, 0, -0.3), np.random.default_rng(1))
    stand = standings(seen(scores, 1), RULES)
    assert stand.left == tuple(each.name for each in stand.standings) and not stand.over
    others = stand.standings[1:]
    assert all(each.interval == (-math.inf, math.inf) and each.p_best == 0.25 for each in others)
    end = verdict(seen(scores, 1), RULES, default="default")
    assert (end.verdict, end.chosen) == ("not distinguishable from the default", "default")
    none = standings(seen(scores, 0), RULES)
    assert (none.num_seeds, none.left, none.over) == (0, NAMES, False)


def test_a_planted_winner_is_found_and_the_others_leave() -> None:
    scores = scores_of((0, 0.02, 0.0, -0.1), np.random.default_rng(2), spread=(0.002, 0.004, 0.01))
    early = standings(seen(scores, 2), RULES)
    assert early.leader == "a" and early.standings[-1].name == "c"
    assert early.standings[-1].left_after == 2 and early.standings[-1].interval.high < 0
    late = standings(scores, RULES)
    assert (late.left, late.over, late.reason) == (("a",), True, "one is left")
    end = verdict(scores, RULES, default="default")
    assert (end.winner, end.chosen, end.verdict) == ("a", "a", "better than the default")
    assert 0 < end.interval.low < 0.02 < end.interval.high
    assert end.p_best["a"] > 0.95 and end.regret < 0.001 and end.regrets["c"] > 0.08
    np.testing.assert_allclose(
        end.per_seed["a"], (scores["a"] - scores["default"])[: late.num_seeds].mean(1)
    )
    assert end.minus_default == pytest.approx(end.per_seed["a"].mean())


def test_the_default_stays_where_it_is_best_and_where_all_are_equal() -> None:
    rng = np.random.default_rng(3)
    best = scores_of((0, -0.04, -0.06, -0.08), rng, spread=(0.002, 0.004, 0.01))
    end = verdict(best, RULES, default="default")
    assert (end.verdict, end.chosen, end.winner) == ("worse", "default", "a")
    assert end.interval.high < 0 and end.regret < 0.001 < 0.03 < end.regrets["a"]
    equal = scores_of((0, 0, 0, 0), rng)
    end = verdict(equal, RULES, default="default")
    assert (end.verdict, end.chosen) == ("not distinguishable from the default", "default")
    assert max(end.p_best.values()) < 0.9 and sum(end.p_best.values()) == pytest.approx(1)


def test_a_race_ends_when_the_rest_are_within_what_does_not_matter() -> None:
    rng = np.random.default_rng(4)
    scores = scores_of((0, 0.0, 0.0, -0.1), rng, spread=(0.0001, 0.0003, 0.001))
    stand = standings(scores, RULES)
    assert stand.over and stand.reason == "the rest are within 0.005" and stand.num_seeds < 5
    assert set(stand.left) == {"default", "a", "b"}
    exact = standings(scores, RaceRules(within=0))
    assert exact.num_seeds > stand.num_seeds
    far = standings(scores_of((0, 0, 0, 0), rng), RULES)
    assert (far.reason, far.num_seeds, len(far.left)) == ("5 seeds", 5, 4)


def test_a_race_follows_from_its_scores_alone() -> None:
    """A replay with seeds of some more than the race had used changes nothing."""
    scores = scores_of(
        (0, 0.02, 0.019, -0.1), np.random.default_rng(2), spread=(0.002, 0.004, 0.01)
    )
    stand = standings(scores, RULES)
    ran = {each.name: scores[each.name][: each.num_seeds] for each in stand.standings}
    assert any(len(rows) < stand.num_seeds for rows in ran.values())
    for shown, again in zip(stand.standings, standings(ran, RULES).standings, strict=True):
        assert (again.name, again.left_after) == (shown.name, shown.left_after)
        assert again.interval == pytest.approx(shown.interval, abs=1e-12)
    ends = [verdict(each, RULES, default="default") for each in (scores, ran)]
    assert ends[0].interval == pytest.approx(ends[1].interval, abs=1e-12)
    assert ends[0].regrets == pytest.approx(ends[1].regrets, abs=1e-9)
    # A seed that only some have is not looked at.
    ahead = seen(scores, 2) | {"a": scores["a"][:3]}
    assert standings(ahead, RULES).num_seeds == 2
    assert standings(ahead, RULES).left == standings(seen(scores, 2), RULES).left


def test_sequences_count_by_their_shares() -> None:
    scores = scores_of((0, 0.02), np.random.default_rng(5), num=6)
    weights = np.array([3.0, 1, 1, 1, 0, 0])
    end = verdict(scores, RULES, default="default", weights=weights)
    differences = (scores["a"] - scores["default"]).mean(0)
    assert end.minus_default == pytest.approx(differences @ weights / 6)
    one = verdict(scores, RULES, default="default", weights=np.eye(6)[0])
    assert one.interval == (-math.inf, math.inf)  # one sequence tells nothing of others


def test_more_doubt_widens_the_interval() -> None:
    """Of more contenders, of fewer seeds, of more confidence."""
    scores = scores_of((0, 0.0, 0.0, 0.0), np.random.default_rng(6))

    def width(among: dict[str, np.ndarray], rules: RaceRules = RULES) -> float:
        rest = next(each for each in standings(among, rules).standings if each.difference < 0)
        return rest.interval.high - rest.interval.low

    assert width(seen(scores, 2)) > width(scores)
    assert width(scores, RaceRules(confidence=0.99)) > width(scores)


def test_quantiles_are_those_of_student() -> None:
    """Abramowitz and Stegun, table 26.10, and the closed form of one degree of freedom."""
    for freedom, tail, wanted in [
        (2, 0.025, 4.303), (3, 0.0005, 12.924), (10, 0.005, 3.169), (30, 0.025, 2.042),
    ]:  # fmt: skip
        assert student_quantile(tail, freedom) == pytest.approx(wanted, abs=1e-3)
    assert student_quantile(0.001, 1) == pytest.approx(1 / math.tan(math.pi * 0.001), rel=1e-3)
    assert student_quantile(0.01, 2.5) > student_quantile(0.01, 2.6)


def test_what_is_no_race_is_refused() -> None:
    scores = scores_of((0, 0), np.random.default_rng(7))
    with pytest.raises(ValueError, match="no contender"):
        standings({}, RULES)
    with pytest.raises(ValueError, match="same sequences"):
        standings(scores | {"b": np.zeros((5, 3))}, RULES)
    with pytest.raises(ValueError, match="Weights"):
        standings(scores, RULES, weights=np.ones(3))
    with pytest.raises(ValueError, match="default other"):
        verdict(scores, RULES, default="other")
    alone = {"default": scores["default"][:0]}
    assert standings(alone, RULES).reason == "one is left"
    with pytest.raises(ValueError, match="at least one other"):
        verdict(alone, RULES, default="default")
    with pytest.raises(UserError, match="max_seeds is 1"):
        RaceRules(max_seeds=1)
