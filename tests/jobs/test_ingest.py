"""``jobs/ingest.py`` as a user runs it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from lorat.data.shards.frame_index import FrameIndex
from tests.jobs.in_process import run_in_process
from tests.lorat import layouts
from tests.real_data import REAL_DATA
from tests.waiting import wait_until

pytestmark = pytest.mark.processes(minutes=1)

ROOT = Path(__file__).parents[2]
JOB = [sys.executable, str(ROOT / "jobs" / "ingest.py")]


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*JOB, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )


@pytest.mark.skipif(not (REAL_DATA / "sequences").is_dir(), reason="no real sequences")
def test_real_sequences_are_ingested_verified_reindexed_and_shown(
    tmp_path: Path,
    ray_address: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = tmp_path / "got"
    root.mkdir()
    for split in ("train", "val"):
        (root / split).symlink_to(REAL_DATA / "sequences")
    (tmp_path / "names.txt").write_text("Crossing\nCouple\nball1\n")
    uri = tmp_path / "shards"
    done = run(
        "got10k", "--source", root, "--output", uri, "--include-list", tmp_path / "names.txt"
    )
    assert done.returncode == 0, done.stderr
    assert "3 tracks, 365 frames" in done.stdout
    index = FrameIndex.open(uri)
    assert index.storage == "window"

    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    caplog.set_level("INFO")
    assert run_in_process("ingest", "verify", uri) == 0
    assert "365 images" in caplog.text

    for file in uri.glob("index-*/*"):
        file.unlink()
    assert run_in_process("ingest", "reindex", uri) == 0
    assert FrameIndex.open(uri).fingerprint == index.fingerprint

    picture = tmp_path / os.fsdecode(b"new/12:30 M\xfc.png")
    assert run_in_process("ingest", "preview", uri, "--output", picture, "--num-pairs", 3) == 0
    drawn = cv2.imdecode(np.fromfile(picture, np.uint8), cv2.IMREAD_COLOR)
    assert drawn.shape[0] > 3 * 224

    shard = next(uri.glob("shard-*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    caplog.clear()
    assert run_in_process("ingest", "verify", uri) == 1
    assert shard.name in caplog.text


@pytest.mark.exhaustive
def test_an_interrupt_stops_cleanly_and_the_same_command_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "source"
    names = [f"GOT-10k_Train_{n:06d}" for n in range(1, 161)]
    picture = tmp_path / "frame.jpg"
    layouts.write_image(picture, 1, (1280, 720))
    for name in names:
        (root / "train" / name).mkdir(parents=True)
        for t in range(5):
            (root / "train" / name / f"{t + 1:08d}.jpg").symlink_to(picture)
        layouts.write_rows(root / "train" / name / "groundtruth.txt", layouts.boxes(5))
    (root / "train" / "list.txt").write_text("\n".join(names))
    uri = tmp_path / "out"
    command = ["got10k", "--source", str(root), "--output", str(uri)]
    job = subprocess.Popen(
        [*JOB, *command], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    wait_until("shard", lambda: list(uri.glob("_ingest/receipt-*.arrow")), process=job)
    job.send_signal(signal.SIGINT)
    output, errors = job.communicate(timeout=300)
    assert job.returncode == 130, errors
    assert "shards are whole and kept." in output
    assert not re.search(r"^\[?\d{4}-\d\d-\d\d .*\.cc:|^\*\*\*|@ +0x", errors, re.MULTILINE)
    (again,) = [line for line in errors.splitlines() if "This goes on from here: " in line]
    given = shlex.split(again.partition("here: ")[2])
    assert given[0] == "python"
    assert given[2:] == [str(word) for word in job.args[2:]]
    assert "Traceback" not in errors
    made = {p.name: p.stat().st_mtime_ns for p in uri.glob("_ingest/receipt-*.arrow")}
    assert 0 < len(made) < 54

    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert f"{len(made)} of 54 shards are already there" in done.stdout
    assert FrameIndex.open(uri).num_frames == 160 * 5
    assert sorted(p.suffix for p in uri.iterdir() if p.is_file()).count(".parquet") == 54
    assert not [p for p in uri.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "/nowhere/at/all"], "no dataset at /nowhere/at/all"),
        (["preview", "/nowhere/at/all"], "no dataset"),
        (["got10k", "--output", "x"], "--source"),
        (["got10k", "--source", ".", "--output", "x", "--variant", "Q-1"], "no variant Q-1"),
        (["got11k", "--source", ".", "--output", "x"], "got11k"),
    ],
)
def test_a_users_error_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_in_process("ingest", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_picture_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a.png").mkdir()
    for output in ("file/a.png", "a.png", "a.gif"):
        assert run_in_process("ingest", "preview", "set", "--output", tmp_path / output) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    words = ("file is none; give another place", "a.png is a folder", "ends in .png or .jpg")
    assert len(errors) == len(words)
    assert all(word in line for word, line in zip(words, errors, strict=True))


def test_help_names_every_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("ingest", "--help") == 0
    printed = capsys.readouterr().out
    for name in ("got10k", "lasot_ext", "trackingnet", "video", "verify", "reindex", "preview"):
        assert name in printed
    assert run_in_process("ingest", "coco", "--help") == 0
    assert "Folder of the dataset as published" in capsys.readouterr().out
