"""Run a small but real cluster on this machine, lose a node of it, and finish a training.

    python infra/small_cluster.py

Processes, each stopped by its own id at the end: on loopback PostgreSQL, an object store that
speaks S3, and an MLflow server with passwords that keeps its runs in the first and its files in the
second; and Ray nodes with a token, whose own ports other machines reach: a head without work, a
decode node known by its label, and two training nodes.  Their Python has the project's dependencies
but not the project, which comes with ``ray job submit --working-dir``.  While the nodes train, one
of them is killed, and later another is told that it will be taken away, as a spot node is, and then
is.
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
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from processes import Failure, Processes, answers, say, wait_for
from ray_nodes import Ray
from servers import BUCKET, dependencies_only, start_mlflow, start_postgres, start_storage

ROOT = Path(__file__).resolve().parents[1]
STEP_S, TRAINING_S = 120, 400
"""Longest time that a server, a node or a change of the cluster takes, and a training."""
NOTICE_S = 30
"""Between the announcement that a node will be taken away and its end."""
LOOPBACK = ("127.", "::ffff:127.", "::1")


DATA = """
from lorat.data.shards.from_memory import MemoryTrack, write_dataset
from lorat.data.synthetic.videos import render
from lorat.config.variants import get_variant
from lorat.data.shards.windows import WindowLaw

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

