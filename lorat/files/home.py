"""The folder that holds what the platform keeps on this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def home() -> Path:
    """Return ``$LORAT_HOME``, or ``~/.lorat``: datasets, runs and the local MLflow store.

    It does not depend on the working directory, so a job that Ray runs in a copy of the
    repository finds the same datasets and runs as one started by hand.
    """
    return Path(os.path.expanduser(os.environ.get("LORAT_HOME") or "~/.lorat"))


def home_problem() -> str | None:
    """Say why nothing can be written into the home folder, none if something can."""
    folder = home().absolute()
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def storage_address(given: str | None = None) -> str:
    """Return where runs and searches are: ``given``, ``$LORAT_STORAGE``, or ``runs`` at home."""
    return given or os.environ.get("LORAT_STORAGE") or str(home() / "runs")
