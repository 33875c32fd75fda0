"""KV over plain TCP, straight from the payload's buffers and straight into the sink's.

    sender                                       receiver
    hello -------------------------------------> checks magic and version
          <------------------------------------- hello
    length of header, header, payload ---------> sink.open, bytes land, sink.close
          <------------------------------------- answer, in the order of the pieces

Everything runs on the event loop (`transfer.stream`). There is no authentication and no encryption: bind to a network
you trust.
"""

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from urllib.parse import urlsplit

from baton.clock import Clock
from baton.errors import ConfigError, TransferError
from baton.transfer import framing
from baton.transfer.base import PIECE_TIMEOUT_S, Connection, PieceSink, Transport
from baton.transfer.ends import ReceiverEnd, SenderEnd
from baton.transfer.stream import Stream
from baton.transfer.vector import Vector
from baton.transfer.wire import PieceHeader

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
BACKLOG = 128
_LENGTH = struct.Struct("<I")


class TcpConnection(SenderEnd):
    def __init__(
        self, stream: Stream, clock: Clock, peer: str, on_closed: Callable[[SenderEnd], object]
    ) -> None:
        super().__init__(clock, peer, on_closed)
        self._stream = stream
        self._start(self._read_answers)

    async def _transmit(self, header: bytes, payload: Vector) -> None:
        await self._stream.write(Vector((memoryview(_LENGTH.pack(len(header)) + header),)))
        await self._stream.write(payload)

    async def _read_answers(self) -> None:
        while True:
            accepted, reason_bytes = framing.decode_answer(await self._stream.read(framing.ANSWER.size))
            reason = await self._stream.read(reason_bytes)
            self._answered(None if accepted else framing.refusal(reason))

    def _disconnect(self) -> None:
        self._stream.close()


class TcpTransport(Transport):
    """`advertise_host` is what peers are told to connect to; needed when `host` binds every interface."""

    name = "tcp"

    def __init__(
        self,
        clock: Clock,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        advertise_host: str | None = None,
        piece_timeout_s: float = PIECE_TIMEOUT_S,
    ) -> None:
        if advertise_host is None and host in ("", "0.0.0.0", "::"):
            raise ConfigError(
                f"transfer.host {host!r} binds every interface: set transfer.advertise_host too"
            )
        self._clock = clock
        self._host = host
        self._port = port
        self._advertise_host = advertise_host or host
        self._piece_timeout_s = piece_timeout_s
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._receiving: set[asyncio.Task[None]] = set()
        self._connections: set[SenderEnd] = set()

    # --- receiving ---

    async def listen(self, sink: PieceSink) -> str:
        try:
            family, _, _, _, address = (await _resolve(self._host, self._port))[0]
            listener = self._listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError as error:
            await self.aclose()
            raise ConfigError(f"cannot receive KV on {self._host}:{self._port}: {error.strerror}") from None
        self._accepting = asyncio.create_task(self._accept(listener, sink))
        return _format(self._advertise_host, listener.getsockname()[1])

    async def _accept(self, listener: socket.socket, sink: PieceSink) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, (host, port, *_) = await loop.sock_accept(listener)
            except OSError as error:  # out of file descriptors, or the peer left again
                log.warning("cannot accept a KV connection: %s", error.strerror)
                await self._clock.sleep(0.1)
                continue
            task = asyncio.create_task(self._receive(Stream(sock), ReceiverEnd(sink), _format(host, port)))
            self._receiving.add(task)
            task.add_done_callback(self._receiving.discard)

    async def _receive(self, stream: Stream, end: ReceiverEnd, peer: str) -> None:
        error = TransferError("this worker closes its transport")
        try:
            async with self._clock.timeout(HELLO_TIMEOUT_S):
                hello = await stream.read(framing.HELLO.size)
                await stream.write(Vector((memoryview(framing.hello()),)))
                framing.check_hello(hello)
            while True:
                await self._receive_piece(stream, end, await self._read_header(stream))
        except TransferError as cause:
            error = cause.with_traceback(None)
        except TimeoutError:
            error = TransferError("the sender stalled")
        except Exception as cause:
            error = TransferError(f"receiving failed: {cause!r}")
            log.exception("receiving KV from %s", peer)
        finally:
            stream.close()
            end.abort(error)  # only now: nothing writes into the sink's buffers any more
            log.info("KV connection from %s ended: %s", peer, error)

    async def _read_header(self, stream: Stream) -> PieceHeader:
        (num_bytes,) = _LENGTH.unpack(await stream.read(_LENGTH.size))
        framing.check_header_bytes(num_bytes)
        return PieceHeader.decode(memoryview(await stream.read(num_bytes)))

    async def _receive_piece(self, stream: Stream, end: ReceiverEnd, header: PieceHeader) -> None:
        async with self._clock.timeout(self._piece_timeout_s):
            target = end.open(header)
            if target is not None:
                await stream.read_into(target)
            else:
                framing.check_skipped_bytes(header.num_bytes)
                await stream.skip(header.num_bytes)
            await stream.write(Vector((memoryview(framing.encode_answer(end.close())),)))

    # --- sending ---

    async def connect(self, address: str, *, timeout_s: float) -> Connection:
        try:
            async with self._clock.timeout(timeout_s):
                stream = await self._dial(address)
        except TimeoutError:
            raise TransferError(f"{address} did not answer within {timeout_s:g} s") from None
        except OSError as error:
            raise TransferError(f"cannot connect to {address}: {error.strerror}") from None
        connection = TcpConnection(stream, self._clock, address, self._connections.discard)
        self._connections.add(connection)
        return connection

    async def _dial(self, address: str) -> Stream:
        family, _, _, _, sockaddr = (await _resolve(*_parse(address)))[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, sockaddr)
            stream = Stream(sock)
            await stream.write(Vector((memoryview(framing.hello()),)))
            framing.check_hello(await stream.read(framing.HELLO.size))
        except BaseException:
            sock.close()
            raise
        return stream

    async def aclose(self) -> None:
        tasks = [*self._receiving, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self._connections):
            await connection.aclose()


async def _resolve(host: str, port: int) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
    loop = asyncio.get_running_loop()
    return await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # type: ignore[return-value]


def _parse(address: str) -> tuple[str, int]:
    parts = urlsplit(address)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme != "tcp" or not host or not port:
        raise TransferError(f"{address!r} is not an address of the form tcp://host:port")
    return host, port


def _format(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