STEPS, STEPS_PER_EPOCH = 480, 30
TRAINING = (
    "--variant=N-112 --backbone=none --workers=2 --cpus-per-worker=1 --batch-size=16 "
    f"--pairs-per-epoch={16 * STEPS_PER_EPOCH} --epochs={STEPS // STEPS_PER_EPOCH} "
    "--log-every=10 --validate-every=0 --name=small "
    f"--keep={STEPS // STEPS_PER_EPOCH + 2} "  # none is gone before it is looked for
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
    "ao": {k: v for k, v in run.data.tags.items() if k.startswith("score.") and k.endswith("/ao")},
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
    """Check who listens where, and that nobody comes in without a password."""
    listening = processes.listening()
    for name in ("postgres", "storage", "mlflow"):
        addresses = {address for address, _ in listening[name]}
        require(addresses == {"127.0.0.1"}, f"{name} listens on {addresses}.")
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
    token = processes.environment["RAY_AUTH_TOKEN"]
    require(_control_plane_answers(processes, ray, token), "Ray's control plane does not answer.")
    require(
        not _control_plane_answers(processes, ray, secrets.token_hex(32)),
        "Ray's control plane answers with a wrong token.",
    )
    say("PostgreSQL, object store, MLflow and Ray's dashboard are on loopback; "
        "Ray and MLflow refuse who has no password")  # fmt: skip
    for name in sorted(set(listening) - {"postgres", "storage", "mlflow"}):
        ports = sorted(port for at, port in listening[name] if not at.startswith(LOOPBACK))
        require(int(ray.url.rpartition(":")[2]) not in ports, "Ray's dashboard is open.")
        say(f"the Ray node {name} listens for other machines on the ports {ports}")


def _control_plane_answers(processes: Processes, ray: Ray, token: str) -> bool:
    """Ask Ray's control plane, which listens on every address, with a token."""
    program = f"""
import ray
ray._raylet.GcsClient(address={ray.address!r}).internal_kv_get(b"nothing", None, timeout=20)
"""
    environment = processes.environment | {"RAY_AUTH_TOKEN": token}
    asked = subprocess.run(
        [ray.python, "-c", program], env=environment, cwd=processes.folder, stderr=subprocess.PIPE
    )
    return asked.returncode == 0


def wait_in_training(ray: Ray, job: str, what: str, ready: Callable[[], bool]) -> None:
    """Wait for something that happens while the training runs."""

    def checked() -> bool:
        require(
            ray.status(job) in ("PENDING", "RUNNING"), f"the job ended: {ray.logs(job)[-3000:]}"
        )
        return ready()

    wait_for(what, checked, seconds=TRAINING_S)


def saved_steps(ray: Ray) -> set[int]:
    """Return the steps of which a whole checkpoint is in the object store."""
    prefix = f"{ray.processes.environment['AWS_ENDPOINT_URL']}/{BUCKET}?prefix=runs/small/step-"
    with urllib.request.urlopen(prefix, timeout=10) as answer:
        return {int(step) for step in re.findall(rb"step-(\d+)/complete.json", answer.read())}


def check_places(ray: Ray, trainers: list[str]) -> None:
    """Check that decoding is on the decode node, and one training worker on each of the others."""
    found = ray.actors("RayTrainWorker")
    require(found == trainers, f"the training workers are on {found}, not on {trainers}.")
    decoders = ray.actors("BlockDecoder")
    require(set(decoders) == {"decode1"}, f"decoding is on {decoders}, not on decode1 alone.")
    say(f"decoding is on decode1, the training workers are on {' and '.join(trainers)}")


def replace(ray: Ray, lost: str, new: str) -> None:
    """Kill a node as a machine is lost, and add another."""
    before = ray.nodes()
    ray.processes.kill(lost)
    wait_for("noticing the loss", lambda: ray.nodes() == before - 1, seconds=STEP_S)
    say(f"the node {lost} is killed, and Ray has noticed")
    ray.join(new)
    wait_for(f"the node {new}", lambda: ray.nodes() == before, seconds=STEP_S)
    say(f"the node {new} has joined")


def lose_a_node(ray: Ray, job: str) -> None:
    """Kill a training node after the first checkpoint, without a word, and add another."""
    wait_in_training(ray, job, "the first checkpoint", lambda: bool(saved_steps(ray)))
    say("a checkpoint is in the object store")
    check_places(ray, ["train1", "train2"])
    replace(ray, "train2", "train3")
    # Its first steps, not the line before them: a node whose end is announced while workers still
    # start is no preemption to them, they only wait for another node.
    steps = re.compile(r"going on from step-.*^step +\d+/", re.DOTALL | re.MULTILINE)
    wait_in_training(ray, job, "training again", lambda: bool(steps.search(ray.logs(job))))
    say("training goes on from a checkpoint")


def take_a_node_away(ray: Ray, job: str) -> int:
    """Announce the end of a training node, see it used, and end it; return the saved step."""
    ray.announce_end("train1", NOTICE_S)
    end = time.monotonic() + NOTICE_S
    said = r"a node will be taken away: writing a checkpoint at step (\d+)"
    wait_in_training(ray, job, "hearing of it", lambda: bool(re.search(said, ray.logs(job))))
    step = int(re.findall(said, ray.logs(job))[0])
    wait_in_training(ray, job, "the checkpoint", lambda: step in saved_steps(ray))
    left = end - time.monotonic()
    require(left > 0, f"the checkpoint came {-left:.0f} s too late.")
    say(f"a node will be taken away: the checkpoint of step {step} came {left:.0f} s before that")
    replace(ray, "train1", "train4")
    return step


def check_metrics(ray: Ray, job: str) -> None:
    """Check that what the dashboard shows of a training is there to be read."""
    dashboard = ROOT / "infra" / "compose" / "grafana" / "dashboards" / "lorat.json"
    wanted = set(re.findall(r"ray_lorat_(?!search_)\w+", dashboard.read_text()))
    wait_in_training(
        ray, job, "every metric of the dashboard", lambda: wanted <= ray.exported_metrics()
    )
    say(f"Prometheus would read all {len(wanted)} metrics of a training")


def check_result(processes: Processes, python: Path, logs: str, taken_at: int) -> None:
    """Check what the training left in MLflow and in the object store."""
    report = json.loads(processes.run(python, "-c", REPORT).splitlines()[-1])
    require(report["status"] == "FINISHED", f"the run is {report['status']}.")
    require(report["num_runs"] == 1, f"one training made {report['num_runs']} runs.")
    steps = list(range(10, STEPS + 1, 10))
    require(report["steps"] == steps, f"MLflow has the steps {report['steps']}.")
    resumed = [int(step) for step in re.findall(r"going on from step-(\d+)", logs)]
    require(
        len(resumed) > 1 and resumed[-1] >= taken_at,
        f"the training went on from the steps {resumed}, not from {taken_at} at the end.",
    )
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
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
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
        taken_at = take_a_node_away(ray, job)
        check_metrics(ray, job)
        ended = ("SUCCEEDED", "FAILED", "STOPPED")
        wait_for("the training", lambda: ray.status(job) in ended, seconds=TRAINING_S)
        logs = ray.logs(job)
        print(logs)
        require(ray.status(job) == "SUCCEEDED", f"the training is {ray.status(job)}.")
        check_result(processes, python, logs, taken_at)
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
