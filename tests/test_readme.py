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
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import psutil
import pytest

from infra.processes import answers, free_port, wait_for
from lorat import synthetic

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SMALL = "--variant N-112 --backbone none --epochs 1 --pairs-per-epoch 64 --batch-size 16"
ADDED = {
    "make run": f'ARGS="{SMALL} --no-final-evaluation"',
    "python jobs/train.py --data shards/got10k --val-data shards/got10k": SMALL,
    "python jobs/tune.py --trials 32": "--trials 2 --variant N-112 --max-steps 16 --backbone none",
    "ray job submit -- python jobs/train.py": f"{SMALL} --no-final-evaluation",
    "ray job submit --working-dir . -- python jobs/train.py": f"{SMALL} --no-final-evaluation",
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


@dataclass(frozen=True)
class Workspace:
    """A folder with the jobs, a small dataset and nothing of this machine's."""

    folder: Path
    environment: dict[str, str]

    def run(self, command: str, **variables: str) -> str:
        """Run a command line; fail with its output unless it succeeds."""
        result = subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-6000:]}"
        return result.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("readme")
    for name in ("jobs", "lorat", "platform", "infra", "pyproject.toml", "README.md", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
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
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= {
        "LORAT_HOME": str(folder / "home"),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
    }
    return Workspace(folder, environment)


@pytest.fixture(scope="module")
def head(workspace: Workspace) -> Iterator[str]:
    """Run a Ray head at the root of the repository; yield its dashboard's address."""
    port = "8497"
    command = (
        "ray start --head --block --disable-usage-stats --include-dashboard=true --num-cpus=2 "
        f"--node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --dashboard-port={port} --port=0 "
        "--ray-client-server-port=24497 --dashboard-agent-listen-port=24499"
    )
    process = subprocess.Popen(
        shlex.split(command),
        cwd=ROOT,
        env=workspace.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for url in (f"{address}/api/version", "http://127.0.0.1:24499/api/local_raylet_healthz"):
            wait_for(url, lambda url=url: answers(url), seconds=90)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_the_tables_of_this_test_name_only_commands_of_the_readme() -> None:
    assert set(ADDED) | set(ELSEWHERE) <= set(COMMANDS)


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if c not in ELSEWHERE and not c.startswith(("make", "pip", "ray"))],
)
def test_a_job_of_the_readme_runs(workspace: Workspace, command: str) -> None:
    """The jobs build on one another, in the README's order."""
    workspace.run(f"{command} {ADDED.get(command, '')}")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("ray job submit")])
def test_a_submitted_job_of_the_readme_runs(workspace: Workspace, head: str, command: str) -> None:
    # A link would be shipped as a link: submit from the repository itself.
    with_root = Workspace(ROOT, workspace.environment)
    output = with_root.run(f"{command} {ADDED[command]}", RAY_API_SERVER_ADDRESS=head)
    assert "models:/lorat/" in output


def test_the_install_command_of_the_readme_resolves(workspace: Workspace) -> None:
    (command,) = (c for c in COMMANDS if c.startswith("pip install"))
    assert command == "pip install -e .[dev]"
    Workspace(ROOT, workspace.environment).run(
        f"{sys.executable} -m pip install --dry-run --quiet -e .[dev]"
    )


def test_make_run_ends_with_a_registered_model_and_make_stop_with_no_ray(
    workspace: Workspace,
) -> None:
    home = workspace.folder / "run-home"
    variables = {"LORAT_HOME": str(home), "LORAT_RAY_PORT": "8498"}
    if (ROOT / ".venv" / "ready").exists() and shutil.which("make"):
        start = f"make run {ADDED['make run']}"
    else:
        start = f"infra/local_run.sh {SMALL} --no-final-evaluation"
    root = Workspace(ROOT, workspace.environment)
    try:
        output = root.run(start, **variables)
        assert "models:/lorat/1, alias candidate" in output
        assert "http://127.0.0.1:5000" in output
        assert (home / "mlflow.db").exists()
    finally:
        root.run("infra/local_run.sh --stop", **variables)
    with pytest.raises(OSError, match=r"refused|reset"):
        urllib.request.urlopen("http://127.0.0.1:8498/api/version", timeout=2)


@pytest.mark.skipif(
    not ((ROOT / ".venv" / "ready").exists() and shutil.which("make")),
    reason="make would install a whole environment first",
)
def test_make_ui_opens_the_local_store_on_this_machine_only(workspace: Workspace) -> None:
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
        wait_for("MLflow", lambda: answers(f"http://127.0.0.1:{port}/health"), seconds=90)
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
