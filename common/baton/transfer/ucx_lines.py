"""The messages of a UCX connection: chunks one way, control messages the other, matched by tag.

A chunk is sent only when a receive is posted for it (one credit each), so nothing piles up in UCX.

Tags: what it is (8 bit), the connection (40, drawn by the sender), a running number (16).
"""

import asyncio
import enum
import secrets
import struct
from collections import deque
from typing import Any, NamedTuple

from baton.errors import TransferError
from baton.transfer import framing
from baton.transfer.ucx_worker import Operation, UcxWorker
from baton.transfer.vector import Vector

WINDOW = 4  # chunks in flight per connection
CHUNK_BYTES = 2**19  # a copy of it is a tenth of a millisecond of the event loop
PREFIX_BYTES = 512  # of a chunk: two lengths, the piece's header in its first chunk; bytes start aligned
MAX_CONTROL_BYTES = 1024
_LENGTHS = struct.Struct("<II")  # of header, of payload; both zero: the sender closes
_CONTROL = struct.Struct("<BHH")  # kind, credits, length of text


class Tag(enum.IntEnum):
    HELLO = 1
    CHUNK = 2
    CONTROL = 3

    def number(self, connection_id: int = 0, number: int = 0) -> int:
        return self << 56 | connection_id << 16 | number & 0xFFFF


class Kind(enum.IntEnum):
    WELCOME = 1
    CREDIT = 2
    ACCEPTED = 3
    REFUSED = 4
    BYE = 5


class Control(NamedTuple):
    kind: Kind
    credits: int
    text: bytes


def new_connection_id() -> int:
    return secrets.randbits(40)


class SenderLine:
    """Chunks out, through WINDOW staging slots; control messages in, in order."""

    def __init__(self, worker: UcxWorker, endpoint: Any, connection_id: int) -> None:
        self.endpoint = endpoint
        self._worker = worker
        self._connection_id = connection_id
        self._credits = 0
        self._credited = asyncio.Event()
        self._num_chunks = 0
        self._num_controls = 0
        self._slots: list[memoryview] = []
        self._sending: deque[Operation] = deque()  # at most one per slot, oldest first

    async def control(self) -> Control:
        buffer = memoryview(bytearray(MAX_CONTROL_BYTES))
        tag = Tag.CONTROL.number(self._connection_id, self._num_controls)
        self._num_controls += 1
        await self._worker.wait(self._worker.receive(self.endpoint, buffer, tag))
        kind, credits, text_bytes = _CONTROL.unpack_from(buffer)
        if kind not in list(Kind) or text_bytes > MAX_CONTROL_BYTES - _CONTROL.size:
            raise TransferError("a control message that makes no sense")
        self._credits += credits
        if self._credits > WINDOW:
            raise TransferError("more credits than chunks were sent")
        self._credited.set()
        return Control(Kind(kind), credits, bytes(buffer[_CONTROL.size : _CONTROL.size + text_bytes]))

    async def send_chunk(self, header: bytes, payload: Vector) -> None:
        """Takes as much of the payload as fits; what it took is not read any more when this returns."""
        slot = await self._free_slot()
        num_bytes = payload.gather(slot[PREFIX_BYTES:])
        _LENGTHS.pack_into(slot, 0, len(header), num_bytes)
        slot[_LENGTHS.size : _LENGTHS.size + len(header)] = header
        chunk = slot[: PREFIX_BYTES + num_bytes]
        self._sending.append(self._worker.send(self.endpoint, chunk, self._next_chunk_tag()))

    def last_message(self) -> tuple[memoryview, int]:
        """An empty chunk, and its tag."""
        return memoryview(bytes(PREFIX_BYTES)), self._next_chunk_tag()

    def close(self) -> None:
        self._worker.close(self.endpoint)
        self.endpoint = None
        self._sending.clear()

    async def _free_slot(self) -> memoryview:
        while self._credits == 0:
            self._credited.clear()
            await self._credited.wait()
        self._credits -= 1
        if len(self._sending) == WINDOW:
            await self._worker.wait(self._sending[0])
            self._sending.popleft()
        if len(self._slots) < WINDOW:
            self._slots.append(memoryview(bytearray(PREFIX_BYTES + CHUNK_BYTES)))
        return self._slots[self._num_chunks % WINDOW]

    def _next_chunk_tag(self) -> int:
        self._num_chunks += 1
        return Tag.CHUNK.number(self._connection_id, self._num_chunks - 1)


class ReceiverLine:
    """Chunks in, in order, each into a receive that was posted before its credit went out; control messages out."""

    def __init__(self, worker: UcxWorker, endpoint: Any, connection_id: int) -> None:
        self.endpoint = endpoint
        self._worker = worker
        self._connection_id = connection_id
        self._num_posted = 0
        self._num_told = 0
        self._owed = 0  # credits
        self._posted: deque[Operation] = deque()
        for _ in range(WINDOW):
            self._post(memoryview(bytearray(PREFIX_BYTES + CHUNK_BYTES)))
        self.tell(Kind.WELCOME, framing.hello())

    async def chunk(self) -> tuple[memoryview, memoryview]:
        """(header, payload) of the next chunk, valid until `recycle`. Raises TransferError."""
        await asyncio.sleep(0)  # a fast sender leaves nothing to wait for
        slot = self._posted[0].buffer
        await self._worker.wait(self._posted[0])
        header_bytes, payload_bytes = _LENGTHS.unpack_from(slot)
        if header_bytes > framing.MAX_HEADER_BYTES or payload_bytes > CHUNK_BYTES:
            raise TransferError("a chunk with lengths that cannot be")
        if header_bytes == payload_bytes == 0:
            raise TransferError("the sender closed the connection")
        header = slot[_LENGTHS.size : _LENGTHS.size + header_bytes]
        return header, slot[PREFIX_BYTES : PREFIX_BYTES + payload_bytes]

    def recycle(self) -> None:
        self._post(self._posted.popleft().buffer)
        if self._owed >= WINDOW // 2:
            self.tell(Kind.CREDIT)

    def tell(self, kind: Kind, text: bytes = b"") -> None:
        self._worker.send(self.endpoint, *self._control(kind, text))

    def last_message(self) -> tuple[memoryview, int]:
        """A goodbye, and its tag."""
        return self._control(Kind.BYE, b"")

    def close(self) -> None:
        self._worker.close(self.endpoint)
        self.endpoint = None
        self._posted.clear()

    def _control(self, kind: Kind, text: bytes) -> tuple[memoryview, int]:
        message = _CONTROL.pack(kind, self._owed, len(text)) + text
        tag = Tag.CONTROL.number(self._connection_id, self._num_told)
        self._owed = 0
        self._num_told += 1
        return memoryview(message), tag

    def _post(self, slot: memoryview) -> None:
        tag = Tag.CHUNK.number(self._connection_id, self._num_posted)
        self._posted.append(self._worker.receive(self.endpoint, slot, tag))
        self._num_posted += 1
        self._owed += 1
