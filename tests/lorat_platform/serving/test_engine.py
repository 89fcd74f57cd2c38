"""The engine: many sessions in one batch, each as if it were alone."""

from __future__ import annotations

import dataclasses
import gc
import json
import queue
import threading
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.image.codec import encode_jpeg
from lorat.model.network import build_model
from lorat_platform.serving import engine as engine_module
from lorat_platform.serving import messages, statistics
from lorat_platform.serving.drift import Drift
from lorat_platform.serving.engine import Engine
from lorat_platform.serving.messages import HEADER
from lorat_platform.serving.served_model import SHORT_MS, THREADS
from lorat_platform.serving.session import Session
from lorat_platform.serving.settings import ServingSettings
from lorat_platform.serving.shadow import Shadow
from tests.constant_trackers import random_tracker
from tests.served_models import BOX, expected, frames, served
from tests.waiting import wait_until

RAW = '{"raw": [160, 120]}'
ADD = f'{{"add": "it", "box": {list(BOX)}}}'


class Talk:
    """A session, its answers, and how a client would use it."""

    def __init__(self, engine: Engine, *commands: str) -> None:
        self.engine = engine
        self.answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.session: Session = engine.open(self.answers.put)
        self.sent = self.read = 0
        for command in (RAW, *commands):
            engine.command(self.session, command)

    def send(self, frame: np.ndarray, number: int | None = None) -> None:
        self.engine.frame(
            self.session,
            HEADER.pack(self.sent if number is None else number, self.read) + frame.tobytes(),
        )
        self.sent += 1

    def receive(self) -> dict[str, Any]:
        answer = self.answers.get(timeout=60)
        self.read += 1
        return answer


@pytest.fixture
def engine():
    engine = Engine(served(1), ServingSettings())
    yield engine
    engine.stop()


def test_sessions_in_one_batch_are_tracked_as_alone(engine: Engine) -> None:
    videos = [frames(6, seed) for seed in range(4)]
    talks = [Talk(engine, ADD) for _ in videos]
    found: list[list[list[float]]] = [[] for _ in videos]
    for number in range(6):
        for talk, video in zip(talks, videos, strict=True):
            talk.send(video[number])
        for talk, boxes in zip(talks, found, strict=True):
            answer = talk.receive()
            assert (answer["frame"], answer["model"], answer["skipped"]) == (number, "lorat/1", 0)
            assert 0 <= answer["targets"]["it"]["score"] <= 1
            boxes.append(answer["targets"]["it"]["box"])
    alone = served(1)
    for video, boxes in zip(videos, found, strict=True):
        np.testing.assert_allclose(boxes, expected(alone, video), atol=0.02)


def test_targets_come_and_go_in_mid_stream(engine: Engine) -> None:
    video = frames(6)
    talk = Talk(engine, ADD)
    seen = []
    for number, frame in enumerate(video):
        if number == 2:
            engine.command(talk.session, '{"add": "other", "box": [20, 20, 30, 30]}')
        if number == 4:
            engine.command(talk.session, '{"drop": "it"}')
        talk.send(frame)
        seen.append(talk.receive()["targets"])
    assert [sorted(each) for each in seen] == [["it"]] * 2 + [["it", "other"]] * 2 + [["other"]] * 2
    assert seen[2]["other"] == {"box": [20, 20, 30, 30], "score": 1}
    other = [each["other"]["box"] for each in seen[2:]]
    np.testing.assert_allclose(other, expected(served(1), video[2:], (20, 20, 30, 30)), atol=0.02)


def test_target_is_taken_up_where_it_was(engine: Engine) -> None:
    """A client that comes back gives first frame, first box, and the place to go on from."""
    video = frames(8)
    alone = expected(served(1), video)
    at = [round(float(value), 2) for value in alone[4]]
    talk = Talk(engine, f'{{"add": "it", "box": {list(BOX)}, "at": {at}}}')
    talk.send(video[0])
    assert talk.receive()["targets"]["it"]["box"] == pytest.approx(at, abs=0.02)
    for number in range(5, 8):
        talk.send(video[number])
        np.testing.assert_allclose(talk.receive()["targets"]["it"]["box"], alone[number], atol=0.05)


