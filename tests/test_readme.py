"""Every command of the README runs as it is written there; long ones with a smaller budget."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import psutil
import pytest

from infra.processes import answers, free_port, wait_for
from lorat.data import synthetic
from tests.jobs.in_process import run_in_process
from tests.small_shards import make_shards

pytestmark = pytest.mark.processes(minutes=3)

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
MAKE = (ROOT / ".venv" / "ready").exists() and shutil.which("make")
SMALL = "--variant N-112 --backbone none --epochs 1 --pairs-per-epoch 64 --batch-size 16"
ADDED = {
    # Rendering the synthetic training set takes a minute; tests/jobs/test_default_run.py does it.
    "make run": f'ARGS="{SMALL} --no-final-evaluation --data {{train}} --val-data {{val}}"',
    "python jobs/train.py --data shards/got10k --val-data shards/got10k": (
        f"{SMALL} --validate-every 0 --no-final-evaluation"
    ),
    "python jobs/tune.py --trials 32": (
        "--trials 2 --variant N-112 --max-steps 16 --backbone none "
        "--data shards/got10k --val-data shards/got10k"
    ),
    # That a submitted job also trains is what `make run` shows.
    "ray job submit -- python jobs/train.py": "--dry-run",
    "ray job submit --working-dir . -- python jobs/train.py": "--dry-run",
}
"""What is added to a command so that it takes seconds."""
ELSEWHERE = {
    "make test": "it is what runs this",
    "python -m pytest": "it is what runs this",
    "python jobs/train.py": "tests/jobs/test_default_run.py runs it and checks what it reaches",
}


def _commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


COMMANDS = _commands()
EXPORTED = dict(c.split(" ")[1].split("=") for c in COMMANDS if c.startswith("export "))


@dataclass(frozen=True)
class Workspace:
    """A folder with the jobs, a small dataset and nothing of this machine's."""

    folder: Path
    environment: dict[str, str]

    def run(self, command: str, **variables: str) -> str:
        """Run a command line at the root of the repository; fail with its output if it fails."""
        result = subprocess.run(
            command,
            shell=True,
            cwd=ROOT,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-6000:]}"
        return result.stdout


@dataclass(frozen=True)
class LocalRun:
    """What `make run` printed, and the Ray that it started."""

    output: str
    dashboard: str
    state: Path


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("readme")
    split = folder / "GOT-10k" / "val"
    names = [f"GOT-10k_Val_{number:06d}" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        video = synthetic.render("val", number, num_frames=12)
        (split / name).mkdir(parents=True)
        rows = []
        for frame, (image, box) in enumerate(zip(video.images, video.box, strict=True), start=1):
            cv2.imwrite(str(split / name / f"{frame:08d}.jpg"), image[:, :, ::-1])
            x1, y1, x2, y2 = box
            rows.append(f"{x1:.3f},{y1:.3f},{x2 - x1:.3f},{y2 - y1:.3f}")
        (split / name / "groundtruth.txt").write_text("\n".join(rows) + "\n")
    (split / "list.txt").write_text("\n".join(names) + "\n")
    dropped = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH"}
    dropped |= {name for name in os.environ if name.startswith("RAY_AUTH_")}
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= {
        "LORAT_HOME": str(folder / "home"),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
    }
    return Workspace(folder, environment)


@pytest.fixture(scope="module")
def local_run(workspace: Workspace) -> Iterator[LocalRun]:
    port, home = free_port(), Path(workspace.environment["LORAT_HOME"])
    variables = {"LORAT_RAY_PORT": str(port)}
    start = "make run" if MAKE else "infra/local_run.sh"
    added = ADDED["make run"] if MAKE else ADDED["make run"].removeprefix("ARGS=").strip('"')
    added = added.format(
        train=make_shards(workspace.folder / "train", split="train"),
        val=make_shards(workspace.folder / "val", split="val"),
    )
    try:
        output = workspace.run(f"{start} {added}", **variables)
        yield LocalRun(output, f"http://127.0.0.1:{port}", home)
    finally:
        printed = workspace.run("make stop" if MAKE else "infra/local_run.sh --stop", **variables)
        assert "Stopped the local Ray." in printed
        with pytest.raises(OSError, match=r"refused|reset"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=2)


def test_the_tables_of_this_test_name_only_commands_of_the_readme() -> None:
    assert set(ADDED) | set(ELSEWHERE) <= set(COMMANDS)


def test_make_run_ends_with_a_registered_model(local_run: LocalRun) -> None:
    assert "models:/lorat/1, alias candidate" in local_run.output
    assert "jobs/track.py VIDEO --select --model models:/lorat/1" in local_run.output
    assert "http://127.0.0.1:5000" in local_run.output
    assert (local_run.state / "mlflow.db").exists()


@pytest.mark.parametrize("path", ["/api/jobs/", "/api/version", "/nodes?view=summary"])
def test_the_ray_of_make_run_tells_nothing_without_its_token(
    local_run: LocalRun, path: str
) -> None:
    """Neither to another user of this machine nor to a page in a browser."""
    pages = [{}, {"Host": "page.example"}, {"Origin": "http://page.example"}]
    for headers in [*pages, {"Authorization": "Bearer guessed"}]:
        request = urllib.request.Request(local_run.dashboard + path, headers=headers)
        with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
            urllib.request.urlopen(request, timeout=10)


@pytest.mark.usefixtures("shared_ray")
def test_the_jobs_of_the_readme_run_in_its_order(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They build on one another, in a home folder that begins empty."""
    monkeypatch.chdir(workspace.folder)
    monkeypatch.setenv("LORAT_HOME", str(workspace.folder / "home-of-jobs"))
    commands = [c for c in COMMANDS if c not in ELSEWHERE and c.startswith("python jobs/")]
    assert len(commands) >= 10
    for command in commands:
        _, job, *arguments = shlex.split(f"{command} {ADDED.get(command, '')}")
        print(f"$ {command}", flush=True)
        assert run_in_process(Path(job).stem, *arguments) == 0, command


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("ray job submit")])
def test_a_submitted_job_of_the_readme_runs(
    workspace: Workspace, local_run: LocalRun, command: str
) -> None:
    added = ADDED[command]
    output = workspace.run(
        f"{command} {added}", RAY_API_SERVER_ADDRESS=local_run.dashboard, **EXPORTED
    )
    assert "T-168, recipe brief, on synthetic" in output


def test_the_install_command_of_the_readme_resolves(workspace: Workspace) -> None:
    (command,) = (c for c in COMMANDS if c.startswith("pip install"))
    assert command == "pip install -e .[dev]"
    workspace.run(f"{sys.executable} -m pip install --dry-run --quiet -e .[dev]")


@pytest.mark.skipif(not MAKE, reason="make would install a whole environment first")
def test_make_ui_opens_the_local_store_on_this_machine_only(
    workspace: Workspace, local_run: LocalRun
) -> None:
    assert (local_run.state / "mlflow.db").exists()
    port = free_port()
    server = subprocess.Popen(
        ["make", "ui", f"PORT={port}"],
        cwd=ROOT,
        env=workspace.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for("MLflow", lambda: answers(f"http://127.0.0.1:{port}/health"), seconds=300)
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/registered-models/get?name=lorat"
        with urllib.request.urlopen(url) as answer:
            assert json.load(answer)["registered_model"]["name"] == "lorat"
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        sockets = [s for process in family for s in process.net_connections()]
        bound = {s.laddr for s in sockets if s.status == psutil.CONN_LISTEN}
        assert bound == {("127.0.0.1", port)}
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        output, _ = server.communicate(timeout=60)
    assert f"http://127.0.0.1:{port}" in output
