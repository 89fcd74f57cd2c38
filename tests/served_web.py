"""The web side of a replica on a real socket, without Ray."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterator

import uvicorn

from lorat_platform.serving.engine import Engine
from lorat_platform.serving.served_model import ServedModel
from lorat_platform.serving.settings import ServingSettings
from lorat_platform.serving.web import make_app
from tests.served_models import served
from tests.waiting import wait_until

TOKEN = "a-token-that-nobody-guesses"


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
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="websockets-sansio"))
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
