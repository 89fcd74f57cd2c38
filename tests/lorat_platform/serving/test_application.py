"""The application on a real Ray: changes of the champion, lost replicas, who may come in."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch

from infra.processes import free_port
from lorat.errors import UserError
from lorat.metrics.confidence import BINS
from lorat_platform.cluster import ray_internals
from lorat_platform.cluster.connection import connected
from lorat_platform.recording.run import open_run
from lorat_platform.recording.store import connect, tracking_uri
from lorat_platform.registry import versions
from lorat_platform.serving.application import SWITCH_S, Scale, build
from lorat_platform.serving.client import Client
from lorat_platform.serving.connections import BOUNDED
from lorat_platform.serving.crowd import HALF_OPEN, HANDSHAKE, crowd
from lorat_platform.serving.running import serving
from lorat_platform.serving.score_board import SharedBoard
from lorat_platform.serving.settings import ServingSettings
from lorat_platform.serving.web import SESSION_HEADER
from tests.constant_trackers import random_tracker, staying_tracker
from tests.mlflow_home import make_home
from tests.served_models import BOX, frames
from tests.served_web import is_bounded
from tests.waiting import wait_until

pytestmark = pytest.mark.processes(minutes=2)

TOKEN = "a-token-that-nobody-guesses"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with three versions of ``lorat``; the last one gives what is not finite."""
    with pytest.MonkeyPatch.context() as patch:
        folder = make_home(tmp_path_factory.mktemp("serving") / "home")
        patch.setenv("LORAT_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        broken = random_tracker()
        with torch.no_grad():
            for parameter in broken.parameters():
                parameter.fill_(float("nan"))
        with open_run("lorat", "training") as run:
            for model in (random_tracker(1), staying_tracker(), broken):
                versions.register(model, run_id=run.wait_for_id())
        yield folder


@pytest.fixture(scope="module")
def place(home: Path) -> Iterator[str]:
    promote("1")
    port = free_port()
    settings = ServingSettings(poll_s=0.2)  # no model is named: the champion is meant
    with (
        connected(num_cpus=2, env=BOUNDED),
        serving(
            settings, Scale(replicas=2, cpus=0.5), host="127.0.0.1", port=port, token=TOKEN
        ) as url,
    ):
        assert url == f"http://127.0.0.1:{port}/"
        yield f"127.0.0.1:{port}"


def promote(version: str) -> None:
    connect().set_registered_model_alias("lorat", "champion", version)


def status(place: str) -> dict[str, Any]:
    return requests.get(f"http://{place}/status?token={TOKEN}", timeout=30).json()


def test_champion_changes_in_mid_stream_and_no_frame_is_lost(place: str) -> None:
    video = frames(40)
    models, boxes = [], []
    with Client(f"ws://{place}/track", token=TOKEN) as client:
        assert client._socket.remote_address[1] == client.hello["direct"]["port"]
        client.add("it", BOX)
        sent = 0

        def follow() -> str:
            nonlocal sent
            client.send(video[sent % 40])
            answer = client.receive()
            assert answer["frame"] == sent
            sent += 1
            models.append(answer["model"])
            boxes.append(answer["targets"]["it"]["box"])
            return models[-1]

        for _ in range(5):
            assert follow() == "lorat/1"
        for version in ("2", "1", "2"):  # there, back by alias, and there again
            promote(version)
            wait_until("change", lambda v=version: follow() == f"lorat/{v}")
        before = boxes[-1]
        for _ in range(5):
            follow()
        promote("3")
        wait_until("alarm", lambda: "models:/lorat/3" in status(place)["refused"])
        assert follow() == "lorat/2"
        assert "not finite" in status(place)["refused"]["models:/lorat/3"]
        promote("1")
        wait_until("change", lambda: follow() == "lorat/1")
    assert sorted(set(models)) == ["lorat/1", "lorat/2"]
    centre = [before[0] + before[2] / 2, before[1] + before[3] / 2]
    after = boxes[boxes.index(before) + 1]  # the tracker that stays goes on from the last box
    assert [after[0] + after[2] / 2, after[1] + after[3] / 2] == pytest.approx(centre, abs=15)


def test_connections_that_want_nothing_hold_no_session_up(place: str) -> None:
    host, _, port = place.partition(":")
    with crowd(host, int(port)) as many, Client(f"ws://{place}/track", token=TOKEN) as client:
        many.come(1000, *HALF_OPEN)
        many.come(100, HANDSHAKE)  # without the token
        assert len(list(client.track(frames(20), {"it": BOX}))) == 20
        wait_until("end of those without a token", lambda: many.still_open() <= 1000, seconds=60)
        assert is_bounded(place)


def test_plain_http_finds_its_replica(place: str) -> None:
    with requests.Session() as http:
        http.headers["Authorization"] = f"Bearer {TOKEN}"
        sessions: list[str] = []
        while len(owners := {name.partition(".")[0] for name in sessions}) < 2:
            assert len(sessions) < 40, owners  # chance decides between two that are idle
            sessions.append(http.post(f"http://{place}/sessions").json()["session"])
        for name in sessions:
            own = {SESSION_HEADER: name}
            at = f"http://{place}/sessions/{name}"
            http.post(f"{at}/commands", json={"raw": [160, 120]}, headers=own)
            http.post(f"{at}/commands", json={"add": "it", "box": list(BOX)}, headers=own)
            for number, frame in enumerate(frames(3)):
                answer = http.post(f"{at}/frames", data=frame.tobytes(), headers=own)
                assert answer.json()["frame"] == number
            assert http.delete(at, headers=own).status_code == 204
            assert http.delete(at, headers=own).status_code == 410
        assert requests.get(f"http://{place}/status", timeout=30).status_code == 401
        name = http.post(f"http://{place}/sessions").json()["session"]
        own, at = {SESSION_HEADER: name}, f"http://{place}/sessions/{name}"
        http.post(f"{at}/commands", json={"raw": [160, 120]}, headers=own)
        video = frames(5)
        for frame in video:  # a client that does not wait; Ray Serve drops what works on its frame
            with contextlib.suppress(requests.Timeout):
                http.post(f"{at}/frames", data=frame.tobytes(), headers=own, timeout=(10, 0.005))
        wait_until(
            "place for a frame",
            lambda: (
                http.post(f"{at}/frames", data=video[0].tobytes(), headers=own).status_code == 200
            ),
            seconds=30,
        )


def test_sessions_of_a_killed_replica_are_told_and_begin_again(place: str) -> None:
    import ray

    video = frames(30)
    clients = [Client(f"ws://{place}/track", token=TOKEN) for _ in range(6)]
    try:
        last = {}
        for client in clients:
            client.add("it", BOX)
            client.send(video[0])
            last[client] = client.receive()
        owners = {client: client.hello["session"].partition(".")[0] for client in clients}
        assert len(set(owners.values())) == 2
        victim = owners[clients[0]]
        actors = ray.util.list_named_actors(all_namespaces=True)
        (found,) = (each for each in actors if each["name"].endswith(victim))
        pid, switch_s = process_of(found)
        assert switch_s == pytest.approx(SWITCH_S)
        assert b"OMP_WAIT_POLICY=PASSIVE" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        os.kill(pid, signal.SIGKILL)
        for client in clients:
            if owners[client] == victim:
                with pytest.raises(UserError, match="begin again"):
                    go_on(client, video)
                with Client(f"ws://{place}/track", token=TOKEN) as again:
                    again.add("it", BOX, at=last[client]["targets"]["it"]["box"])
                    again.send(video[0])
                    assert again.receive()["targets"]["it"]["box"] == pytest.approx(
                        last[client]["targets"]["it"]["box"], abs=0.02
                    )
            else:
                go_on(client, video)
    finally:
        for client in clients:
            client.close()


def go_on(client: Client, video: list[Any]) -> None:
    for frame in video[1:]:
        client.send(frame)
        client.receive()


def process_of(actor: dict[str, str]) -> tuple[int, float]:
    """Return the process of an actor, and for how long its threads keep each other waiting."""
    import ray

    handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
    return ray.get(handle.__ray_call__.remote(lambda self: (os.getpid(), sys.getswitchinterval())))


FROM_OUTSIDE = """
import json, sys, time, urllib.request
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
client = mlflow.MlflowClient()
for number in range(100):
    version = str(2 - number % 2)
    client.set_registered_model_alias("lorat", "champion", version)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with urllib.request.urlopen(sys.argv[2], timeout=60) as answer:
            if json.load(answer)["model"] == "lorat/" + version:
                break
        time.sleep(0.05)
    else:
        sys.exit("no change to version " + version)
"""


@pytest.mark.exhaustive
def test_hundred_changes_from_outside_leave_no_frame_unanswered(place: str) -> None:
    """Somebody else sets the alias, with MLflow's client alone, while four videos are tracked."""
    promote("1")
    stop = threading.Event()
    seen: list[list[str]] = [[] for _ in range(4)]
    video = frames(40)

    def follow(models: list[str]) -> None:
        with Client(f"ws://{place}/track", token=TOKEN) as client:
            client.add("it", BOX)
            while not stop.is_set():
                client.send(video[len(models) % 40])
                answer = client.receive()
                assert answer["frame"] == len(models)
                models.append(answer["model"])
                stop.wait(0.04)

    with ThreadPoolExecutor(4) as pool:
        following = [pool.submit(follow, models) for models in seen]
        try:
            found = subprocess.run(
                [sys.executable, "-c", FROM_OUTSIDE, tracking_uri(),
                 f"http://{place}/status?token={TOKEN}"],
                capture_output=True, text=True, timeout=580, check=False,
            )  # fmt: skip
        finally:
            stop.set()
        for each in following:
            each.result(60)
    assert found.returncode == 0, found.stderr
    changes = [sum(a != b for a, b in itertools.pairwise(models)) for models in seen]
    assert min(changes) >= 50, changes  # a replica that is not asked may skip a short-lived one
    assert set(seen[0]) == {"lorat/1", "lorat/2"}


def test_settings_of_a_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAT_SERVE_TOKEN", TOKEN)
    build({"model": "models:/lorat@champion", "poll_s": "0.5", "replicas": "2", "gpus": "0"})
    for args, says in (
        ({"model": "m", "color": "red"}, "no setting color"),
        ({"model": "m", "window": "0"}, "--window is 0"),
        ({"model": "m", "max_replicas": "1", "replicas": "2"}, "fewer than the 2"),
    ):
        with pytest.raises(UserError, match=says):
            build(args)
    monkeypatch.setenv("LORAT_SERVE_TOKEN", "short")
    with pytest.raises(UserError, match="5 characters"):
        build({"model": "m"})
    build({"model": "m", "token": "none"})


def test_counts_of_scores_are_added_up_in_ray(place: str) -> None:
    first, second = SharedBoard("test", "first"), SharedBoard("test", "second")
    ones = {"lorat/1": np.ones(BINS, np.int64)}
    first.add_up(1, ones)
    for _ in range(2):  # its own counts replace what it wrote before
        total = second.add_up(1, ones | {"lorat/2": np.arange(BINS)})
    assert {model: counts.sum() for model, counts in total.items()} == {
        "lorat/1": 2 * BINS,
        "lorat/2": BINS * (BINS - 1) / 2,
    }
    assert [first.is_first(1, "lorat/1"), second.is_first(1, "lorat/1")] == [True, False]
    assert second.is_first(1, "lorat/2")
    assert second.add_up(2, ones)["lorat/1"].sum() == BINS
    assert ray_internals.stored_keys("test/scores/1/") == []


def test_port_that_is_taken(place: str) -> None:
    port = int(place.rpartition(":")[2])
    with (
        pytest.raises(UserError, match=f"Port {port}"),
        serving(ServingSettings(), Scale(), host="127.0.0.1", port=port, token=TOKEN),
    ):
        pass
