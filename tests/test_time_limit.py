"""A test that hangs ends, shows where, and spares those after it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.processes(minutes=0.3)

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import ctypes, subprocess, sys, time

def test_waits_for_a_process():
    subprocess.run([sys.executable, "child.py"])
    while True:
        time.sleep(0.1)

def test_does_not_want_to_end():
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass

def test_holds_the_interpreter():
    ctypes.PyDLL(None).sleep(1000)

def test_is_harmless():
    pass
"""
CHILD = """
import os, pathlib, subprocess, sys, time

def stuck_beside_its_family():
    pathlib.Path("pid").write_text(str(os.getpid()))
    time.sleep(1000)

if sys.argv[1:]:
    stuck_beside_its_family()
subprocess.Popen([sys.executable, __file__, "again"], start_new_session=True)
"""


def run(folder: Path, test: str) -> subprocess.CompletedProcess[str]:
    """Run one of the tests above, and the harmless one, with limits of seconds."""
    (folder / "test_them.py").write_text(TESTS)
    (folder / "child.py").write_text(CHILD)
    (folder / "conftest.py").write_text("from tests import time_limit\ntime_limit.PATIENCE_S = 1\n")
    (folder / "pytest.ini").touch()
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "tests.time_limit", "-p", "no:cacheprovider",
            "--timeout=3", f"test_them.py::{test}", "test_them.py::test_is_harmless",
        ],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip


def test_a_hanging_test_fails_with_the_stack_of_every_process_and_the_next_one_runs(
    tmp_path: Path,
) -> None:
    done = run(tmp_path, "test_waits_for_a_process")
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "test_waits_for_a_process did not end in 3 s." in done.stdout
    for function in ("in test_waits_for_a_process", "stuck_beside_its_family (child.py"):
        assert function in done.stdout
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("test", ["test_does_not_want_to_end", "test_holds_the_interpreter"])
def test_a_test_that_cannot_be_ended_takes_its_process_along(test: str, tmp_path: Path) -> None:
    done = run(tmp_path, test)
    assert done.returncode == 1
    assert f"in {test}" in done.stderr
