"""The caller's side of gRPC."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

import grpc

from baton import codec
from baton.certificates import Loaded
from baton.errors import BatonError, InternalError, InvalidRequest, Unavailable
from baton.rpc.base import Channel, Method, Req, Res
from baton.rpc.calls import Feeding, was_cancelled
from baton.rpc.grpc_wire import CHANNEL_OPTIONS, ERROR_TRAILER, MEANING
from baton.rpc.secure import Security, channel_credentials, why_no_connection

NOT_CONNECTED = "failed to connect"  # how gRPC begins when no connection came about at all


class GrpcChannel(Channel):
    """`_calls` are those under way, each with the reason for which we cancelled it ourselves.

    gRPC's own channel is made anew when the certificate has changed: it could not connect again with the former one.
    Calls that run on the one before end there, and it is closed with the last of them."""

    def __init__(self, address: str, security: Security | None) -> None:
        self._address = address
        self._security = security
        self._loaded: Loaded | None = None
        self._channel: grpc.aio.Channel | None = None
        self._users: Counter[grpc.aio.Channel] = Counter()  # calls on each channel
        self._closed = False
        self._calls: dict[Any, Exception | None] = {}

    async def unary(self, method: Method[Req, Res], request: Req, *, timeout_s: float) -> Res:
        channel = self._connected()
        call = channel.unary_unary(method.path)(codec.encode(request), timeout=timeout_s)
        async with self._calling(method, call, channel):
            return self._decoded(method, await call)

    async def aclose(self) -> None:
        self._closed = True
        for call in tuple(self._calls):
            self._cancel(call, self._closed_error())
        if self._channel is not None:
            await self._channel.close()

    async def _stream(
        self, method: Method[Req, Res], requests: AsyncIterator[Req], timeout_s: float | None
    ) -> AsyncGenerator[Res, None]:
        channel = self._connected()
        call = channel.stream_stream(method.path)(timeout=timeout_s)

        async def send(request: Req) -> None:
            await call.write(codec.encode(request))

        def fail(error: Exception) -> None:
            if not call.done():  # an ended call refuses writes; its reader knows why it ended
                self._cancel(call, error)

        answers = cast(AsyncGenerator[bytes, None], aiter(call))
        async with (
            self._calling(method, call, channel),
            Feeding(requests, send, call.done_writing, fail),
            aclosing(answers),
        ):
            async for data in answers:
                yield self._decoded(method, data)

    def _connected(self) -> grpc.aio.Channel:
        if self._closed:
            raise self._closed_error()
        loaded = None if self._security is None else self._security.certificates.current()
        if self._channel is None or loaded is not self._loaded:
            self._channel, self._loaded = self._made(loaded), loaded
        return self._channel

    def _made(self, loaded: Loaded | None) -> grpc.aio.Channel:
        if self._security is None or loaded is None:
            return grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        # Certificates are for roles, not for addresses (baton.certificates).
        options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", self._security.server_name))
        return grpc.aio.secure_channel(self._address, channel_credentials(loaded), options=options)

    @asynccontextmanager
    async def _calling(
        self, method: Method[Any, Any], call: Any, channel: grpc.aio.Channel
    ) -> AsyncGenerator[None, None]:
        """Turns what gRPC raises into our errors, and ends the call with the block."""
        self._calls[call] = None
        self._users[channel] += 1
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise await self._error(method, error) from None
        except asyncio.CancelledError:
            why = self._calls[call]
            if why is None or was_cancelled():
                raise
            raise why from None
        finally:
            del self._calls[call]
            call.cancel()
            self._users[channel] -= 1
            if not self._users[channel]:
                del self._users[channel]
                if channel is not self._channel:
                    await channel.close()

    def _cancel(self, call: Any, why: Exception) -> None:
        self._calls[call] = why
        call.cancel()

    def _decoded(self, method: Method[Any, Res], data: bytes) -> Res:
        try:
            return cast(Res, codec.decode(method.response, data))
        except InvalidRequest as error:
            raise InternalError(f"{self._address} answered {method.path} wrongly: {error}") from error

    async def _error(self, method: Method[Any, Any], error: grpc.aio.AioRpcError) -> BatonError:
        for key, value in error.trailing_metadata() or ():
            if key == ERROR_TRAILER:
                return codec.decode_error(value)
        details = error.details() or ""
        if details.startswith(NOT_CONNECTED) and "refused" not in details:
            details = await why_no_connection(self._address, self._security) or details
        meaning = MEANING.get(error.code(), InternalError)
        return meaning(f"{method.path} at {self._address}: {details}")

    def _closed_error(self) -> Unavailable:
        return Unavailable(f"the channel to {self._address} is closed")
