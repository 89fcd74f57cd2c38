"""The image: linted, and every command of it run in a fresh environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

pytestmark = pytest.mark.processes(minutes=0.4)

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "infra" / "Dockerfile"
BIN = Path(sys.executable).parent


def _stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of every stage by its name: (keyword, value)."""
    parser = DockerfileParser(path=str(DOCKERFILE), cache_content=True)
    stages: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for step in parser.structure:
        if step["instruction"] == "FROM":
            name = step["value"].split(" AS ")[1]
        if step["instruction"] != "COMMENT":
            stages.setdefault(name, []).append((step["instruction"], step["value"]))
    return stages


def _commands(stage: str) -> list[str]:
    return [value for keyword, value in _stages()[stage] if keyword == "RUN"]


def _health(stage: str) -> list[str]:
    (value,) = [value for keyword, value in _stages()[stage] if keyword == "HEALTHCHECK"]
    return json.loads(value.split("CMD", 1)[1])


def _run(command: str | list[str], environment: Path, folder: Path) -> None:
    """Run one command of the image, with ``environment`` as its Python."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    result = subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        env=own | {"PATH": f"{environment}/bin:{BIN}:{os.environ['PATH']}", "PIP_QUIET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}{result.stderr[-4000:]}"


def test_the_linter_has_nothing_to_say() -> None:
    result = subprocess.run(
        [BIN / "hadolint", "--no-color", DOCKERFILE], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("stage", ["lorat", "mlflow"])
def test_the_image_is_not_root_and_checks_its_health(stage: str) -> None:
    instructions = _stages()[stage]
    users = [value for keyword, value in instructions if keyword == "USER"]
    assert users
    assert all(re.fullmatch(r"[1-9]\d*:[1-9]\d*", user) for user in users)
    assert _health(stage)


@pytest.mark.parametrize("stage", ["lorat", "mlflow"])
def test_the_image_reports_nothing_about_its_use(stage: str) -> None:
    set_there = " ".join(value for keyword, value in _stages()[stage] if keyword == "ENV")
    assert "MLFLOW_DISABLE_TELEMETRY=true" in set_there
    assert stage == "mlflow" or "RAY_USAGE_STATS_ENABLED=0" in set_there


def test_the_build_context_holds_what_is_copied_and_no_more() -> None:
    """Only named folders go into an image: no checkout history, data, run or .env file."""
    rules = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().split()
    assert rules[0] == "*"
    kept = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert kept == {
        "infra/requirements.lock", "jobs", "lorat", "platform", "LICENSE", "README.md",
        "pyproject.toml",
    }  # fmt: skip
    assert all((ROOT / path).exists() for path in kept)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build context, as .dockerignore leaves it."""
    folder = tmp_path_factory.mktemp("context")
    rules = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().split()
    for rule in rules:
        if rule.startswith("!"):
            source, target = ROOT / rule[1:], folder / rule[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
    return folder


@pytest.fixture(params=["filled", pytest.param("fresh", marks=pytest.mark.exhaustive)])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A virtual environment of its own.

    A filled one sees the packages of the one that runs the tests, so that pip only finds that
    everything is there; a fresh one has 7 GB in the end and is deleted at once.
    """
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=request.param == "fresh")
    if request.param == "filled":
        (site,) = folder.glob("lib/python3*/site-packages")
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.timeout(900)
def test_every_command_of_the_mlflow_image_runs(tmp_path: Path, environment: Path) -> None:
    shutil.copy(ROOT / "infra" / "requirements.lock", tmp_path)
    for command in _commands("mlflow"):
        _run(command, environment, tmp_path)
    _run(["mlflow", "server", "--help"], environment, tmp_path)


@pytest.mark.timeout(900)
def test_every_command_of_the_ray_image_runs(context: Path, environment: Path) -> None:
    commands = _commands("lorat")
    assert len(commands) == 2
    assert any("ray drain-node --help" in command for command in commands)
    for command in commands:
        _run(command, environment, context)
    _run(_health("lorat"), environment, context.parent)  # the project itself, not this folder
    assert list(environment.glob("lib/python3*/site-packages/lorat_platform/__init__.py"))
