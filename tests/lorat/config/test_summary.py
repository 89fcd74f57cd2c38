"""A configuration is read at a glance, and nothing of it is left out."""

from __future__ import annotations

import dataclasses

from lorat.config.fields import field_paths
from lorat.config.summary import MOST_LINES, WIDTH, summary
from lorat.config.training import LoraConfig, TrainConfig, resolve


def test_what_differs_from_the_recipe_comes_first() -> None:
    config = resolve(
        TrainConfig(
            variant="B-224", lora=LoraConfig(rank=8, targets=("q", "v")), lr=3e-4, micro_batch=16,
            data="s3://data/a", val_data="s3://data/v",
        )
    )  # fmt: skip
    first, heading, *lines = summary(config).splitlines()
    assert first == "B-224, recipe paper, on s3://data/a, validated on s3://data/v"
    assert heading == "other than the recipe has it:"
    end = lines.index("as the recipe has it:")
    assert [line.split(maxsplit=1)[0] for line in lines[:end]] == [
        "lora.rank", "lora.targets", "micro_batch", "lr",
    ]  # fmt: skip
    assert lines[0].split() == ["lora.rank", "8", "(recipe:", "64)"]
    assert lines[3].split() == ["lr", "0.0003", "(recipe:", "0.0001)"]


def test_every_field_is_on_one_screen() -> None:
    usual = resolve(TrainConfig())
    assert "other than" not in summary(usual)
    many = dataclasses.replace(
        usual, lr=1.0, min_lr=0.5, warmup_lr=0.1, warmup_epochs=1.0, weight_decay=0.2, seed=1,
        clip_norm=2.0, nonfinite="skip", max_skipped=5, max_damaged=0.5, precision="fp32",
        compile="off", frozen_dtype="bf16", epochs=3, batch_size=4, backbone="/" + "x" * 300,
    )  # fmt: skip
    for config in (usual, many):
        text = summary(config)
        lines = text.splitlines()
        assert len(lines) <= 24
        assert max(len(line) for line in lines if "x" * 300 not in line) <= WIDTH
        for path in field_paths(config):
            assert path in ("variant", "recipe", "data", "val_data") or f" {path} " in text, path
    assert summary(many).splitlines()[MOST_LINES].startswith("  ")
