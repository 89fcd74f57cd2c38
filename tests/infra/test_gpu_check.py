"""The check on a GPU: its steps are bounded and independent, its table says what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "infra"))

import gpu_check  # noqa: E402

pytestmark = pytest.mark.processes(minutes=0.3)
SCRIPT = ROOT / "infra" / "gpu_check.sh"


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script with this interpreter as its Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_step_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "track-B.json").mkdir()
    result = check("--small", tmp_path, "track-B", "track-L")
    assert result.returncode == 1
    assert "--- track-B: 2 after" in result.stdout
    assert "| track-B | failed with 2: see track-B.log |" in result.stdout
    assert "error: " in (tmp_path / "track-B.log").read_text()
    assert "--- track-L: 0 after" in result.stdout
    assert "| track-L: N-112, 160x120 | 1 video: " in result.stdout
    assert json.loads((tmp_path / "track-L.json").read_text())["figures"]["eager_2_fps"] > 0


def test_a_folder_must_be_given() -> None:
    result = check()
    assert (result.returncode, result.stdout[:6]) == (2, "error:")


def test_the_script_is_sound_and_its_bounds_are_positive() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


PRINTS = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
for step in range(1, 1000):
    print(f"step {step:3d}/999  loss 1.0", flush=True)
    time.sleep(0.02)
"""


def test_the_tenth_step_is_timed_and_the_training_stopped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = gpu_check.tenth_step([sys.executable, "-c", PRINTS])
    assert 0.18 < found["seconds"] < 60
    assert 0.02 <= found["longest_silence_s"] <= found["seconds"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].endswith("step  10/999  loss 1.0")


def test_a_training_that_ends_before_is_said() -> None:
    with pytest.raises(SystemExit, match="ended with 3 before its tenth step"):
        gpu_check.tenth_step([sys.executable, "-c", "raise SystemExit(3)"])


def report(**figures: Any) -> dict[str, Any]:
    options = {"variant": "B-224", "batch_size": 128, "precision": "fp16", "batch": 32,
               "width": 1280, "height": 720}  # fmt: skip
    return {"device": "GPU X", "date": "2027-01-02 03:04:05", "options": options,
            "figures": figures}  # fmt: skip


def test_the_table_has_a_line_for_every_step(tmp_path: Path) -> None:
    stages = {
        f"{kind}_{num}_{stage}_ms": 0.25
        for kind in ("eager", "captured")
        for num in (1, 32)
        for stage in ("crop", "copy", "network", "read_back")
    }
    reports = {
        "track-B": report(eager_1_fps=170.4, captured_1_fps=650.0, eager_32_fps=1260.0,
                          captured_32_fps=3100.0, **stages),
        "train-B": report(loop_ms=52.0, bare_ms=51.0, overhead=0.0196, augment_ms=0.9, mfu=0.41),
        "memory-B-folded": report(lora_peak_mb=12345.6, lora_optimiser_mb=20.0),
        "start-warm": {"seconds": 41.25, "longest_silence_s": 7.5},
    }  # fmt: skip
    for name, content in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "tests.log").write_text("...\n== 12 passed in 3.00s ==\n")
    (tmp_path / "train-L.json").write_text("{}")  # of an earlier run
    steps = [("tests", "0"), *((name, "0") for name in reports), ("train-L", "124"),
             ("start-cold", "untried"), ("compile-B", "1")]  # fmt: skip
    (tmp_path / "steps.tsv").write_text("".join(f"{n}\t{code}\t9\n" for n, code in steps))
    text, whole = gpu_check.table(tmp_path)
    assert not whole
    lines = text.splitlines()
    assert lines[0] == "| on GPU X, 2027-01-02 | measured | wanted |"
    assert lines[2:] == [
        "| train-B: B-224, 128 pairs, fp16 | 52.0 ms a step, 2,462 pairs/s, MFU 41 %, bare 51.0 ms "
        "(+2.0 %), augmentation 0.9 ms | 53 ms |",
        "| train-L | not done within 9 s | 150 ms |",
        "| memory-B-folded: B-224, 128 pairs, fp16 | peak 12,346 MB, optimiser 20.0 MB |  |",
        "| track-B: B-224, 1280x720 | 1 video: 170 eager, 650 captured frames/s (crop 0.25 + copy "
        "0.25 + network 0.25 + read back 0.25 ms); 32 videos: 1,260 eager, 3,100 captured frames/s "
        "(crop 0.25 + copy 0.25 + network 0.25 + read back 0.25 ms) | 600; 3,000 together |",
        "| start-cold | no time was left | 100 s |",
        "| start-warm | tenth step after 41.2 s, at most 7.5 s without a line | 60 s |",
        "| tests | 12 passed in 3.00s |  |",
        "| compile-B | failed with 1: see compile-B.log |  |",
    ]
