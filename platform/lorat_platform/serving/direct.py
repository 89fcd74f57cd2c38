"""The direct way to a replica: a port of its own, past the proxy of Ray Serve.

The proxy takes a frame apart, sends it to the replica as a remote call and brings the answer back
likewise, which costs half as much as tracking does with a small model.  It still begins every
session, so that it knows how busy each replica is; then a client on the same machine may go on at
the replica itself.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from lorat_platform.serving.connections import BoundedProtocol

HOST = "127.0.0.1"
"""Only this machine comes in here, whatever address the proxy has."""
STOP_S = 2


@contextlib.contextmanager
def listening(app: Starlette) -> Iterator[int]:
    """Run an application on a free port of loopback, in a thread of its own; yield the port."""
    own = socket.socket()
    try:
        own.bind((HOST, 0))
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                http=BoundedProtocol,
                ws="websockets-sansio",
                ws_per_message_deflate=False,
                timeout_graceful_shutdown=STOP_S,
            )
        )
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [own]}, name="direct", daemon=True
        )
        thread.start()
        yield own.getsockname()[1]
        server.should_exit = True
        thread.join(2 * STOP_S)
    finally:
        own.close()
