"""The hand-over of one request's KV, seen from the receiver, who owns the memory. No I/O, no clock: time is passed in.

    RESERVED ---> RECEIVING ---> VERIFIED ---> LIVE
        |             |              |           |
        +-------------+--------------+-----------+---> CANCELLED | EXPIRED | FAILED ---> DRAINING ---> FREE

RESERVED   blocks are taken, the ticket is out, nothing came yet
RECEIVING  at least one piece was opened
VERIFIED   every block of every layer arrived, each piece's digest matched, the last piece gave the first token
LIVE       the sequence runs; its blocks belong to the engine, the hand-over only still refuses late pieces
DRAINING   ended early, but a transport may still write: the blocks belong to nobody else yet
FREE       no byte can be written any more: the blocks may go back to the pool

A piece is refused unless request, epoch, layers, blocks and size fit and it is the first of its kind. `open` and
`close` come in pairs (transfer.base), which is how the hand-over knows whether a write may still land.

A piece that does not match its digest is closed by `reject`: its place is free again and the sender may send the same
piece once more, MAX_SENDS times in all. Nothing of a rejected piece counts, so VERIFIED needs its repeat.
"""

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.errors import TransferError, TransferRefused
from baton.kv.layout import KVLayout
from baton.request import BlockId, RequestId
from baton.transfer.wire import PieceHeader

MAX_SENDS = 3  # of one piece


class State(enum.Enum):
    RESERVED = enum.auto()
    RECEIVING = enum.auto()
    VERIFIED = enum.auto()
    LIVE = enum.auto()
    CANCELLED = enum.auto()
    EXPIRED = enum.auto()
    FAILED = enum.auto()
    DRAINING = enum.auto()
    FREE = enum.auto()


ENDINGS = (State.CANCELLED, State.EXPIRED, State.FAILED)
TRANSITIONS: dict[State, tuple[State, ...]] = {
    State.RESERVED: (State.RECEIVING, *ENDINGS),
    State.RECEIVING: (State.VERIFIED, *ENDINGS),
    State.VERIFIED: (State.LIVE, *ENDINGS),
    State.LIVE: ENDINGS,
    State.CANCELLED: (State.DRAINING,),
    State.EXPIRED: (State.DRAINING,),
    State.FAILED: (State.DRAINING,),
    State.DRAINING: (State.FREE,),
    State.FREE: (),
}


