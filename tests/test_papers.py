"""The papers for whoever goes on: they name what is there, and their recipe for a dataset works."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml

from lorat.data import datasets
from lorat.data.datasets import DATASETS, Findings
from lorat.data.shards.verification import verify
from lorat.errors import UserError
from tests.jobs.in_process import run_in_process
from tests.lorat.layouts import boxes, write_image, write_rows
from tests.lorat.loading import to_shards

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = ROOT / "platform" / "lorat_platform"
CODE = ("lorat", "platform/lorat_platform", "jobs", "infra", "tests")
ROOMS = [
    ROOT / "lorat" / "data" / "shards",
    ROOT / "lorat" / "checkpoint",
    PLATFORM / "recording",
    PLATFORM / "search",
]
"""Folders that draw what they write."""
PAPERS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    *sorted((ROOT / "infra").glob("*.md")),
    *(room / "README.md" for room in ROOMS),
]
EXAMPLE = "birds"
"""What the recipe adds, which is not there."""


def _name(paper: Path) -> str:
    return str(paper.relative_to(ROOT))


def _quoted(text: str) -> set[str]:
    """Return what stands between backticks, without blocks of code."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return {quote.strip() for quote in re.findall(r"`([^`\n]+)`", prose)}


def _paths(text: str) -> set[str]:
    """Return the modules that a paper names anywhere, and the folders between backticks."""
    modules = set(re.findall(r"(?<![\w./-])(?:[\w.-]+/)*[\w-]+\.py\b", text)) - {"__init__.py"}
    tops = (*(folder.partition("/")[0] for folder in CODE), "lorat_platform")
    folders = {q for q in _quoted(text) if re.fullmatch(rf"(?:{'|'.join(tops)})/[\w./-]*", q)}
    return {path for path in modules | folders if EXAMPLE not in path}


def _exists(path: str, paper: Path) -> bool:
    if path.startswith("lorat_platform/"):
        path = f"platform/{path}"
    places = [ROOT / path]
    if paper.parent in ROOMS:
        places.append(paper.parent / path)
    elif "/" not in path:
        places += [*(ROOT / "tests").rglob(path), ROOT / "infra" / path]
    return any(place.exists() for place in places)


@pytest.mark.parametrize("paper", PAPERS, ids=_name)
def test_every_module_that_a_paper_names_is_there(paper: Path) -> None:
    named = _paths(paper.read_text())
    assert sorted(path for path in named if not _exists(path, paper)) == []


@cache
def _words() -> frozenset[str]:
    """Return every word of the code and of the files that start it."""
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "Makefile", ROOT / "pyproject.toml", *(ROOT / "infra").rglob("*.sh")]
    own = Path(__file__)
    return frozenset(
        word for path in files if path != own for word in re.findall(r"\w+", path.read_text())
    )


@pytest.mark.parametrize("paper", PAPERS, ids=_name)
def test_every_name_that_a_paper_quotes_occurs_in_the_code(paper: Path) -> None:
    quoted = {q for q in _quoted(paper.read_text()) if re.fullmatch(r"\w+(\.\w+)*", q)}
    names = {q for q in quoted if "_" in q and not q.endswith((".py", ".yaml", ".json", ".md"))}
    names = {name for name in names if EXAMPLE not in name}
    assert sorted(n for n in names if not set(re.findall(r"\w+", n)) <= _words()) == []


@pytest.mark.parametrize("paper", PAPERS, ids=_name)
def test_every_link_of_a_paper_leads_somewhere(paper: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", paper.read_text())
    assert [link for link in links if not (paper.parent / link).exists()] == []


def test_the_page_on_upgrades_names_every_internal_of_ray_that_is_imported() -> None:
    known = _quoted((ROOT / "infra" / "UPGRADING.md").read_text())
    imported = set()
    for path in (p for folder in CODE[:4] for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    private = {name for name in imported if re.match(r"ray\.(train\.v2\b|(.+\.)?_)", name)}
    assert private, "nothing is found any more"
    unnamed = {
        name
        for name in private
        if name.rpartition(".")[2] not in known
        and not any(name == k or name.startswith(f"{k}.") for k in known if k.startswith("ray."))
    }
    assert sorted(unnamed) == []


def test_the_page_on_upgrades_names_tests_that_there_are() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "infra" / "UPGRADING.md").read_text()))
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert sorted(name for name in named if f"def {name}(" not in tests) == []


def _recipe(section: str) -> list[str]:
    """Return the blocks of code of a section of the page on adding."""
    page = (ROOT / "infra" / "ADDING.md").read_text()
    text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^ *```\w+\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


