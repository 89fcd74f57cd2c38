"""With which settings the weights of trials track, and which one counts."""

from __future__ import annotations

from typing import Any

import pytest

from lorat.config.tracking import TrackingConfig
from lorat.config.training import TrainConfig
from lorat_platform.search.settings import best_of, settings_of, tracking_of
from lorat_platform.search.space import SearchSpace, build_space

WINDOW, FACTOR, SMALLEST = (
    "tracking.window_penalty", "tracking.search_area_factor", "tracking.min_object_size",
)  # fmt: skip


def space(*entries: str) -> SearchSpace:
    return build_space(TrainConfig(), entries)


def test_a_search_without_them_tracks_once() -> None:
    assert settings_of(space(), 8, 0) == ({},)


def test_few_choices_are_all_tried_the_usual_first() -> None:
    found = settings_of(space(f"{WINDOW}=choice(0.2,0.4)", f"{FACTOR}=choice(3,4,5)"), 6, 0)
    assert len(found) == 6
    assert found[0] == {WINDOW: 0.4, FACTOR: 4.0}, "nearest to what is usual"
    assert {(s[WINDOW], s[FACTOR]) for s in found} == {
        (w, f) for w in (0.2, 0.4) for f in (3.0, 4.0, 5.0)
    }


def test_ranges_are_covered_from_end_to_end() -> None:
    found = settings_of(space(f"{WINDOW}=uniform(0,1)", f"{SMALLEST}=loguniform(1,100)"), 11, 0)
    assert found[0] == {WINDOW: 0.45, SMALLEST: 10.0}
    assert sorted(int(s[WINDOW] * 10) for s in found[1:]) == list(range(10))
    assert min(s[SMALLEST] for s in found) < 100**0.1
    assert max(s[SMALLEST] for s in found) > 100**0.9


def test_they_follow_from_the_search_alone() -> None:
    entries = (f"{WINDOW}=uniform(0,1)", f"{FACTOR}=choice(3,4,5)")
    assert settings_of(space(*entries), 5, 7) == settings_of(space(*entries), 5, 7)
    assert settings_of(space(*entries), 5, 7) != settings_of(space(*entries), 5, 8)
    assert settings_of(space(*entries), 1, 7) == ({WINDOW: 0.45, FACTOR: 4.0},)


def test_a_setting_changes_what_it_names() -> None:
    base = TrackingConfig(min_object_size=5.0)
    assert tracking_of(base, {WINDOW: 0.3, FACTOR: 5.0}) == TrackingConfig(
        window_penalty=0.3, search_area_factor=5.0, min_object_size=5.0
    )
    assert tracking_of(base, {}) == base


@pytest.mark.parametrize(
    ("objectives", "best"), [(("ao",), 1), (("latency", "sr75"), 2), (("loss",), 0)]
)
def test_the_first_objective_that_is_a_score_chooses(objectives: Any, best: int) -> None:
    scores = [{"ao": 0.4, "sr75": 0.1}, {"ao": 0.6, "sr75": 0.2}, {"ao": 0.6, "sr75": 0.3}]
    found = [{"tracking": {WINDOW: i / 10}, "scores": s} for i, s in enumerate(scores)]
    assert best_of(found, objectives) is found[best]
