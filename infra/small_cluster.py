"""Run a small but real cluster on this machine, lose a node of it, and finish a training.

    python infra/small_cluster.py

Processes, each on loopback and stopped by its own id at the end: PostgreSQL, an object store
that speaks S3, an MLflow server with passwords that keeps its runs in the first and its files in
the second, and Ray nodes with a token: a head without work, a decode node known by its label, and
two training nodes.  Their Python has the project's dependencies but not the project, which
comes with ``ray job submit --working-dir``.  One training node is killed while it trains.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from processes import Failure, Processes, answers, free_port, say, wait_for
from servers import BUCKET, dependencies_only, start_mlflow, start_postgres, start_storage

ROOT = Path(__file__).resolve().parents[1]
DISCOVERY = "prom_metrics_service_discovery.json"
STEP_S, TRAINING_S = 120, 400
"""Longest time that a server, a node or a change of the cluster takes, and a training."""


def start_ray_node(processes: Processes, python: Path, name: str, *options: str) -> None:
    """Start one Ray node, a machine of its own as far as Ray can tell."""
    processes.start(
        name, python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
        "--object-store-memory=200000000", "--min-worker-port=0", "--max-worker-port=0",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--temp-dir={processes.folder}/{name}", *options,
    )  # fmt: skip


class Ray:
    """The Ray cluster: its nodes, and its head as clients see it."""

    def __init__(self, processes: Processes, python: Path) -> None:
        self.processes, self.python = processes, python
        dashboard = free_port()
        self.url = f"http://127.0.0.1:{dashboard}"
        # Ray replaces 127.0.0.1 by an address that other machines reach, but not 127.0.0.2.
        self.address = f"127.0.0.2:{free_port()}"
        self.addresses = {"head": "127.0.0.2"}
        processes.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        start_ray_node(
            processes, python, "head", "--head", "--node-ip-address=127.0.0.2",
            f"--port={self.address.split(':')[1]}", "--num-cpus=0", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={free_port()}",
        )  # fmt: skip

    def join(self, name: str) -> None:
        """Start a node with an address of its own; its role is the name up to the number."""
        self.addresses[name] = f"127.0.0.{2 + len(self.addresses)}"
        role = name.rstrip("0123456789")
        # A decode node offers no CPU but the resource "decode": no training worker goes there.
        offer = (
            ["--num-cpus=0", '--resources={"decode": 1}'] if role == "decode" else ["--num-cpus=1"]
        )
        start_ray_node(
            self.processes, self.python, name, f"--address={self.address}",
            f"--node-ip-address={self.addresses[name]}", f"--labels=lorat-role={role}", *offer,
        )  # fmt: skip

    def get(self, path: str) -> dict[str, object]:
        """Ask the head, with the token."""
        token = self.processes.environment["RAY_AUTH_TOKEN"]
        request = urllib.request.Request(
            self.url + path, headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def alive(self) -> dict[str, str]:
        """Return the address of every living node with its id."""
        summary = self.get("/nodes?view=summary")["data"]["summary"]
        return {
            node["raylet"]["nodeManagerAddress"]: node["raylet"]["nodeId"]
            for node in summary
            if node["raylet"].get("state") == "ALIVE"
        }

    def nodes(self) -> int:
        """Count the nodes that are alive."""
        return len(self.alive())

    def announce_end(self, name: str) -> None:
        """Announce that a node will end, as the pods of infra/kuberay do in their preStop."""
        self.processes.run(
            self.python, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}",
            f"--node-id={self.alive()[self.addresses[name]]}", "--reason-message=test",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds=60",
        )  # fmt: skip

    def submit(self, *entrypoint: str) -> str:
        """Submit a job from the repository; return its id."""
        job = f"small-{secrets.token_hex(4)}"
        self.processes.run(
            self.python, "-m", "ray.scripts.scripts", "job", "submit", f"--address={self.url}",
            f"--submission-id={job}", "--no-wait", f"--working-dir={ROOT}", "--", *entrypoint,
        )  # fmt: skip
        return job

    def status(self, job: str) -> str:
        """Return PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return str(self.get(f"/api/jobs/{job}")["status"])

    def logs(self, job: str) -> str:
        """Return what a job printed so far."""
        return str(self.get(f"/api/jobs/{job}/logs")["logs"])

    def exported_metrics(self) -> set[str]:
        """Return the names that Prometheus would read from the nodes."""
        listed = json.loads((self.processes.folder / "head" / DISCOVERY).read_text())
        names = set()
        for target in {target for group in listed for target in group["targets"]}:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                names |= {line.split("{")[0] for line in answer.read().decode().splitlines()}
        return names


