"""The start of any job removes what killed jobs left on this machine, and nothing that lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import command
import left_overs
import pytest

from lorat.files import scratch
from lorat.files.storage import locate
from tests.other_driver import FOREIGN, announce
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
GONE = scratch.Process(scratch.machine(), os.getpid(), "1").mark()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAT_CROP_CACHE", str(tmp_path / "crops"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "home"


def half_checkpoint(run: Path) -> Path:
    """Make what Ray Train leaves where it is killed while it deletes a checkpoint."""
    half = run / "step-00000020"
    half.mkdir(parents=True)
    (half / "optimizer.safetensors").write_bytes(b"o")
    return half


def test_what_has_no_living_owner_is_removed(home: Path, tmp_path: Path) -> None:
    dead = [
        half_checkpoint(home / "runs" / "killed"),
        half_checkpoint(home / "runs" / "search" / "between-rungs" / "0001"),
        home / "runs" / "killed" / ".part-step-00000040",
        home / "runs" / "search" / f".deleted-between-rungs{GONE}abc",
        home / "models" / f"lorat{GONE}abc",
        home / "datasets" / f".synthetic-v1-train{GONE}abc",
        home / "datasets" / "upload" / f".index{GONE}abc",
        home / "datasets" / "index" / f".part-{GONE}abc",
        tmp_path / "temporary" / f"lorat{GONE}abc",
        tmp_path / "crops" / "crops-search",
    ]
    driven = half_checkpoint(home / "runs" / "driven")
    announce(locate(driven.parent), FOREIGN)
    own = scratch.make_folder()
    for folder in dead:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "file").write_bytes(b"f")
    (tmp_path / "crops" / "crops-search" / "users").write_text("")
    (tmp_path / "crops" / "crops-search" / f"driver{GONE}abc").write_text("")
    left_overs.sweep()
    assert not [folder for folder in dead if folder.exists()]
    assert driven.exists()
    assert own.exists()
    assert [path.name for path in (home / "runs" / "killed").iterdir()] == []


def test_every_job_sweeps_when_it_starts(home: Path, tmp_path: Path) -> None:
    for job in sorted((ROOT / "jobs").glob("*.py")):
        if "__main__" not in job.read_text():
            continue
        assert "command.run(" in job.read_text(), job.name
    left = tmp_path / "temporary" / f"lorat{GONE}abc"
    left.mkdir()

    def main() -> int:
        assert not left.exists()
        return 0

    with pytest.raises(SystemExit) as stop:
        command.run(main)
    assert stop.value.code == 0


def test_what_cannot_be_swept_stops_no_job(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(scratch, "sweep", refuse)
    with pytest.raises(SystemExit) as stop:
        command.run(lambda: 3)
    assert stop.value.code == 3
    assert "cannot be removed" in caplog.text


def test_agents_of_a_killed_ray_are_ended_and_those_of_a_living_one_left() -> None:
    code = (
        "import subprocess\n"
        "open('/proc/self/comm', 'w').write('raylet')\n"
        "agent = subprocess.Popen(['ray::RuntimeEnvAgent'], executable='/bin/cat', stdin=-1)\n"
        "print(agent.pid, flush=True)\n"
        "input()\n"
        "agent.communicate()\n"
    )
    command_line = [sys.executable, "-c", code]
    with subprocess.Popen(command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as raylet:
        assert raylet.stdout is not None
        living = int(raylet.stdout.readline())
        # The child of this process, which is no raylet, as one whose raylet is gone is init's.
        orphan = subprocess.Popen(
            ["ray::DashboardAgent"], executable="/bin/cat", stdin=subprocess.PIPE
        )

        def ended() -> bool:
            left_overs.end_orphaned_agents()
            return orphan.poll() is not None

        wait_until("end of the orphan", ended)
        orphan.communicate()
        assert orphan.returncode == -signal.SIGKILL
        assert scratch.start_time(living) is not None
        raylet.communicate(b"\n")
