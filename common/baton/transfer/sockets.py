"""What transports over a connected socket share: to listen, to greet, to frame pieces, to give up in time.

    sender                                       receiver
    hello <------------------------------------> hello: magic and version
    length of header, header, payload ---------> sink.open, bytes land, sink.close
          <------------------------------------- answer, in the order of the pieces

A transport says where it listens, how it greets and which `Line` comes of it; the line, how a payload crosses.
Everything runs on the event loop (`transfer.stream`).
"""

import asyncio
import logging
import socket
import struct
from abc import abstractmethod
from collections.abc import Callable

from baton.clock import Clock
from baton.errors import TransferError
from baton.transfer import framing
from baton.transfer.base import PIECE_TIMEOUT_S, Connection, PieceSink, Transport
from baton.transfer.ends import ReceiverEnd, SenderEnd
from baton.transfer.framing import Status
from baton.transfer.stream import Stream
from baton.transfer.vector import Vector
from baton.transfer.wire import PieceHeader

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
BACKLOG = 128
ACCEPT_AGAIN_S = 0.1
_LENGTH = struct.Struct("<I")


class Line:
    """One end of a connection whose two sides have greeted each other. Here payloads cross on the socket itself."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    async def send(self, header: bytes, payload: Vector) -> None:
        await self.say(_LENGTH.pack(len(header)) + header)
        await self.send_payload(payload)

    async def send_payload(self, payload: Vector) -> None:
        await self.stream.write(payload)

    async def receive_header(self) -> PieceHeader:
        (num_bytes,) = _LENGTH.unpack(await self.stream.read(_LENGTH.size))
        framing.check_header_bytes(num_bytes)
        return PieceHeader.decode(memoryview(await self.stream.read(num_bytes)))

    async def receive_payload(self, target: Vector) -> None:
        await self.stream.read_into(target)

    async def skip_payload(self, num_bytes: int) -> None:
        await self.stream.skip(num_bytes)

    async def say(self, words: bytes) -> None:
        await self.stream.write(Vector((memoryview(words),)))

    def slot_free(self) -> None:
        raise TransferError("an answer that makes no sense")

    def close(self) -> None:
        """No byte is read or written after this returns."""
        self.stream.close()


class SocketConnection(SenderEnd):
    def __init__(
        self,
        transport: str,
        line: Line,
        clock: Clock,
        peer: str,
        on_closed: Callable[[SenderEnd], object],
    ) -> None:
        super().__init__(clock, peer, on_closed)
        self.transport = transport
        self._line = line
        self._start(self._read_answers)

    async def _transmit(self, header: bytes, payload: Vector) -> None:
        await self._line.send(header, payload)

    async def _read_answers(self) -> None:
        stream = self._line.stream
        while True:
            status, reason_bytes = framing.decode_answer(await stream.read(framing.ANSWER.size))
            if status is Status.SLOT_FREE:
                self._line.slot_free()
            else:
                reason = await stream.read(reason_bytes)
                self._answered(framing.refusal(reason) if status is Status.REFUSED else None)

    def _disconnect(self) -> None:
        self._line.close()


class SocketTransport(Transport):
    def __init__(self, clock: Clock, *, piece_timeout_s: float = PIECE_TIMEOUT_S) -> None:
        self._clock = clock
        self._piece_timeout_s = piece_timeout_s
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._receiving: set[asyncio.Task[None]] = set()
        self._connections: set[SenderEnd] = set()

    # --- what a transport adds ---

    @abstractmethod
    async def _bind(self) -> tuple[socket.socket, str]:
        """A bound socket and the address that peers connect to. Raises ConfigError."""

    @abstractmethod
    async def _dial(self, address: str) -> socket.socket:
        """A connected socket. Raises OSError, or TransferError."""

    @abstractmethod
    async def _greet(self, sock: socket.socket, *, is_receiver: bool) -> Line:
        """What both sides do before the first piece. Whatever it raises, the caller closes the socket."""

    def _name_of(self, peer: object) -> str:
        """For messages; of the address that `accept` returned."""
        return str(peer)

    # --- receiving ---

    async def listen(self, sink: PieceSink) -> str:
        listener, address = await self._bind()
        listener.listen(BACKLOG)
        listener.setblocking(False)
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener, sink))
        return address

    async def _accept(self, listener: socket.socket, sink: PieceSink) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(listener)
            except OSError as error:  # out of file descriptors, or the peer left again
                log.warning("cannot accept a KV connection: %s", error.strerror)
                await self._clock.sleep(ACCEPT_AGAIN_S)
                continue
            task = asyncio.create_task(self._receive(sock, ReceiverEnd(sink, self.name), self._name_of(peer)))
            self._receiving.add(task)
            task.add_done_callback(self._receiving.discard)

    async def _receive(self, sock: socket.socket, end: ReceiverEnd, peer: str) -> None:
        error, line = TransferError("this worker closes its transport"), None
        try:
            async with self._clock.timeout(HELLO_TIMEOUT_S):
                line = await self._greet(sock, is_receiver=True)
            while True:
                await self._receive_piece(line, end, await line.receive_header())
                await asyncio.sleep(0)  # small pieces may come without end
        except TransferError as cause:
            error = cause.with_traceback(None)
        except TimeoutError:
            error = TransferError("the sender stalled")
        except Exception as cause:
            error = TransferError(f"receiving failed: {cause!r}")
            log.exception("receiving KV from %s", peer)
        finally:
            if line is not None:
                line.close()
            sock.close()
            end.abort(error)  # only now: nothing writes into the sink's buffers any more
            log.info("KV connection from %s ended: %s", peer, error)

    async def _receive_piece(self, line: Line, end: ReceiverEnd, header: PieceHeader) -> None:
        async with self._clock.timeout(self._piece_timeout_s):
            target = end.open(header)
            if target is not None:
                await line.receive_payload(target)
            else:
                framing.check_skipped_bytes(header.num_bytes)
                await line.skip_payload(header.num_bytes)
            await line.say(framing.encode_answer(end.close()))

    # --- sending ---

    async def connect(self, address: str, *, timeout_s: float) -> Connection:
        try:
            async with self._clock.timeout(timeout_s):
                line = await self._reach(address)
        except TimeoutError:
            raise TransferError(f"{address} did not answer within {timeout_s:g} s") from None
        except OSError as error:
            raise TransferError(f"cannot connect to {address}: {error.strerror}") from None
        connection = SocketConnection(self.name, line, self._clock, address, self._connections.discard)
        self._connections.add(connection)
        return connection

    async def _reach(self, address: str) -> Line:
        sock = await self._dial(address)
        try:
            return await self._greet(sock, is_receiver=False)
        except BaseException:
            sock.close()
            raise

    async def aclose(self) -> None:
        tasks = [*self._receiving, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self._connections):
            await connection.aclose()


async def greet(stream: Stream) -> None:
    """Both sides say hello before they listen, so that both learn what does not fit. Raises TransferError."""
    await stream.write(Vector((memoryview(framing.hello()),)))
    start = await stream.read(framing.START_BYTES)
    framing.check_start(start)
    framing.check_hello(start + await stream.read(framing.HELLO.size - framing.START_BYTES))
