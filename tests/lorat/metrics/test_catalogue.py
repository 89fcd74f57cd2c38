"""One table of metrics, from which everything else follows."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lorat.errors import UserError
from lorat.metrics import METRICS, GroundTruth, evaluate
from lorat.metrics.catalogue import HEADLINE, MAIN, SCORES, success_rate, table
from lorat.metrics.comparison import GateConfig, compare

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "platform" / "lorat_platform" / "search" / "README.md"


def test_scores_of_an_evaluation_are_those_of_the_table_and_in_their_ranges() -> None:
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 50, (40, 2))
    truth = np.concatenate([start, start + rng.uniform(10, 40, (40, 2))], axis=1)
    moved = truth + np.tile(rng.normal(0, 12, (40, 2)), 2)
    found = evaluate({"a": moved}, {"a": GroundTruth(boxes=truth)})
    assert set(found.scores) == set(SCORES.values())
    for name, score in SCORES.items():
        assert found.scores[score] in METRICS[name].bounds
        assert 0 < found.scores[score] < 1, "not all alike"
    assert found.scores["SR0.5"] > found.scores["SR0.75"]


def test_every_row_says_what_it_is() -> None:
    for name, metric in METRICS.items():
        assert metric.label and metric.meaning, name
        assert (metric.value is None) == (metric.score is None), name
    assert MAIN in HEADLINE
    assert len({metric.label for metric in METRICS.values()}) == len(METRICS)


@pytest.mark.parametrize("name", SCORES)
def test_a_promotion_decides_by_every_score_of_sequences(name: str) -> None:
    champion = {f"s{i}": 0.3 + i / 100 for i in range(20)}
    candidate = {k: v + 0.1 for k, v in champion.items()}
    result = compare(candidate, champion, GateConfig(metric=name))
    assert result.passed
    assert result.numbers()[f"candidate_{name}"] > result.numbers()[f"champion_{name}"]


@pytest.mark.parametrize("name", sorted({*METRICS, "sr57"} - {*SCORES}))
def test_a_promotion_refuses_what_no_sequence_has(name: str) -> None:
    with pytest.raises(UserError, match=f"--metric is {name}, which .*; give one of auc, "):
        GateConfig(metric=name)


def test_a_score_of_which_less_is_better_is_compared_that_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lower = dataclasses.replace(METRICS["sr50"], better="min", value=success_rate(0.1))
    monkeypatch.setitem(METRICS, "sr50", lower)
    champion = {f"s{i}": 0.5 + i / 100 for i in range(20)}
    candidate = {k: v - 0.1 for k, v in champion.items()}
    result = compare(candidate, champion, GateConfig(metric="sr50"))
    assert result.passed
    assert result.numbers()["better"] == 20


def test_the_page_on_searches_has_the_table() -> None:
    assert table() in PAGE.read_text()


def test_names_of_metrics_are_spelled_out_nowhere_else() -> None:
    names = {"auc", "precision", "norm_precision", "sr50", "sr75", *(SCORES[n] for n in HEADLINE)}
    names -= {"precision", "AO"}  # a field of the configuration, too; a label of plots
    spelled = {
        f"{path.relative_to(ROOT)} has {node.value!r}"
        for folder in ("lorat", "platform", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "catalogue.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert spelled == set()
