"""What an installed copy holds: every module, and the marks that its types are meant to be read."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"lorat": ROOT / "lorat", "lorat_platform": ROOT / "platform" / "lorat_platform"}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the names of the files in the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_says_that_the_package_is_typed(held: set[str], package: str) -> None:
    assert f"{package}/py.typed" in held


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_holds_every_module(held: set[str], package: str) -> None:
    """A line of .gitignore that also fits a folder of a package keeps it out of wheels and jobs."""
    folder = PACKAGES[package]
    modules = {f"{package}/{path.relative_to(folder)}" for path in folder.rglob("*.py")}
    assert modules <= held
