"""The sending end of the hand-over: blocks leave while the rest of the prompt is still being computed.

A `Push` is told how far the prompt is computed, layer group by layer group; it sends what will not be written again in
pieces (`outgoing` cuts them) and keeps several in flight. While there is nothing to send, a piece without tokens goes
out now and then: it renews the receiver's lease, and its acknowledgement says that the receiver is there. The source
blocks stay where they are until `run` ended: the engine may give them back only then.
"""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace

from baton.clock import Clock
from baton.config import TransferConfig
from baton.errors import TransferError, TransferRefused
from baton.events import Emit, about
from baton.handover.busy import BusyTime
from baton.handover.outgoing import Outgoing, Span
from baton.kv.layout import Storage
from baton.messages import Ticket
from baton.request import BlockId, Request
from baton.transfer import adapt, wire
from baton.transfer.base import MAX_IN_FLIGHT, Connection, Transport
from baton.transfer.digest import Digester, is_mismatch
from baton.transfer.handshake import wire_version
from baton.transfer.report import Outcome, TransferReport
from baton.transfer.session import Sending
from baton.transfer.wire import PieceHeader

HEARTBEAT = 1 / 3  # of the lease: the longest silence of a sender


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


class Push:
    """Progress of one hand-over. All methods belong to one event loop."""

    def __init__(
        self,
        ticket: Ticket,
        request: Request,
        storage: Storage,
        identity: str,
        clock: Clock,
        emit: Emit,
        config: TransferConfig,
    ) -> None:
        """`identity` names the model in digests, on both sides the same. Raises TransferError when the receiver
        reads no wire version that this worker writes."""
        self.num_bytes = 0  # that were acknowledged
        self.num_pieces = 0  # likewise
        self.wire = BusyTime(clock)
        self.transport = ""  # known once there is a connection
        self.sending = Sending()
        self.ticket = ticket
        self._about = about(request)
        self._wire_version = wire_version(wire.VERSIONS, ticket.compatibility.wire_versions)
        self._num_tokens = request.num_prompt_tokens
        self._storage = storage
        self._clock = clock
        self._emit = emit
        self._timeout_s = config.push_timeout_s
        self._digester = Digester(identity, request.prompt_token_ids)
        self._outgoing = Outgoing(
            storage.layout,
            ticket.num_cached_tokens,
            self._num_tokens,
            config.piece_bytes,
            config.min_piece_bytes,
        )
        self._block_table: Sequence[BlockId] = ()
        self._is_whole = False  # nothing more will be computed
        self._first_token = -1  # none: a prefix has none
        self._changed = asyncio.Event()
        self._heard_s = clock.now()  # the receiver, for the last time
        self._first_piece_s: float | None = None
        self._computed_s: float | None = None  # when the prompt's last step ended
        self._ended_s: float | None = None

    def computed(
        self, num_tokens: int, block_table: Sequence[BlockId], num_layers: int | None = None
    ) -> None:
        """KV of the first num_tokens prompt tokens, in the layers below num_layers (all of them without it), is in
        these blocks."""
        all_layers = self._storage.layout.num_layers
        self._outgoing.written(num_tokens, all_layers if num_layers is None else num_layers)
        self._block_table = tuple(block_table)
        self._changed.set()

    def finish(
        self, block_table: Sequence[BlockId], first_token: int = -1, computed_s: float | None = None
    ) -> None:
        """All of it is computed, since `computed_s` where not just now. `first_token` where it is a whole prompt and no
        prefix."""
        self._is_whole, self._first_token = True, first_token
        self._computed_s = self._clock.now() if computed_s is None else computed_s
        self.computed(self._num_tokens, block_table)

    @property
    def lease_left_s(self) -> float:
        """Until the receiver has been silent for as long as its lease. It, or `run`, gives up around then."""
        return self.ticket.lease_s - (self._clock.now() - self._heard_s)

    async def run(self, connections: Connections) -> None:
        """Returns when the receiver acknowledged everything. Raises TransferError; cancelling it is safe: when it has
        returned or raised, no transport reads the source blocks any more."""
        try:
            connection = await connections.get(self.ticket.address)
            self.transport = connection.transport
            in_flight = asyncio.Semaphore(MAX_IN_FLIGHT)
            async with asyncio.TaskGroup() as tasks:
                is_last = False
                while not is_last:
                    await in_flight.acquire()
                    header = await self._next_piece()
                    is_last = header.is_last
                    tasks.create_task(self._send(connection, header, in_flight))
                    await asyncio.sleep(0)  # a turn of the loop for each piece's digest
        except BaseExceptionGroup as group:
            raise _first_cause(group) from None
        except TransferError as error:
            self.sending.end(error.message)
            raise
        finally:
            self._ended_s = self._clock.now()
            self.sending.end("the push was cancelled")

    def report(self, outcome: Outcome) -> TransferReport:
        """Of a push that has ended."""
        ended_s = self._clock.now() if self._ended_s is None else self._ended_s
        seconds = 0.0 if self._first_piece_s is None else ended_s - self._first_piece_s
        exposed_s = None
        if outcome == "ok" and self._computed_s is not None:
            exposed_s = ended_s - self._computed_s
        return TransferReport(
            "sent", outcome, seconds, self.num_bytes, self.sending.num_mismatches, exposed_s,
            self.transport, self.ticket.worker_id, self.num_pieces, self.wire.seconds,
        )  # fmt: skip

    async def _next_piece(self) -> PieceHeader:
        """Wait until there is something to send, or to say, and cut it: the last piece may have no tokens at all."""
        while not self._outgoing.has_ready and not self._is_whole:
            self._changed.clear()
            try:
                async with self._clock.timeout(self.ticket.lease_s * HEARTBEAT):
                    await self._changed.wait()
            except TimeoutError:
                return self._header(Span(self._num_tokens, self._num_tokens, 0, 0), is_last=False)
        if self._first_piece_s is None:
            self._first_piece_s = self._clock.now()
        layout = self._storage.layout
        span = self._outgoing.take() or Span(self._num_tokens, self._num_tokens, 0, layout.num_layers)
        return self._header(span, is_last=self._is_whole and not self._outgoing.has_ready)

    def _header(self, span: Span, *, is_last: bool) -> PieceHeader:
        layout = self._storage.layout
        sequence = self.sending.depart(last=is_last)
        header = PieceHeader(
            request_id=self.ticket.request_id,
            epoch=self.ticket.epoch,
            sequence=sequence,
            layer_start=span.layer_start,
            layer_end=span.layer_end,
            token_start=span.token_start,
            token_end=span.token_end,
            num_bytes=0,
            num_pieces=sequence + 1 if is_last else 0,
            first_token=self._first_token if is_last else -1,
            head_start=layout.heads[0],
            head_end=layout.heads[1],
            run_tokens=layout.block_size,
            dtype=layout.dtype,
            shard=layout.shard,
            num_shards=layout.num_shards,
            version=self._wire_version,
        )
        return replace(header, num_bytes=adapt.payload_bytes(layout, header))

    async def _send(self, connection: Connection, header: PieceHeader, in_flight: asyncio.Semaphore) -> None:
        failure: str | None = "the push was cancelled"
        try:
            payload = adapt.payload(self._storage, self._block_table, header)
            # Once, from the source: a repeat must carry what was meant the first time.
            digest = self._digester.digest(header, self._storage.layout, payload)
            await self._send_until_intact(connection, replace(header, digest=digest), payload)
            self.num_bytes += header.num_bytes
            self.num_pieces += 1
            self._heard_s = self._clock.now()
            failure = None
        except TransferError as error:
            failure = error.message
            raise
        finally:
            self.sending.settle(failure)
            in_flight.release()

    async def _send_until_intact(
        self, connection: Connection, header: PieceHeader, payload: Sequence[memoryview]
    ) -> None:
        for num_sent in itertools.count(1):
            try:
                with self.wire:
                    await connection.push(header, payload, timeout_s=self._timeout_s)
                return
            except TransferRefused as refusal:
                if not is_mismatch(refusal):
                    raise
                again = self.sending.mismatch(num_sent)
                self._emit(
                    "piece.mismatch", **self._about, piece=header.sequence, bytes=header.num_bytes,
                    to=self.ticket.worker_id, transport=self.ticket.transport, address=self.ticket.address,
                    again=again,
                )  # fmt: skip
                if not again:
                    raise


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
