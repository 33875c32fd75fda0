"""The Decode service: one Session per router, and a plain Generate for simple clients.

    Submit (remote) --> engine.reserve --admitted--> Ticket --> KV arrives (receive.py) --> engine.activate --> Steps
    Submit (local)  --> engine.add ----------------------------------------------------------------------> Steps
    Cancel, or the session's end --> the request's task is cancelled --> pieces drained --> engine.abort

Each request is one task, from Submit until it runs by itself in the engine; that task is the only one that gives the
request's blocks back while they are reserved. Each engine step becomes one Step message per session.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

from baton.clock import Clock
from baton.config import TransferConfig
from baton.engine.batch import SequenceOutput, StepOutput
from baton.engine.worker import Worker
from baton.errors import BatonError, DeadlineExceeded, InternalError
from baton.events import Emit
from baton.kv.block import num_blocks_for
from baton.messages import (
    Cancel,
    Failure,
    GenerateCall,
    GenerateChunk,
    Heartbeat,
    Received,
    SessionDown,
    SessionUp,
    Step,
    Submit,
    Ticket,
)
from baton.request import FinishReason, RequestId
from baton.rpc import DECODE_GENERATE, SESSION, Handlers
from baton_decode.receive import Receiver


class DecodeService:
    """Owns the sessions of this worker."""

    def __init__(
        self,
        worker: Worker,
        receiver: Receiver,
        transport_name: str,
        transport_address: str,
        config: TransferConfig,
        clock: Clock,
        emit: Emit,
        *,
        heartbeat_s: float,
    ) -> None:
        self.worker = worker
        self.receiver = receiver
        self.transport_name = transport_name
        self.transport_address = transport_address
        self.config = config
        self.clock = clock
        self.emit = emit
        self.heartbeat_s = heartbeat_s
        worker.explain(receiver.explain)

    def handlers(self) -> Handlers:
        return {SESSION: self.session, DECODE_GENERATE: self.generate}

    async def session(self, messages: AsyncIterator[SessionUp]) -> AsyncGenerator[SessionDown, None]:
        """Ends, and cancels all its requests, when the router goes away or says no more."""
        session = _Session(self)
        reading = asyncio.create_task(session.read(messages))
        try:
            while True:
                for message in await session.outgoing():
                    yield message
                if reading.done():
                    reading.result()
                    return
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await session.aclose()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[GenerateChunk, None]:
        rows: asyncio.Queue[SequenceOutput] = asyncio.Queue()

        def on_step(output: StepOutput) -> None:
            for row in output.outputs:
                if row.request_id == call.request.request_id and (row.token_ids or row.finish_reason):
                    rows.put_nowait(row)

        self.worker.engine.add(call.request)
        self.worker.listen(on_step)
        try:
            while True:
                row = await rows.get()
                if row.finish_reason is FinishReason.ERROR:
                    raise InternalError(f"the engine failed on {call.request.request_id}")
                yield GenerateChunk(row.first_index, row.token_ids, row.finish_reason, logprobs=row.logprobs)
                if row.finish_reason is not None:
                    return
        finally:
            self.worker.unlisten(on_step)
            self.worker.engine.abort(call.request.request_id)
            self.worker.admit()


@dataclass(slots=True)
class _Job:
    handle: int
    request_id: RequestId
    admitted: asyncio.Event = field(default_factory=asyncio.Event)
    starting: asyncio.Task[None] | None = None  # until it runs by itself in the engine


class _Session:
    """One router. Its jobs live exactly as long as it."""

    def __init__(self, service: DecodeService) -> None:
        self._service = service
        self._worker = service.worker
        self._jobs: dict[RequestId, _Job] = {}
        self._by_handle: dict[int, _Job] = {}
        self._out: list[SessionDown] = []
        self._wake = asyncio.Event()
        self._say(Heartbeat(self._worker.engine.load()))  # a first sign of life: the router waits for it
        self._ending: set[asyncio.Task[None]] = set()
        self._worker.listen(self._on_step)

    async def read(self, messages: AsyncIterator[SessionUp]) -> None:
        try:
            async for message in messages:
                if isinstance(message, Submit):
                    self._submit(message)
                else:
                    self._cancel(message)
        finally:
            self._wake.set()

    async def outgoing(self) -> list[SessionDown]:
        """What there is to say, or a heartbeat when there was nothing for a while."""
        try:
            async with self._service.clock.timeout(self._service.heartbeat_s):
                await self._wake.wait()
        except TimeoutError:
            return [Heartbeat(self._worker.engine.load())]
        self._wake.clear()
        taken, self._out = self._out, []
        return taken

    async def aclose(self) -> None:
        self._worker.unlisten(self._on_step)
        for job in tuple(self._jobs.values()):
            self._end(job)
        if self._ending:
            await asyncio.gather(*self._ending, return_exceptions=True)

    # --- a request's start ---

    def _submit(self, submit: Submit) -> None:
        request_id = submit.request.request_id
        job = _Job(submit.handle, request_id)
        try:
            if submit.remote_prefill:
                self._worker.engine.reserve(submit.request)
            else:
                self._worker.engine.add(submit.request)
        except BatonError as error:
            self._say(Failure(submit.handle, error.code, error.message))
            return
        self._jobs[request_id] = self._by_handle[submit.handle] = job
        if submit.remote_prefill:
            job.starting = asyncio.create_task(self._start_remote(job, submit))
        self._worker.admit()

    async def _start_remote(self, job: _Job, submit: Submit) -> None:
        try:
            async with self._service.clock.timeout(submit.deadline_s):
                await job.admitted.wait()
                await self._receive(job, submit)
        except TimeoutError:
            error = DeadlineExceeded(f"{job.request_id} was not handed over within its deadline")
            self._fail(job, error)
        except BatonError as error:
            self._fail(job, error)

    async def _receive(self, job: _Job, submit: Submit) -> None:
        service, engine = self._service, self._worker.engine
        sequence = engine.sequence(job.request_id)
        if sequence is None:
            raise InternalError(f"{job.request_id} vanished from the engine")
        block_size = self._worker.record.block_size
        service.receiver.expect(
            submit.request,
            submit.epoch,
            sequence.prompt_blocks(block_size),
            sequence.num_cached_tokens,
            service.config.lease_s,
        )
        self._say(self._ticket(job, submit, sequence.num_cached_tokens))
        num_blocks = num_blocks_for(submit.request.num_prompt_tokens - sequence.num_cached_tokens, block_size)
        hand_over = await service.receiver.wait_verified(job.request_id)
        service.receiver.go_live(job.request_id)
        started_s, ended_s = hand_over.opened_s or 0.0, hand_over.closed_s or 0.0
        self._say(Received(job.handle, num_blocks, hand_over.num_bytes, ended_s - started_s))
        service.emit("kv.received", request=job.request_id, blocks=num_blocks)
        job.starting = None
        finish_reason = engine.activate(job.request_id, hand_over.first_token)
        if finish_reason is not None:
            self._finish(job, finish_reason)

    def _ticket(self, job: _Job, submit: Submit, num_cached_tokens: int) -> Ticket:
        service, record = self._service, self._worker.record
        return Ticket(
            handle=job.handle,
            request_id=job.request_id,
            epoch=submit.epoch,
            worker_id=record.worker_id,
            transport=service.transport_name,
            address=service.transport_address,
            fingerprint=record.fingerprint,
            block_size=record.block_size,
            num_cached_tokens=num_cached_tokens,
            lease_s=service.config.lease_s,
            compatibility=record.compatibility,
        )

    # --- a request's end ---

    def _cancel(self, cancel: Cancel) -> None:
        job = self._by_handle.get(cancel.handle)
        if job is not None:
            self._service.emit("request.cancelled", request=job.request_id)
            self._end(job)

    def _fail(self, job: _Job, error: BatonError) -> None:
        """Called from the request's own starting task."""
        self._say(Failure(job.handle, error.code, error.message))
        job.starting = None
        self._end(job)

    def _finish(self, job: _Job, reason: FinishReason) -> None:
        self._forget(job)
        self._say(Step((), (), (), (), ((job.handle, reason),), self._worker.engine.load()))

    def _end(self, job: _Job) -> None:
        """Stop what is under way; blocks go back once no write can land in them any more."""
        self._forget(job)
        task = asyncio.create_task(self._give_back(job))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _give_back(self, job: _Job) -> None:
        if job.starting is not None:
            job.starting.cancel()
            await asyncio.gather(job.starting, return_exceptions=True)
        await self._service.receiver.end(job.request_id, "the request was cancelled")
        self._worker.engine.abort(job.request_id)
        self._worker.admit()

    def _forget(self, job: _Job) -> None:
        self._jobs.pop(job.request_id, None)
        self._by_handle.pop(job.handle, None)

    # --- what the router hears ---

    def _say(self, message: SessionDown) -> None:
        self._out.append(message)
        self._wake.set()

    def _on_step(self, output: StepOutput) -> None:
        for request_id in output.admitted:
            if (job := self._jobs.get(request_id)) is not None:
                job.admitted.set()
        rows = [(job, row) for row in output.outputs if (job := self._jobs.get(row.request_id)) is not None]
        told = [(job, row) for job, row in rows if row.token_ids or row.finish_reason is not None]
        if not told:
            return
        self._say(
            Step(
                handles=tuple(job.handle for job, row in told),
                first_index=tuple(row.first_index for _, row in told),
                num_tokens=tuple(len(row.token_ids) for _, row in told),
                token_ids=tuple(token for _, row in told for token in row.token_ids),
                finished=tuple((job.handle, row.finish_reason) for job, row in told if row.finish_reason),
                load=self._worker.engine.load(),
                logprob_rows=tuple(i for i, (_, row) in enumerate(told) if row.logprobs),
                logprobs=tuple(each for _, row in told for each in row.logprobs),
            )
        )
        for job, row in told:
            if row.finish_reason is not None:
                self._forget(job)
