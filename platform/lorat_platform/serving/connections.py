"""What a connection may do before and beside a session: the bounds that uvicorn has not.

uvicorn, which is the HTTP side of Ray Serve's proxies, waits for ever for the rest of a request and
keeps all of its headers, waits for ever for a client that does not read, and accepts connections
until the process has no file descriptor left.  :func:`bound_connections` is called in each proxy
where ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names it, as ``jobs/serve.py`` and the
RayService do; a replica's own port has the same bounds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import time
from typing import Any

from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

BOUNDED = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.bound_connections"}
"""Environment of a proxy with bounds."""
REQUEST_S = 30.0
"""Longest time from the first byte of a request, or from the beginning of a connection, to its end;
and how long a client may take nothing of what was sent to it."""
MAX_HEAD = 65_536
"""Bytes of a request besides its body, and beyond as many as that has: line, headers, sizes of
chunks, trailers."""
SHARE_OF_FILES = 0.5
"""Of the file descriptors of a process, for connections; Ray needs the others."""
REFUSED_S = 1.0
"""Longest time in which a connection beyond those begins a request, to be told; half as many may
wait for it."""
WARN_S = 60.0
"""Between two warnings that there are too many connections."""

log = logging.getLogger("ray.serve")  # of which the proxy keeps what is logged


def bound_connections() -> list[Any]:
    """Let uvicorn servers that begin in this process from now on have bounds.

    Returns:
        No middleware; Ray Serve asks for a list of them.
    """
    auto.AutoHTTPProtocol = BoundedProtocol
    return []


def most_connections() -> int:
    """Return how many connections this process takes at the same time."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return int(SHARE_OF_FILES * soft)


class BoundedProtocol(HttpToolsProtocol):
    """A connection that ends when its requests do not, and is refused where there are too many."""

    _deadline: asyncio.TimerHandle | None = None
    _besides_body = _of_body = 0
    _refused = False
    _warned = -WARN_S

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless there are too many."""
        super().connection_made(transport)  # type: ignore[arg-type]  # as uvicorn has it
        most = most_connections()
        if len(self.connections) > most:
            self._warn(most)
            if len(self.connections) > 1.5 * most:
                self.transport.abort()
                return
            self._refused = True
            self.loop.call_later(REFUSED_S, self.transport.close)
        # The kernel ends a connection, WebSockets too, that takes nothing of what waits for it.
        transport.get_extra_info("socket").setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * REQUEST_S)
        )
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        if self._refused:
            self._end(503, "The server has too many connections; try again later.")
            return
        if self.cycle is None or self.cycle.response_complete:
            self._await_request()
        self._besides_body += len(data)
        super().data_received(data)
        if self._besides_body > MAX_HEAD + self._of_body and not self.transport.is_closing():
            self._end(431, f"The request has more than {MAX_HEAD} bytes besides its body.")

    def on_body(self, body: bytes) -> None:
        """Note that these bytes are of the body."""
        self._besides_body -= len(body)
        self._of_body += len(body)
        super().on_body(body)

    def on_message_begin(self) -> None:
        """Note that a request begins, maybe right after another."""
        self._await_request()
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """Note that a request is complete."""
        self._have_request()
        self._besides_body = self._of_body = 0
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection over to a WebSocket, which has pings of its own."""
        self._have_request()
        super().handle_websocket_upgrade()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._have_request()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(REQUEST_S, self._be_late)

    def _have_request(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _be_late(self) -> None:
        self._end(408, f"The request was not complete within {REQUEST_S:g} s; send it faster.")

    def _end(self, code: int, why: str) -> None:
        """Answer, unless an answer has begun, and close; what works on the request is told."""
        if self.cycle is not None and self.cycle.response_started:
            self.transport.close()
            return
        body = json.dumps({"error": why}).encode()
        self.transport.write(
            f"HTTP/1.1 {code} \r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        self.transport.close()

    @classmethod
    def _warn(cls, most: int) -> None:
        if time.monotonic() - cls._warned > WARN_S:
            cls._warned = time.monotonic()
            log.warning(
                "New connections are refused: this process has the %d that its limit of file "
                "descriptors allows; raise that limit (ulimit -n), or put an ingress in front that "
                "bounds the connections of a client.",
                most,
            )
