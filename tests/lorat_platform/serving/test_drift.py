"""Drift of the scores, and shadows: what is counted, what is alarming, what is recorded."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorat.errors import UserError
from lorat.metrics.confidence import BINS, DRIFT, histogram, stability_index
from lorat_platform.promotion.shadows import found_of
from lorat_platform.recording.store import connect
from lorat_platform.serving import score_board
from lorat_platform.serving.drift import ENOUGH, HOUR_S, Drift, stored_reference
from lorat_platform.serving.engine import Engine
from lorat_platform.serving.messages import HEADER
from lorat_platform.serving.score_board import SharedBoard
from lorat_platform.serving.settings import ServingSettings
from lorat_platform.serving.shadow import Shadow
from lorat_platform.serving.shadow_record import ShadowRecord
from tests.constant_trackers import random_tracker, shrinking_tracker
from tests.served_models import BOX, frames, served


def test_stability_index() -> None:
    """Values computed by hand: shares (1/4, 3/4) and (3/4, 1/4) differ by ln 3."""
    assert stability_index([249.5, 749.5], [749.5, 249.5]) == pytest.approx(np.log(3))
    assert stability_index([10, 20], [100, 200]) == pytest.approx(0, abs=1e-3)
    assert np.isfinite(stability_index([0, 10], [10, 0]))
    for bad in ([0, 0], [1, 2, 3]):
        with pytest.raises(ValueError, match="histograms"):
            stability_index([1, 2], bad)
    assert histogram([0, 1, 0.999, 1.2, 0.5]).tolist()[-1] == 3


def answers(scores: np.ndarray, model: str = "lorat/1") -> list[dict[str, Any]]:
    return [{"model": model, "targets": {"it": {"score": float(s)}}} for s in scores]


def see(drift: Drift, scores: np.ndarray) -> None:
    for answer in answers(scores):
        drift.observe(None, None, answer)  # type: ignore[arg-type]


def test_alarm_when_the_scores_of_an_hour_are_others() -> None:
    rng = np.random.default_rng(0)
    reference = histogram(rng.beta(8, 2, 5000))
    asked, alarms, now = [], [], [0.0]

    def ask(model: str) -> np.ndarray:
        asked.append(model)
        if len(asked) == 1:
            raise UserError("MLflow does not answer.")
        return reference

    drift = Drift(ask, alarms.append, clock=lambda: now[0])

    def index(scores: np.ndarray) -> float | None:
        see(drift, scores)
        drift.compare()
        return drift.index("lorat/1")

    assert index(rng.beta(8, 2, ENOUGH - 1)) is None
    assert asked == []
    assert index(rng.beta(8, 2, 10)) is None  # what it was cannot be read now
    found = index(rng.beta(8, 2, 10))
    assert found is not None and found < 0.1
    now[0] += HOUR_S
    assert index(rng.beta(3, 5, 10)) is None
    for _ in range(3):
        found = index(rng.beta(3, 5, ENOUGH))
        assert found is not None and found > DRIFT
    assert len(alarms) == 1 and "lorat/1" in alarms[0]
    now[0] += HOUR_S
    assert index(rng.beta(8, 2, ENOUGH)) is not None
    assert len(alarms) == 1
    now[0] += HOUR_S
    index(rng.beta(3, 5, ENOUGH))
    assert len(alarms) == 2
    assert asked == ["lorat/1"] * 2


def test_scores_of_all_replicas_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees too few, or a video of its own; together they are as in the evaluation, or not."""
    kept: dict[str, str] = {}

    def store(key: str, value: str, *, overwrite: bool = True) -> bool:
        is_new = key not in kept
        if is_new or overwrite:
            kept[key] = value
        return is_new

    for name, function in (
        ("store", store),
        ("stored", kept.get),
        ("stored_keys", lambda prefix: [key for key in kept if key.startswith(prefix)]),
        ("forget", kept.pop),
    ):
        monkeypatch.setattr(score_board.ray_internals, name, function)
    rng = np.random.default_rng(0)
    scores = np.sort(rng.beta(8, 2, 1200))
    reference = histogram(scores)
    alarms, now = [], [0.0]
    replicas = [
        Drift(lambda model: reference, alarms.append, SharedBoard("app", name), lambda: now[0])
        for name in "abc"
    ]

    def indexes() -> list[float | None]:
        for _ in range(2):  # what one writes the others see at their next look
            for replica in replicas:
                replica.compare()
        return [replica.index("lorat/1") for replica in replicas]

    for replica, part in zip(replicas, np.array_split(scores, 3), strict=True):
        see(replica, part)
    assert indexes() == [pytest.approx(0, abs=1e-6)] * 3
    replicas.pop()  # it dies; what it counted stays
    assert indexes() == [pytest.approx(0, abs=1e-6)] * 2
    assert alarms == []
    now[0] += HOUR_S
    for replica in replicas:
        see(replica, rng.beta(3, 5, ENOUGH // 2))
    first, second = indexes()
    assert first == second and first is not None and first > DRIFT
    assert len(alarms) == 1 and f"over {ENOUGH} scores" in alarms[0]
    assert all(key.startswith("app/scores/1/") for key in kept)


@pytest.mark.parametrize("text", [None, "", "null", "[1, 2]", '{"a": 1}', json.dumps([0] * BINS)])
def test_version_without_a_histogram_has_no_reference(text: str | None) -> None:
    assert stored_reference(text) is None
    assert stored_reference(json.dumps(list(range(BINS)))) is not None


def test_shadow_tracks_beside_and_never_answers(own_store: Path) -> None:
    """The same weights agree in every frame, others do not; both are found by promotion."""
    engine = Engine(served(1), ServingSettings())
    same, other, unseen = (
        Shadow(served(7, random_tracker(1)), 1.0),
        Shadow(served(2, shrinking_tracker()), 1.0),
        Shadow(served(3), 0.0),
    )
    for shadow in (same, other, unseen):
        engine.observe(shadow.observe)
    got: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    try:
        session = engine.open(got.put)
        engine.command(session, '{"raw": [160, 120]}')
        engine.command(session, f'{{"add": "a", "box": {list(BOX)}}}')
        for number, frame in enumerate(frames(10)):
            if number == 5:
                engine.command(session, '{"add": "b", "box": [10, 10, 30, 20]}')
            if number == 8:
                engine.command(session, '{"drop": "a"}')
            engine.frame(session, HEADER.pack(number, number) + frame.tobytes())
            assert got.get(timeout=60)["model"] == "lorat/1"
        assert got.empty()
    finally:
        engine.stop()
    assert not unseen.agreements
    agreed = same.agreements["lorat/1"].metrics()
    assert agreed["shadow/frames"] == 7 + 4
    assert agreed["shadow/overlap"] == pytest.approx(1, abs=1e-6)
    assert agreed["shadow/share_apart"] == 0
    assert agreed["shadow/score"] == agreed["shadow/served_score"]
    apart = other.agreements["lorat/1"].metrics()
    assert apart["shadow/overlap"] < 0.9

    for replica in ("one", "two"):
        record = ShadowRecord(same, replica)
        record.write()
        record.close()
    (found,) = found_of(connect(), "lorat/7")
    assert (found.beside, found.frames) == ("lorat/1", 22)
    assert "mean overlap 1.000, apart in 0.0 %" in str(found)
    assert found_of(connect(), "lorat/2") == []
