"""The web side of a replica on a real socket, without Ray."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterator

import uvicorn

from lorat_platform.serving.connections import BoundedProtocol
from lorat_platform.serving.engine import Engine
from lorat_platform.serving.served_model import ServedModel
from lorat_platform.serving.settings import ServingSettings
from lorat_platform.serving.web import make_app
from tests.served_models import served
from tests.waiting import wait_until

TOKEN = "a-token-that-nobody-guesses"


def read_to_the_end(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes, or resets what it has not read."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


def is_bounded(place: str) -> bool:
    """Tell whether the server at host:port refuses headers that do not end."""
    host, _, port = place.partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as endless:
        endless.sendall(b"GET / HTTP/1.1\r\n" + 11_000 * b"X: y\r\n")
        return b" 431 " in read_to_the_end(endless)


@contextlib.contextmanager
def web(
    settings: ServingSettings,
    token: str | None = TOKEN,
    model: ServedModel | None = None,
    direct: bool = False,
) -> Iterator[tuple[Engine, str]]:
    """Run it for the length of a ``with`` block; yield the engine and host:port."""
    engine = Engine(model or served(1), settings)
    hashed = hashlib.sha256(token.encode()).hexdigest() if token else None
    app = make_app(engine, hashed, lambda: {"model": engine.model.name}, direct=direct)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", ws="websockets-sansio", http=BoundedProtocol)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        wait_until("server", lambda: server.started)
        yield engine, f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        engine.stop()
        server.should_exit = True
        thread.join()
        listening.close()
