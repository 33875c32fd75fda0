"""The hand-over of one request's KV, seen from the receiver, who owns the memory. No I/O, no clock: time is passed in.

    RESERVED ---> RECEIVING ---> VERIFIED ---> LIVE
        |             |              |           |
        +-------------+--------------+-----------+---> CANCELLED | EXPIRED | FAILED ---> DRAINING ---> FREE

RESERVED   blocks are taken, the ticket is out, nothing came yet
RECEIVING  at least one piece was opened
VERIFIED   all tokens of all layers and heads arrived, each piece's digest matched, every shard's last piece is there
LIVE       the sequence runs; its blocks belong to the engine, the hand-over only still refuses late pieces
DRAINING   ended early, but a transport may still write: the blocks belong to nobody else yet
FREE       no byte can be written any more: the blocks may go back to the pool, or be computed here instead

A piece is refused unless request, epoch, tokens, layers, heads and size fit and it is the first of its kind. `open`
and `close` come in pairs (transfer.base), which is how the hand-over knows whether a write may still land.

A prefix is handed over without a first token: whoever receives it computes what follows.

A piece that does not match its digest is closed by `reject`: its place is free again and the sender may send the same
piece once more, MAX_SENDS times in all. Nothing of a rejected piece counts, so VERIFIED needs its repeat.

`Sending` below is the other side: when the sender may give its source blocks back.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.errors import TransferError, TransferRefused
from baton.kv.layout import KVLayout
from baton.request import BlockId, RequestId
from baton.transfer.coverage import Coverage
from baton.transfer.tally import Piece, Tally, name_of
from baton.transfer.wire import ELEMENT_BYTES, Box, PieceHeader

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

    `block_ids` are the destination blocks of the whole prompt of `num_tokens`; pieces may fill the tokens from
    `first_token_to_send` on (the ones before are held already). Each open or closed piece renews the lease, one
    without tokens, too: that is how a sender who has nothing to send yet says that it is there.
    """

    request_id: RequestId
    epoch: int
    layout: KVLayout
    block_ids: Sequence[BlockId]
    num_tokens: int
    first_token_to_send: int
    lease_s: float
    lease_end_s: float
    is_prefix: bool = False  # no first token comes with it
    state: State = State.RESERVED
    ending: State | None = None  # which of CANCELLED, EXPIRED, FAILED it was
    reason: str = ""
    num_bytes: int = 0
    opened_s: float | None = None
    closed_s: float | None = None
    _open: dict[Piece, Box] = field(default_factory=dict)  # a transport writes them now
    _tally: Tally = field(init=False)
    _coverage: Coverage = field(init=False)  # by closed pieces

    def __post_init__(self) -> None:
        layers = (0, self.layout.num_layers)
        wanted = Box(self.first_token_to_send, self.num_tokens, *layers, *self.layout.heads)
        self._coverage = Coverage(wanted)
        self._tally = Tally(is_prefix=self.is_prefix)

    # --- pieces ---

    def open(self, header: PieceHeader, now_s: float) -> None:
        """From here until it is closed its place in the blocks belongs to a transport. Raises TransferRefused."""
        self._check(header)
        if self.state is State.RESERVED:
            self._move(State.RECEIVING)
        if self.opened_s is None and (header.num_tokens or header.is_last):
            self.opened_s = now_s
        self._open[name_of(header)] = header.box
        self.lease_end_s = now_s + self.lease_s

    def close(self, header: PieceHeader, error: TransferError | None, now_s: float) -> None:
        """The piece is complete and its digest matched, or `error` says why it never will be."""
        box = self._open.pop(name_of(header))
        if self._drained():
            return
        if error is not None:
            self.end(State.FAILED, error.message)
            return
        self.lease_end_s = now_s + self.lease_s
        self.num_bytes += header.num_bytes
        self._tally.add(header)
        self._coverage.add(box)
        if self._tally.is_complete:
            self._finish(now_s)

    def reject(self, header: PieceHeader) -> None:
        """All bytes of the piece came and they are not what the header promised. The lease is not renewed."""
        del self._open[name_of(header)]
        self._tally.num_rejected[name_of(header)] += 1
        if self._drained():
            return
        if self._tally.num_rejected[name_of(header)] == MAX_SENDS:
            self.end(State.FAILED, f"piece {header.sequence} did not match its digest {MAX_SENDS} times")

    def _drained(self) -> bool:
        """True when the hand-over has ended before."""
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
        self._tally.check(header, self._open)
        self._check_place(header)

    def _check_place(self, header: PieceHeader) -> None:
        box, wanted = header.box, self._coverage.wanted
        if not all(start <= end for start, end in zip(box[::2], box[1::2], strict=True)):
            raise TransferRefused("a piece that ends before it begins")
        if not 0 <= box.layer_start <= box.layer_end <= wanted.layer_end:
            raise TransferRefused(f"layers {box.layer_start}-{box.layer_end} do not exist here")
        if not wanted.head_start <= box.head_start <= box.head_end <= wanted.head_end:
            raise TransferRefused(f"KV heads {box.head_start}-{box.head_end} are not held here")
        if header.num_tokens and box.token_start < wanted.token_start:
            raise TransferRefused(f"token {box.token_start} is held already, send from {wanted.token_start}")
        if box.token_end > self.num_tokens:
            raise TransferRefused(f"tokens up to {box.token_end} of a prompt of {self.num_tokens}")
        token_bytes = self.layout.token_bytes(*box[2:], ELEMENT_BYTES[header.dtype])
        if header.num_bytes != header.num_tokens * token_bytes:
            raise TransferRefused(
                f"piece of {header.num_bytes} bytes, its place holds {header.num_tokens * token_bytes}"
            )
        if any(map(box.overlaps, self._open.values())) or self._coverage.overlaps(box):
            raise TransferRefused("two pieces claim the same tokens, layers and heads")

    def _finish(self, now_s: float) -> None:
        if not self._coverage.is_complete:
            self.end(State.FAILED, f"all pieces came, but only {self.share:.1%} of the KV")
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
    def first_token(self) -> int:
        """-1 while no last piece came, and of a prefix."""
        return self._tally.first_token

    @property
    def num_mismatches(self) -> int:
        return self._tally.num_rejected.total()

    @property
    def num_pieces(self) -> int:
        """That matched their digest."""
        return len(self._tally.done)

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def share(self) -> float:
        """Of what is to be sent, verified; 1.0 when nothing is to be sent."""
        return self._coverage.share

    def _move(self, to: State) -> None:
        assert to in TRANSITIONS[self.state], f"{self.state} -> {to}"
        self.state = to


