"""Find the golden fixtures, in the folder that ``LORAT_GOLDEN`` names or the one kept here.

A test module names the files it checks in a module-level tuple ``COVERS`` of patterns and is
parametrised over what :func:`golden` finds, so a new set dropped into the folder is tested
without a change.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(os.environ.get("LORAT_GOLDEN") or Path(__file__).parent / "fixtures")


def golden(pattern: str) -> list[Path]:
    """Return the fixture files that match a name pattern such as ``*_loss.npz``, sorted.

    Raises:
        FileNotFoundError: if there is no fixture folder.
    """
    if not FOLDER.is_dir():
        raise FileNotFoundError(f"There is no fixture folder {FOLDER}; set LORAT_GOLDEN to one.")
    return sorted(FOLDER.glob(pattern))


def beside(path: Path, ending: str, other: str) -> Path:
    """Return the file of the same set: ``a_io.npz`` -> ``a_merged.safetensors``."""
    assert path.name.endswith(ending)
    return path.with_name(path.name.removesuffix(ending) + other)


def name_of(path: Path) -> str:
    """Return the test id of a fixture file."""
    return path.stem
