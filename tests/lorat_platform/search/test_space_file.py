"""A space in a file: the default one, both forms, and mistakes by line and field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat_platform.search import space as spaces
from lorat_platform.search.dimension import Dimension
from lorat_platform.search.plan import default_config
from lorat_platform.search.space import build_space
from lorat_platform.search.space_file import read_space_file

DEFAULT = Path(spaces.__file__).with_name("default-space.yaml")
JSON = """{
\t// the same in JSON
\t"lora": {"rank": [4, 8, 16, 32, 64, 128]},  # comments of either kind
\t"lr": {"loguniform": [1e-4, 0.01]}, /* over
\tlines */ "head.depth": "choice(1,2,3,4)",
\t"backbone": "s3://a//b#c" // no comment in a text
}"""


def read(tmp_path: Path, text: str, name: str = "space.yaml") -> tuple[Dimension, ...]:
    (tmp_path / name).write_text(text)
    return read_space_file(tmp_path / name, default_config())


def test_the_file_that_is_shipped_is_the_default_space() -> None:
    base = default_config()
    shipped = build_space(base, instead=read_space_file(DEFAULT, base))
    assert shipped.base == build_space(base).base
    assert list(shipped.dimensions) == list(build_space(base).dimensions)
    for path, dimension in build_space(base).dimensions.items():
        assert shipped.dimensions[path].kind == dimension.kind
        assert shipped.dimensions[path].values == pytest.approx(dimension.values)


def test_what_the_shipped_file_suggests_can_be_searched(tmp_path: Path) -> None:
    more = re.sub(r"^# (?=\w[\w.]+: )", "", DEFAULT.read_text(), flags=re.MULTILINE)
    space = build_space(default_config(), instead=read(tmp_path, more))
    assert {"batch_size", "beta2", "lora.targets", "tracking.window_penalty"} < set(
        space.dimensions
    )
    assert space.base.weight_decay == 0.05


def test_json_with_comments_says_the_same(tmp_path: Path) -> None:
    found = read(tmp_path, JSON, "space.json")
    assert found[:3] == read_space_file(DEFAULT, default_config())
    assert found[3].values == ("s3://a//b#c",)


def test_a_file_is_the_whole_space_and_entries_add_to_it(tmp_path: Path) -> None:
    file = read(tmp_path, "head.depth: [1, 2]\nlora.rank: 8\n")
    space = build_space(default_config(), ["lora.dropout=uniform(0,0.2)"], instead=file)
    assert list(space.dimensions) == ["head.depth", "lora.dropout"]
    assert space.base.lora.rank == 8


def test_values_are_read_by_the_type_of_their_field(tmp_path: Path) -> None:
    text = "lr: 1e-5\nlora.rslora: [true, false]\nlora.alpha: [null, 16]\n"
    text += "init_from: [none, 'no']\nlora.targets: [[q, v], q+k]\n"
    values = {d.path: d.values for d in read(tmp_path, text)}
    assert values == {
        "lr": (1e-5,),
        "lora.rslora": (True, False),
        "lora.alpha": (None, 16.0),
        "init_from": (None, "no"),
        "lora.targets": ("q+v", "q+k"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1e-3\nlora.rnk: [4]", "line 2: there is no configuration field lora.rnk; did you "
         "mean lora.rank"),
        ("# a\nlora:\n  rnk: [4]", "line 3: there is no configuration field lora.rnk"),
        ("lorra:\n  rank: 4", "line 1: there is no configuration field lorra"),
        ("window_penalty: 0.3", "did you mean tracking.window_penalty"),
        ("lr: 1e-3\nhead.depth: 2\nlr: 1e-4", "line 3: lr is given twice, first in line 1"),
        ("lora: {rank: 4}\nlora.rank: 8", "line 2: lora.rank is given twice, first in line 1"),
        ("lora:\n  rank: 4\nlora:\n  alpha: 8", "line 3: lora is given twice"),
        ("\nhead.depth: uniform(1,3)", "line 2: head.depth takes an integer; use int"),
        ("head.depth: [1, two]", "line 1: head.depth: 'two' is not an integer"),
        ("head.depth: [1, 1]", "line 1: head.depth lists a value twice"),
        ("lr: {lognormal: [1, 2]}", "line 1: lr has the unknown range lognormal; write uniform"),
        ("lr: {loguniform: [1]}", "line 1: lr needs two ends"),
        ("lr: {low: 1, high: 2}", "line 1: lr has several parts; write uniform"),
        ("lr: loguniform(2e-3,1e-3)", "line 1: lr is empty; give low < high"),
        ("lr:", "line 1: lr has no value"),
        ("lr: [{a: 1}]", "line 1: lr has a value with parts"),
        ("lr: [1e-3", "line 1: while parsing a flow sequence, expected"),
        ("a: &x {b: *x}", "line 1: there is no configuration field a"),
        ("lora: &x {rank: 4, lora: *x}", "no configuration field lora.lora"),
        ("- lr=1e-3", "holds no fields"),
        ("", "holds no fields"),
        ("lora.rank: [4]\n---\nlr: 1", "expected a single document"),
        ("? [a]\n: b", "line 1: a field's name is missing"),
        ("lr: \x07", "special characters are not allowed"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "space.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_configuration_refuses_is_named_by_line_as_well(tmp_path: Path) -> None:
    file = read(tmp_path, "lr: 1e-3\nlora.dropout: uniform(0,1)\n")
    message = r"space.yaml, line 2: lora.dropout cannot be: lora.dropout is 1.0; give 0 or more"
    with pytest.raises(UserError, match=message):
        build_space(TrainConfig(), instead=file)
    with pytest.raises(UserError, match="line 1: seed would give every trial other samples"):
        build_space(TrainConfig(), instead=read(tmp_path, "seed: [1, 2]"))


@pytest.mark.parametrize("make", ["nothing", "folder", "bytes", "huge"])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, make: str) -> None:
    file = tmp_path / "space.yaml"
    if make == "folder":
        file.mkdir()
    elif make != "nothing":
        file.write_bytes(b"\xff\xfe\x00" if make == "bytes" else b"#" * (1 << 21))
    with pytest.raises(UserError, match=r"space\.yaml"):
        read_space_file(file, default_config())
