"""The life of one request in the router.

1 admit            a slot, or 429
2 place            a pair (prefill worker, decode worker), or a decode worker alone (choice)
3 submit           decode worker reserves blocks and answers with a ticket (attempts)
4 prefill          prefill worker computes, pushes KV to the ticket's address, answers with the first token; where
                   the KV does not arrive, the decode worker computes the prompt itself (hand_over)
5 stream           first token, then the decode worker's Step messages, straight into the request's stream
6 end              finish, error, deadline, cancel or disconnect: one path, which cancels the attempt on the decode
                   worker and the call on the prefill worker if they have not ended by themselves
"""

import asyncio
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator

from baton.clock import Clock
from baton.config import RouterConfig
from baton.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
)
from baton.events import Emit, about
from baton.request import Request, WorkerId
from baton.tracing import NO_TRACING, SpanKind, Tracer
from baton_router.admission import Admission
from baton_router.attempts import Attempts
from baton_router.choice import Chains, Choice
from baton_router.fleet import Fleet
from baton_router.generation import AtOnce, Record, Tokens, TokenStream, never
from baton_router.placement import Placement
from baton_router.workers import Link

MAX_RECORDS = 512


class Pipeline:
    """Implements `generation.Generator`. Owns the requests in flight and the records of recent ones."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        clock: Clock,
        rng: random.Random,
        emit: Emit,
        tracer: Tracer = NO_TRACING,
    ) -> None:
        self._fleet = fleet
        self._clock = clock
        self._choice = Choice(fleet, rng)
        self._attempts = Attempts(config, fleet, self._choice, clock, emit, tracer)
        self._emit = emit
        self._tracer = tracer
        self.admission = Admission(config.max_num_requests)
        self._streams: dict[str, TokenStream] = {}
        self._records: OrderedDict[str, Record] = OrderedDict()

    # --- what the front doors call ---

    async def generate(
        self, request: Request, *, timeout_s: float, at_once: AtOnce = never
    ) -> AsyncGenerator[list[Tokens], None]:
        if request.request_id in self._streams:
            raise InternalError(f"request id {request.request_id} is in use")
        with self.admission.slot():
            record = self._new_record(request)
            stream = self._streams[request.request_id] = TokenStream(at_once)
            serving = asyncio.create_task(self._serve(request, record, stream, timeout_s))
            try:
                while tokens := await stream.take():
                    self._count(record, tokens)
                    yield tokens
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
                self._close_record(request, record)
                del self._streams[request.request_id]

    def drop(self, request_id: str, sample: int) -> None:
        self._attempts.drop(request_id, sample)

    def cancel(self, request_id: str) -> bool:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.fail(Cancelled(f"request {request_id} was cancelled"))
        return stream is not None

    async def trial(
        self, request: Request, prefill: WorkerId | None, decode: WorkerId, timeout_s: float
    ) -> list[Tokens]:
        """Serve a request of the router's own where it says. Raises BatonError."""
        record = Record(request.request_id, request.num_prompt_tokens, self._clock.now())
        stream = TokenStream()
        link = self._fleet.link(decode)
        try:
            async with self._clock.timeout(timeout_s):
                if prefill is None:
                    await self._attempts.alone(request, stream, link, timeout_s)
                else:
                    source = self._fleet.link(prefill)
                    chains = Chains(request)
                    await self._attempts.pair(chains, record, stream, source, link, timeout_s, is_trial=True)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
        stream.end()
        return await stream.take()

    def record(self, request_id: str) -> Record | None:
        record = self._records.get(request_id)
        if record is not None and (stream := self._streams.get(request_id)) is not None:
            record.num_output_tokens = stream.num_tokens
        return record

    # --- one request ---

    async def _serve(self, request: Request, record: Record, stream: TokenStream, timeout_s: float) -> None:
        try:
            async with self._clock.timeout(timeout_s):
                chains = Chains(request)
                with self._choice.placed(chains) as placement:
                    prefill, decode = self._note_placement(request, record, placement)
                    if prefill is None:
                        await self._attempts.alone(request, stream, decode, timeout_s)
                    else:
                        source = placement.source
                        await self._attempts.pair(chains, record, stream, prefill, decode, timeout_s, source)
            stream.end()
        except TimeoutError:
            self._fail(record, stream, DeadlineExceeded(f"not finished within {timeout_s:g} s"))
        except BatonError as error:
            self._fail(record, stream, error)
        except Exception as error:
            self._fail(record, stream, InternalError(f"{type(error).__name__}: {error}"))
            raise

    def _fail(self, record: Record, stream: TokenStream, error: BatonError) -> None:
        record.error = f"{error.code}: {error.message}"
        stream.fail(error)

    def _note_placement(
        self, request: Request, record: Record, placement: Placement
    ) -> tuple[Link | None, Link]:
        record.placed_s = self._clock.now()
        record.prefill_worker, record.decode_worker = placement.prefill, placement.decode
        pair = {"prefill": placement.prefill, "decode": placement.decode}
        said = pair if placement.source is None else {**pair, "source": placement.source.worker_id}
        self._emit("request.placed", **about(request), **said)
        attributes = {f"baton.{role}_worker": worker for role, worker in pair.items()}
        self._tracer.start("place", request.traceparent, record.arrival_s, SpanKind.INTERNAL, attributes).end(
            record.placed_s
        )
        prefill = self._fleet.link(placement.prefill) if placement.prefill is not None else None
        return prefill, self._fleet.link(placement.decode)

    # --- records ---

    def _new_record(self, request: Request) -> Record:
        record = Record(request.request_id, request.num_prompt_tokens, self._clock.now())
        self._records[request.request_id] = record
        if len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        return record

    def _count(self, record: Record, batch: list[Tokens]) -> None:
        if record.first_token_s is None:
            record.first_token_s = self._clock.now()
        for tokens in batch:
            if tokens.num_cached_tokens:
                record.num_cached_tokens_decode = tokens.num_cached_tokens
        if batch[-1].finish_reason is not None:
            record.finish_reason = batch[-1].finish_reason.value

    def _close_record(self, request: Request, record: Record) -> None:
        record.finished_s = self._clock.now()
        record.num_output_tokens = self._streams[request.request_id].num_tokens
        self._emit(
            "request.ended",
            **about(request),
            tokens=record.num_output_tokens,
            reason=record.finish_reason,
            error=record.error,
        )