class Departure(enum.Enum):
    """States of `Sending`."""

    OPEN = enum.auto()  # pieces leave, more will come
    COMPLETE = enum.auto()  # the last piece left, some are not acknowledged
    ENDED = enum.auto()  # failed or cancelled, but a transport may still read a piece
    RELEASED = enum.auto()  # nobody reads the source blocks any more: they may go back


@dataclass(slots=True)
class Sending:
    """The hand-over seen from the sender, who owns the source blocks.

    OPEN --last piece leaves--> COMPLETE --all acknowledged--> RELEASED (succeeded)
     |                             |
     +------- end(reason) ---------+--> ENDED --no piece in flight--> RELEASED
    """

    state: Departure = Departure.OPEN
    succeeded: bool = False
    reason: str = ""  # why it ended early; the first one counts
    num_left: int = 0  # pieces that left, repeats not counted
    num_in_flight: int = 0
    num_mismatches: int = 0

    def depart(self, *, last: bool) -> int:
        """A piece leaves; returns its sequence number."""
        assert self.state is Departure.OPEN
        self.num_left += 1
        self.num_in_flight += 1
        if last:
            self.state = Departure.COMPLETE
        return self.num_left - 1

    def mismatch(self, num_sent: int) -> bool:
        """The receiver got something else. True: send the piece again."""
        self.num_mismatches += 1
        return num_sent < MAX_SENDS and self.state in (Departure.OPEN, Departure.COMPLETE)

    def settle(self, failure: str | None = None) -> None:
        """A piece is acknowledged, or (`failure`) given up; no transport reads it any more."""
        assert self.num_in_flight > 0
        self.num_in_flight -= 1
        if failure is not None:
            self.end(failure)
        self._release()

    def end(self, reason: str) -> None:
        """Failed, cancelled, expired: nothing leaves any more. Idempotent."""
        if self.state in (Departure.OPEN, Departure.COMPLETE):
            self.state, self.reason = Departure.ENDED, reason
            self._release()

    def _release(self) -> None:
        if self.num_in_flight or self.state in (Departure.OPEN, Departure.RELEASED):
            return
        self.succeeded = self.state is Departure.COMPLETE
        self.state = Departure.RELEASED
