"""The web side of a replica: WebSockets, plain HTTP, its status, and the page.

An ASGI application that knows no Ray: it runs under any server.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from lorat.errors import UserError
from lorat_platform.serving import messages
from lorat_platform.serving.engine import Engine
from lorat_platform.serving.session import Session

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
SESSION_HEADER = "x-session-id"
"""Requests with a session's id in it go to the replica that has the session."""
BAD_MESSAGE, TRY_LATER = 1008, 1013
"""Codes with which a WebSocket is closed.  Source: RFC 6455, section 7.4, and IANA's registry."""
IDLE_CHECK_S = 1.0
BODY_S = 30.0
"""Longest time that the body of a request takes to come."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src blob:; img-src 'self' data:; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Of the page: it loads nothing from elsewhere, and no other page may show it."""


def make_app(
    engine: Engine, token_sha256: str | None, status: Callable[[], dict[str, Any]]
) -> Starlette:
    """Make the application.

    Args:
        engine: which tracks.
        token_sha256: hash, in hexadecimal, of the token that every request but those for the page
            must give, as ``Authorization: Bearer`` or as ``?token=``; none means that everybody
            is served.
        status: returns what ``/status`` shows.
    """
    web = _Web(engine, token_sha256, status)
    routes = [
        Route("/", lambda request: FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)),
        Route("/status", web.guarded(web.status)),
        WebSocketRoute("/track", web.track),
        Route("/sessions", web.guarded(web.begin), methods=["POST"]),
        Route("/sessions/{session}", web.guarded(web.end), methods=["DELETE"]),
        Route("/sessions/{session}/commands", web.guarded(web.command), methods=["POST"]),
        Route("/sessions/{session}/frames", web.guarded(web.frame), methods=["POST"]),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    return Starlette(routes=routes, lifespan=web.lifespan)


