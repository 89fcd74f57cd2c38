"""The small recipe, for a fraction of its steps: the tracker learns to track."""

from __future__ import annotations

from pathlib import Path

from lorat.baselines import baseline
from lorat.config import TrainConfig, resolve
from lorat.frame_index import FrameIndex
from lorat.metrics import evaluate as score
from lorat.model import build_model
from lorat.one_pass import track_sequences
from lorat.shards import ImageReader
from lorat_platform.batches import Decoder
from lorat_platform.evaluation import ground_truth, usable_tracks
from lorat_platform.sources import open_datasets, open_pairs
from lorat_platform.train_loop import run
from lorat_platform.validation import ValidationPlan, tracking_scores
from tests.lorat_platform.local_source import LocalSource
from tests.small_shards import make_shards

NUM_STEPS = 96


def static_overlap(uri: str) -> float:
    """Return the AO of a box that never moves."""
    index = FrameIndex.open(uri)
    tracks = usable_tracks(index)
    results = track_sequences(baseline("static"), index, ImageReader(index), tracks)
    predictions = {result.name: result.boxes for result in results}
    truths = {index.sequence(track): ground_truth(index, track) for track in tracks}
    return score(predictions, truths).scores["AO"]


def test_the_small_recipe_learns_to_track(tmp_path: Path) -> None:
    train = make_shards(tmp_path / "train", split="train", num_shards=3)
    val = make_shards(tmp_path / "val", split="val")
    config = resolve(
        TrainConfig(
            data=train, val_data=val, epochs=1, pairs_per_epoch=32 * NUM_STEPS, warmup_epochs=0.1
        )
    )
    assert config.variant == "T-112", "the default, with the shipped backbone"
    datasets = open_datasets(config)
    decoder = Decoder(*open_pairs(config, datasets.train))
    learner = run(config, LocalSource(decoder.load, batch_size=32, end_step=NUM_STEPS))
    assert learner.step == NUM_STEPS
    plan = ValidationPlan(config=config, sources=datasets.val, num_pairs=0, num_sequences=4)
    learnt = tracking_scores(learner.model, plan)["val/ao"]
    untrained = tracking_scores(build_model(config), plan)["val/ao"]
    assert learnt > untrained + 0.15
    assert learnt > static_overlap(val)
