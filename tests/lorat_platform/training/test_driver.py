"""A training survives what is done to it, and ends as if nothing had happened.

On one machine with a fixed number of threads the weights are bitwise the same; the tests allow
1e-6 relative.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray.cluster_utils import Cluster as LocalCluster

from lorat.config.training import resolve
from lorat.data.pairs.batches import Decoder
from lorat.learning.loop import Hooks, run
from lorat_platform.cluster import ray_internals
from lorat_platform.data.sources import open_datasets, open_pairs
from lorat_platform.recording.journal import Journal
from tests.lorat_platform.local_source import LocalSource
from tests.lorat_platform.training_jobs import (
    CHECKPOINT_EVERY,
    LOG_EVERY,
    NUM_STEPS,
    TrainJob,
    assert_same_weights,
    job,
    mlflow_run,
    mlflow_run_id,
    processes_of,
    resumed_steps,
    run_folder,
    shown_steps,
    train_losses,
    training_config,
)
from tests.object_store import KEYS, object_store
from tests.small_shards import make_shards
from tests.waiting import wait_until

pytestmark = [pytest.mark.processes(minutes=4), pytest.mark.timeout(900)]

WORKER = "RayTrainWorker"
GAP = 40
"""Steps between going on and the next blow: more than one checkpoint."""


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(tmp_path_factory.mktemp("data") / "train", split="train")


@pytest.fixture(scope="module")
def val_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(tmp_path_factory.mktemp("data") / "val", split="val")


@dataclass(frozen=True)
class Undisturbed:
    """The same training without Ray, to which nothing happens."""

    checkpoint: Path
    losses: dict[int, float]


@pytest.fixture(scope="module")
def undisturbed(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    config = resolve(training_config(uri))
    decoder = Decoder(*open_pairs(config, open_datasets(config).train))
    source = LocalSource(decoder.load, batch_size=4, end_step=NUM_STEPS)
    losses: dict[int, float] = {}

    def keep(step: int, metrics: dict[str, float]) -> None:
        losses[step] = metrics["train/loss"]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as --cpus-per-worker says
    try:
        learner = run(config, source, hooks=Hooks(log_every=LOG_EVERY, on_interval=keep))
    finally:
        torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("undisturbed")
    learner.save(folder)
    return Undisturbed(folder, losses)


@contextlib.contextmanager
def local_nodes(count: int) -> Iterator[tuple[LocalCluster, list[Any]]]:
    """Run a head without CPUs and some nodes of one CPU each, as far as Ray can tell."""
    # This process starts it, and has imported Ray before there were a token and an address for it.
    ray_internals.keep_to_loopback()
    ray_internals.read_token_again()
    nodes = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield nodes, [nodes.add_node(num_cpus=1) for _ in range(count)]
    finally:
        nodes.shutdown()


def node_of(process: psutil.Process, nodes: LocalCluster) -> Any:
    """Return the node on which a process runs."""
    parents = {parent.pid for parent in process.parents()}
    for node in nodes.worker_nodes:
        if {started.process.pid for started in node.all_processes["raylet"]} & parents:
            return node
    raise AssertionError(f"{process} is on no node")


@dataclass(frozen=True, kw_only=True)
class Blow:
    """Something done to a training."""

    seen: int
    """The step that was shown last before it."""
    resumed: int
    """The step that the training went on from after it."""
    text: str
    """What the job that was hit had printed when it, or the one after it, went on."""

    def cost_little(self) -> bool:
        """Tell whether no more was lost than the steps since the checkpoint before.

        One checkpoint may have been on its way.  How far the training got after the step that was
        seen is the machine's affair, but not to the end.
        """
        last = self.seen // CHECKPOINT_EVERY * CHECKPOINT_EVERY
        return last - CHECKPOINT_EVERY <= self.resumed < NUM_STEPS


@dataclass(frozen=True, kw_only=True)
class Battered:
    """A training to which several things happened, one after the other."""

    home: Path
    run_ids: set[str]
    """MLflow runs that its jobs had."""
    blows: dict[str, Blow]
    codes: dict[str, int] = field(default_factory=dict)
    """Exit codes of the jobs that ended by themselves."""
    last_text: str
    """What the last job printed."""


class Story:
    """Deals the blows and notes what came of each."""

    def __init__(self) -> None:
        self.blows: dict[str, Blow] = {}
        self._seen, self._resumed_at, self._hit = 0, 0, ""

    def wait(self, training: TrainJob) -> None:
        """Wait until the training is past a checkpoint since it went on."""
        resumed = resumed_steps(training.text)
        least = (resumed[-1] if resumed else 0) + GAP
        self._seen = training.wait_for_step(least, self._resumed_at)

    def strike(self, what: str, training: TrainJob, act: Callable[[], None]) -> None:
        """Do something after which the same job goes on."""
        self.wait(training)
        lines = len(training.lines)
        act()
        self.went_on(what, training, lines)

    def interrupted(self, training: TrainJob) -> None:
        """Note that a job ended, so that another has to go on."""
        self._hit, self._resumed_at = training.text, 0

    def went_on(self, what: str, training: TrainJob, after: int = 0) -> None:
        """Note where the training goes on: the same job, or the one after it."""
        resumed = int(training.wait_for(r"going on from step-(\d+)", after)[1])
        self._resumed_at = len(training.lines)
        text = self._hit or training.text
        self.blows[what] = Blow(seen=self._seen, resumed=resumed, text=text)
        self._hit = ""


def validation_process(training: TrainJob, other_than: int = 0) -> psutil.Process:
    """Wait for the process of a validation and return it."""

    def found() -> psutil.Process | None:
        others = (p for p in processes_of("run_validation_fn") if p.pid != other_than)
        return next(others, None)

    process = wait_until(
        "validation", found, process=training.process, output=lambda: training.text
    )
    assert process is not None
    return process


def kill_worker() -> None:
    """Kill the training's only worker."""
    (worker,) = processes_of(WORKER)
    worker.kill()


