"""Run a job inside the test process: the imports of torch and MLflow are paid once."""

from __future__ import annotations

import contextlib
import importlib
import runpy
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def import_job(name: str) -> ModuleType:
    """Return the module ``jobs/NAME.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "jobs"))
        module = importlib.import_module(name)
        importlib.import_module("loading").LOADING.end()  # as the job would when it runs
        return module


def run_in_process(name: str, *arguments: object) -> int:
    """Run ``jobs/NAME.py`` as its command line would and return the exit code."""
    # What jobs/bootstrap.py does to Ctrl-C when it is imported is for a process of its own.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as after:
        for number, handler in handlers.items():
            after.callback(signal.signal, number, handler)
        path = ROOT / "jobs" / f"{name}.py"
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        patch.syspath_prepend(str(ROOT / "jobs"))
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
    code = stop.value.code
    return code if isinstance(code, int) else 0
