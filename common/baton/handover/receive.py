"""The receiving end of the hand-over: which pieces may land where, and when a request has all it needs.

A piece whose bytes lie as this pool's do is written where it belongs at once; any other one goes into memory of its
own and is converted once its digest matched (transfer.adapt). Either way it counts for nothing before that.

`Receiver` is the worker's `PieceSink`. It owns the table of hand-overs; nobody else touches them. Whoever reserved the
blocks (a decode service, or `fetch`) expects a hand-over, waits for it, and ends it; they go back only after `end`.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from baton.clock import Clock
from baton.errors import TransferError, TransferRefused
from baton.events import Emit, about
from baton.kv.layout import Storage
from baton.messages import Holder, Purpose
from baton.request import BlockId, Request, RequestId
from baton.transfer import adapt
from baton.transfer.digest import Digester, mismatch
from baton.transfer.report import OnTransfer, Outcome, TransferReport, ignore
from baton.transfer.session import HandOver, State
from baton.transfer.tally import Piece, name_of
from baton.transfer.wire import PieceHeader

_OUTCOMES: dict[State, Outcome] = {
    State.CANCELLED: "cancelled",
    State.EXPIRED: "expired",
    State.FAILED: "failed",
}


@dataclass(slots=True)
class _Expected:
    hand_over: HandOver
    digester: Digester
    peer: str  # who sends
    about: dict[str, str]  # fields of the request's events
    transport: str = ""  # that carries it: of the latest piece
    landings: dict[Piece, adapt.Landing] = field(default_factory=dict)  # of the open pieces
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Receiver:
    def __init__(
        self, storage: Storage, identity: str, clock: Clock, emit: Emit, on_transfer: OnTransfer = ignore
    ) -> None:
        """`identity` names the model in digests, on both sides the same. `on_transfer` hears of every hand-over
        once it has ended."""
        self._storage = storage
        self._identity = identity
        self._clock = clock
        self._emit = emit
        self._on_transfer = on_transfer
        self._expected: dict[RequestId, _Expected] = {}
        self.num_pieces_refused = 0
        self.num_digest_mismatches = 0

    # --- the side of whoever reserved the blocks ---

    def expect(
        self,
        request: Request,
        epoch: int,
        block_ids: Sequence[BlockId],
        num_cached_tokens: int,
        lease_s: float,
        peer: str = "",
        *,
        is_prefix: bool = False,
    ) -> None:
        """Tokens from num_cached_tokens on, into the blocks of the whole prompt; `peer` is to send them, and the first
        generated token with them unless the prompt `is_prefix` of another one."""
        assert request.request_id not in self._expected
        hand_over = HandOver(
            request_id=request.request_id,
            epoch=epoch,
            layout=self._storage.layout,
            block_ids=tuple(block_ids),
            num_tokens=request.num_prompt_tokens,
            first_token_to_send=num_cached_tokens,
            lease_s=lease_s,
            lease_end_s=self._clock.now() + lease_s,
            is_prefix=is_prefix,
        )
        digester = Digester(self._identity, request.prompt_token_ids)
        self._expected[request.request_id] = _Expected(hand_over, digester, peer, about(request))

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
        expected = self._expected.pop(request_id)
        expected.hand_over.go_live()
        self._report(expected, "ok")

    def fail(self, request_id: RequestId, reason: str) -> None:
        """Somebody else knows that the rest will not come: `wait_verified` raises. Does nothing when all is there."""
        expected = self._expected.get(request_id)
        if expected is not None and expected.hand_over.state in (State.RESERVED, State.RECEIVING):
            expected.hand_over.end(State.FAILED, reason)
            expected.changed.set()

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
            self._forget(expected)

    def end_if_idle(self, request_id: RequestId, reason: str) -> bool:
        """True: it has ended, or was never expected, and nothing is written. False: use `end`."""
        expected = self._expected.get(request_id)
        if expected is None:
            return True
        expected.hand_over.end(State.CANCELLED, reason)
        if expected.hand_over.state is not State.FREE:
            return False
        self._forget(expected)
        return True

    def num_mismatches(self, request_id: RequestId) -> int:
        """Pieces so far that did not match their digest."""
        expected = self._expected.get(request_id)
        return 0 if expected is None else expected.hand_over.num_mismatches

    def _forget(self, expected: _Expected) -> None:
        hand_over = expected.hand_over
        del self._expected[hand_over.request_id]
        self._report(expected, _OUTCOMES[hand_over.ending or State.FAILED])

    def _report(self, expected: _Expected, outcome: Outcome) -> None:
        hand_over = expected.hand_over
        ended_s = self._clock.now() if hand_over.closed_s is None else hand_over.closed_s
        seconds = 0.0 if hand_over.opened_s is None else ended_s - hand_over.opened_s
        self._on_transfer(
            TransferReport(
                "received",
                outcome,
                seconds,
                hand_over.num_bytes,
                hand_over.num_mismatches,
                transport=expected.transport,
                peer=expected.peer,
                num_pieces=hand_over.num_pieces,
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
                f"KV from {expected.peer or 'somebody'} {hand_over.ending.name.lower()}: {hand_over.reason}; "
                f"{hand_over.num_open} pieces still open"
            )
            return replace(holder, purpose=Purpose.DRAINING, epoch=hand_over.epoch, note=note)
        over = f" over {expected.transport}" if expected.transport else ""
        return replace(
            holder,
            epoch=hand_over.epoch,
            lease_left_s=hand_over.lease_end_s - self._clock.now(),
            note=f"{hand_over.share:.0%} of the KV from {expected.peer or 'somebody'} has arrived{over}",
        )

    @property
    def num_expected(self) -> int:
        return len(self._expected)

    # --- the transport's side (PieceSink) ---

    def open(self, header: PieceHeader, transport: str = "") -> Sequence[memoryview]:
        expected = self._expected.get(header.request_id)
        try:
            if expected is None:
                raise TransferRefused(f"nobody expects KV for {header.request_id}")
            if not adapt.can_convert(header.dtype, self._storage.layout.dtype):
                raise TransferRefused(f"{header.dtype} cannot become {self._storage.layout.dtype}")
            expected.hand_over.open(header, self._clock.now())
        except TransferRefused as refusal:
            self.num_pieces_refused += 1
            known = {"request": header.request_id} if expected is None else expected.about
            self._emit("piece.refused", **known, piece=header.sequence, why=refusal.message)
            raise
        landing = adapt.landing(self._storage, expected.hand_over.block_ids, header)
        expected.landings[name_of(header)] = landing
        expected.transport = transport
        expected.changed.set()
        return landing.buffers

    def close(self, header: PieceHeader, error: TransferError | None) -> None:
        expected = self._expected[header.request_id]  # stays until FREE, so it is there for every open piece
        landing = expected.landings.pop(name_of(header))
        expected.changed.set()
        layout = self._storage.layout
        if error is None and expected.digester.digest(header, layout, landing.buffers) != header.digest:
            self._reject(expected, header)
        if error is None:
            landing.land()
        expected.hand_over.close(header, error, self._clock.now())

    def _reject(self, expected: _Expected, header: PieceHeader) -> None:
        self.num_digest_mismatches += 1
        self._emit(
            "piece.corrupt", **expected.about, piece=header.sequence, bytes=header.num_bytes,
            tokens=[header.token_start, header.token_end], layers=[header.layer_start, header.layer_end],
        )  # fmt: skip
        expected.hand_over.reject(header)
        raise mismatch(header)
