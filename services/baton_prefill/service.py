"""The Prefill service: compute a prompt, hand its KV over, answer with the first token.

    Prefill called --> with a source: Fetcher.fetch, which fills the prefix cache, or fails
                   --> engine.add(prefill_only) --> each layer group, each step: Push.computed
                                                --> first token: Push.finish
                                                                                      |
          answer to the router <------------------------------------------------------+
          the push goes on; when it ended, however it ended: engine.abort, and the router hears of it

A push needs a ticket. A prompt may begin without (PrefillAhead); what is computed until the ticket comes is remembered
and told to the push then. A ticket that does not come within a lease is a push that failed.

Source blocks are kept until the receiver acknowledged them or the push failed: engine.abort (which
keeps what is computed as cached prefix) is called for a request only after its push ended. The push begins before the
fetch: it keeps the ticket's lease alive meanwhile.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing

from baton.clock import Clock
from baton.config import TransferConfig
from baton.engine.batch import LayerProgress, StepOutput
from baton.engine.worker import Worker
from baton.errors import BatonError, InternalError, InvalidRequest, TransferError
from baton.events import Emit, about
from baton.handover.fetch import Fetcher
from baton.handover.outgoing import layer_group_ends
from baton.handover.owner import check_ticket
from baton.handover.push import Connections, Push
from baton.kv.layout import Storage
from baton.messages import (
    Holder,
    PrefillAnswer,
    PrefillBegin,
    PrefillCall,
    PrefillResult,
    PrefillTicket,
    PrefillUp,
    PrefixSource,
    Purpose,
    Ticket,
)
from baton.request import BlockId, FinishReason, Request, RequestId
from baton.rpc import PREFILL, PREFILL_AHEAD, Handlers
from baton.tracing import NO_TRACING, Phases, SpanKind, Tracer
from baton.transfer.base import Transport
from baton.transfer.report import OnTransfer, Outcome, ignore
from baton_prefill.job import Job


class PrefillService:
    """Owns the hand-overs that leave this worker. Built once per process, closed with `aclose`."""

    def __init__(
        self,
        worker: Worker,
        storage: Storage,
        transport: Transport,
        fetcher: Fetcher,
        config: TransferConfig,
        clock: Clock,
        emit: Emit,
        on_transfer: OnTransfer = ignore,
        tracer: Tracer = NO_TRACING,
    ) -> None:
        """`on_transfer` hears of every push once it has ended."""
        self._worker = worker
        self._storage = storage
        self._transport = transport
        self._fetcher = fetcher
        self._config = config
        self._clock = clock
        self._emit = emit
        self._on_transfer = on_transfer
        self._tracer = tracer
        self._connections = Connections(transport, config.push_timeout_s)
        self._jobs: dict[RequestId, Job] = {}
        self._pushes: dict[asyncio.Task[Outcome], None] = {}  # in the order they were made
        worker.listen(self._on_step)
        worker.explain(self._explain)
        ends = layer_group_ends(storage.layout.num_layers, config.num_layer_groups)
        worker.engine.listen_to_layers(ends, self._on_layers)

    def _explain(self, holder: Holder) -> Holder:
        """For the block ledger: where these blocks are being sent to."""
        job = self._jobs.get(holder.request_id)
        return holder if job is None or holder.purpose is Purpose.RECEIVING else job.explain(holder)

    def handlers(self) -> Handlers:
        return {PREFILL: self.prefill, PREFILL_AHEAD: self.prefill_ahead}

    async def aclose(self) -> None:
        self._worker.unlisten(self._on_step)
        self._worker.engine.listen_to_layers((), None)
        for task in tuple(self._pushes):
            task.cancel()
        await asyncio.gather(*self._pushes, return_exceptions=True)

    async def prefill(self, call: PrefillCall) -> AsyncGenerator[PrefillAnswer, None]:
        """The first token, then how the push ended. Left early, it stops both."""
        check_ticket(self._worker, self._transport, call.ticket)

        async def ticket() -> Ticket:
            return call.ticket

        async with aclosing(self._answers(call.request, ticket, call.source)) as answers:
            async for answer in answers:
                yield answer

    async def prefill_ahead(self, messages: AsyncIterator[PrefillUp]) -> AsyncGenerator[PrefillAnswer, None]:
        """Likewise, for a prompt whose ticket follows."""
        begin = await anext(messages, None)
        if not isinstance(begin, PrefillBegin):
            raise InvalidRequest("the first message must say what to compute", param="message")
        async with aclosing(self._answers(begin.request, lambda: self._late_ticket(messages))) as answers:
            async for answer in answers:
                yield answer

    async def _late_ticket(self, messages: AsyncIterator[PrefillUp]) -> Ticket:
        """Raises TransferError."""
        wait_s = self._config.lease_s
        try:
            async with self._clock.timeout(wait_s):
                message = await anext(messages, None)
        except TimeoutError:
            raise TransferError(f"no ticket came within {wait_s:g} s") from None
        if not isinstance(message, PrefillTicket):
            raise TransferError("no ticket came")
        check_ticket(self._worker, self._transport, message.ticket)
        return message.ticket

    async def _answers(
        self,
        request: Request,
        ticket: Callable[[], Awaitable[Ticket]],
        source: PrefixSource | None = None,
    ) -> AsyncGenerator[PrefillAnswer, None]:
        await self._worker.engine.prepare(request)
        if request.request_id in self._jobs:
            raise InvalidRequest(f"request {request.request_id} is here already", param="request_id")
        self._worker.engine.check(request, prefill_only=True)  # before the decode worker hears of it
        job, pushing = self._start(request, ticket)
        try:
            if source is not None and request.sampling.prompt_logprobs is None:
                job.fetched = await self._fetcher.fetch(request, source)
            if not pushing.done():
                self._worker.engine.add(request, prefill_only=True)
                job.is_added = True
            await asyncio.wait((job.done, pushing), return_when=asyncio.FIRST_COMPLETED)
            if job.done.done():
                result = await self._first_token(job, request)
                yield result
                if result.finish_reason is not None and request.sampling.n == 1:
                    return  # one token was all: nobody needs the KV elsewhere
            await asyncio.wait((pushing,))
            yield job.pushed()
        finally:
            pushing.cancel()

    def _start(
        self, request: Request, ticket: Callable[[], Awaitable[Ticket]]
    ) -> tuple[Job, "asyncio.Task[Outcome]"]:
        job = self._jobs[request.request_id] = Job(request, self._trace(request), self._clock.now())
        pushing = asyncio.create_task(self._push(job, ticket))
        self._pushes[pushing] = None
        # A callback, not a `finally` in the task: a task cancelled before its first turn never reaches its `finally`.
        pushing.add_done_callback(lambda task: self._forget(task, request.request_id))
        return job, pushing

    def _trace(self, request: Request) -> Phases:
        attributes = {"baton.worker": self._worker.record.worker_id}
        return Phases(self._tracer, self._clock, "prefill", request.traceparent, SpanKind.SERVER, attributes)

    async def _first_token(self, job: Job, request: Request) -> PrefillResult:
        sequence = self._worker.engine.sequence(request.request_id)
        first = await job.done
        now = self._clock.now()
        num_cached_tokens = sequence.num_cached_tokens if sequence is not None else 0
        queue_s, prefill_s = job.trace_computed(now, num_cached_tokens)
        return PrefillResult(
            token_id=first.token_ids[0],
            finish_reason=first.finish_reason,
            num_cached_tokens=num_cached_tokens,
            queue_s=queue_s,
            prefill_s=prefill_s,
            load=self._worker.load(),
            logprobs=first.logprobs[0] if first.logprobs else None,
            prompt_logprobs=first.prompt_logprobs,
            transport=job.transport if first.finish_reason is None or request.sampling.n > 1 else "",
            fetched=job.fetched,
        )

    def _on_step(self, output: StepOutput) -> None:
        for row in output.outputs:
            job = self._jobs.get(row.request_id)
            sequence = self._worker.engine.sequence(row.request_id)
            if job is None or job.done.done():
                continue
            if job.first_step_s is None:
                job.first_step_s = self._clock.now() - output.seconds
            if row.finish_reason in (FinishReason.ERROR, FinishReason.ABORT) or sequence is None:
                why = row.error or str(row.finish_reason)
                job.done.set_exception(InternalError(f"prefill of {row.request_id} failed: {why}"))
            elif row.token_ids:
                job.done.set_result(row)
                # A turn later: the answer is on its way before the digest of the last piece is made.
                block_table = tuple(sequence.block_table)
                asyncio.get_running_loop().call_soon(
                    self._finish, job, block_table, row.token_ids[0], self._clock.now()
                )
            else:
                self._computed(job, row.num_computed_tokens, sequence.block_table)

    def _on_layers(self, progress: LayerProgress) -> None:
        job = self._jobs.get(progress.request_id)
        if job is not None and not job.done.done():
            self._computed(job, progress.num_tokens, progress.block_table, progress.num_layers)

    def _computed(
        self, job: Job, num_tokens: int, block_table: Sequence[BlockId], num_layers: int | None = None
    ) -> None:
        block_table = tuple(block_table)
        job.tell(lambda push: push.computed(num_tokens, block_table, num_layers))

    def _finish(self, job: Job, block_table: Sequence[BlockId], first_token: int, computed_s: float) -> None:
        job.tell(lambda push: push.finish(block_table, first_token, computed_s))

    async def _push(self, job: Job, ticket: Callable[[], Awaitable[Ticket]]) -> Outcome:
        try:
            push = self._push_to(await ticket(), job.request)
            job.send_with(push)
            await push.run(self._connections)
        except BatonError as error:
            job.failure = error.message
            self._emit("push.failed", **about(job.request), why=error.message)
            return "failed"
        report = push.report("ok")
        self._emit(
            "push.done", **about(job.request), pieces=push.sending.num_left,
            bytes=report.num_bytes, seconds=report.seconds, exposed_s=report.exposed_s,
        )  # fmt: skip
        return "ok"

    def _push_to(self, ticket: Ticket, request: Request) -> Push:
        identity = self._worker.record.compatibility.identity
        return Push(ticket, request, self._storage, identity, self._clock, self._emit, self._config)

    def _forget(self, pushing: asyncio.Task[Outcome], request_id: RequestId) -> None:
        """The push ended, so no transport reads the blocks any more: the engine may have them back."""
        del self._pushes[pushing]
        job = self._jobs.pop(request_id)
        if job.is_added:
            self._worker.engine.abort(request_id)
        self._worker.admit()
        outcome: Outcome = "cancelled" if pushing.cancelled() else pushing.result()
        if job.push is None:  # nothing was sent to anybody
            job.trace.end(outcome)
            return
        report = job.push.report(outcome)
        self._worker.wire.note(report.num_bytes, report.wire_s)
        self._on_transfer(report)
        job.end_trace(report, self._clock.now())
