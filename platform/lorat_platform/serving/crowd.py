"""A crowd of connections that want nothing of a server, for measurements and tests."""

from __future__ import annotations

import contextlib
import json
import resource
import selectors
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from lorat_platform.serving.messages import HEADER

HANDSHAKE = (
    b"GET /track HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
"""Source: RFC 6455, section 1.3."""
HALF_OPEN = (
    b"",
    b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    b"POST /sessions/a/commands HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    HANDSHAKE[:60],
)
"""What half-open connections send, in turn, before they fall silent."""


@dataclass
class Crowd:
    """Connections to a server.

    Args:
        host, port: of the server.
    """

    host: str
    port: int
    open: list[socket.socket] = field(default_factory=list)

    def come(self, count: int, *kinds: bytes) -> None:
        """Open connections that send one of these, in turn, and nothing more."""
        for number in range(count):
            each = socket.create_connection((self.host, self.port), timeout=60)
            self.open.append(each)
            each.sendall(kinds[number % len(kinds)])

    def send_unread(self, count: int, frame: bytes, seconds: float) -> None:
        """Open sessions that send a raw frame again and again, and never read an answer."""
        sessions = []
        for _ in range(count):
            each = socket.create_connection((self.host, self.port), timeout=60)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.open.append(each)
            sessions.append(each)
            each.sendall(HANDSHAKE)
            each.sendall(_masked(0x1, json.dumps({"raw": [len(frame) // 3, 1]}).encode()))
        until, number = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            message = _masked(0x2, HEADER.pack(number, 0) + frame)
            for each in sessions:
                with contextlib.suppress(OSError):  # it was ended
                    each.sendall(message)
            number += 1
            time.sleep(0.05)

    def still_open(self) -> int:
        """Count the connections that the server has not ended; what came is read and dropped."""
        with selectors.DefaultSelector() as selector:
            for each in self.open:
                each.setblocking(False)
                selector.register(each, selectors.EVENT_READ)
            for key, _ in selector.select(0):
                readable = key.fileobj
                assert isinstance(readable, socket.socket)
                with contextlib.suppress(BlockingIOError):
                    while _received(readable):
                        pass
                    self.open.remove(readable)
                    readable.close()
        return len(self.open)

    def go(self) -> None:
        """Close what is open."""
        for each in self.open:
            each.close()
        self.open.clear()


@contextlib.contextmanager
def crowd(host: str, port: int) -> Iterator[Crowd]:
    """Make a crowd, which goes at the end of a ``with`` block; this process may have many files."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found = Crowd(host, port)
    try:
        yield found
    finally:
        found.go()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65_536)
    except ConnectionError:
        return b""


def _masked(kind: int, payload: bytes) -> bytes:
    """Return a whole message of a client, with a mask of zeros.  Source: RFC 6455, section 5.2."""
    length = len(payload)
    if length < 126:
        size = bytes([0x80 | length])
    elif length < 65_536:
        size = bytes([0x80 | 126]) + length.to_bytes(2, "big")
    else:
        size = bytes([0x80 | 127]) + length.to_bytes(8, "big")
    return bytes([0x80 | kind]) + size + bytes(4) + payload