DATA = """
from lorat.conversion import MemoryTrack, write_dataset
from lorat.synthetic import render
from lorat.variants import get_variant
from lorat.windows import WindowLaw

law = WindowLaw.for_variant(get_variant("N-112"))
for split, videos, frames in (("train", 8, 16), ("val", 2, 16)):
    tracks = []
    for number in range(videos):
        video = render(split, number, frames)
        tracks.append(MemoryTrack(name=video.name, images=video.images, box=video.box))
    stored = "window" if split == "train" else "full"
    index = write_dataset(f"s3://lorat/data/{split}", tracks, split=split, stored=stored, law=law)
    print(f"{split}: {index.num_tracks} videos, {index.num_frames} frames")
"""
"""Makes a small dataset in the object store."""

STEPS, STEPS_PER_EPOCH = 360, 30
TRAINING = (
    "--variant=N-112 --backbone=none --workers=2 --cpus-per-worker=1 --batch-size=16 "
    f"--pairs-per-epoch={16 * STEPS_PER_EPOCH} --epochs={STEPS // STEPS_PER_EPOCH} "
    "--log-every=10 --validate-every=0 --name=small "
    f"--data=s3://{BUCKET}/data/train --val-data=s3://{BUCKET}/data/val "
    f"--storage=s3://{BUCKET}/runs"
).split()

REPORT = """
import json
import mlflow

client = mlflow.MlflowClient()
version = client.get_model_version_by_alias("lorat", "candidate")
run = client.get_run(version.run_id)
runs = client.search_runs([run.info.experiment_id])
history = client.get_metric_history(run.info.run_id, "train/loss")
folder = mlflow.artifacts.download_artifacts("models:/lorat@candidate", dst_path="model")
print(json.dumps({
    "version": version.version,
    "status": run.info.status,
    "num_runs": len(runs),
    "steps": sorted({metric.step for metric in history}),
    "ao": {k: v for k, v in run.data.metrics.items() if k.endswith("/ao")},
}))
"""
"""Asks MLflow what the training left there."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`Failure` with the message unless the condition holds."""
    if not condition:
        raise Failure(message)


def start(processes: Processes, python: Path) -> Ray:
    """Start every server and node, and make the data."""
    database = start_postgres(processes, password=secrets.token_hex(16))
    say("PostgreSQL runs")
    start_storage(processes, python)
    say("the object store runs")
    start_mlflow(processes, python, database)
    ray = Ray(processes, python)
    wait_for("the head", lambda: answers(f"{ray.url}/api/version"), seconds=STEP_S)
    for count, name in enumerate(("decode1", "train1", "train2"), start=2):
        ray.join(name)
        wait_for(f"the node {name}", lambda count=count: ray.nodes() == count, seconds=STEP_S)
        say(f"the node {name} has joined")
    processes.environment["PYTHONPATH"] = str(ROOT)
    printed = processes.run(python, "-c", DATA)
    del processes.environment["PYTHONPATH"]
    say("the data is in the object store: " + "; ".join(printed.splitlines()))
    health = f"{processes.environment['MLFLOW_TRACKING_URI']}/health"
    wait_for("MLflow", lambda: answers(health), seconds=STEP_S)
    say("MLflow runs")
    return ray


def check_doors(processes: Processes, ray: Ray) -> None:
    """Check that the servers are on loopback only, and that nobody comes in without a password."""
    listening = processes.listening()
    for name in ("postgres", "storage", "mlflow"):
        require(listening[name] == {"127.0.0.1"}, f"{name} listens on {listening[name]}.")
    mlflow = processes.environment["MLFLOW_TRACKING_URI"]
    for url in (
        f"{ray.url}/api/jobs/",
        f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1",
    ):
        try:
            urllib.request.urlopen(url, timeout=10).close()
        except urllib.error.HTTPError as error:
            require(error.code == 401, f"{url} answers {error.code} without a password.")
        else:
            raise Failure(f"{url} lets everybody in.")
    say("servers are on loopback; Ray and MLflow refuse who has no password")


