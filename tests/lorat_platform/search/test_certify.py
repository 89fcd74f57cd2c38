"""Replayed searches: what is planted is what races are judged by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorat.errors import UserError
from lorat.metrics.race import RaceRules
from lorat_platform.search.certify import (
    CertifyBenchmark,
    benchmark_certify,
    halving,
    planted,
    race,
    replay,
)
from lorat_platform.search.curves import Curves, read_curves

STEPS = (4, 8, 16)


def curves_of(spread: float, means: np.ndarray | None = None) -> Curves:
    """Return curves of 6 configurations, 6 seeds and 10 sequences; by default all are equal."""
    rng = np.random.default_rng(0)
    scores = np.full((6, 6, 3, 10), 0.5) * np.array([0.4, 0.7, 1.0])[:, None]
    scores += 0.1 * rng.standard_normal(10)
    scores += spread * rng.standard_normal((6, 6, 3, 1))
    scores += spread * rng.standard_normal((6, 6, 3, 10))
    if means is not None:
        scores += means[:, None, None, None]
    return Curves(
        values=tuple({"lr": 1e-3 * (k + 1)} for k in range(6)),
        steps=STEPS,
        sequences=tuple(f"0 {k}" for k in range(10)),
        metric="ao",
        scores=scores,
    )


def test_what_is_planted_is_the_truth() -> None:
    curves, rng = curves_of(0.02, np.linspace(0, 0.2, 6)), np.random.default_rng(0)

    def truth(case: str) -> np.ndarray:
        return planted(curves, case, rng)[:, :, -1].mean((1, 2))

    assert np.ptp(truth("as logged")) > 0.15
    np.testing.assert_allclose(truth("all are equal"), truth("all are equal")[0])
    for case, places in (("the default is best", {0}), ("another is best", {1, 2, 3, 4, 5})):
        of = truth(case)
        assert int(of.argmax()) in places
        np.testing.assert_allclose(np.sort(of.max() - of), [0, *[0.02] * 5], atol=1e-12)


def test_a_score_where_less_is_better_is_turned_round() -> None:
    curves = curves_of(0.02)
    loss = Curves(
        values=curves.values, steps=STEPS, sequences=curves.sequences, metric="loss",
        scores=curves.scores,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(planted(loss, "as logged", rng), -curves.scores)


def test_halving_stops_what_is_not_among_the_best_so_far() -> None:
    curve = np.array([[0.1, 0.2, 0.9], [0.2, 0.3, 0.4], [0.05, 0.6, 0.7], [0.3, 0.4, 0.5]])
    # The first is alone on every rung; the second is the best of two on all but the last; the
    # third is the last of three on the first; the fourth is second of three on the second.
    ranking, spent = halving(curve, STEPS, [0, 1, 2, 3], 0.5)
    assert (ranking, spent) == ([0, 3, 1, 2], 16 + 16 + 4 + 16)
    ranking, spent = halving(curve, STEPS, [0, 1, 2, 3], 1.0)
    assert (ranking, spent) == ([0, 2, 3, 1], 4 * 16)


def test_a_clear_winner_is_chosen_for_few_trainings_and_a_clear_default_stays() -> None:
    rules = RaceRules()
    for means, verdict in (([0, 0.2, 0.1, 0.0, 0.05, 0.1], "better than the default"),
                           ([0.2, 0.1, 0.0, 0.05, 0.1, 0.0], "worse")):  # fmt: skip
        curves = curves_of(0.005, np.array(means))
        truth = curves.scores[:, :, -1].mean((1, 2))
        full = {str(c): curves.scores[c, :5, -1] for c in (0, 1, 2, 5)}
        end, trained, all_hold = race(full, rules, truth)
        assert (end.verdict, all_hold) == (verdict, True)
        assert int(end.chosen) == truth.argmax()
        assert trained < 4 * 4
        one = replay(curves.scores, STEPS, CertifyBenchmark(), np.random.default_rng(1))
        assert one.raced == one.ahead == one.fuller == truth.argmax() and one.end_holds
        assert one.steps[0] < one.steps[2]


def test_a_wrong_truth_is_noticed() -> None:
    """Coverage can fail."""
    curves = curves_of(0.005)
    full = {str(c): curves.scores[c, :5, -1] for c in range(4)}
    *_, all_hold = race(full, RaceRules(), np.array([0.5, 0.6, 0.5, 0.5]))
    assert not all_hold


def test_the_benchmark_says_what_races_find(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "curves.parquet"
    curves_of(0.02, np.linspace(0, 0.2, 6)).write(file)
    caplog.set_level("INFO")
    asked = CertifyBenchmark(curves=file, searches=5, seed=1)
    found = benchmark_certify(asked)
    assert benchmark_certify(asked) == found
    for of in found.values():
        assert of["end_holds"] >= 0.8 and sum(of["verdicts"].values()) == pytest.approx(1)
        assert of["raced"]["full_trainings"] > of["searched"]["full_trainings"]
    assert found["as logged"]["raced"]["worse_than_default"] == 0
    assert found["all are equal"]["raced"]["regret"] == pytest.approx(0, abs=1e-9)
    assert found["all are equal"]["verdicts"]["not distinguishable from the default"] > 0.7
    assert "| the default is best | the race's verdict |" in caplog.text
    with pytest.raises(UserError, match="more seeds than the 6 of --max-seeds"):
        benchmark_certify(CertifyBenchmark(curves=file, rules=RaceRules(max_seeds=6)))


def test_the_shipped_curves_are_enough_and_can_be_replayed() -> None:
    kinds, seeds, *_ = read_curves().scores.shape
    assert kinds >= 24 and seeds >= 8
    found = benchmark_certify(CertifyBenchmark(searches=2))
    assert found["the default is best"]["raced"]["worse_than_default"] == 0