@dataclass(slots=True)
class HandOver:
    """Mutable; touched only by its owner, on one event loop.

    `block_ids` are the destination blocks of the whole prompt; pieces may fill those from index `first_block` on (the
    ones before are held already). Each open or closed piece renews the lease.
    """

    request_id: RequestId
    epoch: int
    layout: KVLayout
    block_ids: Sequence[BlockId]
    first_block: int
    lease_s: float
    lease_end_s: float
    state: State = State.RESERVED
    ending: State | None = None  # which of CANCELLED, EXPIRED, FAILED it was
    reason: str = ""
    first_token: int = -1
    num_bytes: int = 0
    opened_s: float | None = None
    closed_s: float | None = None
    _open: set[int] = field(default_factory=set)  # sequence numbers a transport writes now
    _taken: set[int] = field(default_factory=set)  # opened or done; a second one is a duplicate
    _num_rejected: Counter[int] = field(default_factory=Counter)  # by sequence number
    _num_done: int = 0
    _num_pieces: int = 0  # known from the last piece on
    _filled: dict[int, int] = field(default_factory=dict)  # block index -> bit per layer, claimed by a piece

    # --- pieces ---

    def open(self, header: PieceHeader, now_s: float) -> list[BlockId]:
        """The destination blocks of this piece, in order. Raises TransferRefused."""
        self._check(header)
        self._claim(header)
        if self.state is State.RESERVED:
            self._move(State.RECEIVING)
            self.opened_s = now_s
        self._open.add(header.sequence)
        self._taken.add(header.sequence)
        self.lease_end_s = now_s + self.lease_s
        return list(self.block_ids[header.block_start : header.block_start + header.num_blocks])

    def close(self, header: PieceHeader, error: TransferError | None, now_s: float) -> None:
        """The piece is complete and its digest matched, or `error` says why it never will be."""
        if self._closed_while_draining(header):
            return
        if error is not None:
            self.end(State.FAILED, error.message)
            return
        self.lease_end_s = now_s + self.lease_s
        self.num_bytes += header.num_bytes
        self._num_done += 1
        if header.is_last:
            self._num_pieces = header.num_pieces
            self.first_token = header.first_token
        if self._num_pieces and self._num_done == self._num_pieces:
            self._finish(now_s)

    def reject(self, header: PieceHeader) -> None:
        """All bytes of the piece came and they are not what the header promised. The lease is not renewed."""
        if self._closed_while_draining(header):
            return
        self._num_rejected[header.sequence] += 1
        if self._num_rejected[header.sequence] == MAX_SENDS:
            self.end(State.FAILED, f"piece {header.sequence} did not match its digest {MAX_SENDS} times")
            return
        self._taken.discard(header.sequence)
        self._unclaim(header)

    def _closed_while_draining(self, header: PieceHeader) -> bool:
        self._open.discard(header.sequence)
        if self.state is not State.DRAINING:
            return False
        if not self._open:
            self._move(State.FREE)
        return True

    def _check(self, header: PieceHeader) -> None:
        if self.state not in (State.RESERVED, State.RECEIVING):
            raise TransferRefused(f"the hand-over of {self.request_id} is {self.state.name.lower()}")
        if header.epoch != self.epoch:
            raise TransferRefused(f"piece of epoch {header.epoch}, expected {self.epoch}")
        if header.sequence in self._taken:
            raise TransferRefused(f"piece {header.sequence} came twice")
        if not 0 <= header.layer_start <= header.layer_end <= self.layout.num_layers:
            raise TransferRefused(f"layers {header.layer_start}-{header.layer_end} do not exist here")
        if header.num_blocks and header.block_start < self.first_block:
            raise TransferRefused(f"block {header.block_start} is held already, send from {self.first_block}")
        if header.block_start + header.num_blocks > len(self.block_ids):
            raise TransferRefused(
                f"blocks up to {header.block_start + header.num_blocks} of {len(self.block_ids)} reserved ones"
            )
        expected = header.num_blocks * self.layout.group_bytes(header.layer_start, header.layer_end)
        if header.num_bytes != expected:
            raise TransferRefused(f"piece of {header.num_bytes} bytes, its place holds {expected}")
        if self._num_pieces and (header.is_last or header.sequence >= self._num_pieces):
            raise TransferRefused("a piece after the last one")
        if header.is_last and header.first_token < 0:
            raise TransferRefused("the last piece carries no first token")
        if header.is_last and (
            header.sequence != header.num_pieces - 1 or max(self._taken, default=-1) >= header.num_pieces
        ):
            raise TransferRefused(f"piece {header.sequence} says it is the last of {header.num_pieces}")

    def _claim(self, header: PieceHeader) -> None:
        bits, indices = _place(header)
        if any(self._filled.get(index, 0) & bits for index in indices):
            raise TransferRefused("two pieces claim the same block and layer")
        for index in indices:
            self._filled[index] = self._filled.get(index, 0) | bits

    def _unclaim(self, header: PieceHeader) -> None:
        bits, indices = _place(header)
        for index in indices:
            self._filled[index] &= ~bits
            if not self._filled[index]:
                del self._filled[index]

    def _finish(self, now_s: float) -> None:
        everything = (1 << self.layout.num_layers) - 1
        missing = [
            i for i in range(self.first_block, len(self.block_ids)) if self._filled.get(i) != everything
        ]
        if missing:
            self.end(State.FAILED, f"all pieces came, but {len(missing)} blocks are incomplete")
            return
        self.closed_s = now_s
        self._move(State.VERIFIED)

    # --- the other edges ---

    def go_live(self) -> None:
        self._move(State.LIVE)

    def end(self, ending: State, reason: str) -> None:
        """Cancel, expire or fail; idempotent: the first ending is the one that counts."""
        if self.ending is not None:
            return
        self._move(ending)
        self.ending, self.reason = ending, reason
        self._move(State.DRAINING)
        if not self._open:
            self._move(State.FREE)

    def expire(self, now_s: float) -> bool:
        """True when the lease had ended; then the hand-over is EXPIRED."""
        if self.state not in (State.RESERVED, State.RECEIVING) or now_s < self.lease_end_s:
            return False
        self.end(State.EXPIRED, f"no progress for {self.lease_s:g} s")
        return True

    @property
    def num_mismatches(self) -> int:
        return self._num_rejected.total()

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_blocks_received(self) -> int:
        return len(self._filled)

    def _move(self, to: State) -> None:
        assert to in TRANSITIONS[self.state], f"{self.state} -> {to}"
        self.state = to


def _place(header: PieceHeader) -> tuple[int, range]:
    """A bit per layer, and the indices of the blocks."""
    bits = (1 << header.layer_end) - (1 << header.layer_start)
    return bits, range(header.block_start, header.block_start + header.num_blocks)
