"""The types agree: the first of all tests, beside which the second process begins with others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_types_agree() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "mypy"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
