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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError

from lorat.errors import UserError
from lorat_platform import training as lorat_training
from lorat_platform.cluster import Cluster
from lorat_platform.run_options import Placement, RunOptions
from tests.lorat_platform.training_jobs import (
    CHECKPOINT_EVERY,
    NUM_STEPS,
    TrainJob,
    assert_same_weights,
    mlflow_run_id,
    resumed_steps,
    run_folder,
    train_losses,
)
from tests.small_shards import make_shards


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(tmp_path_factory.mktemp("data") / "train", split="train")


@contextlib.contextmanager
def job(home: Path, uri: str, *options: str, **environment: str) -> Iterator[TrainJob]:
    started = TrainJob(home, uri, *options, **environment)
    try:
        yield started
    finally:
        started.clean_up()


@pytest.fixture(scope="module")
def uninterrupted(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Home folder of a training that nothing happened to."""
    home = tmp_path_factory.mktemp("uninterrupted")
    with job(home, uri) as training:
        text = training.finish()
    assert resumed_steps(text) == []
    return home


def assert_ends_like(home: Path, reference: Path, text: str, seen: int) -> None:
    """Fail unless a training, seen at a step before it broke, lost little and ended the same.

    How far it got after that step is the machine's affair, but not to the end.
    """
    last = seen // CHECKPOINT_EVERY * CHECKPOINT_EVERY
    (resumed,) = resumed_steps(text)
    assert last - CHECKPOINT_EVERY <= resumed < NUM_STEPS  # one may have been on its way
    assert f"trained {NUM_STEPS} steps" in text
    assert_same_weights(home, reference)


def count_mlflow_runs(home: Path) -> int:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("train")
    assert experiment is not None
    return len(client.search_runs([experiment.experiment_id]))


def test_a_killed_worker_is_replaced(uri: str, uninterrupted: Path, tmp_path: Path) -> None:
    with job(tmp_path, uri) as training:
        step = training.wait_for_step(120)
        (worker,) = training.training_workers()
        worker.send_signal(signal.SIGKILL)
        text = training.finish()
    assert "worker 0 failed" in text
    assert_ends_like(tmp_path, uninterrupted, text, step)
    assert count_mlflow_runs(tmp_path) == 1


def test_of_two_workers_a_killed_one_is_replaced(
    uri: str, uninterrupted: Path, tmp_path: Path
) -> None:
    with job(tmp_path, uri, "--workers", "2") as training:
        step = training.wait_for_step(120)
        _, worker = training.training_workers()
        worker.send_signal(signal.SIGKILL)
        text = training.finish()
    assert re.search(r"^worker \d failed: its process was killed", text, re.MULTILINE), text
    (resumed,) = resumed_steps(text)
    assert step - 2 * CHECKPOINT_EVERY <= resumed < NUM_STEPS
    assert f"trained {NUM_STEPS} steps" in text
    assert_same_curve(tmp_path, uninterrupted)


def test_failures_beyond_the_limit_end_with_a_sentence(uri: str, tmp_path: Path) -> None:
    with job(tmp_path, uri, "--max-failures", "0") as training:
        training.wait_for_step(60)
        (worker,) = training.training_workers()
        worker.send_signal(signal.SIGKILL)
        code = training.process.wait(timeout=120)
    assert code == 2, training.text
    assert "error: Training workers failed once without a new checkpoint" in training.text
    assert "the same command goes on from the last checkpoint." in training.text
    assert "Traceback" not in training.text


def validation_process(training: TrainJob, other_than: int = 0) -> psutil.Process:
    """Wait for the process of a validation and return it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for child in psutil.Process(training.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "run_validation_fn" in " ".join(child.cmdline()) and child.pid != other_than:
                    return child
        assert training.process.poll() is None, training.text
        time.sleep(0.05)
    raise AssertionError(f"no validation in time:\n{training.text}")


def test_a_validation_neither_holds_the_steps_up_nor_ends_the_training_by_its_death(
    uri: str, tmp_path: Path
) -> None:
    val = make_shards(tmp_path / "val", split="val")
    endless = ("--val-pairs", "100000000", "--val-sequences", "0", "--no-final-evaluation")
    options = ("--val-data", f"tiny={val}", "--validate-every", "7", *endless)
    with job(tmp_path, uri, *options) as training:
        first = validation_process(training)
        training.wait_for_step(NUM_STEPS)
        assert first.is_running()
        first.send_signal(signal.SIGKILL)
        training.wait_for("process that validated step-00000350 died, .*; it is tried once more")
        validation_process(training, first.pid).send_signal(signal.SIGKILL)
        training.wait_for("process that validated step-00000350 died, .*; the training goes on")
        text = training.finish()
    assert f"trained {NUM_STEPS} steps" in text
    assert resumed_steps(text) == []
    assert "Traceback" not in text


def test_a_killed_driver_is_gone_on_with_by_the_same_command(
    uri: str, uninterrupted: Path, tmp_path: Path
) -> None:
    with job(tmp_path, uri) as first:
        first.wait_for_step(5)
        run_id = mlflow_run_id(tmp_path)
        step = first.wait_for_step(120)
        first.kill()
    with job(tmp_path, uri) as second:
        text = second.finish()
    assert "going on with run" in text
    assert_ends_like(tmp_path, uninterrupted, text, step)
    assert mlflow_run_id(tmp_path) == run_id
    assert count_mlflow_runs(tmp_path) == 1


@contextlib.contextmanager
def ray_head(temp: Path) -> Iterator[str]:
    """Run a Ray of one node in a session of its own, which is killed as a whole."""
    port = 6400 + os.getpid() % 500
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block",
        f"--port={port}", "--num-cpus=2", "--include-dashboard=false",
        "--node-ip-address=127.0.0.1", "--disable-usage-stats", f"--temp-dir={temp}",
    ]  # fmt: skip
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    head = subprocess.Popen(
        command, start_new_session=True, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_for_port(port, head)
        yield f"127.0.0.1:{port}"
    finally:
        family = [head.pid, *(c.pid for c in psutil.Process(head.pid).children(recursive=True))]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()


def _wait_for_port(port: int, head: subprocess.Popen[bytes]) -> None:
    import socket

    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, "ray start failed"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            time.sleep(3)  # the other parts of the node
            return
        time.sleep(0.5)
    raise AssertionError("Ray did not start")


def test_a_whole_cluster_may_stop_and_start_again(
    uri: str, uninterrupted: Path, tmp_path: Path
) -> None:
    short = Path("/tmp") / f"lorat-ray-{os.getpid()}"  # socket paths must be short
    with ray_head(short / "a") as address, job(tmp_path, uri, "--address", address) as first:
        first.wait_for_step(5)
        run_id = mlflow_run_id(tmp_path)
        step = first.wait_for_step(120)
    with ray_head(short / "b") as address, job(tmp_path, uri, "--address", address) as second:
        text = second.finish()
    assert_ends_like(tmp_path, uninterrupted, text, step)
    assert mlflow_run_id(tmp_path) == run_id


def test_the_driver_ends_by_itself_when_the_cluster_is_gone(uri: str, tmp_path: Path) -> None:
    short = Path("/tmp") / f"lorat-ray-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        with ray_head(short / "c") as address:
            training = stack.enter_context(job(tmp_path, uri, "--address", address))
            training.wait_for_step(60)
        assert training.process.wait(timeout=120) != 0


def test_a_removed_node_is_replaced_by_another(
    uri: str, uninterrupted: Path, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster as LocalCluster

    nodes = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        first = nodes.add_node(num_cpus=1)
        with job(tmp_path, uri, "--address", nodes.address) as training:
            training.wait_for_step(5)
            nodes.add_node(num_cpus=1)
            step = training.wait_for_step(120)
            nodes.remove_node(first, allow_graceful=False)
            text = training.finish()
    finally:
        nodes.shutdown()
    assert_ends_like(tmp_path, uninterrupted, text, step)


def test_a_node_about_to_be_taken_away_gets_a_checkpoint_first(
    uri: str, uninterrupted: Path, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster as LocalCluster

    nodes = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0})
    fast = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2"}
    try:
        first = nodes.add_node(num_cpus=1)
        with job(tmp_path, uri, "--address", nodes.address, **fast) as training:
            training.wait_for_step(5)
            nodes.add_node(num_cpus=1)
            step = training.wait_for_step(60)
            drain = [
                str(Path(sys.executable).parent / "ray"), "drain-node",
                "--address", nodes.address, "--node-id", first.node_id,
                "--reason", "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message", "the test takes it away",
                "--deadline-remaining-seconds", "3",
            ]  # fmt: skip
            subprocess.run(drain, check=True, capture_output=True)
            found = training.wait_for(r"taken away: writing a checkpoint at step (\d+)")
            training.wait_for("going on from step-")
            text = training.finish()
    finally:
        nodes.shutdown()
    (resumed, *_rest) = resumed_steps(text)
    assert resumed >= int(found[1]) >= step
    assert_same_weights(tmp_path, uninterrupted)


def assert_same_curve(home: Path, reference: Path) -> None:
    """Compare the losses of trainings with different numbers of workers.

    Gradients are added in another order, which changes the last bit; from there the distance
    grows tenfold in about 15 steps of Adam, until it is a few thousandths.  Other samples would
    change every loss by several hundredths.
    """
    expected, found = train_losses(reference), train_losses(home)
    assert found.keys() == expected.keys()
    steps = sorted(expected)
    assert steps[-1] == NUM_STEPS
    distance = {s: abs(found[s] - expected[s]) / expected[s] for s in steps}
    assert max(distance[s] for s in steps if s <= 50) < 2e-6
    assert sum(distance.values()) / len(distance) < 0.01


def test_two_workers_learn_what_one_does(uri: str, uninterrupted: Path, tmp_path: Path) -> None:
    with job(tmp_path, uri, "--workers", "2") as training:
        training.finish()
    assert_same_curve(tmp_path, uninterrupted)


def test_an_elastic_training_goes_on_with_fewer_workers(
    uri: str, uninterrupted: Path, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster as LocalCluster

    nodes = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes.add_node(num_cpus=1)
        second = nodes.add_node(num_cpus=1)
        patience = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
        options = ("--address", nodes.address, "--workers", "1:2")
        with job(tmp_path, uri, *options, **patience) as training:
            training.wait_for_step(60)
            nodes.remove_node(second, allow_graceful=False)
            text = training.finish()
    finally:
        nodes.shutdown()
    assert "going on from step-" in text
    assert "with 1 worker\n" in text
    assert_same_curve(tmp_path, uninterrupted)


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(uri: str, tmp_path: Path) -> None:
    with job(tmp_path, uri) as first:
        first.wait_for_step(60)
        first.process.send_signal(signal.SIGINT)
        assert first.process.wait(timeout=60) == 130, first.text
        assert "Traceback" not in first.text
    with job(tmp_path, uri) as second:
        second.wait_for("going on from step-")
        second.process.send_signal(signal.SIGINT)
        assert second.process.wait(timeout=60) == 130, second.text


def test_a_full_disk_ends_the_run_with_a_sentence_and_spares_the_last_checkpoint(
    uri: str, tmp_path: Path
) -> None:
    with job(tmp_path, uri) as training:
        training.wait_for_step(60)
        folder = run_folder(tmp_path)
        while not (folder / "step-00000050").exists():
            time.sleep(0.05)
        folder.chmod(0o500)
        if os.access(folder, os.W_OK):  # root writes anywhere; take the place away instead
            folder.chmod(0o700)
            for step in range(100, NUM_STEPS + 1, CHECKPOINT_EVERY):
                (folder / f".part-step-{step:08d}").write_text("in the way")
        code = training.process.wait(timeout=120)
        text = training.text
    folder.chmod(0o700)
    assert code == 2, text
    assert "error: The checkpoint step-" in text
    assert "is intact" in text
    assert "Traceback" not in text
    from lorat.storage import locate
    from lorat_platform import checkpoint_store

    assert checkpoint_store.newest(locate(folder)) is not None


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (WorkerGroupStartupTimeoutError(2), "did not give the 2 CPUs .* lower --workers"),
        (
            WorkerGroupStartupFailedError("a node died"),
            "could not be started, .* a node died; look",
        ),
    ],
)
def test_workers_that_do_not_start_end_with_a_sentence(failure: Exception, message: str) -> None:
    cluster = Cluster(embedded=False, address="127.0.0.1:1", cpus=8, gpus=0, nodes=2)
    place = Placement.plan(RunOptions(workers="2", cpus_per_worker=1), cluster, batch_size=8)

    def fit() -> None:
        raise ControllerError(failure)

    with pytest.raises(UserError, match=message):
        lorat_training._in_thread(fit, place)


def test_more_than_the_machine_has_is_refused_at_once() -> None:
    machine = Cluster(embedded=True, address="", cpus=2, gpus=0, nodes=1)
    with pytest.raises(UserError, match="do not fit into the 2 CPUs"):
        Placement.plan(RunOptions(workers="3"), machine, 64)
    with pytest.raises(UserError, match="need a GPU each"):
        Placement.plan(RunOptions(workers="1", device="gpu"), machine, 64)
    with pytest.raises(UserError, match="at most one worker per pair"):
        Placement.plan(RunOptions(workers="1:9"), machine, 8)
    place = Placement.plan(RunOptions(workers="1:2"), machine, 64)
    assert (place.low, place.high, place.cpus, place.threads) == (1, 2, 1, 1)


@pytest.mark.parametrize("workers", ["0", "2:1", "a", "1:2:3", "-1"])
def test_a_wrong_number_of_workers_is_refused(workers: str) -> None:
    with pytest.raises(UserError, match="workers is"):
        RunOptions(workers=workers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_worker": 0}, "--cpus-per-worker is 0; give 1 or more."),
        ({"val_pairs": -1}, "--val-pairs is -1; give 0 or more."),
        ({"val_gpus": -0.5}, "--val-gpus is -0.5; give 0 or more."),
        ({"val_gpus": 1.5}, "--val-gpus is 1.5; give a part of one GPU, or whole ones."),
        ({"max_failures": -2}, "--max-failures is -2; give 0 or more, or -1."),
        ({"name": "a b"}, "--name is 'a b'; give letters"),
    ],
)
def test_a_wrong_option_is_named_as_it_is_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        RunOptions(**options)
    assert str(caught.value).startswith(message)
