"""The receiving end of the hand-over: which pieces may land where, and when a request has all it needs.

`Receiver` is the worker's `PieceSink`. It owns the table of hand-overs; nobody else touches them. A decode service
expects a hand-over, waits for it, and ends it; blocks go back to the pool only after `wait_free`.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from baton.clock import Clock
from baton.errors import TransferError, TransferRefused
from baton.events import Emit
from baton.kv.layout import BlockStorage
from baton.messages import Holder, Purpose
from baton.request import BlockId, RequestId
from baton.transfer.digest import mismatch, piece_digest
from baton.transfer.report import OnTransfer, Outcome, TransferReport, ignore
from baton.transfer.session import HandOver, State
from baton.transfer.wire import PieceHeader

_OUTCOMES: dict[State, Outcome] = {
    State.CANCELLED: "cancelled",
    State.EXPIRED: "expired",
    State.FAILED: "failed",
}


@dataclass(slots=True)
class _Expected:
    hand_over: HandOver
    buffers: dict[int, list[memoryview]] = field(default_factory=dict)  # open piece -> where it is written
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Receiver:
    def __init__(
        self, storage: BlockStorage, clock: Clock, emit: Emit, on_transfer: OnTransfer = ignore
    ) -> None:
        """`on_transfer` hears of every hand-over that got at least one piece, once it has ended."""
        self._storage = storage
        self._clock = clock
        self._emit = emit
        self._on_transfer = on_transfer
        self._expected: dict[RequestId, _Expected] = {}
        self.num_pieces_refused = 0
        self.num_digest_mismatches = 0

    # --- the decode service's side ---

    def expect(
        self,
        request_id: RequestId,
        epoch: int,
        block_ids: Sequence[BlockId],
        first_block: int,
        lease_s: float,
    ) -> None:
        assert request_id not in self._expected
        hand_over = HandOver(
            request_id=request_id,
            epoch=epoch,
            layout=self._storage.layout,
            block_ids=tuple(block_ids),
            first_block=first_block,
            lease_s=lease_s,
            lease_end_s=self._clock.now() + lease_s,
        )
        self._expected[request_id] = _Expected(hand_over)

    async def wait_verified(self, request_id: RequestId) -> HandOver:
        """Raises TransferError when the hand-over failed or its lease ended."""
        expected = self._expected[request_id]
        hand_over = expected.hand_over
        while hand_over.state in (State.RESERVED, State.RECEIVING):
            expected.changed.clear()
            try:
                async with self._clock.timeout(max(0.0, hand_over.lease_end_s - self._clock.now())):
                    await expected.changed.wait()
            except TimeoutError:
                hand_over.expire(self._clock.now())
        if hand_over.state is not State.VERIFIED:
            raise TransferError(f"the KV of {request_id} did not arrive: {hand_over.reason}")
        return hand_over

    def go_live(self, request_id: RequestId) -> None:
        """From here on the engine owns the blocks; late pieces find nothing and are refused."""
        hand_over = self._expected.pop(request_id).hand_over
        hand_over.go_live()
        self._report(hand_over, "ok")

    async def end(self, request_id: RequestId, reason: str) -> None:
        """Cancel what is under way and wait until no byte can be written any more. Idempotent."""
        expected = self._expected.get(request_id)
        if expected is None:
            return
        expected.hand_over.end(State.CANCELLED, reason)
        while expected.hand_over.state is not State.FREE:
            expected.changed.clear()
            await expected.changed.wait()  # ends: a transport closes every piece it opened, stalled ones too
        if self._expected.get(request_id) is expected:
            del self._expected[request_id]
            self._report(expected.hand_over, _OUTCOMES[expected.hand_over.ending or State.FAILED])

    def _report(self, hand_over: HandOver, outcome: Outcome) -> None:
        if hand_over.opened_s is not None:
            ended_s = self._clock.now() if hand_over.closed_s is None else hand_over.closed_s
            self._on_transfer(
                TransferReport(
                    "received",
                    outcome,
                    ended_s - hand_over.opened_s,
                    hand_over.num_bytes,
                    hand_over.num_mismatches,
                )
            )

    def explain(self, holder: Holder) -> Holder:
        """For the block ledger: what is known of the hand-over into these blocks."""
        expected = self._expected.get(holder.request_id)
        if expected is None:
            return holder
        hand_over = expected.hand_over
        if hand_over.ending is not None:
            note = (
                f"{hand_over.ending.name.lower()}: {hand_over.reason}; {hand_over.num_open} pieces still open"
            )
            return replace(holder, purpose=Purpose.DRAINING, epoch=hand_over.epoch, note=note)
        wanted = len(hand_over.block_ids) - hand_over.first_block
        return replace(
            holder,
            epoch=hand_over.epoch,
            lease_left_s=hand_over.lease_end_s - self._clock.now(),
            note=f"{hand_over.num_blocks_received} of {wanted} blocks have begun to arrive",
        )

    @property
    def num_expected(self) -> int:
        return len(self._expected)

    # --- the transport's side (PieceSink) ---

    def open(self, header: PieceHeader) -> Sequence[memoryview]:
        expected = self._expected.get(header.request_id)
        try:
            if expected is None:
                raise TransferRefused(f"nobody expects KV for {header.request_id}")
            block_ids = expected.hand_over.open(header, self._clock.now())
        except TransferRefused as refusal:
            self.num_pieces_refused += 1
            self._emit("piece.refused", request=header.request_id, piece=header.sequence, why=refusal.message)
            raise
        buffers = [self._storage.region(b, header.layer_start, header.layer_end) for b in block_ids]
        expected.buffers[header.sequence] = buffers
        expected.changed.set()
        return buffers

    def close(self, header: PieceHeader, error: TransferError | None) -> None:
        expected = self._expected[header.request_id]  # stays until FREE, so it is there for every open piece
        buffers = expected.buffers.pop(header.sequence)
        corrupt = error is None and piece_digest(header, buffers) != header.digest
        expected.changed.set()
        if not corrupt:
            expected.hand_over.close(header, error, self._clock.now())
            return
        self.num_digest_mismatches += 1
        self._emit("piece.corrupt", request=header.request_id, piece=header.sequence, bytes=header.num_bytes)
        expected.hand_over.reject(header)
        raise mismatch(header)
