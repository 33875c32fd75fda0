"""The server's side of gRPC."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton import codec
from baton.clock import Clock
from baton.errors import BatonError, ConfigError, InvalidRequest, Unavailable
from baton.rpc import health
from baton.rpc.base import Handlers, Method, Server
from baton.rpc.calls import respond
from baton.rpc.grpc_wire import ERROR_TRAILER, SERVER_OPTIONS, STATUS_OF
from baton.rpc.secure import Security
from baton.tracing import CALLER, valid_traceparent

MAX_DETAILS = 200  # characters of an error's message in the status itself; the trailer has more
FIRST_REQUEST_S = 1.0  # that a refusal waits for it
CLEAN_UP_S = 5.0  # for handlers that a closing server has cancelled

Authorize = Callable[[str | None], None]  # gets the header "authorization"; raises Unauthenticated


class GrpcServer(Server):
    """Health and reflection beside the services. `health_address` is served without TLS and knows health alone: probes
    of a kubelet have no certificate."""

    def __init__(
        self,
        handlers: Handlers,
        clock: Clock,
        authorize: Authorize | None,
        security: Security | None,
    ) -> None:
        self._clock = clock
        self._authorize = authorize
        self._security = security
        self.health_address = ""
        self._running: set[asyncio.Task[Any]] = set()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
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
        self._servers = [self._server]

    async def start(self, address: str, health_address: str | None) -> None:
        """Raises ConfigError."""
        try:
            self.address = await self._bind(self._server, address, self._security)
            if health_address is not None:
                probed = grpc.aio.server(options=SERVER_OPTIONS)
                health_pb2_grpc.add_HealthServicer_to_server(self._health, probed)
                self._servers.append(probed)
                self.health_address = await self._bind(probed, health_address, None)
        except BaseException:
            await self._stop(None)
            raise
        for server in self._servers:
            await server.start()

    async def _bind(self, server: grpc.aio.Server, address: str, security: Security | None) -> str:
        await _check_free(address)
        try:
            if security is None or security.serve_plain:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, security.server_credentials())
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}") from error
        return f"{address.rpartition(':')[0]}:{port}"

    def set_serving(self, serving: bool) -> None:
        self._health.set_serving(serving)

    async def aclose(self, grace_s: float) -> None:
        self._health.close()
        await self._stop(grace_s)
        if self._running:
            with suppress(TimeoutError):
                async with self._clock.timeout(CLEAN_UP_S):
                    await asyncio.wait(self._running)

    async def _stop(self, grace_s: float | None) -> None:
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))

    def _adapted(self, method: Method[Any, Any], handler: Any) -> Callable[[Any, Any], Awaitable[None]]:
        """Every kind is a stream in both directions: on the wire there is no difference."""

        async def serve_call(requests: Any, context: Any) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._running.add(task)
            CALLER.set(valid_traceparent(_metadata(context, "traceparent")))
            try:
                await self._admit(method, requests, context)
                await respond(method, handler, _Decoded(method, requests), _encoding(method, context))
            except BatonError as error:
                await context.abort(*_to_status(error))
            finally:
                self._running.discard(task)

        return serve_call

    async def _admit(self, method: Method[Any, Any], requests: Any, context: Any) -> None:
        """Raises Unauthenticated; once the first request is here, because gRPC's clients take a refusal that crosses it
        for an internal error of their own."""
        try:
            if self._security is not None:
                self._security.check_caller(method.caller, context.auth_context())
            if self._authorize is not None:
                self._authorize(_authorization(context))
        except BatonError:
            with suppress(TimeoutError):
                async with self._clock.timeout(FIRST_REQUEST_S):
                    await anext(requests, None)
            raise


def _authorization(context: Any) -> str | None:
    return next((value for key, value in context.invocation_metadata() if key == "authorization"), None)


class _Decoded(AsyncIterator[Any]):
    def __init__(self, method: Method[Any, Any], messages: AsyncIterator[bytes]) -> None:
        self._type = method.request
        self._messages = messages

    async def __anext__(self) -> Any:
        try:
            message = await anext(self._messages)
        except grpc.aio.BaseError as error:  # the server stops, or the call has ended
            raise Unavailable(f"nothing more comes: {error}") from error
        return codec.decode(self._type, message)


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
    code = STATUS_OF.get(error.code, grpc.StatusCode.INTERNAL)
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
