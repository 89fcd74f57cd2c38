"""A client: tracks the frames of a video with a server, over a WebSocket."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from lorat.errors import UserError
from lorat.image.codec import encode_jpeg
from lorat_platform.serving.messages import HEADER, MAX_MESSAGE, Order

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
DIRECT_S = 10.0
"""Longest wait for a replica's own port."""
AHEAD = 4
"""Frames that are on their way while an answer is waited for."""


class Client:
    """A session with a server.

    >>> with Client("ws://127.0.0.1:8000/track?token=...") as client:
    ...     for answer in client.track(frames, {"it": (100, 80, 60, 90)}):
    ...         print(answer["frame"], answer["targets"]["it"]["box"])

    Args:
        url: of the server, ``ws://HOST:PORT/track``.
        token: of the server, if it asks for one and the URL has none.
        order: ``strict`` or ``newest``; see :mod:`lorat_platform.serving.messages`.
        quality: of the JPEGs that are sent, 1 to 100.

    Raises:
        UserError: if no server answers, or not with this token.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        order: Order = "strict",
        quality: int = 90,
        timeout_s: float = 60.0,
    ) -> None:
        from websockets.exceptions import InvalidStatus, WebSocketException
        from websockets.sync.client import connect

        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._open = contextlib.ExitStack()
        try:
            self._socket = self._open.enter_context(
                # Images do not get smaller, and trying takes longer than sending them.
                connect(
                    url,
                    additional_headers=headers,
                    compression=None,
                    max_size=None,
                    open_timeout=timeout_s,
                )
            )
        except InvalidStatus as error:
            code = error.response.status_code
            remedy = "it is busy, try again later" if code >= 500 else "give its token"
            raise UserError(f"The server refuses the session (HTTP {code}); {remedy}.") from error
        except (OSError, WebSocketException, TimeoutError) as error:
            where = url.partition("?")[0]
            raise UserError(
                f"No server answers at {where} ({error}); start it or give its URL."
            ) from error
        self._quality, self._timeout_s = quality, timeout_s
        self._number = self._read = 0
        try:
            self.hello = self._receive()
        except UserError:
            self.close()
            raise
        """Id of the session, model, window."""
        self._go_direct(url)
        if order != "strict":
            self.say({"order": order})

    def _go_direct(self, url: str) -> None:
        """Go on at the replica itself, where that is on this machine; else all stays as it is."""
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        offer, at = self.hello.get("direct"), urlsplit(url)
        if offer is None or at.scheme != "ws" or at.hostname not in LOOPBACK_NAMES:
            return
        with contextlib.ExitStack() as opened:
            try:
                socket = opened.enter_context(
                    connect(
                        f"ws://127.0.0.1:{offer['port']}/direct",
                        additional_headers={"Authorization": f"Bearer {offer['ticket']}"},
                        compression=None,
                        max_size=None,
                        open_timeout=DIRECT_S,
                    )
                )
                greeting = json.loads(socket.recv(timeout=DIRECT_S))
            except (OSError, WebSocketException, TimeoutError, ValueError):
                return  # a tunnel or a container: there the port is another one, or none
            if greeting == {"session": self.hello["session"]}:
                self._socket = socket
                self._open.push(opened.pop_all())

    @property
    def sent(self) -> int:
        """Frames that were sent."""
        return self._number

    def say(self, command: Mapping[str, Any]) -> None:
        """Send a command; see :mod:`lorat_platform.serving.messages`."""
        self._send(json.dumps(command))

    def add(self, name: str, box: Sequence[float], at: Sequence[float] | None = None) -> None:
        """Follow a target that is at ``box`` (left, top, width, height) in the next frame."""
        place = {} if at is None else {"at": list(map(float, at))}
        self.say({"add": name, "box": list(map(float, box))} | place)

    def drop(self, name: str) -> None:
        """Follow a target no longer."""
        self.say({"drop": name})

    def send(self, frame: np.ndarray | bytes) -> int:
        """Send a frame, RGB uint8 (H, W, 3) or an encoded image; return its number.

        Raises:
            UserError: if the session is over, or the image is too large.
        """
        image = frame if isinstance(frame, bytes) else encode_jpeg(frame, self._quality)
        if len(image) > MAX_MESSAGE - HEADER.size:
            raise UserError(
                f"The frame has {len(image):,} bytes, a message to the server at most "
                f"{MAX_MESSAGE:,}; send a smaller one, or compress it."
            )
        number, self._number = self._number, self._number + 1
        self._send(HEADER.pack(number, self._read) + image)
        return number

    def _send(self, message: str | bytes) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            self._socket.send(message)
        except ConnectionClosed:
            while True:  # the last answer says why
                self._receive()

    def receive(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            UserError: if the session is over.
        """
        answer = self._receive()
        self._read += 1
        return answer

    def _receive(self) -> dict[str, Any]:
        from websockets.exceptions import ConnectionClosed

        try:
            answer = json.loads(self._socket.recv(timeout=self._timeout_s))
        except TimeoutError:
            raise UserError(
                f"No answer came for {self._timeout_s:g} s; look at the server's /status."
            ) from None
        except ConnectionClosed as error:
            raise UserError(
                f"The server is gone ({error}); begin again, with the targets at their last boxes."
            ) from error
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def track(
        self, frames: Iterable[np.ndarray | bytes], boxes: Mapping[str, Sequence[float]]
    ) -> Iterator[dict[str, Any]]:
        """Follow targets through the frames, of which the first has the boxes.

        Yields:
            The answer to each frame that was tracked: all of them, unless the order is ``newest``.
        """
        for name, box in boxes.items():
            self.add(name, box)
        ahead: deque[int] = deque()
        for frame in frames:
            ahead.append(self.send(frame))
            if len(ahead) > AHEAD:
                yield self._next(ahead)
        while ahead:
            yield self._next(ahead)

    def _next(self, ahead: deque[int]) -> dict[str, Any]:
        """Receive an answer; it and the frames that gave way to it are no longer on their way."""
        answer = self.receive()
        while ahead and ahead[0] <= answer["frame"]:
            ahead.popleft()
        return answer

    def close(self) -> None:
        """End the session."""
        self._open.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
