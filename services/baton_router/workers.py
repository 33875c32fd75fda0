"""The workers as this router sees them: a link to each, alive or not, and a session with each decode worker.

    mirror says a worker joined --> Link: channel, a Status.Watch stream (life and load), a Session if it decodes
    the watch or the session breaks or falls silent --> the link is down: every attempt on it fails with WorkerLost,
                                                        then it reconnects until the mirror says the worker left

An `Attempt` is one try at serving one request on one decode worker.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from baton.clock import Clock
from baton.errors import BatonError, InternalError, Unavailable, WorkerLost, from_code
from baton.events import Emit
from baton.messages import (
    BlockLedger,
    BlocksCall,
    Cancel,
    Failure,
    Heartbeat,
    Load,
    PrefillCall,
    PrefillResult,
    Received,
    Role,
    SessionDown,
    SessionUp,
    StatusCall,
    Step,
    Submit,
    Ticket,
    WorkerRecord,
)
from baton.request import FinishReason, Request, TokenLogprobs, WorkerId
from baton.rpc import PREFILL, SESSION, STATUS_BLOCKS, STATUS_WATCH, Rpc
from baton_router.generation import Tokens, TokenStream

RECONNECT_S = 0.25


class Attempt:
    """One try at one request. The session writes, the pipeline reads. Tokens go straight into the request's stream."""

    def __init__(self, handle: int, request: Request, stream: TokenStream, first_index: int) -> None:
        loop = asyncio.get_running_loop()
        self.handle = handle
        self.request = request
        self.ticket: asyncio.Future[Ticket] = loop.create_future()
        self.received: asyncio.Future[Received] = loop.create_future()
        self.finished: asyncio.Future[FinishReason] = loop.create_future()
        self._stream = stream
        self._next_index = first_index
        self._held: list[Tokens] | None = []  # what came before the first token was given to the stream

    def start_stream(self) -> None:
        """The first token is in the stream: everything after it may follow."""
        held, self._held = self._held or [], None
        for tokens in held:
            self._stream.push(tokens)

    def tokens(
        self,
        first_index: int,
        token_ids: tuple[int, ...],
        reason: FinishReason | None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        if first_index > self._next_index:
            self.fail(InternalError(f"tokens {self._next_index} to {first_index - 1} are missing"))
            return
        num_known = self._next_index - first_index
        token_ids = token_ids[num_known:]
        tokens = Tokens(self._next_index, token_ids, reason, logprobs[num_known:])
        self._next_index += len(token_ids)
        if self._held is None:
            self._stream.push(tokens)
        else:
            self._held.append(tokens)
        if reason is not None:
            self._resolve(self.finished, reason)

    def finish(self, reason: FinishReason) -> None:
        """Ended without a row of its own, or told so already by its last row."""
        if not self.finished.done():
            self.tokens(self._next_index, (), reason)

    def got_ticket(self, ticket: Ticket) -> None:
        self._resolve(self.ticket, ticket)

    def got_kv(self, received: Received) -> None:
        self._resolve(self.received, received)

    def fail(self, error: BatonError) -> None:
        for future in (self.ticket, self.received, self.finished):
            if not future.done():
                future.set_exception(error)
                future.exception()  # the pipeline waits for one of the three; the others need no reader

    @staticmethod
    def _resolve(future: asyncio.Future[Any], value: Any) -> None:
        if not future.done():
            future.set_result(value)


@dataclass(slots=True)
class Session:
    """The Step stream with one decode worker."""

    _out: list[SessionUp] = field(default_factory=list)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _attempts: dict[int, Attempt] = field(default_factory=dict)
    _next_handle: int = 1

    def submit(
        self, request: Request, stream: TokenStream, *, epoch: int, remote_prefill: bool, deadline_s: float
    ) -> Attempt:
        attempt = Attempt(self._next_handle, request, stream, first_index=1 if remote_prefill else 0)
        self._next_handle += 1
        self._attempts[attempt.handle] = attempt
        self._send(Submit(attempt.handle, request, epoch, remote_prefill, deadline_s))
        return attempt

    def cancel(self, attempt: Attempt) -> None:
        """Forget the attempt and tell the worker; one that has ended already is left alone."""
        if self._attempts.pop(attempt.handle, None) is not None:
            self._send(Cancel(attempt.handle))

    def fail_all(self, error: BatonError) -> None:
        """Their pipelines hear of it and cancel them, so a worker that is still there gives everything back."""
        for attempt in tuple(self._attempts.values()):
            attempt.fail(error)

    def _send(self, message: SessionUp) -> None:
        self._out.append(message)
        self._wake.set()

    async def outgoing(self) -> AsyncGenerator[SessionUp, None]:
        while True:
            await self._wake.wait()
            self._wake.clear()
            taken, self._out = self._out, []
            for message in taken:
                yield message

    def dispatch(self, message: SessionDown) -> Load | None:
        """Tell the attempts; returns the worker's load where the message carries it."""
        match message:
            case Step():
                self._step(message)
                return message.load
            case Heartbeat():
                return message.load
            case Failure():
                if (attempt := self._attempts.pop(message.handle, None)) is not None:
                    attempt.fail(from_code(message.code, message.message, None, None))
            case Ticket():
                if (attempt := self._attempts.get(message.handle)) is not None:
                    attempt.got_ticket(message)
            case Received():
                if (attempt := self._attempts.get(message.handle)) is not None:
                    attempt.got_kv(message)
        return None

    def _step(self, step: Step) -> None:
        reasons = dict(step.finished)
        logprobs = _logprobs(step)
        start = 0
        for handle, first_index, num in zip(step.handles, step.first_index, step.num_tokens, strict=True):
            token_ids = step.token_ids[start : start + num]
            start += num
            if (attempt := self._attempts.get(handle)) is not None:
                attempt.tokens(first_index, token_ids, reasons.get(handle), logprobs.get(handle, ()))
        for handle, reason in step.finished:
            if (attempt := self._attempts.pop(handle, None)) is None:
                continue
            if reason is FinishReason.ERROR:
                attempt.fail(InternalError(f"the engine failed on {attempt.request.request_id}"))
            else:
                attempt.finish(reason)


def _logprobs(step: Step) -> dict[int, tuple[TokenLogprobs, ...]]:
    """By handle."""
    found, start = {}, 0
    for row in step.logprob_rows:
        end = start + step.num_tokens[row]
        found[step.handles[row]] = step.logprobs[start:end]
        start = end
    return found


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
        self.num_dispatched_tokens = 0  # prompt tokens sent to this prefill worker and not yet answered
        self.transports: dict[WorkerId, str] = {}  # that really carried KV from here, by decode worker
        self._channel = rpc.connect(record.address)
        self._clock = clock
        self._emit = emit
        self._timeout_s = timeout_s
        self._depending: set[Attempt] = set()  # their KV is still on its way out of this worker
        self._parts_up: set[str] = set()
        self._on_change = on_change

    @property
    def up(self) -> bool:
        return len(self._parts_up) == (2 if Role.DECODE in self.record.roles else 1)

    async def prefill(self, call: PrefillCall, timeout_s: float) -> PrefillResult:
        self.num_dispatched_tokens += call.request.num_prompt_tokens
        try:
            result: PrefillResult = await self._channel.unary(PREFILL, call, timeout_s=timeout_s)
        except Unavailable as error:
            raise WorkerLost(f"prefill worker {self.record.worker_id} was lost: {error.message}") from error
        finally:
            self.num_dispatched_tokens -= call.request.num_prompt_tokens
        if result.transport:
            self.transports[call.ticket.worker_id] = result.transport
        return result

    async def blocks(self, timeout_s: float) -> BlockLedger:
        return await self._channel.unary(STATUS_BLOCKS, BlocksCall(), timeout_s=timeout_s)

    def depend(self, attempt: Attempt) -> None:
        """Until its KV was received, this attempt dies with this worker."""
        if attempt.received.done():
            return
        self._depending.add(attempt)
        attempt.received.add_done_callback(lambda _: self._depending.discard(attempt))

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep("watch", self._watch))
            if Role.DECODE in self.record.roles:
                tasks.create_task(self._keep("session", self._session))

    async def aclose(self) -> None:
        self._lost("the worker left")
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
                        self._on_change(self)
                        self._emit("link.up", worker=self.record.worker_id, part=part)
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
            await self._clock.sleep(RECONNECT_S)

    async def _watch(self) -> AsyncGenerator[None, None]:
        stream = self._channel.server_stream(STATUS_WATCH, StatusCall(), timeout_s=None)
        try:
            async for status in stream:
                self.record = status.record
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
                    self.record = replace(self.record, load=load)
                yield
        finally:
            await stream.aclose()

    def _lost(self, why: str) -> None:
        error = WorkerLost(f"worker {self.record.worker_id} was lost: {why}")
        self._on_change(self)
        self.session.fail_all(error)
        depending, self._depending = self._depending, set()
        for attempt in depending:
            attempt.fail(error)
