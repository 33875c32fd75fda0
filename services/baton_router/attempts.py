"""One try at serving a request: on a pair of workers, or on a decode worker alone.

    begun on p, or the call to it opens --+--> the prefill call is asked --> hand_over: first token, KV --> d's tokens
    submitted to d -----------> ticket ---+                                                                    --> ended

However it ends, the attempt on the decode worker is cancelled and the call on the prefill worker closed, if they have
not ended by themselves.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from baton.clock import Clock
from baton.config import RouterConfig
from baton.errors import Overloaded, TransferError
from baton.events import Emit
from baton.kv.block import num_blocks_for
from baton.messages import PrefillCall, PrefillResult, PrefixSource, Ticket
from baton.request import Request, WorkerId
from baton.tracing import Phases, SpanKind, Tracer
from baton_router.choice import Chains, Choice
from baton_router.fleet import Fleet
from baton_router.generation import Record, TokenStream
from baton_router.hand_over import HandOver
from baton_router.prefill_stream import PrefillStream
from baton_router.session import Attempt, Session
from baton_router.workers import Link


class _Trying(NamedTuple):
    session: Session  # the link's at that time: it has another one once it has reconnected
    attempt: Attempt


class Attempts:
    """Owns those under way."""

    def __init__(
        self, config: RouterConfig, fleet: Fleet, choice: Choice, clock: Clock, emit: Emit, tracer: Tracer
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._choice = choice
        self._clock = clock
        self._emit = emit
        self._tracer = tracer
        self._under_way: dict[str, _Trying] = {}

    def drop(self, request_id: str, sample: int) -> None:
        if (trying := self._under_way.get(request_id)) is not None:
            trying.session.drop(trying.attempt, sample)

    async def alone(self, request: Request, stream: TokenStream, decode: Link, timeout_s: float) -> None:
        with self._trying(request, stream, decode, timeout_s, self._trace(request, decode)) as (_, attempt):
            attempt.start_stream()
            await attempt.finished

    async def pair(
        self,
        chains: Chains,
        record: Record,
        stream: TokenStream,
        prefill: Link,
        decode: Link,
        timeout_s: float,
        source: PrefixSource | None = None,
        *,
        is_trial: bool = False,
    ) -> None:
        trace = self._trace(chains.request, decode)
        prefill_id = prefill.record.worker_id
        trace.phase("ticket")
        asking = trace.call("prefill call", {"baton.worker": prefill_id})
        request = replace(chains.request, traceparent=asking.traceparent)
        ahead = request if source is None and _begins_ahead(prefill, decode, request) else None
        # The prefill worker hears of it first: the first token waits for that one.
        async with prefill.prefill_stream(timeout_s, ahead) as answers:
            with self._trying(chains.request, stream, decode, timeout_s, trace, prefill_id) as trying:
                try:
                    ticket = await self._ticket(trying.attempt)
                    self._note_ticket(chains, record, ticket)
                    trace.phase("answer")
                    call = PrefillCall(
                        request, ticket, min(timeout_s, self._config.prefill_timeout_s), source
                    )
                    hand_over = HandOver(
                        trying.attempt, trying.session, prefill, decode, self._fleet.canary, self._clock,
                        self._emit, is_trial=is_trial,
                    )  # fmt: skip
                    await self._finished(chains, record, trying.attempt, hand_over, answers, call)
                    if is_trial:
                        _check_trial(hand_over)
                finally:
                    asking.end(self._clock.now())

    async def _finished(
        self,
        chains: Chains,
        record: Record,
        attempt: Attempt,
        hand_over: HandOver,
        answers: PrefillStream,
        call: PrefillCall,
    ) -> None:
        """The hand-over goes on beside the attempt, and of a trial beyond its end."""
        prefill_id = hand_over.prefill_id
        attempt.received.add_done_callback(lambda _: _note_transfer(record, attempt))
        running = asyncio.create_task(
            hand_over.run(
                answers, call, lambda result: self._note_prefill(chains, record, prefill_id, result)
            )
        )
        try:
            await asyncio.wait((running, attempt.finished), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            await attempt.finished
            if hand_over.is_trial:
                await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    @contextmanager
    def _trying(
        self,
        request: Request,
        stream: TokenStream,
        decode: Link,
        timeout_s: float,
        trace: Phases,
        prefill_id: WorkerId | None = None,
    ) -> Iterator[_Trying]:
        request = replace(request, traceparent=trace.traceparent)
        session = decode.session
        attempt = session.submit(request, stream, epoch=1, deadline_s=timeout_s, prefill_id=prefill_id)
        trying = self._under_way[request.request_id] = _Trying(session, attempt)
        try:
            yield trying
        finally:
            del self._under_way[request.request_id]
            session.cancel(attempt)
            trace.end(attempt.error)

    def _trace(self, request: Request, decode: Link) -> Phases:
        attributes = {"baton.worker": decode.record.worker_id}
        return Phases(self._tracer, self._clock, "attempt", request.traceparent, SpanKind.CLIENT, attributes)

    async def _ticket(self, attempt: Attempt) -> Ticket:
        try:
            async with self._clock.timeout(self._config.reserve_timeout_s):
                return await attempt.ticket
        except TimeoutError:
            raise Overloaded(
                f"no decode worker had room within {self._config.reserve_timeout_s:g} s",
                retry_after_s=self._config.reserve_timeout_s,
            ) from None

    # --- records ---

    def _note_ticket(self, chains: Chains, record: Record, ticket: Ticket) -> None:
        record.ticket_s = self._clock.now()
        record.num_cached_tokens_decode = ticket.num_cached_tokens
        self._choice.confirm_ticket(chains, ticket)

    def _note_prefill(self, chains: Chains, record: Record, prefill: WorkerId, result: PrefillResult) -> None:
        record.num_cached_tokens_prefill = result.num_cached_tokens
        record.transport = result.transport or None
        if (fetched := result.fetched) is not None:
            record.fetched_from, record.num_fetched_tokens = fetched.source_id, fetched.num_tokens
            self._choice.note_fetched(chains, prefill, fetched)


def _begins_ahead(prefill: Link, decode: Link, request: Request) -> bool:
    """Where the decode worker has room as far as is known, so that its ticket comes soon."""
    load = decode.record.load
    num_tokens = request.num_prompt_tokens + 1 + decode.session.num_unseen_tokens(load.num_own)
    num_blocks = num_blocks_for(num_tokens, decode.record.block_size)
    return prefill.record.prefills_ahead and not load.num_waiting and load.num_free_blocks >= num_blocks


def _note_transfer(record: Record, attempt: Attempt) -> None:
    if attempt.received.cancelled() or attempt.received.exception() is not None:
        return
    received = attempt.received.result()
    record.num_blocks_transferred = received.num_blocks
    record.num_bytes_transferred = received.num_bytes
    record.transfer_s = received.seconds


def _check_trial(hand_over: HandOver) -> None:
    """A path whose damage was repaired has given the right answer, and is no good path."""
    if hand_over.num_mismatches:
        raise TransferError(f"{hand_over.num_mismatches} pieces did not match their digest")
