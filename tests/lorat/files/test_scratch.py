"""What a killed process leaves is removed, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lorat.files import scratch
from lorat.files.scratch import Process, make_folder, sweep, temporary_folder


def test_what_killed_processes_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = make_folder("checkpoint")
    assert Process.of(own.name) == Process.here()
    elsewhere = tmp_path / f"checkpoint{Process('0123456789ab', 1, '1').mark()}abcdefgh"
    others = [tmp_path / "checkpoint-abcdefgh", tmp_path / "checkpoint.own-x-1-2-abcdefgh"]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        start = scratch.start_time(other.pid)
        assert start is not None
        living = Process(scratch.machine(), other.pid, start)
        alive = tmp_path / f"checkpoint{living.mark()}abcdefgh"
        gone = Process(scratch.machine(), other.pid, "1")  # its number is used again
        left = [tmp_path / f"checkpoint{gone.mark()}abcdefgh", tmp_path / f".part-{gone.mark()}a"]
        for folder in (alive, left[0], elsewhere, *others):
            folder.mkdir()
            (folder / "head.safetensors").write_bytes(b"h")
        left[1].write_bytes(b"h")
        assert sorted(sweep(tmp_path)) == sorted(left)
        assert sorted(tmp_path.iterdir()) == sorted([own, alive, elsewhere, *others])
        other.kill()
    assert sweep(tmp_path) == [alive]
    then = os.stat(elsewhere).st_mtime - scratch.ABANDONED_S - 1
    os.utime(elsewhere, (then, then))
    assert sweep(tmp_path) == [elsewhere]
    assert not sweep(tmp_path / "missing")


def test_a_link_is_removed_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("")
    folder = tmp_path / "folder"
    folder.mkdir()
    gone = Process(scratch.machine(), os.getpid(), "1").mark()
    (folder / f"x{gone}abc").symlink_to(precious)
    sweep(folder)
    assert not list(folder.iterdir())
    assert (precious / "file").exists()


def test_a_killed_process_leaves_a_folder_that_the_next_one_removes(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from lorat.files.scratch import temporary_folder\n"
        "with temporary_folder() as folder:\n"
        "    (folder / 'large').write_bytes(b'x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment)
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"lorat\.own-[0-9a-f]{12}-\d+-\d+-\w+", left.name)
    assert sweep(tmp_path) == [left]


def test_a_temporary_folder_is_gone_at_the_end(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as folder:
        assert folder.parent == tmp_path
        (folder / "file").write_text("")
    assert not list(tmp_path.iterdir())
