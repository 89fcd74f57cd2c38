"""The example of the room trains, as it stands there, without Ray."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import lorat.learning
from lorat.checkpoint import load
from tests.small_shards import make_shards

ROOT = Path(__file__).resolve().parents[3]


def test_the_example_trains_with_a_dataloader_of_torch(tmp_path: Path) -> None:
    _, _, code = (lorat.learning.__doc__ or "").partition("is this::\n")
    shards = make_shards(tmp_path / "train", split="train")
    code, replaced = re.subn(
        r'synthetic\.ensure\(None, "train"\)', repr(shards), textwrap.dedent(code)
    )
    assert replaced == 1, "rendering the whole set would take a minute"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nassert 'ray' not in sys.modules"],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        f"step {step}" for step in (1, 2, 3, 4)
    ]
    assert load(tmp_path / "tracker").variant.name == "T-112"
