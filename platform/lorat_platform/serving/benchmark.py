"""What serving reaches on this machine, with clients in processes of their own on loopback."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import psutil

from lorat.config.bounds import Bounds, check_bounds
from lorat.config.fields import flag
from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.image.codec import decode_rgb, encode_jpeg
from lorat_platform.serving.client import Client
from lorat_platform.serving.connections import BOUNDED, REQUEST_S
from lorat_platform.serving.crowd import HALF_OPEN, HANDSHAKE, crowd
from lorat_platform.serving.settings import ServingSettings

log = logging.getLogger(__name__)

FRAME_S = 0.04
"""Of a video of 25 frames per second."""
WIDTH, HEIGHT = 640, 360
BOX = (280.0, 150.0, 80.0, 60.0)
VIDEO_FRAMES = 50
MEMORY_POINTS = 20
SERVER_PROCESSES = {
    "replica": "ServeReplica", "proxy": "ProxyActor", "controller": "ServeController",
}  # fmt: skip
"""Processes of a server, and what the titles have that Ray gives them."""
QUIET_FRAMES = 100
"""Before the first change of the model, to tell what waits come from it and which from others."""
Measure = Literal["all", "throughput", "swaps", "memory", "loss", "crowd"]


@dataclass(frozen=True, kw_only=True)
class ServeBenchmark:
    """Measure serving: targets/s beside a process for each target, the gap at a change of the
    model, memory of a long session, and what a lost replica or a crowd of idle connections does to
    others."""

    variant: str = "T-112"
    """Model, such as T-112 or S-224; its weights are random."""
    measure: Measure = "all"
    """What to measure."""
    targets: Annotated[int, Bounds(1, 1024)] = 16
    """Targets that are tracked at the same time, 1 to 1024."""
    seconds: Annotated[float, Bounds(0, 86_400, above=True)] = 15.0
    """Length of each measurement of throughput, more than 0, at most 86,400."""
    swaps: Annotated[int, Bounds(1, 100_000)] = 100
    """Changes of the model, 1 to 100,000."""
    frames: Annotated[int, Bounds(100, 100_000_000)] = 100_000
    """Frames of the long session, 100 to 100,000,000."""
    sessions: Annotated[int, Bounds(2, 10_000)] = 50
    """Sessions that come and go while a replica is lost, 2 to 10,000."""
    connections: Annotated[int, Bounds(10, 50_000)] = 3000
    """Connections that send half a request, and a third as many silent WebSockets, 10 to 50,000."""

    def __post_init__(self) -> None:
        check_bounds(self, flag)


def benchmark_serve(options: ServeBenchmark) -> dict[str, Any]:
    """Measure, and log a line for each result.

    Returns:
        Figures by measurement.
    """
    parts: dict[str, Callable[[ServeBenchmark], dict[str, Any]]] = {
        "throughput": _throughput,
        "swaps": _swaps,
        "memory": _memory,
        "loss": _loss,
        "crowd": _crowd,
    }
    return {name: part(options) for name, part in parts.items() if options.measure in ("all", name)}


@contextlib.contextmanager
def _server(options: ServeBenchmark, versions: int = 1, **settings: Any) -> Iterator[_Server]:
    """Serve random weights from a store of their own."""
    from lorat.model.network import build_model
    from lorat_platform.cluster.connection import connected
    from lorat_platform.recording.run import open_run
    from lorat_platform.recording.store import connect
    from lorat_platform.registry import versions as registry
    from lorat_platform.serving.application import Scale
    from lorat_platform.serving.running import serving

    before = {name: os.environ.get(name) for name in ("LORAT_HOME", "MLFLOW_TRACKING_URI")}
    with tempfile.TemporaryDirectory(prefix="lorat-serve-") as folder:
        os.environ["LORAT_HOME"] = folder
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        try:
            with open_run("lorat", "benchmark") as run:
                for seed in range(versions):
                    config = TrainConfig(variant=options.variant, backbone="none", seed=seed)
                    registry.register(build_model(config), run_id=run.wait_for_id())
            store = connect()
            store.set_registered_model_alias("lorat", "champion", "1")
            replicas = settings.pop("replicas", 1)
            cpus = len(os.sched_getaffinity(0)) / replicas  # of Ray: clients have the same cores
            scale = Scale(replicas=replicas, cpus=cpus)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            with (
                connected("local", env=BOUNDED),
                serving(
                    ServingSettings(**settings), scale, host="127.0.0.1", port=port, token=None
                ),
            ):
                yield _Server(f"127.0.0.1:{port}")
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


@dataclass(frozen=True)
class _Server:
    place: str

    @property
    def track(self) -> str:
        return f"ws://{self.place}/track"

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{self.place}/status", timeout=60) as answer:
            return json.load(answer)


def _video(seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    ground = np.kron(ground, np.ones((8, 8, 1), np.uint8))
    return [encode_jpeg(np.roll(ground, 2 * n, 1), 85) for n in range(VIDEO_FRAMES)]


def _throughput(options: ServeBenchmark) -> dict[str, Any]:
    alone = _together(options.targets, _track_alone, options.variant, options.seconds)
    figures = {"process_per_target": alone}
    log.info("A process for each of %d targets: %.0f targets/s", options.targets, alone)
    for name, clients in (("sessions", options.targets), ("one_session", 1)):
        with _server(options) as server:
            each = options.targets // clients
            rate = each * _together(clients, _track_there, server.track, options.seconds, each)
            batch = server.status()["p50_p99"].get("batch", [0.0])[0]
        figures |= {name: rate, f"{name}_ratio": rate / alone, f"{name}_batch": batch}
        log.info(
            "%d session(s) of %d target(s): %.0f targets/s, %.2f times, median batch %.0f",
            clients, each, rate, rate / alone, batch,
        )  # fmt: skip
    return figures


def _together(count: int, work: Callable[..., None], *given: Any) -> float:
    """Run a function in processes that begin at the same time; return the sum of their rates."""
    context = multiprocessing.get_context("spawn")
    rates: Any = context.Queue()
    begin = context.Barrier(count)
    processes = [
        context.Process(target=work, args=(rates, begin, number, *given), daemon=True)
        for number in range(count)
    ]
    for process in processes:
        process.start()
    found = [rates.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return float(sum(found))


def _track_alone(rates: Any, begin: Any, number: int, variant: str, seconds: float) -> None:
    """Track a video with the library, as a program for each target would."""
    import torch

    from lorat.model.network import build_model
    from lorat.tracking.tracker import Tracker

    torch.set_num_threads(1)
    tracker = Tracker(build_model(TrainConfig(variant=variant, backbone="none")))
    video = _video(number)
    left, top, width, height = BOX
    tracker.init(decode_rgb(video[0]), (left, top, left + width, top + height))
    tracker.update(decode_rgb(video[1]))
    begin.wait(300)
    began, done = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        tracker.update(decode_rgb(video[done % VIDEO_FRAMES]))
        done += 1
    rates.put(done / (time.monotonic() - began))


def _track_there(
    rates: Any, begin: Any, number: int, url: str, seconds: float, targets: int
) -> None:
    """Track a video with the server."""
    video = _video(number)
    with Client(url) as client:
        boxes = {str(n): (BOX[0] + 5 * n, *BOX[1:]) for n in range(targets)}
        begin.wait(300)
        began, done = time.monotonic(), 0
        frames = (video[n % VIDEO_FRAMES] for n in range(10**9))
        for _ in client.track(frames, boxes):
            done += 1
            if time.monotonic() - began >= seconds:
                break
        rates.put(done / (time.monotonic() - began))


def _swaps(options: ServeBenchmark) -> dict[str, Any]:
    """Change the model under a video of 25 frames per second; measure the longest waits."""
    video = _video()
    context = multiprocessing.get_context("spawn")
    with _server(options, versions=2, poll_s=0.05) as server, Client(server.track) as client:
        # In a process of its own, so that it does not hold this one up, which measures.
        ready, begin, made = context.Event(), context.Event(), context.Value("i", 0)
        changing = context.Process(
            target=_change, args=(server, options.swaps, ready, begin, made), daemon=True
        )
        changing.start()
        ready.wait(300)
        client.add("it", BOX)
        client.send(video[0])
        client.receive()
        waits: list[float] = []
        models: list[str] = []
        began = time.monotonic()
        while changing.is_alive():
            number = len(waits) + 1
            if number == QUIET_FRAMES:
                begin.set()
            time.sleep(max(0.0, began + number * FRAME_S - time.monotonic()))
            sent = time.monotonic()
            client.send(video[number % VIDEO_FRAMES])
            answer = client.receive()
            waits.append(time.monotonic() - sent)
            models.append(answer["model"])
    moves = [n for n in range(1, len(models)) if models[n] != models[n - 1]]
    figures = {
        "swaps": made.value,
        "moves": len(moves),
        "unanswered": client.sent - 1 - len(waits),
        "wait_p50_ms": 1000 * float(np.quantile(waits, 0.5)),
        "wait_p99_ms": 1000 * float(np.quantile(waits, 0.99)),
        "gap_p99_frame_times": _gap(waits, moves),
        "gap_without_change": _gap(waits, range(2, QUIET_FRAMES - 3)),
    }
    log.info(
        "%d changes, %d seen by the session; %d of %d frames unanswered; waits %.1f ms (median), "
        "%.1f ms (p99); at a change p99 %.2f frame times, without one %.2f",
        made.value, len(moves), figures["unanswered"], len(waits), figures["wait_p50_ms"],
        figures["wait_p99_ms"], figures["gap_p99_frame_times"], figures["gap_without_change"],
    )  # fmt: skip
    return figures


def _change(server: _Server, swaps: int, ready: Any, begin: Any, made: Any) -> None:
    """Let the champion be the other version each time when the last one serves."""
    from lorat_platform.recording.store import connect

    store = connect()
    ready.set()
    begin.wait(300)
    while made.value < swaps:
        version = 2 - made.value % 2
        store.set_registered_model_alias("lorat", "champion", str(version))
        while server.status()["model"] != f"lorat/{version}":
            time.sleep(FRAME_S)
        made.value += 1


def _gap(waits: Sequence[float], places: Iterable[int]) -> float:
    """Return the p99 of the longest waits around places in a video, in frame times."""
    longest = [max(waits[max(0, n - 2) : n + 3]) for n in places]
    return float(np.quantile(longest or [0.0], 0.99)) / FRAME_S


def _memory(options: ServeBenchmark) -> dict[str, Any]:
    """Track very many frames in one session; note what each process of the server holds."""
    frame = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8).tobytes()
    numbers: list[int] = []
    sizes: dict[str, list[float]] = {kind: [] for kind in SERVER_PROCESSES}
    with _server(options) as server, Client(server.track) as client:
        client.say({"raw": [128, 96]})
        every = options.frames // MEMORY_POINTS
        frames = (frame for _ in range(options.frames))
        for number, _ in enumerate(client.track(frames, {"it": (40, 30, 30, 30)}), 1):
            if number % every == 0:
                numbers.append(number)
                for kind, mb in _resident_mb().items():
                    sizes[kind].append(mb)
                now = ", ".join(f"{kind} {mb[-1]:.1f} MB" for kind, mb in sizes.items())
                log.info("%d frames: %s", number, now)
    # What is set up once, such as caches of allocators, is not growth.
    settled = slice(MEMORY_POINTS // 5, None)
    slopes = {
        kind: 1e6 * float(np.polyfit(numbers[settled], mb[settled], 1)[0])
        for kind, mb in sizes.items()
    }
    for kind, slope in slopes.items():
        log.info("%s: %.1f bytes/frame after the first fifth", kind, slope)
    return {"frames": numbers, "mb": sizes, "bytes_per_frame": slopes}


def _resident_mb() -> dict[str, float]:
    """Return the memory of the processes of Ray Serve, by kind."""
    return {
        kind: sum(each.memory_info().rss for each in processes) / 1e6
        for kind, processes in _server_processes().items()
    }


def _server_processes() -> dict[str, list[psutil.Process]]:
    """Return the processes of Ray Serve that this process started, by kind."""
    found: dict[str, list[psutil.Process]] = {kind: [] for kind in SERVER_PROCESSES}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            for kind, title in SERVER_PROCESSES.items():
                if title in command:
                    found[kind].append(process)
    return found


def _crowd(options: ServeBenchmark) -> dict[str, Any]:
    """Track a video of 25 frames per second beside a crowd of connections that want nothing."""
    video = _video()
    waits: dict[str, list[float]] = {"alone": [], "beside": []}
    sizes = {}
    stop, when = threading.Event(), "alone"
    with _server(options, idle_s=REQUEST_S) as server:
        client = Client(server.track)
        client.add("it", BOX)

        def follow() -> None:
            with client:
                for frame in itertools.cycle(video):
                    if stop.is_set():
                        return
                    sent = time.monotonic()
                    client.send(frame)
                    client.receive()
                    waits[when].append(time.monotonic() - sent)
                    time.sleep(max(0.0, sent + FRAME_S - time.monotonic()))

        following = threading.Thread(target=follow, daemon=True)
        following.start()
        time.sleep(options.seconds)
        sizes["alone"] = _resident_mb()
        host, _, port = server.place.partition(":")
        with crowd(host, int(port)) as many:
            when = "beside"
            many.come(options.connections, *HALF_OPEN)
            many.come(options.connections // 3, HANDSHAKE)
            came = time.monotonic()
            many.send_unread(8, bytes(96 * 128 * 3), options.seconds)
            sizes["beside"] = _resident_mb()
            while (left := many.still_open()) and time.monotonic() - came < 5 * REQUEST_S:
                time.sleep(1)
            gone = time.monotonic() - came
        sizes["after"] = _resident_mb()
        stop.set()
        following.join(60)
        with Client(server.track) as again:
            found = len(list(again.track(video[:5], {"it": BOX})))
    quantiles = {name: 1000 * np.quantile(each, (0.5, 0.99, 1)) for name, each in waits.items()}
    for name, (median, high, longest) in quantiles.items():
        log.info("%s: %d frames, waits %.0f ms (median), %.0f (p99), %.0f (longest)",
                 name, len(waits[name]), median, high, longest)  # fmt: skip
    for name, kinds in sizes.items():
        log.info("%s: %s", name, ", ".join(f"{kind} {mb:.1f} MB" for kind, mb in kinds.items()))
    log.info("%d of the crowd not ended after %.0f s; a new session: %d answers", left, gone, found)
    return {
        "waits_ms": {name: each.tolist() for name, each in quantiles.items()},
        "mb": sizes, "left": left, "seconds": gone, "answers_after": found,
    }  # fmt: skip


def _loss(options: ServeBenchmark) -> dict[str, Any]:
    """Open and drop sessions at random while a replica is killed."""
    video = _video()
    with _server(options, replicas=2) as server:
        counts = dict.fromkeys(
            ("frames", "told", "new", "resumed", "elsewhere", "wrong", "refused"), 0
        )
        lock = threading.Lock()
        stop = threading.Event()

        def come_and_go(number: int) -> None:
            chance = random.Random(number)
            last: dict[str, Any] | None = None
            while not stop.is_set():
                began = False
                try:
                    with Client(server.track) as client:
                        began = True
                        at = last["targets"]["it"]["box"] if last is not None else None
                        client.add("it", BOX, at=at)
                        for n in range(chance.randint(5, 60)):
                            client.send(video[n % VIDEO_FRAMES])
                            answer = client.receive()
                            with lock:
                                counts["frames"] += 1
                                counts["wrong"] += answer["frame"] != n
                                if n == 0 and at is not None:
                                    found = answer["targets"]["it"]["box"]
                                    goes_on = np.allclose(found, at, atol=0.02)
                                    counts["resumed" if goes_on else "elsewhere"] += 1
                            last = answer
                            if stop.is_set():
                                return
                        last = None
                except UserError:
                    with lock:
                        counts["told" if began else "refused"] += 1
                        counts["new"] += began and last is None
                    time.sleep(0.1)

        clients = [
            threading.Thread(target=come_and_go, args=(number,), daemon=True)
            for number in range(options.sessions)
        ]
        for client in clients:
            client.start()
        time.sleep(options.seconds / 2)
        victim = _server_processes()["replica"][0].pid
        os.kill(victim, signal.SIGKILL)
        time.sleep(options.seconds / 2)
        with lock:
            before = counts["frames"]
        time.sleep(options.seconds / 2)
        stop.set()
        for client in clients:
            client.join(60)
        counts["hung"] = sum(client.is_alive() for client in clients)
        counts["frames_at_the_end"] = counts["frames"] - before
    log.info(
        "%d sessions at a time, a replica killed: %d frames, %d wrong answers, %d sessions told "
        "(%d before their first answer), %d taken up again from their last box, %d elsewhere, "
        "%d refused at first, %d frames after it",
        options.sessions, counts["frames"], counts["wrong"], counts["told"], counts["new"],
        counts["resumed"], counts["elsewhere"], counts["refused"], counts["frames_at_the_end"],
    )  # fmt: skip
    return dict(counts)
