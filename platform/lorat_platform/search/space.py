"""The search space: configuration fields by path, and what each may be.

Fixed fields are taken out of the search.  Everything is checked against the configuration before a
trial starts.

Fields below ``tracking`` change no weight, so they are no part of what a trial is: every trial is
evaluated with several settings of them (:mod:`lorat_platform.search.settings`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorat.config.fields import get_path, replace_path
from lorat.config.training import TrainConfig, resolve
from lorat.errors import UserError
from lorat_platform.search.dimension import Dimension, Scalar, field_value, parse_entry

Coupling = Literal["none", "linear", "sqrt"]

RANKS = (4, 8, 16, 32, 64, 128)
HEAD_DEPTHS = (1, 2, 3, 4)
LR_RANGE = 10.0
"""The learning rate is searched from the recipe's / 10 to the recipe's × 10."""

TRACKING = "tracking."
"""Begin of the paths of fields that are searched without training again."""
MOST_LEFT_OUT = 0.05
"""Share of the pairs that a batch size may leave out since it does not fit into an epoch."""


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Dimensions by path, over a resolved base configuration."""

    base: TrainConfig
    dimensions: dict[str, Dimension]
    lr_with_batch: Coupling = "none"
    """How the learning rates of a trial follow its batch size."""

    @property
    def trained(self) -> dict[str, Dimension]:
        """What a trial is made of."""
        return {p: d for p, d in self.dimensions.items() if not p.startswith(TRACKING)}

    @property
    def tracking(self) -> dict[str, Dimension]:
        """What is searched with the weights of each trial."""
        return {p: d for p, d in self.dimensions.items() if p.startswith(TRACKING)}

    def configure(self, values: Mapping[str, Any]) -> TrainConfig:
        """Return the base with a trial's values set, and what none stands for filled in.

        A learning rate among the values, as that of the base, is for the base's batch size.

        Raises:
            UserError: if a path or a value is not possible.
        """
        config = self.base
        for path, value in values.items():
            config = replace_path(config, path, field_value(config, path, value))
        config = resolve(config)
        assert config.batch_size is not None and self.base.batch_size is not None
        if self.lr_with_batch != "none" and config.batch_size != self.base.batch_size:
            ratio = config.batch_size / self.base.batch_size
            factor = ratio if self.lr_with_batch == "linear" else math.sqrt(ratio)
            for path in ("lr", "min_lr"):
                config = replace_path(config, path, get_path(config, path) * factor)
        return config

    def prior(self) -> dict[str, Scalar]:
        """Return the base configuration's own values (the paper's), or the nearest allowed ones."""
        return self._nearest(self.trained)

    def usual_tracking(self) -> dict[str, Scalar]:
        """Return the same of the fields that are searched with the weights of each trial."""
        return self._nearest(self.tracking)

    def _nearest(self, dimensions: Mapping[str, Dimension]) -> dict[str, Scalar]:
        own = self.own_values()
        return {path: dimension.nearest(own[path]) for path, dimension in dimensions.items()}

    def own_values(self) -> dict[str, Any]:
        """Return the base configuration's values of the searched fields, allowed there or not."""
        base = self.base
        if base.tracking.search_area_factor is None:
            factor = base.model_variant.search_area_factor
            base = replace_path(base, "tracking.search_area_factor", factor)
        if base.lora.alpha is None and self.dimensions.get("lora.alpha"):
            base = replace_path(base, "lora.alpha", base.lora.resolved_alpha)
        if base.micro_batch is None and self.dimensions.get("micro_batch"):
            base = replace_path(base, "micro_batch", base.batch_size)
        values = {path: get_path(base, path) for path in self.dimensions}
        return {p: "+".join(v) if isinstance(v, tuple) else v for p, v in values.items()}

    def to_tune(self) -> dict[str, Any]:
        """Return what a trial is made of in Ray Tune's terms."""
        from ray import tune

        space: dict[str, Any] = {}
        for path, dimension in self.trained.items():
            if dimension.kind == "choice":
                space[path] = tune.choice(list(dimension.values))
                continue
            low, high = dimension.bounds
            if dimension.kind == "uniform":
                space[path] = tune.uniform(low, high)
            elif dimension.kind == "loguniform":
                space[path] = tune.loguniform(low, high)
            elif dimension.kind == "int":
                space[path] = tune.randint(int(low), int(high) + 1)
            else:
                space[path] = tune.lograndint(int(low), int(high) + 1)
        return space

    def to_lines(self) -> list[str]:
        """Return one line per dimension, in the form that ``--space`` takes."""
        return [str(dimension) for dimension in self.dimensions.values()]