@pytest.fixture(scope="module")
def battered(uri: str, val_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Battered:
    """Deal a training what happens on clusters and machines.

    Two jobs, the same command each time: on a cluster of several nodes, then on this machine.
    """
    home = tmp_path_factory.mktemp("battered")
    story, run_ids = Story(), set()
    val = ("--val-data", f"tiny={val_uri}", "--no-final-evaluation")
    calm = (*val, "--validate-every", "0")
    with local_nodes(3) as (nodes, _):

        def remove_node() -> None:
            (worker,) = processes_of(WORKER)
            nodes.remove_node(node_of(worker, nodes), allow_graceful=False)

        def announce_end() -> None:
            (worker,) = processes_of(WORKER)
            drain_node(nodes, node_of(worker, nodes), seconds=3)

        fast = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2"}
        with job(home, uri, *calm, "--address", nodes.address, **fast) as training:
            training.wait_for_step(LOG_EVERY)
            run_ids.add(mlflow_run_id(home))
            story.strike("worker killed", training, kill_worker)
            story.strike("node removed", training, remove_node)
            story.strike("node announced to end", training, announce_end)
            story.wait(training)
            training.kill()
        story.interrupted(training)
    # A validation that has no end, begun late: it is killed once all steps are taken.
    endless = ("--val-pairs", "1000000", "--val-sequences", "0", "--validate-every", "12")
    with job(home, uri, *val, *endless) as training:
        story.went_on("driver killed", training)
        first = validation_process(training)
        training.wait_for_step(NUM_STEPS)
        assert first.is_running(), "the steps did not wait for it"
        first.kill()
        training.wait_for("process that validated step-00000600 died, .*; it is tried once more")
        validation_process(training, first.pid).kill()
        training.wait_for("process that validated step-00000600 died, .*; the training goes on")
        last_text = training.finish()
    run_ids.add(mlflow_run_id(home))
    return Battered(home=home, run_ids=run_ids, blows=story.blows, last_text=last_text)


def steps_in_journals(folder: Path) -> set[int]:
    """Return the steps of records that MLflow, busy as it may be, has not taken yet."""
    entries = [
        entry for path in folder.glob("mlflow-*") for entry in Journal(path).read(limit=100_000)
    ]
    return {entry.record["step"] for entry in entries if entry.record["op"] == "metrics"}


@pytest.fixture(scope="module")
def cornered(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Battered:
    """Deal a training what no job survives but the next one goes on from."""
    home = tmp_path_factory.mktemp("cornered")
    story, run_ids, codes = Story(), set(), {}
    with local_nodes(1) as (nodes, (node,)):
        # By default Ray gives a cluster that does not answer a minute.
        soon = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
        with job(home, uri, "--address", nodes.address, **soon) as training:
            story.wait(training)
            run_ids.add(mlflow_run_id(home))
            for part in (nodes.head_node, node):
                nodes.remove_node(part, allow_graceful=False)
            codes["cluster gone"] = training.wait_for_end()
        story.interrupted(training)
    with job(home, uri) as training:
        story.went_on("cluster gone", training)
        story.wait(training)
        with no_room_for_checkpoints(run_folder(home)):
            codes["disk full"] = training.wait_for_end()
    story.interrupted(training)
    with job(home, uri, "--max-failures", "0") as training:
        story.went_on("disk full", training)
        story.wait(training)
        kill_worker()
        codes["one failure too many"] = training.wait_for_end()
    story.interrupted(training)
    with job(home, uri) as training:
        story.went_on("one failure too many", training)
        story.wait(training)
        training.process.send_signal(signal.SIGINT)
        codes["ctrl-c"] = training.wait_for_end()
        kept = train_losses(home).keys() | steps_in_journals(run_folder(home))
        assert shown_steps(training.text) <= kept, "what was shown is delivered or waits"
    story.interrupted(training)
    with job(home, uri) as training:
        story.went_on("ctrl-c", training)
        last_text = training.finish()
    run_ids.add(mlflow_run_id(home))
    return Battered(home=home, run_ids=run_ids, blows=story.blows, codes=codes, last_text=last_text)


@contextlib.contextmanager
def no_room_for_checkpoints(folder: Path) -> Iterator[None]:
    """Let no further checkpoint be written to a folder."""
    folder.chmod(0o500)
    in_the_way: list[Path] = []
    if os.access(folder, os.W_OK):  # root writes anywhere; take the places away instead
        folder.chmod(0o700)
        for step in range(0, NUM_STEPS + 1, CHECKPOINT_EVERY):
            part = folder / f".part-step-{step:08d}"
            if not part.exists() and not (folder / f"step-{step:08d}").exists():
                part.write_text("in the way")
                in_the_way.append(part)
    try:
        yield
    finally:
        folder.chmod(0o700)
        for part in in_the_way:
            part.unlink()


def drain_node(nodes: LocalCluster, node: Any, *, seconds: int) -> None:
    """Announce that a node is taken away, as a cloud does with a spot machine."""
    command = [
        str(Path(sys.executable).parent / "ray"), "drain-node",
        "--address", nodes.address, "--node-id", node.node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "the test takes it away",
        "--deadline-remaining-seconds", str(seconds),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def assert_cost_little(battered: Battered, expected: set[str]) -> None:
    """Fail unless every blow was dealt and cost the steps since the last checkpoint at most."""
    assert battered.blows.keys() == expected
    dear = {what: blow for what, blow in battered.blows.items() if not blow.cost_little()}
    assert not dear, [f"{what}: {b.seen} -> {b.resumed}\n{b.text}" for what, b in dear.items()]


def assert_like_undisturbed(battered: Battered, undisturbed: Undisturbed) -> None:
    """Fail unless the training ended in one run, with the same weights, and missed no step."""
    assert f"trained {NUM_STEPS} steps" in battered.last_text
    assert_same_weights(battered.home, undisturbed.checkpoint)
    assert "going on with run" in battered.last_text
    assert battered.run_ids == {mlflow_run(battered.home).info.run_id}
    losses = train_losses(battered.home)
    assert sorted(losses) == list(range(LOG_EVERY, NUM_STEPS + 1, LOG_EVERY)), "none is missing"


def test_what_happens_costs_no_more_than_the_steps_since_the_last_checkpoint(
    battered: Battered,
) -> None:
    blows = {"worker killed", "node removed", "node announced to end", "driver killed"}
    assert_cost_little(battered, blows)
    dealt = battered.blows["node announced to end"]
    announced = re.search(r"taken away: writing a checkpoint at step (\d+)", dealt.text)
    assert announced, dealt.text
    assert dealt.resumed >= int(announced[1]) >= dealt.seen, "nothing is lost of what was announced"


def test_a_battered_training_ends_as_if_nothing_had_happened(
    battered: Battered, undisturbed: Undisturbed
) -> None:
    assert_like_undisturbed(battered, undisturbed)


def test_a_validation_neither_holds_the_steps_up_nor_ends_the_training_by_its_death(
    battered: Battered,
) -> None:
    """What was waited for is in the fixture: its processes died after the last step."""
    assert len(resumed_steps(battered.last_text)) == 1, "the steps went on"
    assert "Traceback" not in battered.last_text


def test_a_survived_failure_is_told_in_a_sentence(battered: Battered) -> None:
    assert "worker 0 failed" in battered.blows["worker killed"].text


@pytest.mark.exhaustive
def test_what_no_job_survives_costs_little_and_is_told_in_a_sentence(
    cornered: Battered, undisturbed: Undisturbed
) -> None:
    assert_cost_little(cornered, {"cluster gone", "disk full", "one failure too many", "ctrl-c"})
    told = {what: blow.text for what, blow in cornered.blows.items()}
    assert cornered.codes["cluster gone"] != 0, told["cluster gone"]
    for what, sentences in (
        ("disk full", ("error: The checkpoint step-", "is intact")),
        (
            "one failure too many",
            (
                "error: Training workers failed once without a new checkpoint",
                "the same command goes on from the last checkpoint.",
            ),
        ),
    ):
        assert cornered.codes[what] == 2, told[what]
        assert all(sentence in told[what] for sentence in sentences), told[what]
        assert "Traceback" not in told[what], told[what]
    assert cornered.codes["ctrl-c"] == 130, told["ctrl-c"]
    assert "stopped; kept: " in told["ctrl-c"]
    assert "This goes on from here: python " in told["ctrl-c"]
    assert "Traceback" not in told["ctrl-c"], told["ctrl-c"]
    assert_like_undisturbed(cornered, undisturbed)


def assert_same_curve(home: Path, reference: Undisturbed) -> None:
    """Compare the losses of trainings with different numbers of workers.

    Gradients are added in another order, which changes the last bit; from there the distance
    grows tenfold in about 15 steps of Adam, until it is a few thousandths.  Other samples would
    change every loss by several hundredths.
    """
    expected, found = reference.losses, train_losses(home)
    assert found.keys() == expected.keys()
    steps = sorted(expected)
    assert steps[-1] == NUM_STEPS
    distance = {s: abs(found[s] - expected[s]) / expected[s] for s in steps}
    assert max(distance[s] for s in steps if s <= 50) < 2e-6
    assert sum(distance.values()) / len(distance) < 0.01


@pytest.mark.exhaustive
def test_two_workers_learn_what_one_does_with_one_of_them_killed_and_then_taken_away(
    uri: str, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints are in an object store, as those of several machines are."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    story = Story()
    with object_store() as store, local_nodes(2) as (nodes, (_, second)):
        options = ("--address", nodes.address, "--workers", "1:2", "--storage", store.uri("runs"))
        with job(tmp_path, uri, *options) as training:
            training.wait_for_step(55)

            def kill_one() -> None:
                _, worker = processes_of(WORKER)
                worker.kill()

            story.strike("killed", training, kill_one)
            both = [line for line in training.lines if "going on from step-" in line]
            story.strike(
                "taken away",
                training,
                lambda: nodes.remove_node(second, allow_graceful=False),
            )
            text = training.finish()
    assert re.search(r"^worker \d failed: its process was killed", text, re.MULTILINE), text
    assert both[0].endswith("with 2 workers")
    assert "with 1 worker\n" in text
    assert all(blow.cost_little() for blow in story.blows.values()), text
    assert f"trained {NUM_STEPS} steps" in text
    assert_same_curve(tmp_path, undisturbed)
