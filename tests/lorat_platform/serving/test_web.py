"""The web side: real sockets, a real client, and what others may send."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from lorat.errors import UserError
from lorat.image.codec import decode_rgb, encode_jpeg
from lorat_platform.serving import connections
from lorat_platform.serving.client import Client
from lorat_platform.serving.crowd import HANDSHAKE
from lorat_platform.serving.engine import Engine
from lorat_platform.serving.messages import HEADER
from lorat_platform.serving.settings import ServingSettings
from lorat_platform.serving.web import SESSION_HEADER
from tests.served_models import BOX, expected, frames, served
from tests.served_web import TOKEN, is_bounded, read_to_the_end, web
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def open_web():
    with web(ServingSettings()) as found:
        yield found


def test_client_tracks_as_the_library_does(open_web: tuple[Engine, str]) -> None:
    _, place = open_web
    jpegs = [encode_jpeg(frame, 95) for frame in frames(12)]
    with Client(f"ws://{place}/track", token=TOKEN) as client:
        answers = list(client.track(jpegs, {"it": BOX}))
    assert [answer["frame"] for answer in answers] == list(range(12))
    boxes = [answer["targets"]["it"]["box"] for answer in answers]
    video = [decode_rgb(jpeg) for jpeg in jpegs]
    np.testing.assert_allclose(boxes, expected(served(1), video), atol=0.02)


def test_client_goes_on_at_the_replica_itself() -> None:
    jpegs = [encode_jpeg(frame, 95) for frame in frames(12)]
    with web(ServingSettings(), direct=True) as (engine, place):
        with Client(f"ws://{place}/track", token=TOKEN) as client:
            direct = client.hello["direct"]
            assert client._socket.remote_address[1] == direct["port"] != int(place.split(":")[1])
            answers = list(client.track(jpegs, {"it": BOX}))
            there = f"ws://127.0.0.1:{direct['port']}/direct"
            for shown in (direct["ticket"], TOKEN, ""):  # a ticket is for one connection
                headers = {"Authorization": f"Bearer {shown}"}
                with pytest.raises(InvalidStatus), connect(there, additional_headers=headers):
                    pass
            assert requests.get(f"http://127.0.0.1:{direct['port']}/status").status_code == 404
        boxes = [answer["targets"]["it"]["box"] for answer in answers]
        video = [decode_rgb(jpeg) for jpeg in jpegs]
        np.testing.assert_allclose(boxes, expected(served(1), video), atol=0.02)
        wait_until("end of the session", lambda: engine.num_sessions == 0)
        assert engine.statistics.counts().get("refused") is None

        # Each end of the session ends the other: what holds it open may be lost, too.
        with connect(f"ws://{place}/track?token={TOKEN}") as began:
            hello = json.loads(began.recv())
            headers = {"Authorization": f"Bearer {hello['direct']['ticket']}"}
            with connect(there, additional_headers=headers) as socket:
                assert json.loads(socket.recv()) == {"session": hello["session"]}
                began.close()
                assert "began is over" in json.loads(socket.recv(timeout=30))["error"]
        with connect(f"ws://{place}/track?token={TOKEN}") as began:
            headers = {"Authorization": f"Bearer {json.loads(began.recv())['direct']['ticket']}"}
            with connect(there, additional_headers=headers) as socket:
                socket.recv()
            with pytest.raises(ConnectionClosed):
                began.recv(timeout=30)
        assert engine.num_sessions == 0


def test_connection_to_a_replica_that_says_nothing_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorat_platform.serving.connections.REQUEST_S", 1.5)
    with (
        web(ServingSettings(), direct=True) as (_, place),
        Client(f"ws://{place}/track", token=TOKEN) as client,
        contextlib.ExitStack() as stack,
    ):
        half_open = []
        for said in (b"", b"GET /direct HTTP/1.1\r\nHost: x\r\nUpgrade: webso") * 50:
            each = socket.create_connection(("127.0.0.1", client.hello["direct"]["port"]))
            half_open.append(stack.enter_context(each))
            each.sendall(said)
        for each in half_open:
            each.settimeout(30)
            assert each.recv(100).startswith(b"HTTP/1.1 408")
            while each.recv(1000):
                pass
        assert len(list(client.track(frames(3), {"it": BOX}))) == 3  # a WebSocket is not


def test_client_stays_where_the_replica_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a tunnel, this machine's port of that number is another's, or nobody listens."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr(
            "lorat_platform.serving.web.listening",
            lambda app: contextlib.nullcontext(silent.getsockname()[1]),
        )
        with (
            web(ServingSettings(), direct=True) as (_, place),
            Client(f"ws://{place}/track", token=TOKEN) as client,
        ):
            assert client._socket.remote_address[1] == int(place.split(":")[1])
            assert len(list(client.track(frames(3), {"it": BOX}))) == 3


def test_plain_http_gives_the_same(open_web: tuple[Engine, str]) -> None:
    _, place = open_web
    jpegs = [encode_jpeg(frame, 95) for frame in frames(4)]
    root = f"http://{place}/sessions"
    with requests.Session() as http:
        http.headers["Authorization"] = f"Bearer {TOKEN}"
        begun = http.post(root)
        assert begun.status_code == 201
        name = begun.json()["session"]
        assert begun.headers[SESSION_HEADER] == name
        at = f"{root}/{name}"
        added = http.post(f"{at}/commands", json={"add": "it", "box": list(BOX)})
        assert added.status_code == 200
        answers = [http.post(f"{at}/frames", data=jpeg).json() for jpeg in jpegs]
        boxes = [answer["targets"]["it"]["box"] for answer in answers]
        video = [decode_rgb(jpeg) for jpeg in jpegs]
        np.testing.assert_allclose(boxes, expected(served(1), video), atol=0.02)
        assert http.delete(at).status_code == 204
        gone = http.post(f"{at}/frames", data=jpegs[0])
        assert gone.status_code == 410
        assert SESSION_HEADER in gone.json()["error"]
        name = http.post(root).json()["session"]
        bad = http.post(f"{root}/{name}/frames", data=b"no image")
        assert bad.status_code == 400
        assert "no image" in bad.json()["error"]
        too_long = http.post(f"{at}/commands", data=b"x" * 5000)
        assert too_long.status_code in (400, 410)


def test_bad_requests_of_plain_http_end_only_their_session(open_web: tuple[Engine, str]) -> None:
    engine, place = open_web
    before = engine.num_sessions
    root = f"http://{place}/sessions"
    jpeg = encode_jpeg(frames(1)[0], 95)
    with requests.Session() as http:
        http.headers["Authorization"] = f"Bearer {TOKEN}"

        def begin(*commands: str) -> str:
            at = f"{root}/{http.post(root).json()['session']}"
            for command in commands:
                assert http.post(f"{at}/commands", data=command).status_code == 200
            return at

        def says(at: str, what: str, body: bytes) -> str:
            answer = http.post(f"{at}/{what}", data=body, timeout=60)
            assert answer.status_code == 400, answer.text
            assert http.post(f"{at}/frames", data=jpeg).status_code == 410
            return answer.json()["error"]

        good = begin(f'{{"add": "it", "box": {list(BOX)}}}')
        for command, what in (
            (b"", "no JSON"),
            (b"\xff\xfe", "no JSON"),
            (b'{"add": "a", "box": [1, NaN, 3, 4]}', "The box is"),
            (b'{"drop": "a"}', "no target"),
            (HEADER.pack(0, 0) + jpeg[:90], "no JSON"),
        ):
            assert what in says(begin(), "commands", command)
        bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\1\0\0" * 2
        for data, what in (
            (b"", "8 bytes"),
            (b'{"add": "a"}', "no image"),
            (jpeg[:-9], "without its end"),
            (bomb, "65536x65536"),
        ):
            assert what in says(begin(), "frames", data)
        assert "one byte per channel" in says(begin('{"raw": [9, 9]}'), "frames", bytes(242))
        assert "outside" in says(begin('{"add": "a", "box": [900, 9, 9, 9]}'), "frames", jpeg)
        assert "there already" in says(
            begin('{"add": "a", "box": [1, 2, 3, 4]}'),
            "commands",
            b'{"add": "a", "box": [1, 2, 3, 4]}',
        )
        assert http.post(f"{good}/commands", data=b"x" * 5000).status_code == 400
        assert http.get(f"{good}/frames").status_code == 405
        assert http.post(f"{good}/frames", data=jpeg).json()["frame"] == 0
        assert engine.num_sessions == before + 1
        http.delete(good)


def test_session_of_plain_http_ends_while_its_frame_is_tracked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with web(ServingSettings(), token=None) as (engine, place):
        going_on = threading.Event()
        step = engine.model.tracker.step

        def slow_step(*given: Any) -> Any:
            assert going_on.wait(60)
            return step(*given)

        monkeypatch.setattr(engine.model.tracker, "step", slow_step)
        root = f"http://{place}/sessions"
        jpeg = encode_jpeg(frames(1)[0], 95)
        name = requests.post(root).json()["session"]
        at = f"{root}/{name}"
        requests.post(f"{at}/commands", json={"add": "it", "box": list(BOX)})
        requests.post(f"{at}/frames", data=jpeg)
        session = engine.find(name)
        with ThreadPoolExecutor(1) as other:
            tracked = other.submit(requests.post, f"{at}/frames", data=jpeg, timeout=60)
            wait_until("frame", lambda: session.answered == 2)
            assert requests.post(f"{at}/frames", data=jpeg).status_code == 409
            assert requests.delete(at).status_code == 204
            answer = tracked.result()
        assert answer.status_code == 400
        assert "was ended" in answer.json()["error"]
        going_on.set()


def test_who_has_no_token_gets_the_page_only(open_web: tuple[Engine, str]) -> None:
    engine, place = open_web
    sessions = engine.num_sessions
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
        for method, path in (("GET", "/status"), ("POST", "/sessions"), ("DELETE", "/sessions/a")):
            answer = requests.request(method, f"http://{place}{path}", headers=headers)
            assert answer.status_code == 401
    with pytest.raises(UserError, match="HTTP 403"):
        Client(f"ws://{place}/track", token="wrong")
    assert requests.get(f"http://{place}/").status_code == 200
    assert requests.get(f"http://{place}/page/../web.py").status_code == 404
    assert requests.get(f"http://{place}/status?token={TOKEN}").json() == {"model": "lorat/1"}
    with Client(f"ws://{place}/track?token={TOKEN}") as client:
        assert client.hello["model"] == "lorat/1"
    wait_until("end of the session", lambda: engine.num_sessions == sessions)


def test_bad_messages_close_their_socket_with_a_reason(open_web: tuple[Engine, str]) -> None:
    _, place = open_web
    for message, says in (
        ("nonsense", "no JSON"),
        (b"short", "8 bytes"),
        (HEADER.pack(0, 0) + b"nonsense", "no image"),
        (HEADER.pack(0, 7) + b"nonsense", "answers were read"),
        ("", "no JSON"),
        (HEADER.pack(0, 0), "8 bytes"),
        ('{"raw": [10, 10]}', "one byte per channel"),
    ):
        with connect(f"ws://{place}/track?token={TOKEN}") as bad:
            json.loads(bad.recv())
            bad.send(message)
            if "raw" in str(message):
                bad.send(HEADER.pack(0, 0) + b"x" * 299)
            assert says in json.loads(bad.recv())["error"]
            with pytest.raises(ConnectionClosed) as closed:
                bad.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008


def test_messages_that_are_too_large_or_none_end_their_socket(open_web: tuple[Engine, str]) -> None:
    engine, place = open_web
    host, port = place.split(":")
    before = engine.num_sessions
    packer = zlib.compressobj(wbits=-15)
    bomb = (packer.compress(bytes(100_000_000)) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]
    assert len(bomb) < 2**17
    packed = b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
    handshake = HANDSHAKE.replace(b"/track", f"/track?token={TOKEN}".encode())
    huge, long = b"\xff" + (2**62).to_bytes(8, "big"), b"\xff" + len(bomb).to_bytes(8, "big")

    def answer(request: bytes, message: bytes) -> bytes:
        with socket.create_connection((host, int(port)), timeout=20) as bad:
            bad.sendall(request)
            bad.recv(65_536)
            bad.sendall(message)
            return read_to_the_end(bad)

    for request, message, code in (
        (handshake, b"\x82" + huge, 1009),
        (handshake, b"\x82\x05hello", 1002),  # a client must mask
        (handshake, b"\x80\x81" + bytes(5), 1002),  # goes on with nothing
        (handshake, b"\x81\x81" + bytes(4) + b"\xff", 1007),
        (handshake[:-2] + packed, b"\xc2" + long + bytes(4) + bomb, 1009),
    ):
        # A reset, since not all was read, may overtake the code.
        assert any(code.to_bytes(2, "big") in answer(request, message) for _ in range(5))
    with Client(f"ws://{place}/track", token=TOKEN) as client:
        with pytest.raises(
            UserError, match="17,000,000 bytes, a message to the server at most 16,"
        ):
            client.send(bytes(17_000_000))
        assert len(list(client.track(frames(2), {"it": BOX}))) == 2
    wait_until("end of the sessions", lambda: engine.num_sessions == before)


def test_server_that_is_full_says_so() -> None:
    with web(ServingSettings(max_sessions=1), token=None) as (engine, place):
        with Client(f"ws://{place}/track"):
            with pytest.raises(UserError, match="try again later"):
                Client(f"ws://{place}/track")
            assert requests.post(f"http://{place}/sessions").status_code == 503
        wait_until("end of the session", lambda: engine.num_sessions == 0)
        with Client(f"ws://{place}/track") as client:
            assert len(list(client.track(frames(3), {"it": BOX}))) == 3


def test_silent_sessions_end_and_half_open_connections_hold_nobody_up() -> None:
    with web(ServingSettings(idle_s=1.0), token=None) as (engine, place):
        host, port = place.split(":")
        with contextlib.ExitStack() as stack:
            for number in range(300):
                each = socket.create_connection((host, int(port)))
                stack.callback(each.close)
                if number % 2:
                    each.sendall(b"GET /track HTTP/1.1\r\nHost: x\r\nUpgrade: webso")
            silent = stack.enter_context(Client(f"ws://{place}/track"))
            with Client(f"ws://{place}/track") as client:
                assert len(list(client.track(frames(5), {"it": BOX}))) == 5
            began = time.monotonic()
            with pytest.raises(UserError, match="No message came for 1 s"):
                silent.receive()
            assert time.monotonic() - began < 30
        assert engine.num_sessions == 0


def test_requests_that_do_not_end_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent, slow, endless and unread connections, beside a session that goes on."""
    monkeypatch.setattr(connections, "REQUEST_S", 1.0)
    get = b"GET / HTTP/1.1\r\nHost: x\r\n"
    post = b"POST /sessions/a/commands HTTP/1.1\r\nHost: x\r\n"
    chunked = post + b"Transfer-Encoding: chunked\r\n\r\n"
    with web(ServingSettings(), token=None) as (engine, place), contextlib.ExitStack() as stack:

        def connected(first: bytes) -> socket.socket:
            host, port = place.split(":")
            each = stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            each.sendall(first)
            return each

        unread = connected(b"")
        unread.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while unread.send((get + b"\r\n") * 1000):
                pass
        session = requests.post(f"http://{place}/sessions").json()["session"]
        to_session = chunked.replace(b"/a/", f"/{session}/".encode())
        late = [connected(first) for first in (b"", b"\r\n", get, to_session + b"1\r\n")]
        trickling = connected(get + b"X: ")
        with Client(f"ws://{place}/track") as client:
            for _ in client.track(frames(13), {"it": BOX}):
                with contextlib.suppress(OSError):
                    trickling.send(b"x")
                time.sleep(0.1)
        for each in (*late, trickling):
            assert b" 408 " in read_to_the_end(each)

        def server_has(each: socket.socket) -> bool:
            return any(c.raddr == each.getsockname() for c in psutil.Process().net_connections())

        wait_until("end of what is not read", lambda: not server_has(unread), seconds=30)
        assert is_bounded(place)
        for first, more in ((get + b"X: ", b"yyyy"), (chunked, b"1\r\nx\r\n")):
            assert b" 431 " in read_to_the_end(connected(first + 16_500 * more))
        assert engine.num_sessions <= 1


def test_more_connections_than_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "most_connections", lambda: 3)
    with web(ServingSettings(), token=None) as (_, place):
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(f"ws://{place}/track")) for _ in range(3)]
            refused = requests.get(f"http://{place}/status")
            assert refused.status_code == 503
            assert "too many connections" in refused.json()["error"]
            with pytest.raises(UserError, match="busy"):
                Client(f"ws://{place}/track")
            assert len(list(clients[0].track(frames(3), {"it": BOX}))) == 3
        wait_until("place", lambda: requests.get(f"http://{place}/status").status_code == 200)


def test_newest_order_answers_the_last_frame(open_web: tuple[Engine, str]) -> None:
    _, place = open_web
    with Client(f"ws://{place}/track", token=TOKEN, order="newest") as client:
        answers: list[dict[str, Any]] = list(client.track(frames(40), {"it": BOX}))
    assert answers[-1]["frame"] == 39
    assert len(answers) + sum(answer["skipped"] for answer in answers) == 40