def default_dimensions(base: TrainConfig) -> tuple[Dimension, ...]:
    """Return what is searched where nothing is said, over a resolved configuration.

    LoRA rank {4 ... 128} (alpha = rank), learning rate log-uniform around the recipe's (1e-5 to
    1e-3 for the paper's recipe), head depth {1 ... 4}.
    """
    assert base.lr is not None
    rank = Dimension(path="lora.rank", kind="choice", values=RANKS)
    lr = Dimension(path="lr", kind="loguniform", values=(base.lr / LR_RANGE, base.lr * LR_RANGE))
    depth = Dimension(path="head.depth", kind="choice", values=HEAD_DEPTHS)
    return (rank, lr, depth) if base.adaptation == "lora" else (lr, depth)


def build_space(
    base: TrainConfig,
    entries: Sequence[str] = (),
    *,
    instead: Sequence[Dimension] | None = None,
    lr_with_batch: Coupling = "none",
) -> SearchSpace:
    """Build the default space over ``base`` and add, replace or fix fields by ``entries``.

    Args:
        base: what is not searched.
        entries: each ``PATH=RANGE`` or ``PATH=VALUE``.
        instead: what is searched and fixed in the place of the default.
        lr_with_batch: how the learning rates of a trial follow its batch size.

    Raises:
        UserError: if a path names no field, a range cannot be, a value is of the wrong type or
            refused by the configuration, or the field changes the pairs that trials train on.
    """
    base = resolve(base)
    dimensions: dict[str, Dimension] = {}
    given = default_dimensions(base) if instead is None else instead
    for dimension in (*given, *(parse_entry(entry, base) for entry in entries)):
        dimensions.pop(dimension.path, None)
        if dimension.fixed:
            value = dimension.values[0]
            _check_value(base, dimension, value)
            base = replace_path(base, dimension.path, field_value(base, dimension.path, value))
        else:
            dimensions[dimension.path] = dimension
    if not dimensions:
        raise UserError("The search space is empty; leave at least one field to search over.")
    for dimension in dimensions.values():
        for value in dimension.values:
            _check_value(base, dimension, value)
        if dimension.path == "batch_size" and dimension.kind in ("int", "logint"):
            low, high = dimension.bounds
            for size in range(int(low), int(high) + 1):
                _check_value(base, dimension, size)
    space = SearchSpace(base=base, dimensions=dimensions, lr_with_batch=lr_with_batch)
    _check_coupling(space)
    return space


def _check_value(base: TrainConfig, dimension: Dimension, value: Scalar) -> None:
    path = dimension.path
    if path == "seed":
        raise UserError(
            f"{dimension.said} would give every trial other samples; "
            "all trials share one seed, so choose it with --seed."
        )
    try:
        config = resolve(replace_path(base, path, field_value(base, path, value)))
    except UserError as error:
        raise UserError(f"{dimension.said} cannot be: {error}") from error
    if (config.epochs, config.pairs_per_epoch) != (base.epochs, base.pairs_per_epoch):
        raise UserError(
            f"{dimension.said} changes how many pairs a trial is trained on; trials are compared "
            f"after the same pairs of one schedule, so set {path} for the whole search instead."
        )
    change = num_pairs(config) / num_pairs(base) - 1
    if abs(change) > MOST_LEFT_OUT:
        raise UserError(
            f"{dimension.said} has {config.batch_size}, of which no whole number is an epoch of "
            f"{config.pairs_per_epoch} pairs, so that its trials would see {abs(change):.0%} "
            f"{'more' if change > 0 else 'fewer'} pairs; give batch sizes that divide the epoch, "
            "or another --pairs-per-epoch."
        )


def num_pairs(config: TrainConfig) -> int:
    """Return the pairs of the whole schedule of a resolved configuration."""
    assert config.batch_size is not None
    return config.total_steps * config.batch_size


def _check_coupling(space: SearchSpace) -> None:
    """Refuse a coupling without effect, or one that makes learning rates which cannot be."""
    if space.lr_with_batch == "none":
        return
    sizes = space.dimensions.get("batch_size")
    if sizes is None:
        raise UserError(
            f"--lr-with-batch is {space.lr_with_batch} but the batch size is not searched; leave "
            "it out, or give --space batch_size=choice(...)."
        )
    for size in sizes.values:
        for lr in space.dimensions["lr"].values if "lr" in space.dimensions else (space.base.lr,):
            try:
                space.configure({"batch_size": size, "lr": lr})
            except UserError as error:
                raise UserError(
                    f"--lr-with-batch {space.lr_with_batch} cannot be with lr {lr:g} and a batch "
                    f"of {size}: {error}"
                ) from error
