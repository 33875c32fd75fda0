"""One router's requests on this worker: what it submits, and what it hears of them.

    Submit (remote) --> engine.reserve --admitted--> Ticket --> KV arrives (receive.py) --> engine.activate --> Steps
    Submit (local)  --> engine.add ----------------------------------------------------------------------> Steps
                        with a grammar: engine.prepare before; a Cancel waits for it
                        n > 1: engine.fork for each further sample; they wait for the first one's prompt
    Cancel, or the session's end --> the request's task is cancelled --> pieces drained --> engine.abort

Each request is one task, from Submit until it runs by itself in the engine; that task is the only one that gives the
request's blocks back while they are reserved. Its samples are sequences of their own in the engine, and end one by one;
the first is kept until the KV is there, because the others take the prompt's blocks from it. Each engine step becomes
one Step message.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from baton.clock import Clock
from baton.config import TransferConfig
from baton.engine.batch import StepOutput
from baton.engine.samples import begin_samples
from baton.engine.worker import Worker
from baton.errors import BatonError, DeadlineExceeded, InternalError, TransferError
from baton.events import Emit, about
from baton.handover.receive import Receiver
from baton.kv.block import num_blocks_for
from baton.messages import (
    Cancel,
    Heartbeat,
    Load,
    Missed,
    Received,
    Recompute,
    SessionDown,
    SessionUp,
    Step,
    Submit,
    Ticket,
)
from baton.request import FinishReason, Request, RequestId
from baton.tracing import NO_TRACING, Phases, SpanKind, Tracer
from baton_decode.job import Job, Sample, failure_of, step_of


@dataclass(frozen=True, slots=True)
class Context:
    """What all sessions of a worker share."""

    worker: Worker
    receiver: Receiver
    transport_name: str
    transport_address: str
    config: TransferConfig
    clock: Clock
    emit: Emit
    heartbeat_s: float
    tracer: Tracer = NO_TRACING

    def trace(self, request: Request) -> Phases:
        attributes = {"baton.worker": self.worker.record.worker_id}
        return Phases(self.tracer, self.clock, "decode", request.traceparent, SpanKind.SERVER, attributes)


class Session:
    """One router. Its jobs live exactly as long as it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._worker = context.worker
        self._jobs: dict[RequestId, Job] = {}
        self._samples: dict[RequestId, Sample] = {}  # those that have not ended
        self._by_handle: dict[int, Sample] = {}  # the same
        self._out: list[SessionDown] = []
        self._wake = asyncio.Event()
        self._say(Heartbeat(self._load()))  # a first sign of life: the router waits for it
        self._preparing: set[asyncio.Task[None]] = set()
        self._early_cancels: list[Cancel] = []  # perhaps of requests that are being prepared
        self._ending: set[asyncio.Task[None]] = set()
        self._worker.listen(self._on_step)

    async def read(self, messages: AsyncIterator[SessionUp]) -> None:
        try:
            async for message in messages:
                if isinstance(message, Submit):
                    self._submit(message)
                elif isinstance(message, Cancel):
                    self._cancel(message)
                else:
                    self._recompute(message)
        finally:
            self._wake.set()

    async def outgoing(self) -> list[SessionDown]:
        """What there is to say, or a heartbeat when there was nothing for a while."""
        try:
            async with self._context.clock.timeout(self._context.heartbeat_s):
                await self._wake.wait()
        except TimeoutError:
            return [Heartbeat(self._load())]
        self._wake.clear()
        taken, self._out = self._out, []
        return taken

    async def aclose(self) -> None:
        self._worker.unlisten(self._on_step)
        for task in self._preparing:
            task.cancel()
        await asyncio.gather(*self._preparing, return_exceptions=True)
        for job in tuple(self._jobs.values()):
            self._end(job, "cancelled")
        if self._ending:
            await asyncio.gather(*self._ending, return_exceptions=True)

    # --- a request's start ---

    def _submit(self, submit: Submit) -> None:
        if submit.request.sampling.grammar is None:
            self._place(submit)
        else:
            task = asyncio.create_task(self._prepare(submit))
            self._preparing.add(task)
            task.add_done_callback(self._prepared)

    async def _prepare(self, submit: Submit) -> None:
        try:
            await self._worker.engine.prepare(submit.request)
        except BatonError as error:
            self._say(failure_of(submit.handle, error))
        else:
            self._place(submit)

    def _prepared(self, task: asyncio.Task[None]) -> None:
        self._preparing.discard(task)
        cancels, self._early_cancels = self._early_cancels, []
        for cancel in cancels:
            self._cancel(cancel)

    def _place(self, submit: Submit) -> None:
        engine = self._worker.engine
        begin = engine.reserve if submit.remote_prefill else engine.add
        try:
            request_ids = begin_samples(engine, submit.request, begin)
        except BatonError as error:
            self._say(failure_of(submit.handle, error))
            return
        trace = self._context.trace(submit.request)
        trace.phase("reserve" if submit.remote_prefill else "run")
        job = Job(submit.handle, request_ids, len(request_ids), submit.request, trace)
        self._jobs[request_ids[0]] = job
        for handle, request_id in enumerate(request_ids, submit.handle):
            sample = Sample(job, request_id, handle)
            self._samples[request_id] = self._by_handle[handle] = sample
        if submit.remote_prefill:
            job.starting = asyncio.create_task(self._start_remote(job, submit))
        self._worker.admit()

    async def _start_remote(self, job: Job, submit: Submit) -> None:
        try:
            async with self._context.clock.timeout(submit.deadline_s):
                await job.admitted.wait()
                await self._receive(job, submit)
        except TimeoutError:
            error = DeadlineExceeded(f"{job.request_id} was not handed over within its deadline")
            self._fail(job, error)
        except BatonError as error:
            self._fail(job, error)

    async def _receive(self, job: Job, submit: Submit) -> None:
        context, engine = self._context, self._worker.engine
        sequence = engine.sequence(job.request_id)
        if sequence is None:
            raise InternalError(f"{job.request_id} vanished from the engine")
        block_size = self._worker.record.block_size
        context.receiver.expect(
            submit.request,
            submit.epoch,
            sequence.prompt_blocks(block_size),
            sequence.num_cached_tokens,
            context.config.lease_s,
            submit.prefill_id,
        )
        self._say(self._ticket(job, submit, sequence.num_cached_tokens))
        job.trace.phase("kv receive", {"baton.cached_tokens": sequence.num_cached_tokens})
        num_blocks = num_blocks_for(submit.request.num_prompt_tokens - sequence.num_cached_tokens, block_size)
        try:
            hand_over = await context.receiver.wait_verified(job.request_id)
        except TransferError as error:
            await self._compute_here(job, error.message)
            return
        context.receiver.go_live(job.request_id)
        started_s, ended_s = hand_over.opened_s or 0.0, hand_over.closed_s or 0.0
        self._say(
            Received(job.handle, num_blocks, hand_over.num_bytes, ended_s - started_s, hand_over.first_token)
        )
        context.emit("kv.received", **about(job.request), blocks=num_blocks)
        job.trace.set({"baton.bytes": hand_over.num_bytes, "baton.mismatches": hand_over.num_mismatches})
        job.trace.phase("run")
        job.starting = None
        self._run(job, engine.activate(job.request_id, hand_over.first_token))

    async def _compute_here(self, job: Job, reason: str) -> None:
        """Only the router knows whether the client has the first token already: ask it, and wait until no write can
        land in the blocks any more."""
        self._say(Missed(job.handle, reason))
        await self._context.receiver.end(job.request_id, reason)
        recompute = await job.recompute
        self._context.emit("kv.recomputed", **about(job.request), why=recompute.reason)
        job.trace.phase("run", {"baton.recomputed": recompute.reason})
        job.starting = None
        self._run(job, self._worker.engine.recompute(job.request_id, recompute.first_token))

    def _recompute(self, recompute: Recompute) -> None:
        """The router may know before this side does that the KV will not come."""
        job = next((job for job in self._jobs.values() if job.handle == recompute.handle), None)
        if job is not None and not job.recompute.done():
            job.recompute.set_result(recompute)
            self._context.receiver.fail(job.request_id, recompute.reason)

    def _run(self, job: Job, finish_reason: FinishReason | None) -> None:
        """The first sample has its first token, which may be its last one, or nobody may want more of it."""
        first = self._samples.get(job.request_id)
        if first is None:
            self._worker.engine.abort(job.request_id)
            self._worker.admit()
        elif finish_reason is not None:
            self._forget(first)
            self._say(Step((), (), (), (), ((first.handle, finish_reason),), self._load()))

    def _ticket(self, job: Job, submit: Submit, num_cached_tokens: int) -> Ticket:
        context = self._context
        return Ticket.of(
            self._worker.record, context.transport_name, context.transport_address, context.config.lease_s,
            handle=job.handle, request_id=job.request_id, epoch=submit.epoch, num_cached_tokens=num_cached_tokens,
        )  # fmt: skip

    # --- a request's end ---

    def _cancel(self, cancel: Cancel) -> None:
        sample = self._by_handle.get(cancel.handle)
        if sample is None:
            if self._preparing:
                self._early_cancels.append(cancel)
            return
        job = sample.job
        if job.num_running > 1:
            self._drop(sample)
        else:
            self._context.emit("request.cancelled", **about(job.request))
            self._end(job, "cancelled")

    def _drop(self, sample: Sample) -> None:
        """One of several."""
        self._forget(sample)
        is_awaited = sample.job.starting is not None and sample.request_id == sample.job.request_id
        if not is_awaited:
            self._worker.engine.abort(sample.request_id)
            self._worker.admit()

    def _fail(self, job: Job, error: BatonError) -> None:
        """Called from the request's own starting task, or when that has ended."""
        self._say(failure_of(job.handle, error))
        job.starting = None
        self._end(job, error.code)

    def _end(self, job: Job, error: str) -> None:
        """Stop what is under way; blocks go back once no write can land in them any more."""
        job.trace.end(error)
        for request_id in job.request_ids:
            if (sample := self._samples.get(request_id)) is not None:
                self._forget(sample)
        task = asyncio.create_task(self._give_back(job))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _give_back(self, job: Job) -> None:
        if job.starting is not None:
            job.starting.cancel()
            await asyncio.gather(job.starting, return_exceptions=True)
        await self._context.receiver.end(job.request_id, "the request was cancelled")
        for request_id in job.request_ids:
            self._worker.engine.abort(request_id)
        self._worker.admit()

    def _forget(self, sample: Sample) -> None:
        del self._samples[sample.request_id], self._by_handle[sample.handle]
        sample.job.num_running -= 1
        if not sample.job.num_running:
            del self._jobs[sample.job.request_id]
            sample.job.trace.end()

    # --- what the router hears ---

    def _say(self, message: SessionDown) -> None:
        self._out.append(message)
        self._wake.set()

    def _on_step(self, output: StepOutput) -> None:
        for request_id in output.admitted:
            if (job := self._jobs.get(request_id)) is not None:
                job.admitted.set()
        told = [
            (sample, row)
            for row in output.outputs
            if (row.token_ids or row.finish_reason is not None)
            and (sample := self._samples.get(row.request_id)) is not None
        ]
        failed = {sample.job: row for sample, row in told if row.finish_reason is FinishReason.ERROR}
        for job, row in failed.items():  # one sample's failure is that of its request
            self._fail(job, InternalError(f"the engine failed on {row.request_id}: {row.error}"))
        going_on = [(sample, row) for sample, row in told if sample.job not in failed]
        for sample, row in going_on:
            if row.finish_reason is not None:
                self._forget(sample)
        if going_on:
            self._say(step_of(going_on, self._load()))

    def _load(self) -> Load:
        return replace(self._worker.load(), num_own=len(self._samples))
