"""Every number that a user gives has stated bounds, checked when the object is made."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
import typing
from typing import Any

import pytest

from lorat.config.bounds import bounded_fields
from lorat.config.fields import from_dict
from lorat.config.training import TrainConfig
from lorat.config.variants import VARIANTS, Variant
from lorat.data.datasets import DATASETS
from lorat.data.shards.windows import WindowLaw
from lorat.errors import UserError
from tests.jobs.in_process import import_job

HUGE = (math.nan, math.inf, -math.inf, 10**30, -(10**30), 2**63, 10**5000, 1e300, "7", True, [1])


def _options() -> list[type[Any]]:
    """List all dataclasses that a configuration, a header or a command line is read into."""
    from lorat_platform.data import benchmark
    from lorat_platform.evaluation import benchmark as track_benchmark
    from lorat_platform.search import benchmark as search_benchmark
    from lorat_platform.training import benchmark as train_benchmark

    names = ("train", "evaluate", "promote", "track", "export", "tune", "ingest")
    jobs = [import_job(name) for name in names]
    modules = [*jobs, benchmark, train_benchmark, track_benchmark, search_benchmark]
    found: dict[type[Any], None] = dict.fromkeys((Variant, WindowLaw, *DATASETS.values()))
    waiting = [
        value
        for module in modules
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and inspect.isclass(value) and value.__name__ in NAMES
    ]
    while waiting:
        kind = waiting.pop()
        found[kind] = None
        hints = typing.get_type_hints(kind).values()
        waiting += [hint for hint in hints if dataclasses.is_dataclass(hint)]  # type: ignore[misc]
    return list(found)


NAMES = ("Options", "Verify", "Reindex", "Preview", "IngestConfig", "DataBenchmark",
         "TrainBenchmark", "TrackBenchmark", "SearchBenchmark", "SearchOptions",
         "RunOptions")  # fmt: skip


def _is_number(hint: Any) -> bool:
    return hint in (int, float) or any(_is_number(part) for part in typing.get_args(hint))


def _docstrings(cls: type[Any]) -> dict[str, str]:
    """Return the text below each field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def test_every_number_has_bounds_and_says_them() -> None:
    kinds = _options()
    assert {"TrainConfig", "RunOptions", "SearchOptions", "EvaluationConfig", "GateConfig"} <= {
        kind.__name__ for kind in kinds
    }
    num = 0
    for kind in kinds:
        bounded = bounded_fields(kind)
        for name, hint in typing.get_type_hints(kind).items():
            if typing.get_origin(hint) is typing.ClassVar or not _is_number(hint):
                continue
            assert name in bounded, f"{kind.__name__}.{name} has no bounds"
            text = _docstrings(kind).get(name, "")
            assert str(bounded[name][1]) in text, f"{kind.__name__}.{name}: {bounded[name][1]}"
            num += 1
    assert num > 70


def test_what_is_out_of_bounds_is_one_sentence() -> None:
    num = 0
    for kind in set(_options()):
        required = {
            field.name: "x"
            for field in dataclasses.fields(kind)
            if field.init and field.default is field.default_factory is dataclasses.MISSING
        }
        if kind is Variant:
            required = dataclasses.asdict(VARIANTS["N-112"])
        for name, (number, bounds, _) in bounded_fields(kind).items():
            for value in HUGE:
                wrong_type = isinstance(value, str | bool | list) or (
                    number is int and isinstance(value, float)
                )
                if not wrong_type and value in bounds:
                    continue
                given = required | {name: (value,) if name == "parts" else value}
                with pytest.raises(UserError, match=name.replace("_", ".")) as caught:
                    kind(**given)
                assert len(str(caught.value)) < 200
                num += 1
    assert num > 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 10_000_000}, "variant.depth is 10000000; give 1 to 256"),
        ({"dim": 8192, "depth": 256}, "more than 5 billion"),
        ({"dim": 100, "num_heads": 3}, "no multiple of num_heads 3"),
        ({"search_size": 100}, "search_size 100 is no multiple of patch_size 14"),
        ({"search_area_factor": float("nan")}, "variant.search_area_factor is NaN; give 1 to 100"),
        ({"search_size": 2048, "template_size": 512, "patch_size": 1}, "more than 128 patches"),
        ({"search_area_factor": 0.5}, "give 1 to 100"),
        ({"dim": None}, "dim is null; give a whole number"),
    ],
)
def test_a_header_with_impossible_sizes_is_refused(changes: dict[str, Any], message: str) -> None:
    values = dataclasses.asdict(VARIANTS["N-112"]) | changes
    with pytest.raises(UserError, match=message):
        from_dict(Variant, values)


def test_a_header_without_a_size_is_refused() -> None:
    values = dataclasses.asdict(VARIANTS["N-112"])
    del values["depth"]
    with pytest.raises(UserError, match="has no depth"):
        from_dict(Variant, values)


def test_the_ends_of_the_bounds_are_allowed() -> None:
    for name, (kind, bounds, _) in bounded_fields(TrainConfig).items():
        ends = [end for end, out in ((bounds.low, bounds.above), (bounds.high, bounds.below))
                if not out]  # fmt: skip
        for end in ends:
            assert getattr(TrainConfig(**{name: kind(end)}), name) == end
