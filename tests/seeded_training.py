"""Print what a short training with a fixed seed gives, to the last digit.

A change that shall change no number prints the same before and after it, on one machine:

PYTHONPATH=.:platform python -m tests.seeded_training
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from lorat.config.training import AugmentConfig, TrainConfig, resolve
from lorat.data.pairs.batches import Decoder
from lorat.learning.loop import Hooks, run
from lorat.model.network import LoRAT
from lorat_platform.data.sources import open_datasets, open_pairs
from lorat_platform.training.validation import ValidationPlan, validate
from tests.lorat_platform.local_source import LocalSource
from tests.small_shards import make_shards

BATCH = 16


def results(folder: Path, num_steps: int) -> Iterator[str]:
    """Ingest, train and track in ``folder``, and yield one line per number."""
    config = resolve(
        TrainConfig(
            variant="N-112",
            backbone="none",
            data=make_shards(folder / "train", split="train"),
            val_data=make_shards(folder / "val"),
            # As in the paper, where the small recipe does without.
            augment=AugmentConfig(color_jitter=0.4, three_augment=True),
            epochs=1,
            pairs_per_epoch=BATCH * num_steps,
            batch_size=BATCH,
            micro_batch=BATCH // 2,
        )
    )
    datasets = open_datasets(config)
    decoder = Decoder(*open_pairs(config, datasets.train))
    lines: list[str] = []

    def note(step: int, metrics: dict[str, float]) -> None:
        lines.append(f"step {step} loss {metrics['train/loss']!r}")

    learner = run(
        config,
        LocalSource(decoder.load, batch_size=BATCH, end_step=num_steps),
        hooks=Hooks(log_every=1, on_interval=note),
    )
    yield from lines
    yield f"weights {digest(learner.model)}"
    plan = ValidationPlan(config=config, sources=datasets.val, num_pairs=BATCH, num_sequences=4)
    yield from (f"{name} {float(value)!r}" for name, value in validate(learner.model, plan).items())


def digest(model: LoRAT) -> str:
    """Hash all weights."""
    hashed = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        hashed.update(name.encode() + value.cpu().numpy().tobytes())
    return hashed.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums of several threads may come in another order
    with tempfile.TemporaryDirectory() as name:
        for line in results(Path(name), num_steps=8):
            print(line)
