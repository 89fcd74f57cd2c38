"""Home folders whose MLflow tables are there already: making them takes seconds per test."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from lorat_platform.recording.store import connect


@functools.cache
def _template() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mlflow-template-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    connect(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


def make_home(folder: Path) -> Path:
    """Make a home folder with an empty store; one that is there stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "mlflow.db").exists():
        shutil.copyfile(_template(), folder / "mlflow.db")
    return folder
