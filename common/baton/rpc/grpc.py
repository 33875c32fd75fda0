"""RPC over gRPC. The wire is the public protocol of proto/baton/v1, with health and reflection on every server.

An error travels as a gRPC status, which any client understands, and as a serialised `baton.v1.Error` in the trailer
`baton-error-bin`, from which our clients raise the very same error again.
"""

import asyncio
import errno
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton import codec, errors
from baton.clock import Clock
from baton.errors import BatonError, ConfigError, DeadlineExceeded, InternalError, InvalidRequest, Unavailable
from baton.rpc import health
from baton.rpc.base import Channel, Handlers, Method, Req, Res, Rpc, Server
from baton.rpc.calls import Feeding, respond, single, was_cancelled
from baton.tracing import CALLER, valid_traceparent

ERROR_TRAILER = "baton-error-bin"
MAX_DETAILS = 200  # characters of an error's message in the status itself; the trailer has more
CLEAN_UP_S = 5.0  # for handlers that a closing server has cancelled
MAX_MESSAGE_BYTES = 64 << 20  # a watch's snapshot of 3 million blocks; a prompt of 16 million tokens

Code = grpc.StatusCode
Authorize = Callable[[str | None], None]  # gets the header "authorization"; raises Unauthenticated

_STATUS_OF: dict[str, grpc.StatusCode] = {
    errors.InvalidRequest.code: Code.INVALID_ARGUMENT,
    errors.Unauthenticated.code: Code.UNAUTHENTICATED,
    errors.ModelNotFound.code: Code.NOT_FOUND,
    errors.RequestTooLarge.code: Code.INVALID_ARGUMENT,
    errors.Overloaded.code: Code.RESOURCE_EXHAUSTED,
    errors.Unavailable.code: Code.UNAVAILABLE,
    errors.WorkerLost.code: Code.UNAVAILABLE,
    errors.DeadlineExceeded.code: Code.DEADLINE_EXCEEDED,
    errors.Cancelled.code: Code.CANCELLED,
    errors.TransferError.code: Code.ABORTED,
    errors.TransferRefused.code: Code.FAILED_PRECONDITION,
    errors.ConfigError.code: Code.FAILED_PRECONDITION,
}

# What a status means that came without our trailer: from gRPC itself. A server that closes cancels what still runs.
_MEANING: dict[grpc.StatusCode, type[BatonError]] = {
    Code.UNAVAILABLE: Unavailable,
    Code.CANCELLED: Unavailable,
    Code.DEADLINE_EXCEEDED: DeadlineExceeded,
}

# A host that is gone without a word is noticed after keepalive time + timeout. The pings are answered by threads of
# gRPC's own, so a Python process that is busy for a while is not taken for dead.
_COMMON_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2500),
    ("grpc.http2.ping_timeout_ms", 2500),  # without it an unanswered keepalive ping is given a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_SERVER_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),  # two servers on one port would share its calls in silence
    ("grpc.http2.min_ping_recv_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),  # never close a connection over keepalive pings
)
_CHANNEL_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 3000),  # despite its name: how long one attempt to connect may take
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),  # a channel's backoff is its own
    ("grpc.enable_http_proxy", 0),  # http_proxy in the environment is not meant for us
)


class GrpcRpc(Rpc):
    """To be used inside one running event loop: grpc.aio knows one per process. `authorize` is asked by its servers
    before every call; health and reflection are open."""

    def __init__(self, clock: Clock, authorize: Authorize | None = None) -> None:
        self._clock = clock
        self._authorize = authorize
        # It tells stderr of every connection that ends, which is no news. Read when the first server or channel starts.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

    async def serve(self, address: str, handlers: Handlers) -> Server:
        await _check_free(address)
        server = _GrpcServer(handlers, self._clock, self._authorize)
        await server.start(address)
        return server

    def connect(self, address: str) -> Channel:
        return _GrpcChannel(address)


# --- server ---


class _GrpcServer(Server):
    def __init__(self, handlers: Handlers, clock: Clock, authorize: Authorize | None) -> None:
        self._clock = clock
        self._authorize = authorize
        self._running: set[asyncio.Task[Any]] = set()
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        services = sorted({method.service for method in handlers})
        for service in services:
            methods = {
                method.name: grpc.stream_stream_rpc_method_handler(self._adapted(method, handler))
                for method, handler in handlers.items()
                if method.service == service
            }
            generic = grpc.method_handlers_generic_handler(service, methods)
            self._server.add_generic_rpc_handlers((generic,))
        self._health = health.Health(services)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*services, health.SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, address: str) -> None:
        host = address.rpartition(":")[0]
        try:
            self.address = f"{host}:{self._server.add_insecure_port(address)}"
        except RuntimeError as error:
            await self._server.stop(None)
            raise ConfigError(f"cannot listen on {address}") from error
        await self._server.start()

    def set_serving(self, serving: bool) -> None:
        self._health.set_serving(serving)

    async def aclose(self, grace_s: float) -> None:
        self._health.close()
        await self._server.stop(grace_s)
        if self._running:
            with suppress(TimeoutError):
                async with self._clock.timeout(CLEAN_UP_S):
                    await asyncio.wait(self._running)

    def _adapted(self, method: Method[Any, Any], handler: Any) -> Callable[[Any, Any], Awaitable[None]]:
        """Every kind is a stream in both directions: on the wire there is no difference."""

        async def serve_call(requests: Any, context: Any) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._running.add(task)
            CALLER.set(valid_traceparent(_metadata(context, "traceparent")))
            try:
                if self._authorize is not None:
                    self._authorize(_authorization(context))
                await respond(method, handler, _Decoded(method, requests), _encoding(method, context))
            except BatonError as error:
                await context.abort(*_to_status(error))
            finally:
                self._running.discard(task)

        return serve_call


