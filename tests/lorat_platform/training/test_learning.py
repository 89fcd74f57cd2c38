"""The small recipe, for a fraction of its steps: the tracker learns to track."""

from __future__ import annotations

from pathlib import Path

from lorat.config.training import TrainConfig, resolve
from lorat.data.pairs.batches import Decoder
from lorat.learning.loop import run
from lorat.model.network import build_model
from lorat.tracking.baselines import baseline
from lorat.tracking.tracker import Tracker
from lorat_platform.data.sources import open_datasets, open_indexes, open_pairs
from lorat_platform.evaluation.validation_set import tracking_scores
from tests.lorat_platform.local_source import LocalSource
from tests.small_shards import make_shards

NUM_STEPS = 96


def test_the_small_recipe_learns_to_track(tmp_path: Path) -> None:
    train = make_shards(tmp_path / "train", split="train", num_shards=3)
    val = make_shards(tmp_path / "val", split="val")
    config = resolve(
        TrainConfig(
            variant="T-112",
            data=train,
            val_data=val,
            epochs=1,
            pairs_per_epoch=32 * NUM_STEPS,
            warmup_epochs=0.1,
        )
    )
    datasets = open_datasets(config)
    decoder = Decoder(*open_pairs(config, datasets.train))
    learner = run(config, LocalSource(decoder.load, batch_size=32, end_step=NUM_STEPS))
    assert learner.step == NUM_STEPS
    indexes = open_indexes(datasets.val)
    learnt, untrained, still = (
        tracking_scores(tracker, indexes)["ao"]
        for tracker in (Tracker(learner.model), Tracker(build_model(config)), baseline("static"))
    )
    assert learnt > untrained + 0.15
    assert learnt > still
