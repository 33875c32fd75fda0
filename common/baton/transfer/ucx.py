"""KV over UCX: pieces cut into chunks, gathered into staging memory, several in flight, scattered at the receiver.

    sender                                         receiver
    hello (own worker address) ------------------> endpoint back to the sender, posts receives
          <--------------------------------------- welcome
    chunk: piece header, bytes ------------------> sink.open; bytes are copied; sink.close; posts the next receives
          <--------------------------------------- credit | accepted | refused
    empty chunk ---------------------------------> the sender closes          (bye: the receiver closes)

Staging on both sides is what makes cancelling safe: UCX may write into a posted receive even after its endpoint was
closed, so it never sees the sink's buffers; the copy is made on the loop, and only while the piece is open.

Worker addresses are exchanged out of band and no listener is opened for others. There is no authentication and no
encryption, and UCX lets peers write to memory: keep its devices (UCX_NET_DEVICES) on a network you trust.
"""

import asyncio
import base64
import binascii
import ipaddress
import logging
import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any
from zlib import crc32

from baton.clock import Clock
from baton.errors import TransferError
from baton.transfer import framing
from baton.transfer.base import PIECE_TIMEOUT_S, Connection, PieceSink, Transport
from baton.transfer.ends import ReceiverEnd, SenderEnd
from baton.transfer.ucx_library import make_library
from baton.transfer.ucx_lines import Kind, ReceiverLine, SenderLine, Tag, new_connection_id
from baton.transfer.ucx_worker import UcxWorker
from baton.transfer.vector import Vector
from baton.transfer.wire import PieceHeader

log = logging.getLogger(__name__)

MAX_HELLO_BYTES = 8192
PARTING_S = 1.0  # for the last message to leave
# Between hosts our own TCP is faster than UCX's, and nothing else of these leaves a host.
_SLOW_OR_LOCAL = {"self", "tcp", "sysv", "posix", "cma", "knem", "xpmem", "cuda_copy", "cuda_ipc", "gdr_copy"}
_HELLO = struct.Struct("<QIH")  # connection id, checksum of the address it was sent to, length of own address
_CHECKSUM = struct.Struct("<I")


class UcxConnection(SenderEnd):
    transport = "ucx"

    def __init__(
        self,
        line: SenderLine,
        clock: Clock,
        peer: str,
        on_closed: Callable[[SenderEnd], object],
        part: "Callable[[SenderLine], None]",
    ) -> None:
        super().__init__(clock, peer, on_closed)
        self._line = line
        self._part = part
        self._start(self._read_controls)

    async def _transmit(self, header: bytes, payload: Vector) -> None:
        await self._line.send_chunk(header, payload)
        while payload.left:
            await asyncio.sleep(0)  # a fast receiver leaves nothing to wait for
            await self._line.send_chunk(b"", payload)

    async def _read_controls(self) -> None:
        while True:
            control = await self._line.control()
            if control.kind is Kind.ACCEPTED:
                self._answered(None)
            elif control.kind is Kind.REFUSED:
                self._answered(framing.refusal(control.text))
            elif control.kind is not Kind.CREDIT:
                raise TransferError(f"{self.peer} closed the connection")

    def _disconnect(self) -> None:
        self._part(self._line)


