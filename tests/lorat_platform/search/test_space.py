from __future__ import annotations

from dataclasses import replace

import pytest

from lorat.config.fields import field_paths, replace_path
from lorat.config.training import LoraConfig, TrainConfig, resolve
from lorat.errors import UserError
from lorat_platform.search.dimension import _members, field_type, parse_entry
from lorat_platform.search.plan import default_config
from lorat_platform.search.space import Coupling, build_space, num_pairs


def test_default_space_of_the_paper_is_rank_lr_and_head_depth() -> None:
    space = build_space(TrainConfig(variant="B-224"))
    assert space.to_lines() == [
        "lora.rank=choice(4,8,16,32,64,128)",
        "lr=loguniform(1e-05,0.001)",
        "head.depth=choice(1,2,3,4)",
    ]
    assert space.prior() == {"lora.rank": 64, "lr": 1e-4, "head.depth": 3}


def test_learning_rate_range_is_scaled_for_the_small_recipe() -> None:
    space = build_space(TrainConfig(variant="T-112"))
    assert space.dimensions["lr"].values == pytest.approx((1e-4, 1e-2))
    assert space.prior()["lr"] == 1e-3


def test_alpha_follows_the_rank() -> None:
    config = build_space(TrainConfig()).configure({"lora.rank": 8})
    assert config.lora.resolved_alpha == 8


def test_entries_add_replace_and_fix_fields() -> None:
    space = build_space(
        TrainConfig(),
        ["lora.dropout=uniform(0,0.2)", "lora.rank=choice(2,4)", "head.depth=2",
         "lora.targets=choice(q+v,q+k+v+proj)"],
    )  # fmt: skip
    assert set(space.dimensions) == {"lr", "lora.dropout", "lora.rank", "lora.targets"}
    assert space.base.head.depth == 2
    assert space.prior()["lora.dropout"] == 0.0
    assert space.prior()["lora.rank"] == 4, "64 is not allowed: the nearest is"
    config = space.configure({"lora.targets": "q+v", "lora.dropout": 0.1})
    assert config.lora.targets == ("q", "v")
    assert config.lora.dropout == 0.1


NULLABLE = {
    "lora.alpha": "uniform(1,48)",
    "drop_path": "uniform(0,0.3)",
    "init_from": "choice(none,other.safetensors)",
    "val_data": "choice(none,synthetic)",
    "augment.color_jitter": "uniform(0.1,0.5)",
    "augment.three_augment": "choice(none,true,false)",
    "micro_batch": "int(1,8)",
    "lr": "loguniform(1e-4,1e-2)",
    "min_lr": "loguniform(1e-7,1e-6)",
    "warmup_epochs": "uniform(0,2)",
    "batch_size": "choice(16,32)",
    "tracking.search_area_factor": "uniform(2,6)",
}
OF_THE_SCHEDULE = ("epochs", "pairs_per_epoch")
"""Fields that may be none, too, but cannot be searched over."""


def test_the_list_of_fields_that_may_be_none_is_complete() -> None:
    base = TrainConfig()
    nullable = {
        path for path in field_paths(base) if type(None) in _members(field_type(base, path))
    }
    assert nullable == {*NULLABLE, *OF_THE_SCHEDULE}


@pytest.mark.parametrize("path", NULLABLE)
def test_every_field_that_may_be_none_can_be_searched_over(path: str) -> None:
    space = build_space(TrainConfig(), [f"{path}={NULLABLE[path]}"])
    for base in (space.base, replace_path(space.base, path, None)):
        some = replace(space, base=base)
        value = (some.prior() | some.usual_tracking())[path]
        space.configure({path: value})
        dimension = space.dimensions[path]
        if dimension.kind == "choice":
            assert value in dimension.values
        else:
            assert dimension.bounds[0] <= value <= dimension.bounds[1]


def test_what_none_stands_for_is_tried_first() -> None:
    space = build_space(TrainConfig(), ["lora.alpha=uniform(1,128)", "micro_batch=int(1,64)"])
    assert space.prior()["lora.alpha"] == 64.0, "the rank"
    assert space.prior()["micro_batch"] == 32, "the whole batch"


def test_a_trial_trains_what_none_stands_for_where_its_configuration_is_read_again() -> None:
    space = build_space(
        TrainConfig(), ["lr=choice(none,0.01)", "augment.color_jitter=choice(none,0.1)"]
    )
    config = space.configure({"lr": None, "augment.color_jitter": None})
    assert config == resolve(config)
    assert config.lr == resolve(TrainConfig()).lr
    assert config.augment == resolve(TrainConfig()).augment


def test_space_without_adapters_has_no_rank() -> None:
    assert "lora.rank" not in build_space(TrainConfig(adaptation="head")).dimensions


