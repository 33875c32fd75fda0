"""The sending end of the hand-over: blocks leave while the rest of the prompt is still being computed.

A `Push` is told how far the prompt is computed; it cuts what is complete and not yet sent into pieces and keeps several
in flight. The source blocks stay where they are until `run` ended: the engine may give them back only then.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.clock import Clock
from baton.errors import TransferError, TransferRefused
from baton.events import Emit
from baton.kv.block import num_blocks_for
from baton.kv.layout import BlockStorage
from baton.messages import Ticket
from baton.request import BlockId
from baton.transfer.base import MAX_IN_FLIGHT, Connection, Transport
from baton.transfer.digest import piece_digest
from baton.transfer.wire import PieceHeader


class Connections:
    """One connection per receiver, made on first use and again after it broke."""

    def __init__(self, transport: Transport, timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._open: dict[str, Connection] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def get(self, address: str) -> Connection:
        async with self._locks.setdefault(address, asyncio.Lock()):
            connection = self._open.get(address)
            if connection is None or connection.closed:
                connection = await self._transport.connect(address, timeout_s=self._timeout_s)
                self._open[address] = connection
            return connection


@dataclass(frozen=True, slots=True)
class PushResult:
    num_blocks: int
    num_bytes: int
    num_pieces: int
    seconds: float


class Push:
    """Mutable progress of one hand-over. `computed`, `finish` and `run` belong to one event loop."""

    def __init__(
        self,
        ticket: Ticket,
        num_prompt_tokens: int,
        storage: BlockStorage,
        clock: Clock,
        emit: Emit,
        *,
        piece_bytes: int,
        timeout_s: float,
    ) -> None:
        self._ticket = ticket
        self._storage = storage
        self._clock = clock
        self._emit = emit
        self._timeout_s = timeout_s
        block_size = storage.layout.block_size
        self._blocks_per_piece = max(1, piece_bytes // max(1, storage.layout.block_bytes))
        self._first_block = ticket.num_cached_tokens // block_size
        self._num_blocks = num_blocks_for(num_prompt_tokens, block_size)
        self._num_sent = self._first_block  # index of the first block not yet cut into a piece
        self._num_complete = self._first_block  # blocks below this index will not be written again
        self._block_table: Sequence[BlockId] = ()
        self._first_token: int | None = None
        self._changed = asyncio.Event()

    def computed(self, num_tokens: int, block_table: Sequence[BlockId]) -> None:
        """KV of the first num_tokens prompt tokens is in these blocks. Only full ones are immutable, so only they go."""
        self._num_complete = max(self._num_complete, num_tokens // self._storage.layout.block_size)
        self._block_table = tuple(block_table)
        self._changed.set()

    def finish(self, first_token: int, block_table: Sequence[BlockId]) -> None:
        """The whole prompt is computed; a partial last block may go now."""
        self._num_complete = self._num_blocks
        self._first_token = first_token
        self._block_table = tuple(block_table)
        self._changed.set()

    async def run(self, connections: Connections) -> PushResult:
        """Returns when the receiver acknowledged everything. Raises TransferError; cancelling it is safe: when it has
        returned or raised, no transport reads the source blocks any more."""
        started_s = self._clock.now()
        connection = await connections.get(self._ticket.address)
        in_flight = asyncio.Semaphore(MAX_IN_FLIGHT)
        sequence = 0
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await in_flight.acquire()
                    header = await self._next_piece(sequence)
                    tasks.create_task(self._send(connection, header, in_flight))
                    sequence += 1
                    if header.is_last:
                        break
        except BaseExceptionGroup as group:
            raise _first_cause(group) from None
        num_blocks = self._num_blocks - self._first_block
        return PushResult(
            num_blocks, num_blocks * self._storage.layout.block_bytes, sequence, self._clock.now() - started_s
        )

    async def _next_piece(self, sequence: int) -> PieceHeader:
        """Wait until there is something to send and cut it: full pieces early, whatever is left at the end."""
        while self._first_token is None and self._num_complete <= self._num_sent:
            self._changed.clear()
            await self._changed.wait()
        start = self._num_sent
        self._num_sent = min(self._num_complete, start + self._blocks_per_piece)
        last = self._first_token is not None and self._num_sent == self._num_blocks
        layout = self._storage.layout
        return PieceHeader(
            request_id=self._ticket.request_id,
            epoch=self._ticket.epoch,
            sequence=sequence,
            layer_start=0,
            layer_end=layout.num_layers,
            block_start=start,
            num_blocks=self._num_sent - start,
            num_bytes=(self._num_sent - start) * layout.block_bytes,
            num_pieces=sequence + 1 if last else 0,
            first_token=self._first_token if last and self._first_token is not None else -1,
        )

    async def _send(self, connection: Connection, header: PieceHeader, in_flight: asyncio.Semaphore) -> None:
        block_ids = self._block_table[header.block_start : header.block_start + header.num_blocks]
        payload = [self._storage.region(b, header.layer_start, header.layer_end) for b in block_ids]
        header = replace(header, digest=piece_digest(header, payload))
        try:
            await connection.push(header, payload, timeout_s=self._timeout_s)
        finally:
            in_flight.release()


def _first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Pieces fail together; the first refusal or error tells most."""
    leaves = [error for error in _leaves(group) if not isinstance(error, asyncio.CancelledError)]
    for kind in (TransferRefused, TransferError):
        for error in leaves:
            if isinstance(error, kind):
                return error
    return leaves[0]


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
