"""A training, a search and an evaluation mean the same by a score."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lorat.config.training import TrainConfig
from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.from_memory import MemoryTrack, write_dataset
from lorat.errors import UserError
from lorat.metrics import GroundTruth, evaluate
from lorat.metrics.catalogue import SCORES
from lorat.tracking.baselines import baseline
from lorat_platform.data.sources import resolve_sources
from lorat_platform.evaluation.validation_set import tracking_scores
from lorat_platform.search.trial import measure
from lorat_platform.search.trial.progress import Progress
from lorat_platform.training.validation import ValidationPlan, validate
from tests.constant_trackers import staying_tracker

FRAMES = 6


def track(number: int, *, absent: bool = False) -> MemoryTrack:
    """A target that leaves its first box at a speed of its own, and is absent for a while."""
    images = np.random.default_rng(number).integers(0, 255, (FRAMES, 48, 64, 3)).astype(np.uint8)
    steps = np.arange(FRAMES)[:, None] * (1.0 + number)
    box = np.array([8.0, 8.0, 24.0, 24.0]) + steps * np.array([1.0, 0.0, 1.0, 0.0])
    visible = np.ones(FRAMES, bool)
    if absent:
        visible[2:4] = False
    return MemoryTrack(name=f"sequence-{number}", images=list(images), box=box, visible=visible)


@pytest.fixture
def sets(tmp_path: Path) -> list[FrameIndex]:
    """One with one sequence, and three of LaSOT, which leaves frames without a target out."""
    small = write_dataset(str(tmp_path / "got10k"), [track(0)], name="got10k", split="val")
    lasot = [track(number, absent=True) for number in (1, 2, 3)]
    large = write_dataset(str(tmp_path / "lasot"), lasot, name="lasot", split="test")
    return [small, large]


def published(index: FrameIndex, *, rules: str | None = None) -> float:
    """Return the AO of a box that never moves, by the set's own rules or another's."""
    truths = {}
    for number in range(index.num_tracks):
        rows = slice(int(index.track_start[number]), int(index.track_start[number + 1]))
        truths[index.sequence(number)] = GroundTruth(
            boxes=index.box[rows].astype(float), visible=index.visible[rows]
        )
    still = {name: np.repeat(truth.boxes[:1], FRAMES, axis=0) for name, truth in truths.items()}
    return evaluate(still, truths, dataset=index.name if rules is None else rules).scores["AO"]


def test_a_set_is_scored_by_its_own_rules_and_counts_as_much_as_another(
    sets: list[FrameIndex],
) -> None:
    found = tracking_scores(baseline("static"), sets)
    assert found["ao"] == pytest.approx((published(sets[0]) + published(sets[1])) / 2)
    pooled = (published(sets[0]) + 3 * published(sets[1])) / 4
    assert abs(found["ao"] - pooled) > 0.05, "the sets are not alike"
    ruleless = (published(sets[0]) + published(sets[1], rules="")) / 2
    assert abs(found["ao"] - ruleless) > 0.01, "absent frames matter"


def test_a_training_and_a_search_say_the_same_of_a_model(sets: list[FrameIndex]) -> None:
    model = staying_tracker()
    uris = ",".join(index.uri for index in sets)
    config = TrainConfig(variant="N-112", backbone="none", val_data=uris)
    sources = resolve_sources(uris, "val")
    plan = ValidationPlan(config=config, sources=sources, num_pairs=0, num_sequences=4)
    progress = Progress(history=[], latency_ms=1.0)  # measured before
    setup: Any = SimpleNamespace(
        val_sequences=4, worker_resources={"CPU": 1.0}, settings=({},), objectives=("ao",)
    )
    searched = measure.validate(model, config, setup, torch.device("cpu"), progress)
    of_sequences = searched.pop("sequences")
    trained = validate(model, plan)
    assert trained == {f"val/{name}": value for name, value in searched.items()}
    assert set(searched) == set(SCORES)
    means = [np.mean([each["ao"] for each in of_set.values()]) for of_set in of_sequences]
    assert len(means) == 2
    assert np.mean(means) == pytest.approx(searched["ao"])


def test_sequences_are_spread_over_each_set(
    sets: list[FrameIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorat_platform.evaluation import validation_set

    asked: list[list[int]] = []
    whole = validation_set.track_sequences

    def track_sequences(tracker: Any, index: Any, reader: Any, tracks: list[int], **k: Any) -> Any:
        asked.append(list(tracks))
        return whole(tracker, index, reader, tracks, **k)

    monkeypatch.setattr(validation_set, "track_sequences", track_sequences)
    tracking_scores(baseline("static"), sets, num_sequences=3)
    assert asked == [[0], [0, 1]]


def test_a_set_without_a_first_box_is_named(tmp_path: Path) -> None:
    lost = track(0)
    lost.box[0] = np.nan
    index = write_dataset(str(tmp_path), [lost], name="lost", split="val")
    with pytest.raises(UserError, match=f"No sequence of {tmp_path} can be tracked"):
        tracking_scores(baseline("static"), [index])