def lose_a_node(ray: Ray, job: str) -> None:
    """Kill a training node after the first checkpoint, and add another."""

    def saved() -> bool:
        require(
            ray.status(job) in ("PENDING", "RUNNING"), f"the job ended: {ray.logs(job)[-3000:]}"
        )
        prefix = f"{ray.processes.environment['AWS_ENDPOINT_URL']}/{BUCKET}?prefix=runs/small/step-"
        with urllib.request.urlopen(prefix, timeout=10) as answer:
            return b"complete.json" in answer.read()

    wait_for("the first checkpoint", saved, seconds=TRAINING_S)
    say("a checkpoint is in the object store; the node train2 is killed")
    ray.processes.kill("train2")
    wait_for("noticing the loss", lambda: ray.nodes() == 3, seconds=STEP_S)
    say("Ray has noticed")
    ray.join("train3")
    wait_for("the node train3", lambda: ray.nodes() == 4, seconds=STEP_S)
    say("the node train3 has joined")


def check_metrics(ray: Ray) -> None:
    """Check that what the dashboard shows is there to be read."""
    dashboard = ROOT / "infra" / "compose" / "grafana" / "dashboards" / "lorat.json"
    wanted = set(re.findall(r"ray_lorat_\w+", dashboard.read_text()))
    wait_for(
        "every metric of the dashboard",
        lambda: wanted <= ray.exported_metrics(),
        seconds=TRAINING_S,
    )
    say(f"Prometheus would read all {len(wanted)} metrics of the dashboard")


def check_result(processes: Processes, python: Path, logs: str) -> None:
    """Check what the training left in MLflow and in the object store."""
    report = json.loads(processes.run(python, "-c", REPORT).splitlines()[-1])
    require(report["status"] == "FINISHED", f"the run is {report['status']}.")
    require(report["num_runs"] == 1, f"one training made {report['num_runs']} runs.")
    steps = list(range(10, STEPS + 1, 10))
    require(report["steps"] == steps, f"MLflow has the steps {report['steps']}.")
    require("going on from step-" in logs, "the training began anew after the loss.")
    weights = list((processes.folder / "model").rglob("*.safetensors"))
    require(bool(weights), "the registered model has no weights.")
    say(f"MLflow has one finished run with all {STEPS} steps, and lorat version "
        f"{report['version']} as @candidate with its weights")  # fmt: skip


def run(folder: Path) -> None:
    """Do everything, in a folder for data and logs."""
    python = dependencies_only(folder / "environment")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MLFLOW_", "AWS_", "LORAT_", "PYTHON", "VIRTUAL_ENV"))
    }
    processes = Processes(
        folder,
        inherited
        | {
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "LORAT_HOME": f"{folder}/home",
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
        },
    )
    require(
        subprocess.run(
            [python, "-c", "import lorat"], cwd=folder, stderr=subprocess.PIPE
        ).returncode
        != 0,
        "the environment has the project itself; install it editable, as make does.",
    )
    try:
        ray = start(processes, python)
        check_doors(processes, ray)
        job = ray.submit("python", "jobs/train.py", *TRAINING)
        say("the training is submitted")
        lose_a_node(ray, job)
        check_metrics(ray)
        ended = ("SUCCEEDED", "FAILED", "STOPPED")
        wait_for("the training", lambda: ray.status(job) in ended, seconds=TRAINING_S)
        logs = ray.logs(job)
        print(logs)
        require(ray.status(job) == "SUCCEEDED", f"the training is {ray.status(job)}.")
        check_result(processes, python, logs)
        ray.announce_end("decode1")
        wait_for("the node decode1 to leave", lambda: ray.nodes() == 3, seconds=STEP_S)
        say("a node that was told of its end has left by itself")
    except BaseException:
        for log in sorted(folder.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}", file=sys.stderr)
        raise
    finally:
        processes.stop()


def main() -> int:
    """Run in a folder of its own; return 0 if everything held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep the folder with data and logs")
    parser.add_argument(
        "--limit", type=int, default=590, help="seconds after which it fails (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        made = ROOT / ".venv" / "bin" / "python"
        if not made.exists():
            print("error: there is no Ray here; run 'make .venv/ready' first.", file=sys.stderr)
            return 2
        os.execv(made, [str(made), *sys.argv])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(arguments.limit)
    folder = Path(tempfile.mkdtemp(prefix="lorat-small-", dir="/tmp"))
    folder.chmod(0o711)  # PostgreSQL's user passes through
    try:
        run(folder)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    finally:
        if arguments.keep:
            say(f"everything is in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    say("done")
    return 0


def _too_long(*_: object) -> None:
    raise Failure("everything together took longer than --limit allows.")


if __name__ == "__main__":
    raise SystemExit(main())
