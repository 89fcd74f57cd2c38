"""The locked versions are those of the project, and nothing else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "infra" / "requirements.lock").read_text().splitlines()
LOCKED = {
    canonicalize_name(name): Version(version)
    for name, version in (line.split("==") for line in LINES)
}


def _requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    every = [Requirement(line) for group in groups for line in group]
    return [requirement for requirement in every if requirement.name != project["name"]]


def test_every_dependency_is_locked_at_a_version_that_fits() -> None:
    wrong = {
        str(requirement): str(LOCKED.get(canonicalize_name(requirement.name)))
        for requirement in _requirements()
        if LOCKED.get(canonicalize_name(requirement.name)) is None
        or not requirement.specifier.contains(LOCKED[canonicalize_name(requirement.name)])
    }
    assert not wrong, "write the lock again: python3.11 infra/lock.py"


def test_every_line_is_a_public_version_of_a_package() -> None:
    """No local path, index, local version such as +cpu, marker or hash."""
    assert [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", line)] == []
    assert len(LOCKED) == len(LINES)


def test_the_ray_images_have_the_locked_version() -> None:
    tag = f"rayproject/ray:{LOCKED['ray']}-py311"
    images = re.findall(r"rayproject/ray:[\w.-]+", (ROOT / "infra" / "Dockerfile").read_text())
    assert images == [f"{tag}-cpu", f"{tag}-gpu"]