def test_another_model_goes_on_from_the_first_view_and_the_last_box(engine: Engine) -> None:
    video = frames(8)
    talk = Talk(engine, ADD)
    boxes = []
    larger = build_model(TrainConfig(variant="T-168", backbone="none"))  # crops of another size
    for number, frame in enumerate(video):
        if number == 4:
            engine.use(served(2, larger))
        talk.send(frame)
        answer = talk.receive()
        assert answer["model"] == ("lorat/1" if number < 4 else "lorat/2")
        boxes.append(answer["targets"]["it"]["box"])
    first, second = served(1), served(2, larger)
    np.testing.assert_allclose(boxes[:4], expected(first, video)[:4], atol=0.02)
    (target,) = second.tracker.start([video[0]], [(60, 50, 100, 80)])
    first.tracker.init(video[0], (60, 50, 100, 80))
    for frame in video[1:4]:
        first.tracker.update(frame)
    assert first.tracker._target is not None
    target.box = first.tracker._target.box
    for number in range(4, 8):
        box = second.tracker.step([target], [video[number]])[0][0]
        wanted = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        np.testing.assert_allclose(boxes[number], wanted, atol=0.02)


def test_templates_for_another_model_are_made_beside_the_tracking(engine: Engine) -> None:
    talk = Talk(engine, ADD, '{"add": "other", "box": [20, 20, 30, 30]}')
    talk.send(frames(1)[0])
    talk.receive()
    other = served(2)
    makers: list[str] = []
    make = other.tracker.start_from

    def noting(views: Any) -> Any:
        makers.extend(threading.current_thread().name for _ in views)
        return make(views)

    other.tracker.start_from = noting  # type: ignore[method-assign]
    engine.use(other)
    talk.send(frames(2)[1])
    assert talk.receive()["model"] == "lorat/2"
    assert makers == [threading.current_thread().name] * 2


def test_batch_that_is_short_takes_one_thread() -> None:
    used: list[int] = []

    def step(latency_ms: float, count: int) -> None:
        model = dataclasses.replace(served(1), latency_ms=latency_ms)
        targets = model.tracker.start([frames(1)[0]] * count, [(60, 50, 100, 80)] * count)
        model.step(targets, [frames(1)[0]] * count)
        used.append(torch.get_num_threads())

    def steps() -> None:
        step(SHORT_MS / 3, 2)
        step(SHORT_MS / 3, 4)
        step(SHORT_MS / 3, 1)

    thread = threading.Thread(target=steps)  # the threads of others stay as they are
    before = torch.get_num_threads()
    thread.start()
    thread.join()
    assert used == [1, THREADS, 1]
    assert torch.get_num_threads() == before


