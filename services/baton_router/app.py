"""The HTTP application and its server."""

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import baton
from baton.errors import BatonError, ConfigError, InvalidRequest, Unauthenticated
from baton_router.api_keys import ApiKeys
from baton_router.fleet_view import FleetView
from baton_router.front_door import FrontDoor
from baton_router.openai.api import Api
from baton_router.openai.errors import error_response, on_error, response_to
from baton_router.openai.sse import Exchange

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 * 2**20
BACKLOG = 2048
KEYED = "/v1"
CONNECTION = "baton.connection"  # in the scope of a request that came by our own server
CLEAN_UP_S = 2.0  # for cancelled requests to say so
REQUEST_ID = re.compile(r"[A-Za-z0-9._~:/+=@-]{1,128}")
BAD_REQUEST_ID = InvalidRequest(
    "x-request-id: must be 1 to 128 letters, digits or ._~:/+=@-", param="x-request-id"
)

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(
    door: FrontDoor, fleet: FleetView, *, keys: ApiKeys | None = None, max_body_bytes: int = MAX_BODY_BYTES
) -> "App":
    api = Api(door, fleet, max_body_bytes=max_body_bytes)
    app = FastAPI(
        title="Baton",
        version=baton.__version__,
        description="An OpenAI-compatible API to a fleet of prefill and decode workers.",
        redirect_slashes=False,
    )
    for kind in (BatonError, HTTPException, Exception):
        app.add_exception_handler(kind, on_error)
    app.include_router(api.routes())
    return App(app, api.answering(), door, keys)


class App:
    """The outermost ASGI application: gives every exchange its id, counts how it ended, and calls the endpoints
    that answer prompts itself: FastAPI's stack would cost as much again as all the rest of a short request."""

    def __init__(
        self, app: ASGIApp, answering: Mapping[str, Endpoint], door: FrontDoor, keys: ApiKeys | None
    ) -> None:
        self._app = app
        self._answering = answering
        self._door = door
        self._keys = keys

    def cancel_all(self) -> None:
        self._door.cancel_all()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        wanted = headers.get("x-request-id")
        is_valid = wanted is not None and REQUEST_ID.fullmatch(wanted) is not None
        request_id = wanted if wanted is not None and is_valid else self._door.draw_id()
        exchange = Exchange(request_id, self._door.clock.now(), send, scope.pop(CONNECTION, None))
        scope["baton.exchange"] = exchange

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                exchange.status = exchange.status or message["status"]
            await send(message)

        try:
            if wanted is not None and not is_valid:
                await error_response(BAD_REQUEST_ID)(scope, receive, send_with_id)
            elif (refused := self._refused(scope, headers)) is not None:
                await error_response(refused)(scope, receive, send_with_id)
            elif scope["method"] == "POST" and (endpoint := self._answering.get(scope["path"])) is not None:
                await self._answer(endpoint, scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except Exception:  # answered already, with 500
            log.exception("request %s to %s failed", request_id, scope["path"])
        finally:
            del scope[
                "baton.exchange"
            ]  # the server's `send` holds the scope: a cycle for the garbage collector
            self._door.metrics.count(self._endpoint(scope), exchange.status)

    def _refused(self, scope: Scope, headers: Headers) -> Unauthenticated | None:
        """Only OpenAI's part needs a key: probes and monitoring have none."""
        if self._keys is not None and scope["path"].startswith(KEYED):
            try:
                self._keys.check(headers.get("authorization"))
            except Unauthenticated as error:
                return error
        return None

    async def _answer(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
        except Exception as error:
            response = response_to(request, error)
        await response(scope, receive, send)

    def _endpoint(self, scope: Scope) -> str:
        """The route, not the path: as many as there are in the code."""
        path: str = scope["path"]
        return path if path in self._answering else getattr(scope.get("route"), "path", "unknown")


class HttpServer:
    """A running server. Close it, or leave its context."""

    def __init__(self, app: App, server: "_Server", listener: socket.socket) -> None:
        self._app = app
        self._server = server
        self._running = asyncio.create_task(server.serve([listener]))
        self.host, self.port = listener.getsockname()[:2]

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    async def started(self) -> None:
        starting = asyncio.create_task(self._server.is_up.wait())
        await asyncio.wait((starting, self._running), return_when=asyncio.FIRST_COMPLETED)
        starting.cancel()
        if self._running.done():
            self._running.result()

    async def aclose(self, grace_s: float = 0.0) -> None:
        """Take no more connections, let running requests end for `grace_s` seconds, cancel the rest."""
        cancelling = asyncio.get_running_loop().call_later(grace_s, self._app.cancel_all)
        self._server.stop(grace_s + CLEAN_UP_S)
        await self._running
        cancelling.cancel()
        await asyncio.gather(*self._server.server_state.tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


async def serve_http(app: App, host: str, port: int) -> HttpServer:
    """Serves on the running loop (uvloop where the caller runs one) until it is closed. Port 0: any free one.

    Raises ConfigError when the address cannot be bound.
    """
    protocol: Any = partial(_Protocol, _Writes(asyncio.get_running_loop()))
    config = uvicorn.Config(
        app,
        http=protocol,
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
    )
    server = HttpServer(app, _Server(config), _listen(host, port))
    await server.started()
    return server


def _listen(host: str, port: int) -> socket.socket:
    try:
        [(family, *_, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot serve HTTP on {host}:{port}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot serve HTTP on {host}:{port}: {error.strerror or error}") from error
    return listener


class _Writes:
    """What a turn of the event loop has for all connections, written in one go in the next one: before any task runs
    that was woken meanwhile, so that nothing overtakes it. A write wakes its client; with other work between two writes
    a client of many streams goes to sleep and is woken for each."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: list[tuple[asyncio.Transport, bytes]] = []

    def add(self, transport: asyncio.Transport, data: bytes) -> None:
        if not self._pending:
            self._loop.call_soon(self._write)
        self._pending.append((transport, data))

    def _write(self) -> None:
        pending, self._pending = self._pending, []
        for transport, data in pending:
            if not transport.is_closing():
                transport.write(data)


class _Protocol(HttpToolsProtocol):
    """uvicorn's connection, which the application may write to itself: see sse.Connection."""

    def __init__(self, writes: _Writes, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._writes = writes

    def on_headers_complete(self) -> None:
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope[CONNECTION] = self
        super().on_headers_complete()

    @property
    def is_paused(self) -> bool:
        return self.flow.write_paused

    def write_chunk(self, chunk: bytes) -> None:
        self._writes.add(self.transport, b"%x\r\n%b\r\n" % (len(chunk), chunk))


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to the process and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    def stop(self, grace_s: float) -> None:
        settings: Any = self.config
        settings.timeout_graceful_shutdown = grace_s
        self.should_exit = True