def test_numpy_numbers_become_plain_numbers() -> None:
    import numpy as np

    config = build_space(TrainConfig()).configure({"lora.rank": np.int64(8), "lr": np.float64(0.1)})
    assert type(config.lora.rank) is int
    assert type(config.lr) is float


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("lora.rang=choice(1,2)", "no configuration field lora.rang"),
        ("lora=choice(1,2)", "no configuration field lora;"),
        ("lora.dropout", "is not PATH=RANGE"),
        ("lora.dropout=uniform(0.2,0)", "low < high"),
        ("lora.dropout=uniform(0,1)", "give 0 or more, below 1"),
        ("lora.dropout=uniform(0,x)", "not a finite number"),
        ("lora.dropout=uniform(0,inf)", "not a finite number"),
        ("lora.dropout=normal(0,1)", "unknown range normal"),
        ("lora.dropout=uniform(0)", "two ends"),
        ("lr=loguniform(0,1)", "above 0"),
        ("lr=loguniform(-1,1)", "above 0"),
        ("lora.rank=uniform(1,8)", r"use int\(a,b\)"),
        ("lora.rank=choice(0,8)", "lora.rank is 0"),
        ("lora.rank=choice(4,4)", "twice"),
        ("lora.rank=choice(4.5)", "not an integer"),
        ("lora.init=choice(gaussian,zeros)", "'zeros' is not possible"),
        ("lora.targets=choice(q+x)", "lora.targets has"),
        ("lora.rslora=choice(yes,no)", "takes true or false"),
        ("epochs=choice(2,4)", "how many pairs a trial is trained on"),
        ("batch_size=choice(32,1500)", "27% fewer pairs; give batch sizes that divide"),
        ("batch_size=int(690,700)", "fewer pairs"),
        ("batch_size=choice(32,4096)", "batch_size is 4096 but an epoch has 2048 pairs"),
        ("beta2=uniform(0.9,1)", "beta2 is 1.0; give 0 or more, below 1"),
        ("tracking.window_penalty=uniform(0,2)", "tracking.window_penalty is 2.0; give 0 to 1"),
        ("lora.rnk=choice(1,2)", "did you mean lora.rank"),
        ("window_penalty=uniform(0,1)", "did you mean tracking.window_penalty"),
        ("variant=choice(T-112,Z-1)", "no variant Z-1"),
        ("seed=int(1,9)", "one seed"),
        ("lr=__import__('os').system('x')", "not a finite number"),
    ],
)
def test_a_path_or_range_that_cannot_be_is_an_error(entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_space(TrainConfig(), [entry])


def test_everything_fixed_leaves_nothing_to_search() -> None:
    with pytest.raises(UserError, match="empty"):
        build_space(TrainConfig(), ["lora.rank=8", "lr=1e-3", "head.depth=1"])


def test_the_tune_space_holds_the_same_ranges() -> None:
    space = build_space(default_config(), ["head.depth=int(1,3)", "lora.dropout=uniform(0,0.2)"])
    domains = space.to_tune()
    assert domains["lora.rank"].categories == [4, 8, 16, 32, 64, 128]
    assert (domains["head.depth"].lower, domains["head.depth"].upper) == (1, 4)
    assert {domains["head.depth"].sample() for _ in range(200)} == {1, 2, 3}
    assert 0 <= domains["lora.dropout"].sample() <= 0.2
    low, high = domains["lr"].lower, domains["lr"].upper
    assert (low, high) == pytest.approx((1e-4, 1e-2))


def test_parsing_keeps_thefield_type() -> None:
    base = TrainConfig(lora=LoraConfig(rank=8))
    assert parse_entry("lora.alpha=choice(none,16)", base).values == (None, 16.0)
    assert parse_entry("lora.rslora=true", base).values == (True,)


def test_a_batch_size_keeps_the_pairs_of_the_schedule() -> None:
    space = build_space(TrainConfig(), ["batch_size=choice(8,32,128)"])
    assert space.prior()["batch_size"] == 32
    for size in (8, 32, 128):
        config = space.configure({"batch_size": size})
        assert num_pairs(config) == num_pairs(space.base)
        assert config.lr == space.base.lr, "nothing is coupled unless it is asked for"


@pytest.mark.parametrize(("coupling", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_learning_rates_follow_the_batch_size_where_that_is_asked_for(
    coupling: Coupling, factor: float
) -> None:
    entries = ["batch_size=choice(8,32,128)", "lr=loguniform(1e-5,1e-2)"]
    space = build_space(TrainConfig(), entries, lr_with_batch=coupling)
    assert space.base.min_lr is not None
    for size, times in ((32, 1.0), (128, factor), (8, 1 / factor)):
        config = space.configure({"batch_size": size, "lr": 1e-3})
        assert config.lr == pytest.approx(1e-3 * times)
        assert config.min_lr == pytest.approx(space.base.min_lr * times)


def test_a_coupling_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="the batch size is not searched"):
        build_space(TrainConfig(), lr_with_batch="sqrt")
    entries = ["batch_size=choice(8,128)", "lr=loguniform(0.1,9)"]
    with pytest.raises(UserError, match="cannot be with lr 9 and a batch of 128: lr is 36"):
        build_space(TrainConfig(), entries, lr_with_batch="linear")


def test_what_needs_no_training_is_no_part_of_a_trial() -> None:
    entries = ["tracking.window_penalty=uniform(0.2,0.7)", "beta1=choice(0.8,0.9)"]
    space = build_space(TrainConfig(), entries)
    assert set(space.to_tune()) == set(space.prior()) == {"lora.rank", "lr", "head.depth", "beta1"}
    assert space.usual_tracking() == {"tracking.window_penalty": 0.45}
    assert space.configure({"tracking.window_penalty": 0.3}).tracking.window_penalty == 0.3
