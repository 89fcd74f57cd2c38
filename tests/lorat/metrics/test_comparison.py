"""The gate lets through what is shown to be better, and says why."""

from __future__ import annotations

import numpy as np
import pytest

from lorat.errors import UserError
from lorat.metrics.comparison import GateConfig, compare, compare_seeds


def scores(values: np.ndarray) -> dict[str, float]:
    return {f"s{i:03d}": float(v) for i, v in enumerate(values)}


@pytest.fixture
def champion() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.2, 0.9, 100)


def test_better_on_most_sequences_passes(champion: np.ndarray) -> None:
    noise = np.random.default_rng(1).normal(0.03, 0.05, 100)
    result = compare(scores(champion + noise), scores(champion), GateConfig())
    assert result.passed
    assert result.interval[0] > 0
    assert result.reason.startswith("better: the 95% interval")


def test_better_mean_from_one_lucky_sequence_does_not_pass(champion: np.ndarray) -> None:
    lucky = champion.copy()
    lucky[0] += 0.5
    result = compare(scores(lucky), scores(champion), GateConfig())
    assert result.mean_difference > 0
    assert not result.passed


def test_equal_passes_only_if_allowed(champion: np.ndarray) -> None:
    same = scores(champion)
    assert not compare(same, same, GateConfig()).passed
    assert compare(same, same, GateConfig(allow_equal=True)).passed


def test_worse_does_not_pass_even_if_equal_is_allowed(champion: np.ndarray) -> None:
    result = compare(scores(champion - 0.02), scores(champion), GateConfig(allow_equal=True))
    assert not result.passed
    assert result.reason.startswith("worse")


def test_pairing_sees_what_two_separate_means_would_not(champion: np.ndarray) -> None:
    result = compare(scores(champion + 0.005), scores(champion), GateConfig())
    assert result.passed
    assert champion.std() > 10 * 0.005


def test_interval_has_the_width_that_theory_gives() -> None:
    differences = np.random.default_rng(2).normal(0, 0.1, 400)
    result = compare(scores(differences), scores(np.zeros(400)), GateConfig())
    expected = 2 * 1.96 * differences.std() / 20
    assert result.interval[1] - result.interval[0] == pytest.approx(expected, rel=0.05)


def test_decision_is_reproducible(champion: np.ndarray) -> None:
    arguments = scores(champion + 0.01), scores(champion), GateConfig(resamples=500)
    assert compare(*arguments).interval == compare(*arguments).interval


def test_too_few_or_different_sequences_are_refused() -> None:
    few = {"a": 0.9, "b": 0.9}
    assert "too few" in compare(few, {"a": 0.1, "b": 0.1}, GateConfig()).reason
    with pytest.raises(UserError, match="different sequences"):
        compare(few, {"a": 0.1}, GateConfig())


def test_several_seeds_speak_of_configurations_and_one_of_its_training(
    champion: np.ndarray,
) -> None:
    rng = np.random.default_rng(3)

    def trainings(number: int, better: float) -> dict[str, dict[str, float]]:
        shifts = better + rng.normal(0, 0.02, number)
        noise = rng.normal(0, 0.02, (number, 100))
        return {str(s): scores(champion + shifts[s] + noise[s]) for s in range(number)}

    passed = {1: 0, 5: 0}
    for _ in range(60):
        for number in passed:
            ours, theirs = trainings(number, 0.0), trainings(number, 0.0)
            passed[number] += compare_seeds(ours, theirs, GateConfig(resamples=400)).passed
    assert passed[1] > 15, "equal configurations, but one training is luckier"
    assert passed[5] <= 5
    result = compare_seeds(trainings(5, 0.06), trainings(1, 0.0), GateConfig(resamples=4000))
    assert result.passed
    assert (len(result.candidate_seeds), len(result.champion_seeds)) == (5, 1)
    assert result.numbers()["candidate_seeds"] == 5
    assert result.resampled_means.std() == pytest.approx(0.02 / 5**0.5, rel=0.6)
    spread = np.quantile(result.resampled_means, [0.025, 0.975])
    assert result.interval[0] < spread[0] + 0.003
    assert result.interval[1] > spread[1] - 0.003


def test_seeds_of_other_sequences_are_refused(champion: np.ndarray) -> None:
    ours = {"1": scores(champion), "2": scores(champion[:-1])}
    with pytest.raises(UserError, match="different sequences"):
        compare_seeds(ours, {"": scores(champion)}, GateConfig())