class _Web:
    def __init__(
        self, engine: Engine, token_sha256: str | None, show: Callable[[], dict[str, Any]]
    ) -> None:
        self.engine, self.token_sha256, self.show = engine, token_sha256, show
        self.answers: dict[str, asyncio.Queue[dict[str, Any]]] = {}
        """Of the sessions over plain HTTP, by id."""

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """End idle sessions as long as the application runs."""
        task = asyncio.create_task(self._end_idle())
        yield
        task.cancel()

    async def _end_idle(self) -> None:
        while True:
            await asyncio.sleep(IDLE_CHECK_S)
            self.engine.end_idle()
            for name in list(self.answers):
                with contextlib.suppress(UserError):
                    self.engine.find(name)
                    continue
                self.answers.pop(name, None)

    def may(self, connection: HTTPConnection) -> bool:
        """Tell whether a request has the token."""
        if self.token_sha256 is None:
            return True
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = connection.query_params.get("token", "")
        return hmac.compare_digest(hashlib.sha256(given.encode()).hexdigest(), self.token_sha256)

    def guarded(self, handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """Let only requests with the token through, and turn errors into answers."""

        async def handle(request: Request) -> Response:
            if not self.may(request):
                return _error(401, "The token is missing or wrong; give Authorization: Bearer.")
            try:
                return await handler(request)
            except UserError as error:
                return _error(400, str(error))
            except TimeoutError:
                return _error(
                    408, f"The request was not complete within {BODY_S:g} s; send it faster."
                )
            except ClientDisconnect:
                return Response(status_code=400)

        return handle

    async def status(self, request: Request) -> Response:
        """Say which model serves, whom, and how fast."""
        return JSONResponse(self.show())

    def open(self, queue: asyncio.Queue[dict[str, Any]]) -> Session:
        """Begin a session whose answers go into a queue of this event loop."""
        loop = asyncio.get_running_loop()

        def answer(message: dict[str, Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients are gone
                loop.call_soon_threadsafe(queue.put_nowait, message)

        return self.engine.open(answer)

    async def track(self, socket: WebSocket) -> None:
        """Serve a session over a WebSocket."""
        if not self.may(socket):
            await socket.close(BAD_MESSAGE)
            return
        await socket.accept()
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        try:
            session = self.open(queue)
        except UserError as error:
            await socket.send_text(json.dumps({"error": str(error)}))
            await socket.close(TRY_LATER)
            return
        hello = {"session": session.id, "model": self.engine.model.name}
        await socket.send_text(json.dumps(hello | {"window": session.settings.window}))
        sender = asyncio.create_task(self._send(socket, queue))
        try:
            await self._receive(socket, session, sender)
        finally:
            self.engine.close(session)
            sender.cancel()

    async def _send(self, socket: WebSocket, queue: asyncio.Queue[dict[str, Any]]) -> None:
        """Send answers until one says that the session is over."""
        while True:
            message = await queue.get()
            await socket.send_text(json.dumps(message))
            if "error" in message:
                await socket.close(BAD_MESSAGE)
                return

    async def _receive(
        self, socket: WebSocket, session: Session, sender: asyncio.Task[None]
    ) -> None:
        while True:
            receiving = asyncio.create_task(socket.receive())
            await asyncio.wait({receiving, sender}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():  # the session is over
                receiving.cancel()
                return
            try:
                message = receiving.result()
            except (WebSocketDisconnect, RuntimeError):
                return
            if message["type"] == "websocket.disconnect":
                return
            try:
                if message.get("bytes") is not None:
                    self.engine.frame(session, message["bytes"])
                else:
                    self.engine.command(session, message.get("text") or "")
            except UserError:  # which the session has answered
                await asyncio.wait({sender}, timeout=10)
                return

    async def begin(self, request: Request) -> Response:
        """Begin a session over plain HTTP."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        try:
            session = self.open(queue)
        except UserError as error:
            return _error(503, str(error))
        self.answers[session.id] = queue
        return JSONResponse(
            {"session": session.id, "model": self.engine.model.name},
            status_code=201,
            headers={SESSION_HEADER: session.id},
        )

    async def end(self, request: Request) -> Response:
        """End a session over plain HTTP."""
        session = self._session(request)
        if isinstance(session, Response):
            return session
        self.engine.close(session)
        queue = self.answers.pop(session.id, None)
        if queue is not None:  # a frame may be on its way still
            queue.put_nowait({"error": "The session was ended while the frame was tracked."})
        return Response(status_code=204)

    async def command(self, request: Request) -> Response:
        """Take a command over plain HTTP, as the WebSocket does."""
        session = self._session(request)
        if isinstance(session, Response):
            return session
        body = await _body(request, messages.MAX_TEXT)
        self.engine.command(session, body.decode("utf-8", "replace"))
        return JSONResponse({})

    async def frame(self, request: Request) -> Response:
        """Take a frame over plain HTTP, and answer when it is tracked."""
        session = self._session(request)
        if isinstance(session, Response):
            return session
        body = await _body(request, session.settings.max_frame_bytes)
        queue = self.answers.get(session.id)
        if queue is None:
            raise UserError("The session was ended while the frame was sent.")
        while not queue.empty():  # a client did not wait for them
            queue.get_nowait()
            session.read += 1
        if session.waiting or session.answered > session.read:
            return _error(409, "A frame of this session is being tracked; wait for its answer.")
        number = session.last_number + 1
        header = messages.HEADER.pack(number, session.answered)
        self.engine.frame(session, header + body)
        answer = await queue.get()
        if "error" in answer:
            return _error(400, answer["error"])
        session.read += 1
        return JSONResponse(answer)

    def _session(self, request: Request) -> Session | Response:
        name = request.path_params["session"]
        try:
            session = self.engine.find(name)
        except UserError as error:
            return _error(410, f"{error} Requests must carry the header {SESSION_HEADER}.")
        if name not in self.answers:
            return _error(409, "This session goes over a WebSocket.")
        return session


async def _body(request: Request, limit: int) -> bytes:
    """Read the body of a request, but no more than is allowed.

    Raises:
        UserError: if it is longer.
        TimeoutError: if it does not come in time.
    """
    parts, length = [], 0
    async with asyncio.timeout(BODY_S):
        async for part in request.stream():
            length += len(part)
            if length > limit:
                raise UserError(f"The request has more than {limit:,} bytes; give less.")
            parts.append(part)
    return b"".join(parts)


def _error(code: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status_code=code)
