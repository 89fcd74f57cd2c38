"""The training configuration: one tree of frozen dataclasses.

The command line, the search space and the saved ``config.json`` are all made from these fields,
so a field's path (``lora.rank``) means the same everywhere.  Fields that are ``None`` are filled
by :func:`resolve` from the recipe; everything else is as given.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lorat.config.bounds import Bounds, Count, Seed, Share, ShareBelowOne, check_bounds
from lorat.config.fields import _require, get_path, replace_path
from lorat.config.tracking import TrackingConfig
from lorat.config.variants import VARIANTS, Variant, get_variant
from lorat.files.addresses import refuse_secrets

Adaptation = Literal["lora", "full", "head"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
LearningRate = Annotated[float, Bounds(0, 10)]
LORA_TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the linear layers of every block."""

    rank: Annotated[int, Bounds(1, 1024)] = 64
    """Rank r of every adapter, 1 to 1024."""
    alpha: Annotated[float, Bounds(0, 1_000_000, above=True)] | None = None
    """Scaling numerator, more than 0, at most 1,000,000; none means alpha = rank, that is a scaling
    of 1."""
    dropout: ShareBelowOne = 0.0
    """Dropout before the A matrix, 0 or more, below 1."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    targets: tuple[str, ...] = LORA_TARGETS
    """Adapted layers; for a SwiGLU block fc1 means w12 and fc2 means w3."""
    init: Literal["truncated_normal", "kaiming", "gaussian"] = "truncated_normal"
    """Both matrices truncated normal 0.02 (the paper's), or A random and B zero."""

    def __post_init__(self) -> None:
        check_bounds(self, "lora.{}".format)
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

    depth: Annotated[int, Bounds(1, 64)] = 3
    """Linear layers in each MLP, 1 to 64."""

    def __post_init__(self) -> None:
        check_bounds(self, "head.{}".format)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a pair of frames is drawn and cropped."""

    max_gap: Annotated[int, Bounds(1, 1_000_000)] = 100
    """Largest distance between template and search frame, 1 to 1,000,000 frames."""
    scale_jitter: Annotated[float, Bounds(0, 2)] = 0.25
    """Standard deviation of the log scale of the search crop, per axis, 0 to 2."""
    translation_jitter: Annotated[float, Bounds(0, 100)] = 3.0
    """Largest shift of the search crop, 0 to 100 mean box sides."""
    min_object_size: Annotated[float, Bounds(0, 1000)] = 10.0
    """Smallest clipped box side in the search crop, 0 to 1000 crop pixels."""
    max_tries: Annotated[int, Bounds(1, 1000)] = 12
    """Draws of the jitter before the pair is replaced, 1 to 1000."""

    def __post_init__(self) -> None:
        check_bounds(self, "sampling.{}".format)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of the crops."""

    flip: Share = 0.5
    """Probability of a horizontal flip, separately for template and search, 0 to 1."""
    color_jitter: ShareBelowOne | None = None
    """Half width of the uniform brightness, contrast and saturation factors around 1, 0 or more,
    below 1; none means the recipe's, 0.4 in the paper."""
    three_augment: bool | None = None
    """Apply one of grayscale, solarize and Gaussian blur to both crops (DeiT III); none means the
    recipe's, yes in the paper."""

    def __post_init__(self) -> None:
        check_bounds(self, "augment.{}".format)

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

    variant: str = "T-168"
    """Model size and crop size, such as T-168 (laptop), B-224 or L-378."""
    adaptation: Adaptation = "lora"
    """Train LoRA adapters, the full backbone, or the head alone."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    drop_path: ShareBelowOne | None = None
    """Stochastic depth, the same in all blocks, 0 or more, below 1; none means the variant's."""
    backbone: str = "auto"
    """Backbone weights: auto (shipped or hub), hub, none, or a .safetensors / .pth file."""
    init_from: str | None = None
    """Warm start: a checkpoint folder, models:/NAME@ALIAS, runs:/ID/model, or an official file."""

    recipe: Literal["auto", "paper", "got10k", "small", "brief"] = "auto"
    """Defaults for what is not given; auto means paper for S, B, L, g, brief for T-168, whose
    backbone already tracks, and small for the others."""
    data: str = "synthetic"
    """Training shards: URI, or NAME=URI,NAME=URI, each with an optional *WEIGHT."""
    val_data: str | None = None
    """Validation shards; none means the synthetic validation set when data is synthetic."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    epochs: Annotated[int, Bounds(1, 100_000)] | None = None
    """Reporting intervals of the whole run, 1 to 100,000."""
    pairs_per_epoch: Count | None = None
    """Pairs in one epoch, 1 to 1,000,000,000."""
    batch_size: Annotated[int, Bounds(1, 65_536)] | None = None
    """Global batch: pairs in one optimiser step over all workers, 1 to 65,536."""
    micro_batch: Annotated[int, Bounds(1, 65_536)] | None = None
    """Most pairs in one forward pass of a worker, 1 to 65,536; none means no gradient
    accumulation."""
    lr: Annotated[float, Bounds(0, 10, above=True)] | None = None
    """Peak learning rate, more than 0, at most 10."""
    min_lr: LearningRate | None = None
    """Learning rate at the end of the cosine, 0 to 10."""
    warmup_lr: LearningRate = 1e-7
    """Learning rate of the first step, 0 to 10."""
    warmup_epochs: Annotated[float, Bounds(0, 100_000)] | None = None
    """Length of the linear warm-up, 0 to 100,000 epochs."""
    weight_decay: Annotated[float, Bounds(0, 100)] = 0.1
    """AdamW weight decay of matrices, 0 to 100; biases and embeddings have none."""
    beta1: ShareBelowOne = 0.9
    """Decay of AdamW's mean of the gradients, 0 or more, below 1."""
    beta2: ShareBelowOne = 0.999
    """Decay of AdamW's mean of their squares, 0 or more, below 1."""
    adam_eps: Annotated[float, Bounds(0, 1, above=True)] = 1e-8
    """What AdamW adds to the root of that mean, more than 0, at most 1."""
    clip_norm: Annotated[float, Bounds(0, 1_000_000, above=True)] = 1.0
    """Largest global gradient norm, more than 0, at most 1,000,000."""
    precision: Precision = "auto"
    """Auto means fp16 with a loss scaler on CUDA and fp32 on CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the network, on CUDA of the augmentation, too; auto means on for CUDA."""
    activation_checkpointing: bool = False
    """Recompute the blocks in the backward pass to save memory."""
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"
    """Storage of the frozen weights."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or a gradient is not finite."""
    max_skipped: Annotated[int, Bounds(1, 1_000_000)] = 100
    """Steps skipped in a row that stop the training, 1 to 1,000,000."""
    max_damaged: Share = 0.01
    """Largest share of damaged images before training stops, 0 to 1."""
    seed: Seed = 42
    """Seed of the samples and of the weights, 0 to 4,294,967,295."""

    def __post_init__(self) -> None:
        get_variant(self.variant)
        check_bounds(self)
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
RECIPES["brief"] = RECIPES["small"] | {
    # What is shipped with its head needs little, and more would only teach it plain scenes: of its
    # overlap on real video, 0.467, this costs 0.025, and 5e-5 costs 0.042.
    "epochs": 4,
    "pairs_per_epoch": 2_048,
    "lr": 2e-5,
}
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