def test_a_metric_and_a_search_dimension_are_added_as_the_recipes_say(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("assets", "__pycache__")
    for package in ("lorat", "platform/lorat_platform"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=left_out)
    (metric,), (field, use) = _recipe("A metric"), _recipe("A search dimension")
    for name, before, added in (
        ("lorat/metrics/catalogue.py", "METRICS: dict[str, Metric] = {\n", metric),
        ("lorat/config/training.py", "class TrainConfig:\n", field),
        ("lorat/learning/optimisation.py", "eps=config.adam_eps,\n", use),
    ):
        file = tmp_path / name
        head, mark, tail = file.read_text().partition(before)
        assert mark, f"{name} has no {before!r} any more"
        if name == "lorat/config/training.py":  # after what the class says of itself
            about, quotes, tail = tail.partition('"""\n')
            mark += about + quotes
        file.write_text(head + mark + textwrap.indent(added, "    ") + tail)
    code = """
        import numpy as np, torch
        from lorat.config.training import TrainConfig
        from lorat.learning.optimisation import build_optimizer
        from lorat.metrics import GroundTruth, evaluate
        from lorat.metrics.catalogue import table
        from lorat.metrics.comparison import GateConfig
        from lorat_platform.search.plan import SearchOptions, make_plan
        from lorat_platform.search.results.board import Leaderboard

        boxes = np.tile([10.0, 10.0, 50.0, 50.0], (4, 1))
        found = boxes + np.array([[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [9, 0, 9, 0.0]])
        scores = evaluate({"a": found}, {"a": GroundTruth(boxes=boxes)}).scores
        print(scores["SR0.9"])
        GateConfig(metric="sr90")
        options = SearchOptions(objective="sr90", space=("amsgrad=choice(true,false)",))
        plan = make_plan(TrainConfig(variant="T-112"), options)
        board = Leaderboard(objectives=plan.options.objectives, rungs=plan.rungs)
        board.add("t", {}).report({"step": 1, "sr90": 0.5})
        print("sr90" in board.table().column_names, "`sr90`" in table())
        config = plan.space.configure({"amsgrad": True})
        print(build_optimizer(torch.nn.Linear(2, 2), config).param_groups[0]["amsgrad"])
    """
    places = os.pathsep.join([str(tmp_path), str(tmp_path / "platform")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": places, "LORAT_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["0.75", "True", "True", "True"], done.stderr


def test_a_dataset_is_added_as_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = _recipe("A dataset")
    code = block.replace("lorat.data.datasets", datasets.__name__)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / f"{EXAMPLE}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "code")
    kind = importlib.import_module(EXAMPLE).Birds
    monkeypatch.setitem(DATASETS, EXAMPLE, kind)

    assert run_in_process("ingest", EXAMPLE, "--help") == 0
    assert "Which split the folder is" in capsys.readouterr().out

    for name in ("heron", "wren"):
        for t in range(6):
            write_image(tmp_path / "source" / name / "images" / f"{t + 1}.jpg", t)
        rows = boxes(6)
        rows[2] = [float("nan")] * 4
        write_rows(tmp_path / "source" / name / "boxes.txt", rows)
    index, findings = to_shards(kind(source=tmp_path / "source"), tmp_path / "out")
    assert verify(index.uri) == []
    assert (index.name, index.split, index.num_tracks) == ("birds", "train", 2)
    np.testing.assert_array_equal(index.box[1], [12, 13, 42, 37])
    assert index.valid.tolist() == [True, True, False, True, True, True] * 2
    assert {finding.frames for finding in findings} == {(3,)}

    (tmp_path / "holiday").mkdir()
    with pytest.raises(UserError, match=r"expected .*; found "):
        kind(source=tmp_path / "holiday").entries(Findings())


def test_ci_runs_the_test_command_of_the_readme() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    command = job["steps"][-1]["run"]
    script = (ROOT / command).read_text()
    assert script.rstrip().splitlines()[-1] == "make test"
    assert "make test " in (ROOT / "README.md").read_text()


def test_what_is_committed_is_formatted_and_checked_as_the_test_command_does() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    style = re.findall(r"^style:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    ours = {hook["entry"].removeprefix(".venv/bin/") for hook in hooks}
    theirs = {line.split("/")[-1].strip() for line in style[0].splitlines()}
    assert ours == {line.removesuffix(" .").removesuffix(" --check") for line in theirs}