def test_bad_input_ends_only_its_own_session(engine: Engine) -> None:
    video = frames(4)
    good = Talk(engine, ADD)
    for spoil, says in (
        (lambda bad: bad.send(video[0], 0) or bad.send(video[1], 0), "numbers must grow"),
        (lambda bad: bad.send(video[0][:-1]), "one byte per channel"),
        (lambda bad: engine.frame(bad.session, b"123"), "8 bytes"),
        (lambda bad: engine.frame(bad.session, HEADER.pack(0, 5) + b"12"), "answers were read"),
        (lambda bad: engine.command(bad.session, ADD), "there already"),
        (lambda bad: engine.command(bad.session, '{"drop": "x"}'), "no target"),
        (lambda bad: engine.command(bad.session, "nonsense"), "no JSON"),
    ):
        bad = Talk(engine, ADD)
        with pytest.raises(UserError, match=says):
            spoil(bad)
        last = bad.receive()
        while "error" not in last:
            last = bad.receive()
        with pytest.raises(UserError):
            bad.send(video[0])
        assert engine.num_sessions == 1
    for box, says in (
        ([500, 500, 10, 10], "outside of the 160x120 frame"),
        ([10, 10, 1e-9, 1e-9], "a side of less than 0.01 pixels"),
        ([10, 10, 5e-324, 50], "is empty"),
    ):
        bad = Talk(engine, json.dumps({"add": "far", "box": box}))
        bad.send(video[0])
        assert says in bad.receive()["error"]
    damaged = Talk(engine, '{"raw": null}')
    good.send(video[0])
    jpeg = encode_jpeg(video[0], 90)
    engine.frame(damaged.session, HEADER.pack(0, 0) + jpeg[: len(jpeg) // 2])
    assert "without its end" in damaged.receive()["error"]
    good.send(video[1])
    assert [good.receive()["frame"] for _ in range(2)] == [0, 1]


def test_strange_boxes_are_followed_also_by_another_model(engine: Engine) -> None:
    """Far larger than the frame, hardly inside of it, looked for elsewhere."""
    video = frames(6)
    boxes = ([-4e8, -4e8, 9e8, 9e8], [0, 0, 9e8, 0.01], [159.99, 119.99, 1, 50], [5, 5, 0.02, 0.02])
    places = ([9e8, 9e8, 5, 5], [-9e8, 0, 9e8, 9e8], [160, 120, 0, 0])
    commands = [{"box": box} for box in boxes] + [{"box": BOX, "at": at} for at in places]
    talks = [Talk(engine, json.dumps({"add": "it"} | each)) for each in commands]
    for number, frame in enumerate(video):
        if number == 3:
            engine.use(served(2))
        for talk in talks:
            talk.send(frame)
        for talk in talks:
            answer = talk.receive()
            assert answer["frame"] == number, answer
            left, top, width, height = answer["targets"]["it"]["box"]
            assert number == 0 or (left >= 0 and top >= 0 and width <= 160 and height <= 120)


def test_what_nobody_thought_of_ends_only_its_own_session(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame whose decoding, start or step fails in the code, beside one in the same tick."""
    video = frames(3)
    model = engine.model.tracker
    start_from, step = model.start_from, model.step
    decode = messages.decode

    def fails_on(which: int, function: Any) -> Any:
        def call(*args: Any) -> Any:
            if any(pixels.max() == which for pixels in pictures(args)):
                raise ZeroDivisionError("of this code")
            return function(*args)

        return call

    def pictures(args: Any) -> list[np.ndarray]:
        first = args[-1]
        return [getattr(each, "image_HWC", each) for each in first]

    def decode_or_fail(data: memoryview, raw: Any) -> np.ndarray:
        if bytes(data[:1]) == b"\1":
            raise ZeroDivisionError("of this code")
        return decode(data, raw)

    monkeypatch.setattr(messages, "decode", decode_or_fail)
    monkeypatch.setattr(model, "start_from", fails_on(2, start_from))
    monkeypatch.setattr(model, "step", fails_on(3, step))
    engine.observe(lambda session, image, answer: 1 / 0)
    for value in (1, 2, 3):
        good, bad = Talk(engine, ADD), Talk(engine, ADD)
        if value == 3:
            bad.send(video[0])
            bad.receive()
        with engine._lock:  # both in one tick
            good.send(video[0])
            bad.send(np.full_like(video[0], value))
        assert "The server failed at this frame" in bad.receive()["error"]
        good.send(video[1])
        assert [good.receive()["frame"] for _ in range(2)] == [0, 1]


def test_network_that_is_not_finite_ends_the_sessions_and_the_engine_goes_on() -> None:
    broken = random_tracker().merge()
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    engine = Engine(served(1, broken), ServingSettings())
    try:
        talk = Talk(engine, ADD)
        for frame in frames(2):
            talk.send(frame)
        assert talk.receive()["frame"] == 0
        assert "not finite" in talk.receive()["error"]
        engine.use(served(2))
        talk = Talk(engine, ADD)
        for frame in frames(2):
            talk.send(frame)
        assert [talk.receive()["frame"] for _ in range(2)] == [0, 1]
    finally:
        engine.stop()


def test_newest_frame_wins_and_those_with_commands_stay() -> None:
    engine = Engine(served(1), ServingSettings(batch_wait_ms=0))
    try:
        talk = Talk(engine, '{"order": "newest"}', ADD)
        video = frames(12)
        with engine._lock:  # the engine is busy elsewhere
            for number, frame in enumerate(video):
                if number == 6:
                    engine.command(talk.session, '{"add": "b", "box": [10, 10, 20, 20]}')
                talk.send(frame)
        answers = [talk.receive()]
        while answers[-1]["frame"] < 11:
            answers.append(talk.receive())
        assert [(each["frame"], each["skipped"]) for each in answers] == [(0, 0), (6, 5), (11, 4)]
    finally:
        engine.stop()


def test_client_that_does_not_read_is_not_answered_on() -> None:
    settings = ServingSettings(window=4)
    engine = Engine(served(1), settings)
    try:
        talk = Talk(engine, ADD)
        video = frames(9)
        for number, frame in enumerate(video[:8]):
            talk.send(frame)  # says for ever that it has read nothing
            wait_until("answer", lambda n=number: talk.session.answered > min(n, 3))
        with pytest.raises(UserError, match="read the answers"):
            talk.send(video[8])
        assert talk.session.answered == 4
        newest = Talk(engine, '{"order": "newest"}', ADD)
        for _ in range(3):
            for frame in video[:4]:
                newest.send(frame)
                wait_until("answer", lambda: newest.session.answered == min(newest.sent, 4))
                assert newest.session.waiting <= 1
        newest.read = 4
        newest.send(video[0])
        wait_until("another answer", lambda: newest.session.answered == 5)
        assert newest.receive()["frame"] == 0
    finally:
        engine.stop()


def test_frames_of_all_sessions_that_wait_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who keeps one waiting is not refused; who keeps more is, and its place is free again."""
    video = frames(4)
    monkeypatch.setattr(engine_module, "MAX_WAITING_BYTES", 7 * video[0].nbytes)
    engine = Engine(served(1), ServingSettings(batch_wait_ms=0))
    try:
        talks = [Talk(engine, ADD) for _ in range(6)]
        newest = Talk(engine, '{"order": "newest"}', ADD)
        with engine._lock:  # the engine is busy elsewhere
            for talk in talks[:5]:
                talk.send(video[0])
            for frame in video:
                newest.send(frame)
            talks[5].send(video[0])
            with pytest.raises(UserError, match="wait in this server"):
                talks[0].send(video[1])
            assert [talk.session.waiting for talk in talks] == [0, 1, 1, 1, 1, 1]
        for talk in (*talks[1:], newest):
            assert "targets" in talk.receive()
        assert all(talk.session.waiting_bytes == 0 for talk in (*talks, newest))
    finally:
        engine.stop()


def test_limits_of_a_server() -> None:
    engine = Engine(served(1), ServingSettings(max_sessions=2, max_targets=2, idle_s=0.2))
    try:
        talks = [Talk(engine, ADD), Talk(engine, ADD)]
        with pytest.raises(UserError, match="2 sessions, the most"):
            engine.open(print)
        engine.command(talks[0].session, '{"add": "b", "box": [10, 10, 20, 20]}')
        with pytest.raises(UserError, match="2 targets, the most"):
            engine.command(talks[0].session, '{"add": "c", "box": [10, 10, 20, 20]}')
        unread = Talk(engine, ADD)
        for frame in frames(34):  # two more than it may be answered without reading
            unread.send(frame)
            wait_until("answer", lambda: unread.session.answered >= min(unread.sent, 32))
        time.sleep(0.3)
        engine.end_idle()
        ended = talks[1].receive()
        assert "No message came for 0.2 s" in ended["error"] and ended["again"]
        assert unread.session.waiting == 0
        assert engine.num_sessions == 0
    finally:
        engine.stop()


def test_a_long_session_keeps_nothing_of_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RECENT", 10)
    engine = Engine(served(1), ServingSettings(batch_wait_ms=0))
    try:
        engine.observe(Drift(lambda model: None, print).observe)
        engine.observe(Shadow(served(2), 1.0).observe)
        talk = Talk(engine, ADD)
        video = frames(10)

        def held_after(count: int) -> int:
            for number in range(count):
                talk.send(video[number % 10])
                talk.receive()
            gc.collect()
            own = tracemalloc.Filter(True, "*/lorat_platform/serving/*")  # not of other tests
            kept = tracemalloc.take_snapshot().filter_traces([own])
            return sum(trace.size for trace in kept.traces)

        tracemalloc.start()
        held_after(15)
        before = held_after(15)
        assert held_after(100) - before < 100 * 50  # bytes; an answer alone has 200
    finally:
        tracemalloc.stop()
        engine.stop()


def test_hundred_changes_under_load_lose_no_frame() -> None:
    engine = Engine(served(1), ServingSettings())
    models = [served(1), served(2)]
    try:
        talks = [Talk(engine, ADD) for _ in range(3)]
        video = frames(150)
        stop = threading.Event()

        def change() -> None:
            for number in range(100):
                engine.use(models[number % 2])
                time.sleep(0.005)
            stop.set()

        changing = threading.Thread(target=change)
        changing.start()
        sent = 0
        while not stop.is_set():
            for talk in talks:
                talk.send(video[sent % 150])
            for talk in talks:
                assert talk.receive()["frame"] == sent
            sent += 1
        changing.join()
        counts = engine.statistics.counts()
        assert counts["swaps"] == 100
        assert counts["moved"] >= 3
        assert counts["frames"] == 3 * sent
    finally:
        engine.stop()