class UcxTransport(Transport):
    """Raises ConfigError where UCX cannot be used. A loopback `host` keeps UCX on that device; elsewhere UCX chooses
    among all devices, or among those of UCX_NET_DEVICES."""

    name = "ucx"

    def __init__(
        self, clock: Clock, host: str = "127.0.0.1", *, piece_timeout_s: float = PIECE_TIMEOUT_S
    ) -> None:
        # About its TCP: the get rendezvous it would choose is slower than a put, or, where it finds no put as in 1.21,
        # than eager sends; and segments of a chunk's size save a third of the CPU time.
        options = {"RNDV_SCHEME": "put_zcopy", "TCP_TX_SEG_SIZE": "1M", "TCP_RX_SEG_SIZE": "1M"}
        if _is_loopback(host):
            options["NET_DEVICES"] = "lo"
        library = make_library(options)
        self.library = library.name
        self.has_fast_network = not library.lanes <= _SLOW_OR_LOCAL
        self._clock = clock
        self._piece_timeout_s = piece_timeout_s
        self._worker = UcxWorker(library)
        self._listening: asyncio.Task[None] | None = None
        self._receiving: set[asyncio.Task[None]] = set()
        self._parting: set[asyncio.Task[None]] = set()
        self._connections: set[SenderEnd] = set()
        self._is_torn = False  # a piece ended in the middle: chunks of it may still come

    # --- receiving ---

    async def listen(self, sink: PieceSink) -> str:
        self._worker.start()
        self._listening = asyncio.create_task(self._welcome(sink))
        return _format(self._worker.address)

    async def _welcome(self, sink: PieceSink) -> None:
        while True:
            buffer = memoryview(bytearray(MAX_HELLO_BYTES))
            try:
                await self._worker.wait(self._worker.receive(None, buffer, Tag.HELLO.number()))
                address, connection_id = self._read_hello(buffer)
                line = ReceiverLine(self._worker, self._worker.connect(address), connection_id)
            except TransferError as error:
                log.warning("cannot accept a KV connection: %s", error)
                continue
            self._keep(self._receiving, self._receive(line, ReceiverEnd(sink, self.name), _label(address)))

    def _read_hello(self, message: memoryview) -> tuple[bytes, int]:
        framing.check_hello(message)
        connection_id, target, address_bytes = _HELLO.unpack_from(message, framing.HELLO.size)
        end = framing.HELLO.size + _HELLO.size + address_bytes
        checksum = message[end : end + _CHECKSUM.size]
        if checksum != _CHECKSUM.pack(crc32(message[:end])):
            raise TransferError("a hello that is damaged")
        if target != crc32(self._worker.address):
            raise TransferError("a hello for another worker")
        return bytes(message[end - address_bytes : end]), connection_id

    async def _receive(self, line: ReceiverLine, end: ReceiverEnd, peer: str) -> None:
        error = TransferError("this worker closes its transport")
        try:
            while True:
                header, payload = await line.chunk()
                if not header:
                    raise TransferError("a chunk that belongs to no piece")
                try:
                    await self._receive_piece(line, end, PieceHeader.decode(header), payload)
                except BaseException:
                    self._is_torn = True
                    raise
        except TransferError as cause:
            error = cause.with_traceback(None)
        except TimeoutError:
            error = TransferError("the sender stalled")
        except Exception as cause:
            error = TransferError(f"receiving failed: {cause!r}")
            log.exception("receiving KV from %s", peer)
        finally:
            end.abort(error)
            self._part(line)
            log.info("KV connection from %s ended: %s", peer, error)

    async def _receive_piece(
        self, line: ReceiverLine, end: ReceiverEnd, header: PieceHeader, payload: memoryview
    ) -> None:
        async with self._clock.timeout(self._piece_timeout_s):
            target = end.open(header)
            left = header.num_bytes
            if target is None:
                framing.check_skipped_bytes(left)
            while True:
                if len(payload) > left:
                    raise TransferError("a piece that is longer than its header says")
                if target is not None:
                    target.scatter(payload)
                left -= len(payload)
                line.recycle()
                if not left:
                    break
                more, payload = await line.chunk()
                if more:
                    raise TransferError("a piece within a piece")
        refusal = end.close()
        if refusal is None:
            line.tell(Kind.ACCEPTED)
        else:
            line.tell(Kind.REFUSED, refusal.encode()[: framing.MAX_REASON_BYTES])

    # --- sending ---

    async def connect(self, address: str, *, timeout_s: float) -> Connection:
        self._worker.start()
        target, connection_id = _parse(address), new_connection_id()
        line = SenderLine(self._worker, self._worker.connect(target), connection_id)
        try:
            async with self._clock.timeout(timeout_s):
                hello = self._make_hello(connection_id, target)
                await self._worker.wait(self._worker.send(line.endpoint, hello, Tag.HELLO.number()))
                framing.check_hello((await line.control()).text)
        except BaseException as error:
            self._part(line)
            if isinstance(error, TimeoutError):
                raise TransferError(f"{_label(target)} did not answer within {timeout_s:g} s") from None
            raise
        connection = UcxConnection(line, self._clock, _label(target), self._connections.discard, self._part)
        self._connections.add(connection)
        return connection

    def _make_hello(self, connection_id: int, target: bytes) -> memoryview:
        address = self._worker.address
        hello = framing.hello() + _HELLO.pack(connection_id, crc32(target), len(address)) + address
        return memoryview(hello + _CHECKSUM.pack(crc32(hello)))

    # --- the end ---

    def _part(self, line: SenderLine | ReceiverLine) -> None:
        self._keep(self._parting, self._say_and_close(line))

    async def _say_and_close(self, line: SenderLine | ReceiverLine) -> None:
        """A peer does not notice that an endpoint was closed for as long as our worker lives: so it is told."""
        try:
            with suppress(TransferError, TimeoutError):  # gone, or hung
                async with self._clock.timeout(PARTING_S):
                    await self._worker.wait(self._worker.send(line.endpoint, *line.last_message()))
        finally:
            line.close()

    async def aclose(self) -> None:
        tasks = [*self._receiving, *([self._listening] if self._listening else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in tuple(self._connections):
            await connection.aclose()
        await asyncio.gather(*self._parting, return_exceptions=True)
        # Closing a worker, ucxx receives what nobody asked for and waits for it without end: from a sender that died
        # or stopped in the middle of a chunk it never comes. Whoever closes a transport is about to end, so a worker
        # that may have such a chunk is left to the operating system.
        await self._worker.aclose(abandon=self._is_torn)

    def _keep(self, tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _label(address: bytes) -> str:
    """Short enough for a message; an address may be hundreds of characters long."""
    return f"ucx://{crc32(address):08x}"


def _format(address: bytes) -> str:
    return "ucx://" + base64.urlsafe_b64encode(address + _CHECKSUM.pack(crc32(address))).decode()


def _parse(address: str) -> bytes:
    """Checked, because UCX believes whatever it is given."""
    try:
        data = base64.urlsafe_b64decode(address.removeprefix("ucx://"))
    except (binascii.Error, ValueError):
        data = b""
    body, checksum = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
    if not address.startswith("ucx://") or not body or checksum != _CHECKSUM.pack(crc32(body)):
        raise TransferError(f"{address!r} is not an address of the form ucx://...")
    return body
