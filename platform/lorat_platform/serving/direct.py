"""The direct way to a replica: a port of its own, past the proxy of Ray Serve.

The proxy takes a frame apart, sends it to the replica as a remote call and brings the answer back
likewise, which costs half as much as tracking does with a small model.  It still begins every
session, so that it knows how busy each replica is; then a client on the same machine may go on at
the replica itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

HOST = "127.0.0.1"
"""Only this machine comes in here, whatever address the proxy has."""
HANDSHAKE_S = 20.0
"""A connection that is no WebSocket after this time is closed; half-open ones would add up."""
STOP_S = 2


class _Handshake(H11Protocol):
    """The first request of a connection, for which there is not all the time of the world."""

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._limit = self.loop.call_later(HANDSHAKE_S, transport.abort)

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._end_limit()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_limit()
        super().connection_lost(exc)

    def _end_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()


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
                http=_Handshake,
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
