"""A configuration written by hand is read, or refused in one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorat.config.fields import from_dict, to_dict
from lorat.config.training import LoraConfig, TrainConfig, resolve
from lorat.config.variants import VARIANTS, Variant
from lorat.errors import UserError


def test_what_was_saved_is_read_again() -> None:
    config = resolve(TrainConfig(lora=LoraConfig(targets=("q", "v"), alpha=3), seed=7))
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    for variant in VARIANTS.values():
        assert from_dict(Variant, to_dict(variant)) == variant


def test_a_part_is_enough_and_a_whole_number_is_a_number() -> None:
    values = {"epochs": 3, "lr": 1, "lora": {"targets": ["q"]}, "micro_batch": None}
    config = from_dict(TrainConfig, values)
    assert (config.epochs, config.lr, config.lora.targets) == (3, 1, ("q",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "3"}, 'epochs is "3"; give a whole number or null'),
        ({"epochs": 3.5}, "epochs is 3.5; give a whole number or null"),
        ({"epochs": True}, "epochs is true; give a whole number or null"),
        ({"seed": None}, "seed is null; give a whole number"),
        ({"lr": "1e-4"}, 'lr is "1e-4"; give a number or null'),
        ({"lr": [1e-4]}, "lr is .*; give a number or null"),
        ({"compile": True}, "compile is true; give"),
        ({"compile": "yes"}, 'compile is "yes"; give "auto" or "on" or "off"'),
        ({"activation_checkpointing": 1}, "activation_checkpointing is 1; give true or false"),
        ({"lora": 3}, "configuration lora is 3; give an object with the fields rank"),
        ({"lora": {"rank": "8"}}, 'lora.rank is "8"; give a whole number'),
        ({"lora": {"targets": "qv"}}, "lora.targets is .*; give a list, each a text"),
        ({"lora": {"targets": [1]}}, "lora.targets is .*; give a list, each a text"),
        ({"augment": {"three_augment": "no"}}, "augment.three_augment is .*true or false or null"),
        ({"data": {"a": "b"}}, "data is .*; give a text"),
        ({"lora": {"depth": 1}}, "Unknown configuration field lora.depth"),
        ([], "configuration is \\[\\]; give an object"),
    ],
)
def test_a_wrong_type_is_one_sentence(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        from_dict(TrainConfig, values)
    assert "\n" not in str(caught.value)
