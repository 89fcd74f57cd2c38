"""The web side of a replica: WebSockets, plain HTTP, its status, and the page.

An ASGI application that knows no Ray: it runs under any server.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import json
import logging
import secrets
from collections import deque
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
from lorat_platform.serving.direct import listening
from lorat_platform.serving.engine import Engine
from lorat_platform.serving.session import Session

log = logging.getLogger(__name__)

_Answers = asyncio.Queue[dict[str, Any]]

PAGE = Path(__file__).with_name("page")
SESSION_HEADER = "x-session-id"
"""Requests with a session's id in it go to the replica that has the session."""
BAD_MESSAGE, TRY_LATER = 1008, 1013
"""Codes with which a WebSocket is closed.  Source: RFC 6455, section 7.4, and IANA's registry."""
IDLE_CHECK_S = 1.0
BODY_S = 30.0
"""Longest time that the body of a request takes to come."""
BEGINNING_IS_OVER = (
    "The connection with which this session began is over; begin again, with the targets at their "
    "last boxes."
)
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src blob:; img-src 'self' data:; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Of the page: it loads nothing from elsewhere, and no other page may show it.  So it talks to the
address that it came from, and does not go on at the replica itself."""


def make_app(
    engine: Engine,
    token_sha256: str | None,
    status: Callable[[], dict[str, Any]],
    *,
    direct: bool = False,
) -> Starlette:
    """Make the application.

    Args:
        engine: which tracks.
        token_sha256: hash, in hexadecimal, of the token that every request but those for the page
            must give, as ``Authorization: Bearer`` or as ``?token=``; none means that everybody
            is served.
        status: returns what ``/status`` shows.
        direct: whether sessions may go on at a port of this application's own.
    """
    web = _Web(engine, token_sha256, status, direct)
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


class _Outbox:
    """Brings answers from other threads into an event loop, which wakes up once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[_Answers, dict[str, Any]]] = deque()

    def put(self, queue: _Answers, message: dict[str, Any]) -> None:
        self._waiting.append((queue, message))
        if len(self._waiting) == 1:  # else the loop was woken for the first, and has not come yet
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients are gone
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._waiting:
            queue, message = self._waiting.popleft()
            queue.put_nowait(message)


class _Web:
    def __init__(
        self,
        engine: Engine,
        token_sha256: str | None,
        show: Callable[[], dict[str, Any]],
        direct: bool,
    ) -> None:
        self.engine, self.token_sha256, self.show = engine, token_sha256, show
        self.direct = direct
        self.port: int | None = None
        """For the direct way."""
        self.tickets: dict[str, Session] = {}
        """Sessions that may take the direct way, by what they show there."""
        self.outboxes: dict[asyncio.AbstractEventLoop, _Outbox] = {}
        self.answers: dict[str, _Answers] = {}
        """Of the sessions over plain HTTP, by id."""

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """End idle sessions as long as the application runs, and the others with it."""
        task = asyncio.create_task(self._end_idle())
        with contextlib.ExitStack() as stack:
            if self.direct:
                routes = [WebSocketRoute("/direct", self.go_on)]
                self.port = stack.enter_context(listening(Starlette(routes=routes)))
            yield
            task.cancel()
            await asyncio.to_thread(self.engine.stop)
            await asyncio.to_thread(stack.close)

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
        given = _bearer(connection) or connection.query_params.get("token", "")
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

    def open(self, queue: _Answers) -> Session:
        """Begin a session whose answers go into a queue of this event loop."""
        return self.engine.open(self._into(queue))

    def _into(self, queue: _Answers) -> Callable[[dict[str, Any]], None]:
        """Return what puts answers into a queue of this event loop, from any thread."""
        loop = asyncio.get_running_loop()
        return functools.partial(self.outboxes.setdefault(loop, _Outbox(loop)).put, queue)

    async def track(self, socket: WebSocket) -> None:
        """Serve a session over a WebSocket."""
        if not self.may(socket):
            await socket.close(BAD_MESSAGE)
            return
        await socket.accept()
        queue: _Answers = asyncio.Queue()
        try:
            session = self.open(queue)
        except UserError as error:
            await socket.send_text(json.dumps({"error": str(error)}))
            await socket.close(TRY_LATER)
            return
        hello: dict[str, Any] = {
            "session": session.id,
            "model": self.engine.model.name,
            "window": session.settings.window,
        }
        ticket = secrets.token_urlsafe(24)
        if self.port is not None:
            self.tickets[ticket] = session
            hello["direct"] = {"port": self.port, "ticket": ticket}
        try:
            await socket.send_text(json.dumps(hello))
            await self._converse(socket, session, queue)
        finally:
            went_on = self.port is not None and self.tickets.pop(ticket, None) is None
            self.engine.close(session, BEGINNING_IS_OVER if went_on else "", again=True)

    async def go_on(self, socket: WebSocket) -> None:
        """Go on with a session that began elsewhere; there it is only held open from now on."""
        session = self.tickets.pop(_bearer(socket), None)
        if session is None:
            await socket.close(BAD_MESSAGE)
            return
        await socket.accept()
        queue: _Answers = asyncio.Queue()
        end_there, session.answer = session.answer, self._into(queue)
        try:
            await socket.send_text(json.dumps({"session": session.id}))
            await self._converse(socket, session, queue)
        finally:
            self.engine.close(session)
            end_there({})

    async def _converse(self, socket: WebSocket, session: Session, queue: _Answers) -> None:
        """Take messages and send answers until the session is over."""
        sender = asyncio.create_task(self._send(socket, queue))
        receiver = asyncio.create_task(self._receive(socket, session, queue))
        try:
            await asyncio.wait({receiver, sender}, return_when=asyncio.FIRST_COMPLETED)
            if receiver.done() and receiver.result():
                await asyncio.wait({sender}, timeout=10)
        finally:
            receiver.cancel()
            sender.cancel()

    async def _send(self, socket: WebSocket, queue: _Answers) -> None:
        """Send answers until one says that the session is over; an empty one ends silently."""
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client is gone
            while message := await queue.get():
                await socket.send_text(json.dumps(message))
                if "error" in message:
                    await socket.close(BAD_MESSAGE)
                    return
            await socket.close()

    async def _receive(self, socket: WebSocket, session: Session, queue: _Answers) -> bool:
        """Take messages; return whether it was a bad one that ended the session."""
        while True:
            try:
                message = await socket.receive()
            except (WebSocketDisconnect, RuntimeError):
                return False
            if message["type"] == "websocket.disconnect":
                return False
            lost = session.ended == ""
            try:
                if message.get("bytes") is not None:
                    self.engine.frame(session, message["bytes"])
                else:
                    self.engine.command(session, message.get("text") or "")
            except UserError as error:
                again = {"again": True} if lost else {}
                queue.put_nowait({"error": str(error)} | again)  # where the session has not said it
                return True

    async def begin(self, request: Request) -> Response:
        """Begin a session over plain HTTP."""
        queue: _Answers = asyncio.Queue()
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


def _bearer(connection: HTTPConnection) -> str:
    """Return what a request shows to be let in, empty if it shows nothing."""
    scheme, _, given = connection.headers.get("authorization", "").partition(" ")
    return given if scheme.lower() == "bearer" else ""


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
