"""The Decode service: one Session per router, and a plain Generate for simple clients."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from baton.clock import Clock
from baton.config import TransferConfig
from baton.engine.batch import SequenceOutput, StepOutput
from baton.engine.samples import begin_samples
from baton.engine.worker import Worker
from baton.errors import InternalError
from baton.events import Emit
from baton.handover.receive import Receiver
from baton.messages import GenerateCall, GenerateChunk, SessionDown, SessionUp
from baton.request import FinishReason
from baton.rpc import DECODE_GENERATE, SESSION, Handlers
from baton.tracing import NO_TRACING, Tracer
from baton_decode.session import Context, Session


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
        tracer: Tracer = NO_TRACING,
    ) -> None:
        self._worker = worker
        self._context = Context(
            worker, receiver, transport_name, transport_address, config, clock, emit, heartbeat_s, tracer
        )

    def handlers(self) -> Handlers:
        return {SESSION: self.session, DECODE_GENERATE: self.generate}

    async def session(self, messages: AsyncIterator[SessionUp]) -> AsyncGenerator[SessionDown, None]:
        """Ends, and cancels all its requests, when the router goes away or says no more."""
        session = Session(self._context)
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
        engine = self._worker.engine
        await engine.prepare(call.request)
        names = begin_samples(engine, call.request, engine.add)
        running = {name: sample for sample, name in enumerate(names)}

        def on_step(output: StepOutput) -> None:
            for row in output.outputs:
                if row.request_id in running and (row.token_ids or row.finish_reason):
                    rows.put_nowait(row)

        self._worker.listen(on_step)
        try:
            while running:
                row = await rows.get()
                if row.finish_reason is FinishReason.ERROR:
                    raise InternalError(f"the engine failed on {row.request_id}: {row.error}")
                yield GenerateChunk(
                    row.first_index,
                    row.token_ids,
                    row.finish_reason,
                    logprobs=row.logprobs,
                    prompt_logprobs=row.prompt_logprobs,
                    sample=running[row.request_id],
                )
                if row.finish_reason is not None:
                    del running[row.request_id]
        finally:
            self._worker.unlisten(on_step)
            for name in names:
                engine.abort(name)
            self._worker.admit()
