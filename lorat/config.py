"""The training configuration: one tree of frozen dataclasses.

The command line, the search space and the saved ``config.json`` are all made from these fields,
so a field's path (``lora.rank``) means the same everywhere.  Fields that are ``None`` are filled
by :func:`resolve` from the recipe; everything else is as given.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from lorat.addresses import refuse_secrets
from lorat.errors import UserError
from lorat.field_types import describe, fits
from lorat.variants import VARIANTS, Variant, get_variant

Adaptation = Literal["lora", "full", "head"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
LORA_TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the linear layers of every block."""

    rank: int = 64
    """Rank r of every adapter, 1 or more."""
    alpha: float | None = None
    """Scaling numerator; none means alpha = rank, that is a scaling of 1."""
    dropout: float = 0.0
    """Dropout before the A matrix, in [0, 1)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    targets: tuple[str, ...] = LORA_TARGETS
    """Adapted layers; for a SwiGLU block fc1 means w12 and fc2 means w3."""
    init: Literal["truncated_normal", "kaiming", "gaussian"] = "truncated_normal"
    """Both matrices truncated normal 0.02 (the paper's), or A random and B zero."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"lora.rank is {self.rank}; give 1 or more.")
        _require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; give 0 <= dropout < 1.")
        _require(
            self.alpha is None or self.alpha > 0, f"lora.alpha is {self.alpha}; give more than 0."
        )
        unknown = sorted(set(self.targets) - set(LORA_TARGETS))
        _require(
            not unknown and len(self.targets) > 0,
            f"lora.targets has {unknown or 'nothing'}; choose from {', '.join(LORA_TARGETS)}.",
        )

    @property
    def resolved_alpha(self) -> float:
        """Alpha as a number: the rank where none is given."""
        return float(self.rank if self.alpha is None else self.alpha)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The two MLPs that read the search tokens."""

    depth: int = 3
    """Linear layers in each MLP, 1 or more."""

    def __post_init__(self) -> None:
        _require(self.depth >= 1, f"head.depth is {self.depth}; give 1 or more.")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a pair of frames is drawn and cropped."""

    max_gap: int = 100
    """Largest distance between template and search frame, in frames."""
    scale_jitter: float = 0.25
    """Standard deviation of the log scale of the search crop, per axis."""
    translation_jitter: float = 3.0
    """Largest shift of the search crop, in mean box sides."""
    min_object_size: float = 10.0
    """Smallest clipped box side in the search crop, in crop pixels."""
    max_tries: int = 12
    """Draws of the jitter before the pair is replaced."""

    def __post_init__(self) -> None:
        _require(self.max_gap >= 1, f"sampling.max_gap is {self.max_gap}; give 1 or more.")
        for name in ("scale_jitter", "translation_jitter", "min_object_size"):
            value = getattr(self, name)
            _require(value >= 0, f"sampling.{name} is {value}; give 0 or more.")
        _require(self.max_tries >= 1, f"sampling.max_tries is {self.max_tries}; give 1 or more.")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of the crops."""

    flip: float = 0.5
    """Probability of a horizontal flip, separately for template and search."""
    color_jitter: float | None = None
    """Half width of the uniform brightness, contrast and saturation factors around 1; none means
    the recipe's, 0.4 in the paper."""
    three_augment: bool | None = None
    """Apply one of grayscale, solarize and Gaussian blur to both crops (DeiT III); none means the
    recipe's, yes in the paper."""

    def __post_init__(self) -> None:
        _require(0 <= self.flip <= 1, f"augment.flip is {self.flip}; give 0 <= flip <= 1.")
        _require(
            self.color_jitter is None or 0 <= self.color_jitter < 1,
            f"augment.color_jitter is {self.color_jitter}; give 0 <= color_jitter < 1.",
        )

    @property
    def resolved_color_jitter(self) -> float:
        """The half width as a number: the paper's where none is given."""
        return 0.4 if self.color_jitter is None else self.color_jitter

    @property
    def resolved_three_augment(self) -> bool:
        """Whether one of the three is applied: as in the paper where nothing is given."""
        return True if self.three_augment is None else self.three_augment


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what is learnt; where it runs is not here."""

    variant: str = "T-112"
    """Model size and crop size, such as T-112 (laptop), B-224 or L-378."""
    adaptation: Adaptation = "lora"
    """Train LoRA adapters, the full backbone, or the head alone."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    drop_path: float | None = None
    """Stochastic depth, the same in all blocks; none means the variant's."""
    backbone: str = "auto"
    """Backbone weights: auto (shipped or hub), hub, none, or a .safetensors / .pth file."""
    init_from: str | None = None
    """Warm start: a checkpoint folder, models:/NAME@ALIAS, runs:/ID/model, or an official file."""

    recipe: Literal["auto", "paper", "got10k", "small"] = "auto"
    """Defaults for what is not given; auto means paper for S, B, L, g and small for the others."""
    data: str = "synthetic"
    """Training shards: URI, or NAME=URI,NAME=URI, each with an optional *WEIGHT."""
    val_data: str | None = None
    """Validation shards; none means the synthetic validation set when data is synthetic."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    epochs: int | None = None
    """Reporting intervals of the whole run."""
    pairs_per_epoch: int | None = None
    """Pairs in one epoch."""
    batch_size: int | None = None
    """Global batch: pairs in one optimiser step over all workers."""
    micro_batch: int | None = None
    """Most pairs in one forward pass of a worker; none means no gradient accumulation."""
    lr: float | None = None
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine."""
    warmup_lr: float = 1e-7
    """Learning rate of the first step."""
    warmup_epochs: float | None = None
    """Length of the linear warm-up, in epochs."""
    weight_decay: float = 0.1
    """AdamW weight decay of matrices; biases and embeddings have none."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    precision: Precision = "auto"
    """Auto means fp16 with a loss scaler on CUDA and fp32 on CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto means on for CUDA."""
    activation_checkpointing: bool = False
    """Recompute the blocks in the backward pass to save memory."""
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"
    """Storage of the frozen weights."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or a gradient is not finite."""
    max_skipped: int = 100
    """Steps skipped in a row that stop the training."""
    max_damaged: float = 0.01
    """Largest share of damaged images before training stops."""
    seed: int = 42
    """Seed of the samples and of the weights."""

    def __post_init__(self) -> None:
        get_variant(self.variant)
        for name in ("epochs", "pairs_per_epoch", "batch_size", "micro_batch", "max_skipped"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} is {value}; give 1 or more.")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} is {value}; give more than 0.")
        for name in ("min_lr", "warmup_lr", "warmup_epochs", "weight_decay"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{name} is {value}; give 0 or more.")
        _require(
            self.drop_path is None or 0 <= self.drop_path < 1,
            f"drop_path is {self.drop_path}; give 0 <= drop_path < 1.",
        )
        _require(0 <= self.max_damaged <= 1, f"max_damaged is {self.max_damaged}; give 0 to 1.")
        _require(self.seed >= 0, f"seed is {self.seed}; give 0 or more.")
        for name in ("data", "val_data", "init_from", "backbone"):
            refuse_secrets(getattr(self, name) or "", name)

    @property
    def model_variant(self) -> Variant:
        """The row of the table that ``variant`` names."""
        return VARIANTS[self.variant]

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch (of a resolved configuration)."""
        assert self.pairs_per_epoch is not None and self.batch_size is not None
        return self.pairs_per_epoch // self.batch_size

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run (of a resolved configuration)."""
        assert self.epochs is not None
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Optimiser steps of the warm-up (of a resolved configuration)."""
        assert self.warmup_epochs is not None
        return round(self.warmup_epochs * self.steps_per_epoch)


RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "epochs": 170,
        "pairs_per_epoch": 131_072,
        "batch_size": 128,
        "lr": 1e-4,
        "min_lr": 1e-6,
        "warmup_epochs": 2.0,
        "augment.color_jitter": 0.4,
        "augment.three_augment": True,
    },
    "small": {
        "epochs": 8,
        "pairs_per_epoch": 4_096,
        "batch_size": 32,
        "lr": 1e-3,
        "min_lr": 1e-5,
        "warmup_epochs": 0.5,
        # Minutes of training on plain scenes have no use for strong augmentation.
        "augment.color_jitter": 0.2,
        "augment.three_augment": False,
    },
}
"""Values of the fields left at ``None``, by path, per recipe."""
RECIPES["got10k"] = RECIPES["paper"] | {"epochs": 100}


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill every field that the recipe and the variant decide.

    Raises:
        UserError: if the batch does not fit into an epoch.
    """
    recipe = config.recipe
    if recipe == "auto":
        recipe = config.model_variant.recipe
    values = RECIPES[recipe] | {"drop_path": config.model_variant.drop_path}
    if config.data == "synthetic":
        values["val_data"] = "synthetic"
    resolved = dataclasses.replace(config, recipe=recipe)
    for path, value in values.items():
        if get_path(config, path) is None:
            resolved = replace_path(resolved, path, value)
    _require(
        resolved.steps_per_epoch >= 1,
        f"batch_size is {resolved.batch_size} but an epoch has {resolved.pairs_per_epoch} pairs; "
        "give a smaller batch_size or a larger pairs_per_epoch.",
    )
    return resolved


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries (JSON types)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[Any], values: dict[str, Any], *, path: str = "") -> Any:
    """Build ``cls`` from what :func:`to_dict` gave, or from a part of it.

    Raises:
        UserError: if a key is no field, or a value has another type than its field.
    """
    _require(
        isinstance(values, dict),
        f"The configuration{' ' * bool(path)}{path.rstrip('.')} is "
        f"{json.dumps(values, default=str)}; give an "
        f"object with the fields {', '.join(f.name for f in dataclasses.fields(cls))}.",
    )
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    _require(
        not unknown,
        f"Unknown configuration field {path}{unknown[0] if unknown else ''}; "
        f"fields there are {', '.join(f.name for f in dataclasses.fields(cls))}.",
    )
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            value = from_dict(typing.cast(type[Any], kind), value, path=f"{path}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        _require(
            fits(value, kind),
            f"Configuration field {path}{name} is {json.dumps(value, default=str)}; give "
            f"{describe(kind)}.",
        )
        arguments[name] = value
    return cls(**arguments)


def get_path(config: Any, path: str) -> Any:
    """Return the field at a dotted path such as ``lora.rank``."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def replace_path(config: Any, path: str, value: Any) -> Any:
    """Return a copy with the field at a dotted path such as ``lora.rank`` set.

    Raises:
        UserError: if the path names no field.
    """
    name, _, rest = path.partition(".")
    if not dataclasses.is_dataclass(config) or name not in {
        f.name for f in dataclasses.fields(config)
    }:
        raise UserError(
            f"There is no configuration field {path}; fields are {', '.join(field_paths(config))}."
        )
    if rest:
        value = replace_path(getattr(config, name), rest, value)
    return dataclasses.replace(typing.cast(Any, config), **{name: value})


def field_paths(config: Any) -> list[str]:
    """List the dotted paths of all leaf fields."""
    paths: list[str] = []
    if not dataclasses.is_dataclass(config):
        return paths
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, types.GenericAlias):
            paths += [f"{f.name}.{p}" for p in field_paths(value)]
        else:
            paths.append(f.name)
    return paths
