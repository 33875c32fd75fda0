"""The workers as this router sees them: a link to each, alive or not, and a session with each decode worker.

    mirror says a worker joined --> Link: channel, a Status.Watch stream (life and load), a Session if it decodes
    each report of load, which lags, and what this router sent since --> a Candidate for placement
    the watch or the session breaks or falls silent --> the link is down: every attempt on it fails with WorkerLost,
                                                        then it reconnects until the mirror says the worker left

What goes over a session is in `session`.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace

from baton.clock import Clock
from baton.errors import BatonError, Unavailable, WorkerLost
from baton.events import Emit
from baton.messages import (
    BlockLedger,
    BlocksCall,
    PrefillAnswer,
    PrefillCall,
    Pushed,
    Role,
    SessionUp,
    StatusCall,
    WorkerRecord,
)
from baton.request import Request, WorkerId
from baton.rpc import SESSION, STATUS_BLOCKS, STATUS_WATCH, Rpc
from baton.transfer.rate import Rate
from baton_router.costs import Candidate
from baton_router.prefill_stream import PrefillStream, PrefillStreams
from baton_router.prompt_queue import PromptQueue
from baton_router.session import Session

RECONNECT_S = 0.25


class Link:
    """One worker. `up` is True while its watch stream (and its session, if it decodes) is alive."""

    def __init__(
        self,
        record: WorkerRecord,
        rpc: Rpc,
        clock: Clock,
        emit: Emit,
        timeout_s: float,
        on_change: Callable[["Link"], None],
    ) -> None:
        """`on_change` is called whenever the link may have risen or fallen."""
        self.record = record
        self.session = Session()
        self.prompts = PromptQueue()  # that this worker is to compute
        self.transports: dict[WorkerId, str] = {}  # that really carried KV from here, by decode worker
        self.rates: dict[WorkerId, Rate] = {}  # measured, likewise
        self._channel = rpc.connect(record.address)
        self._streams = PrefillStreams(self._channel)
        self._clock = clock
        self._emit = emit
        self._timeout_s = timeout_s
        self._watching: dict[
            Callable[[BatonError], None], None
        ] = {}  # whose KV is on its way out of this worker
        self._parts_up: set[str] = set()
        self._why_down: dict[str, str] = {}  # by part: why the latest attempt failed
        self._on_change = on_change

    @property
    def up(self) -> bool:
        return len(self._parts_up) == (2 if Role.DECODE in self.record.roles else 1)

    @property
    def why_down(self) -> str:
        """Empty while it is up, or was never tried."""
        return "" if self.up else next(iter(self._why_down.values()), "")

    def candidate(self, num_held_blocks: int) -> Candidate:
        """As it is now: what the worker reported of everybody else's requests, and this router's own."""
        load, session = self.record.load, self.session
        return Candidate(
            self.record,
            num_held_blocks,
            num_seqs=max(0, load.num_running + load.num_waiting - load.num_own) + session.num_seqs,
            num_queued_tokens=self.prompts.num_tokens(load.num_waiting_tokens),
            num_unseen_tokens=session.num_unseen_tokens(load.num_own),
        )

    @asynccontextmanager
    async def prefill_stream(
        self, timeout_s: float, ahead: Request | None
    ) -> AsyncGenerator[PrefillStream, None]:
        """For one `prefill`; of the request that may begin `ahead` of its ticket."""
        stream = await self._streams.take(timeout_s, ahead)
        if ahead is not None:
            self.prompts.sent(ahead.request_id)
        try:
            yield stream
        finally:
            await stream.aclose()
            await self._refill()

    async def prefill(self, stream: PrefillStream, call: PrefillCall) -> AsyncGenerator[PrefillAnswer, None]:
        """Until the push has ended. Raises WorkerLost when the worker goes before."""
        request_id = call.request.request_id
        if not stream.is_ahead:
            self.prompts.sent(request_id)
        try:
            async with aclosing(stream.ask(call)) as answers:
                async for answer in answers:
                    self.prompts.computed(request_id)
                    if answer.transport:
                        self.transports[call.ticket.worker_id] = answer.transport
                    if isinstance(answer, Pushed):
                        self.rates.setdefault(call.ticket.worker_id, Rate()).note(
                            answer.num_bytes, answer.wire_s
                        )
                    yield answer
        except Unavailable as error:
            raise WorkerLost(f"prefill worker {self.record.worker_id} was lost: {error.message}") from error
        finally:
            self.prompts.computed(request_id)

    @contextmanager
    def watched(self, on_lost: Callable[[BatonError], None]) -> Iterator[None]:
        """Inside, `on_lost` is called when this worker is lost: it may be silent for long before a call breaks."""
        self._watching[on_lost] = None
        try:
            yield
        finally:
            del self._watching[on_lost]

    async def blocks(self, timeout_s: float) -> BlockLedger:
        return await self._channel.unary(STATUS_BLOCKS, BlocksCall(), timeout_s=timeout_s)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep("watch", self._watch))
            if Role.DECODE in self.record.roles:
                tasks.create_task(self._keep("session", self._session))

    async def aclose(self) -> None:
        self._lost("the worker left")
        await self._streams.aclose()
        await self._channel.aclose()

    async def _keep(self, part: str, connect: Callable[[], AsyncGenerator[None, None]]) -> None:
        """Consume a stream of messages for ever: each one is a sign of life, none for timeout_s is death."""
        while True:
            messages = connect()
            why = "it ended its stream"
            try:
                while True:
                    async with self._clock.timeout(self._timeout_s):
                        await anext(messages)
                    if part not in self._parts_up:
                        self._parts_up.add(part)
                        self._why_down.pop(part, None)
                        self._on_change(self)
                        self._emit("link.up", worker=self.record.worker_id, part=part)
                        await self._refill()
            except StopAsyncIteration:
                pass
            except TimeoutError:
                why = f"it said nothing for {self._timeout_s:g} s"
            except BatonError as error:
                why = error.message
            finally:
                await messages.aclose()
            if part in self._parts_up:
                self._parts_up.discard(part)
                self._emit("link.down", worker=self.record.worker_id, part=part, why=why)
                self._lost(why)
            elif why != self._why_down.get(part):
                self._emit("link.failed", worker=self.record.worker_id, part=part, why=why)
            self._why_down[part] = why
            await self._clock.sleep(RECONNECT_S)

    async def _watch(self) -> AsyncGenerator[None, None]:
        stream = self._channel.server_stream(STATUS_WATCH, StatusCall(), timeout_s=None)
        try:
            async for status in stream:
                if "session" in self._parts_up:  # whose reports are in step with what it says of each request
                    self.record = replace(status.record, load=self.record.load)
                else:
                    self._report(status.record)
                yield
        finally:
            await stream.aclose()

    async def _session(self) -> AsyncGenerator[None, None]:
        self.session = Session()
        outgoing: AsyncIterator[SessionUp] = self.session.outgoing()
        stream = self._channel.bidi(SESSION, outgoing)
        try:
            async for message in stream:
                load = self.session.dispatch(message)
                if load is not None:
                    self._report(replace(self.record, load=load))
                yield
        finally:
            await stream.aclose()

    async def _refill(self) -> None:
        """Between two requests rather than beside one: to open a stream costs both ends time."""
        if self.up and self.record.prefills_ahead:
            await self._streams.refill()

    def _report(self, record: WorkerRecord) -> None:
        self.record = record
        self.prompts.reported()

    def _lost(self, why: str) -> None:
        error = WorkerLost(f"worker {self.record.worker_id} was lost: {why}")
        self._on_change(self)
        self.session.fail_all(error)
        for on_lost in tuple(self._watching):
            on_lost(error)