def _authorization(context: Any) -> str | None:
    return next((value for key, value in context.invocation_metadata() if key == "authorization"), None)


class _Decoded(AsyncIterator[Any]):
    def __init__(self, method: Method[Any, Any], messages: AsyncIterator[bytes]) -> None:
        self._type = method.request
        self._messages = messages

    async def __anext__(self) -> Any:
        return codec.decode(self._type, await anext(self._messages))


def _metadata(context: Any, wanted: str) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == wanted and isinstance(value, str):
            return value
    return None


def _encoding(method: Method[Any, Any], context: Any) -> Callable[[Any], Awaitable[None]]:
    async def send(answer: Any) -> None:
        try:
            data = codec.encode(answer)
        except InvalidRequest as error:
            raise ValueError(f"{method.path} answered what its proto cannot hold: {error}") from error
        await context.write(data)

    return send


def _to_status(error: BatonError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    code = _STATUS_OF.get(error.code, Code.INTERNAL)
    return code, codec.short_text(error.message, MAX_DETAILS), ((ERROR_TRAILER, codec.encode_error(error)),)


async def _check_free(address: str) -> None:
    """gRPC says neither why it cannot bind, nor says so quietly. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot listen on {address!r}: {error}") from error
    for family, kind, protocol, _, place in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise ConfigError(f"port {port} is in use on {host}; choose another one") from error


# --- client ---


class _GrpcChannel(Channel):
    """`_calls` are those under way, each with the reason for which we cancelled it ourselves."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel: grpc.aio.Channel | None = None
        self._closed = False
        self._calls: dict[Any, Exception | None] = {}

    async def unary(self, method: Method[Req, Res], request: Req, *, timeout_s: float) -> Res:
        call = self._connected().unary_unary(method.path)(codec.encode(request), timeout=timeout_s)
        with self._calling(method, call):
            return self._decoded(method, await call)

    def server_stream(
        self, method: Method[Req, Res], request: Req, *, timeout_s: float | None
    ) -> AsyncGenerator[Res, None]:
        return self._stream(method, single(request), timeout_s)

    def bidi(
        self, method: Method[Req, Res], requests: AsyncIterator[Req], *, timeout_s: float | None = None
    ) -> AsyncGenerator[Res, None]:
        return self._stream(method, requests, timeout_s)

    async def aclose(self) -> None:
        self._closed = True
        for call in tuple(self._calls):
            self._cancel(call, self._closed_error())
        if self._channel is not None:
            await self._channel.close()

    async def _stream(
        self, method: Method[Req, Res], requests: AsyncIterator[Req], timeout_s: float | None
    ) -> AsyncGenerator[Res, None]:
        call = self._connected().stream_stream(method.path)(timeout=timeout_s)

        async def send(request: Req) -> None:
            await call.write(codec.encode(request))

        def fail(error: Exception) -> None:
            if not call.done():  # an ended call refuses writes; its reader knows why it ended
                self._cancel(call, error)

        answers = cast(AsyncGenerator[bytes, None], aiter(call))
        with self._calling(method, call):
            async with Feeding(requests, send, call.done_writing, fail), aclosing(answers):
                async for data in answers:
                    yield self._decoded(method, data)

    def _connected(self) -> grpc.aio.Channel:
        if self._closed:
            raise self._closed_error()
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=_CHANNEL_OPTIONS)
        return self._channel

    @contextmanager
    def _calling(self, method: Method[Any, Any], call: Any) -> Generator[None, None, None]:
        """Turns what gRPC raises into our errors, and ends the call with the block."""
        self._calls[call] = None
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._error(method, error) from None
        except asyncio.CancelledError:
            why = self._calls[call]
            if why is None or was_cancelled():
                raise
            raise why from None
        finally:
            del self._calls[call]
            call.cancel()

    def _cancel(self, call: Any, why: Exception) -> None:
        self._calls[call] = why
        call.cancel()

    def _decoded(self, method: Method[Any, Res], data: bytes) -> Res:
        try:
            return cast(Res, codec.decode(method.response, data))
        except InvalidRequest as error:
            raise InternalError(f"{self._address} answered {method.path} wrongly: {error}") from error

    def _error(self, method: Method[Any, Any], error: grpc.aio.AioRpcError) -> BatonError:
        for key, value in error.trailing_metadata() or ():
            if key == ERROR_TRAILER:
                return codec.decode_error(value)
        meaning = _MEANING.get(error.code(), InternalError)
        return meaning(f"{method.path} at {self._address}: {error.details()}")

    def _closed_error(self) -> Unavailable:
        return Unavailable(f"the channel to {self._address} is closed")
