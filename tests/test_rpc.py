"""Both implementations of RPC keep the promises of `baton.rpc.base`: in process on virtual time, and over real sockets.

Run as a script, this file is the server process that the tests kill.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from functools import wraps
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from baton import codec
from baton import messages as m
from baton.clock import Clock, SystemClock, VirtualClock
from baton.errors import (
    BY_CODE,
    BatonError,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from baton.request import Request, RequestId
from baton.rpc import (
    DECODE_GENERATE,
    ROUTER_CANCEL,
    ROUTER_LIST_WORKERS,
    SESSION,
    STATUS_GET,
    Channel,
    GrpcRpc,
    Handlers,
    InprocRpc,
    InprocRpcNetwork,
    Rpc,
    Server,
)

CALL = m.CancelCall(RequestId("r"))
GENERATE = m.GenerateCall(Request(RequestId("r"), (1, 2)), deadline_s=60.0)
LOAD = m.Load()


class World(ABC):
    """One implementation, its clock, and processes that can be killed."""

    clock: Clock
    rpc: Rpc

    def __init__(self) -> None:
        self.open = AsyncExitStack()

    @abstractmethod
    def run(self, main: Callable[["World"], Coroutine[Any, Any, None]]) -> None: ...

    @abstractmethod
    async def start_process(self, address: str = "127.0.0.1:0") -> str:
        """A process that serves `steady_handlers`. Returns its address."""

    @abstractmethod
    async def kill_process(self, address: str) -> None: ...

    async def serve(self, handlers: Handlers, address: str = "127.0.0.1:0") -> Server:
        server = await self.rpc.serve(address, handlers)
        self.open.push_async_callback(server.aclose, 0.0)
        return server

    def connect(self, address: str) -> Channel:
        channel = self.rpc.connect(address)
        self.open.push_async_callback(channel.aclose)
        return channel

    async def channel_to(self, handlers: Handlers) -> Channel:
        return self.connect((await self.serve(handlers)).address)

    async def within(self, seconds: float, awaitable: Awaitable[Any]) -> Any:
        async with self.clock.timeout(seconds):
            return await awaitable


class InprocWorld(World):
    def __init__(self) -> None:
        super().__init__()
        self.virtual_clock = VirtualClock()
        self.clock = self.virtual_clock
        self.network = InprocRpcNetwork(self.clock, seed=1, latency_s=0.001, jitter_s=0.001)
        self.rpc = InprocRpc(self.network, self.clock)

    def run(self, main: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> None:
            async with self.open:
                await main(self)

        self.virtual_clock.run(whole())

    async def start_process(self, address: str = "127.0.0.1:0") -> str:
        return (await self.serve(steady_handlers(self.clock), address)).address

    async def kill_process(self, address: str) -> None:
        self.network.kill(address)


class GrpcWorld(World):
    def __init__(self) -> None:
        super().__init__()
        self.clock = SystemClock()
        self.rpc = GrpcRpc(self.clock)
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def run(self, main: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> None:
            async with self.open:
                await main(self)

        asyncio.run(whole())

    async def start_process(self, address: str = "127.0.0.1:0") -> str:
        command = [sys.executable, __file__, address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        self.open.callback(_end, process)
        assert process.stdout is not None
        address = (await asyncio.to_thread(process.stdout.readline)).strip()
        assert address, "the server process said nothing"
        self.processes[address] = process
        return address

    async def kill_process(self, address: str) -> None:
        self.processes[address].kill()


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture(params=[InprocWorld, GrpcWorld], ids=["inproc", "grpc"])
def world(request: pytest.FixtureRequest) -> World:
    made: World = request.param()
    return made


Scenario = Callable[..., Coroutine[Any, Any, None]]


def contract(scenario: Scenario) -> Callable[..., None]:
    """A test of both implementations, each on its own kind of event loop."""

    @wraps(scenario)
    def test(world: World, **fixtures: Any) -> None:
        world.run(lambda world: scenario(world=world, **fixtures))

    return test


# --- handlers ---


async def found(call: m.CancelCall) -> m.CancelResult:
    return m.CancelResult(found=True)


async def echo(requests: AsyncIterator[m.SessionUp]) -> AsyncGenerator[m.SessionDown, None]:
    """Answers each cancel with a failure of that handle, and says good-bye."""
    async for request in requests:
        yield m.Failure(request.handle, "echo", "")
    yield m.Heartbeat(LOAD)


async def steady_generate(call: m.GenerateCall) -> AsyncGenerator[m.GenerateChunk, None]:
    yield m.GenerateChunk(0, (1,), None)
    await asyncio.Event().wait()


def steady_handlers(clock: Clock) -> Handlers:
    """Unary: hangs for request id `hang`. Streams: one message at once, then none."""

    async def cancel(call: m.CancelCall) -> m.CancelResult:
        if call.request_id == "hang":
            await clock.sleep(3600)
        return m.CancelResult(found=True)

    async def session(requests: AsyncIterator[m.SessionUp]) -> AsyncGenerator[m.SessionDown, None]:
        async for request in requests:
            yield m.Failure(request.handle, "echo", "")

    return {ROUTER_CANCEL: cancel, DECODE_GENERATE: steady_generate, SESSION: session}


class Hanging:
    """Handlers that wait for ever after their first message, and tell how they ended."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended = asyncio.Event()
        self.how: str | None = None

    @asynccontextmanager
    async def _watched(self) -> AsyncGenerator[None, None]:
        self.started.set()
        try:
            yield
        except asyncio.CancelledError:
            self.how = "cancelled"
            raise
        except GeneratorExit:
            self.how = "closed"
            raise
        finally:
            self.ended.set()

    async def unary(self, call: m.CancelCall) -> m.CancelResult:
        async with self._watched():
            await asyncio.Event().wait()
        raise AssertionError

    async def stream(self, call: Any) -> AsyncGenerator[Any, None]:
        async with self._watched():
            yield m.GenerateChunk(0, (1,), None)
            await asyncio.Event().wait()

    async def session(self, requests: AsyncIterator[m.SessionUp]) -> AsyncGenerator[m.SessionDown, None]:
        async with self._watched():
            async for request in requests:
                yield m.Failure(request.handle, "echo", "")
            await asyncio.Event().wait()

    @property
    def handlers(self) -> Handlers:
        return {ROUTER_CANCEL: self.unary, DECODE_GENERATE: self.stream, SESSION: self.session}


class Outbox:
    """Requests of a session, written one by one."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[m.SessionUp | None] = asyncio.Queue()
        self.closed = asyncio.Event()

    def say(self, handle: int) -> None:
        self._queue.put_nowait(m.Cancel(handle))

    def hang_up(self) -> None:
        self._queue.put_nowait(None)

    async def requests(self) -> AsyncGenerator[m.SessionUp, None]:
        try:
            while (request := await self._queue.get()) is not None:
                yield request
        finally:
            self.closed.set()


def handle_of(message: m.SessionDown) -> int:
    assert isinstance(message, m.Failure)
    return message.handle


async def cancels(*handles: int) -> AsyncGenerator[m.SessionUp, None]:
    for handle in handles:
        yield m.Cancel(handle)


async def collect(stream: AsyncIterator[Any]) -> list[Any]:
    return [message async for message in stream]


async def until_it_answers(world: World, channel: Channel) -> None:
    async with world.clock.timeout(20.0):
        while True:
            with suppress(Unavailable):
                await channel.unary(ROUTER_CANCEL, CALL, timeout_s=5.0)
                return
            await world.clock.sleep(0.05)


# --- the contract: messages ---


@contract
async def test_unary(world: World) -> None:
    channel = await world.channel_to({ROUTER_CANCEL: found})
    assert await channel.unary(ROUTER_CANCEL, CALL, timeout_s=10.0) == m.CancelResult(found=True)


@contract
async def test_the_handler_gets_what_the_caller_sent(world: World) -> None:
    seen = []

    async def generate(call: m.GenerateCall) -> AsyncGenerator[m.GenerateChunk, None]:
        seen.append(call)
        yield m.GenerateChunk(0, call.request.prompt_token_ids, None)

    channel = await world.channel_to({DECODE_GENERATE: generate})
    chunks = await collect(channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=10.0))
    assert seen == [GENERATE]
    assert chunks == [m.GenerateChunk(0, (1, 2), None)]


@contract
async def test_messages_of_a_stream_arrive_once_and_in_order(world: World) -> None:
    async def generate(call: m.GenerateCall) -> AsyncGenerator[m.GenerateChunk, None]:
        for i in range(2000):
            yield m.GenerateChunk(i, (i,) * (i % 50), None)

    channel = await world.channel_to({DECODE_GENERATE: generate})
    chunks = await collect(channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=60.0))
    assert [chunk.first_index for chunk in chunks] == list(range(2000))


@contract
async def test_requests_and_answers_of_a_session_alternate(world: World) -> None:
    channel, outbox = await world.channel_to({SESSION: echo}), Outbox()
    async with aclosing(channel.bidi(SESSION, outbox.requests())) as session:
        for handle in range(20):
            outbox.say(handle)
            assert handle_of(await world.within(10.0, anext(session))) == handle


@contract
async def test_requests_of_a_session_arrive_once_and_in_order(world: World) -> None:
    channel = await world.channel_to({SESSION: echo})
    answers = await collect(channel.bidi(SESSION, cancels(*range(1000)), timeout_s=60.0))
    assert [handle_of(answer) for answer in answers[:-1]] == list(range(1000))


@contract
async def test_a_caller_with_no_more_requests_still_gets_answers(world: World) -> None:
    channel = await world.channel_to({SESSION: echo})
    assert await collect(channel.bidi(SESSION, cancels(), timeout_s=10.0)) == [m.Heartbeat(LOAD)]
    answers = await collect(channel.bidi(SESSION, cancels(5), timeout_s=10.0))
    assert answers == [m.Failure(5, "echo", ""), m.Heartbeat(LOAD)]


@contract
async def test_a_handler_may_end_a_session_while_requests_go_on(world: World) -> None:
    async def one_only(requests: AsyncIterator[m.SessionUp]) -> AsyncGenerator[m.SessionDown, None]:
        yield m.Failure((await anext(requests)).handle, "bye", "")

    channel, outbox = await world.channel_to({SESSION: one_only}), Outbox()
    outbox.say(1)
    assert len(await collect(channel.bidi(SESSION, outbox.requests(), timeout_s=10.0))) == 1
    assert outbox.closed.is_set()


@contract
async def test_a_stream_may_be_opened_before_there_is_a_request(world: World) -> None:
    outbox: asyncio.Queue[m.GenerateCall] = asyncio.Queue()
    called = asyncio.Event()

    async def requests() -> AsyncGenerator[m.GenerateCall, None]:
        yield await outbox.get()

    async def generate(call: m.GenerateCall) -> AsyncGenerator[m.GenerateChunk, None]:
        called.set()
        yield m.GenerateChunk(0, call.request.prompt_token_ids, None)

    channel = await world.channel_to({DECODE_GENERATE: generate})
    stream = channel.bidi(DECODE_GENERATE, requests(), timeout_s=60.0)
    first = asyncio.create_task(collect(stream))
    await world.clock.sleep(0.2)
    assert not called.is_set()
    outbox.put_nowait(GENERATE)
    assert await world.within(10.0, first) == [m.GenerateChunk(0, (1, 2), None)]


@contract
async def test_a_stream_that_was_opened_for_nothing_leaves_nothing(world: World) -> None:
    closed = asyncio.Event()

    async def requests() -> AsyncGenerator[m.GenerateCall, None]:
        try:
            await asyncio.Event().wait()
            yield GENERATE
        finally:
            closed.set()

    server = await world.serve({DECODE_GENERATE: steady_generate})
    stream = world.connect(server.address).bidi(DECODE_GENERATE, requests(), timeout_s=60.0)
    first = asyncio.create_task(collect(stream))
    await world.clock.sleep(0.2)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await world.within(10.0, closed.wait())
    await world.within(10.0, server.aclose(grace_s=30.0))


@contract
async def test_calls_run_side_by_side(world: World) -> None:
    everyone = asyncio.Barrier(20)

    async def cancel(call: m.CancelCall) -> m.CancelResult:
        await everyone.wait()
        return m.CancelResult(found=call.request_id == "7")

    channel = await world.channel_to({ROUTER_CANCEL: cancel, SESSION: echo})
    async with aclosing(channel.bidi(SESSION, cancels(1))) as session:
        await anext(session)
        calls = [m.CancelCall(RequestId(str(i))) for i in range(20)]
        results = await asyncio.gather(*(channel.unary(ROUTER_CANCEL, c, timeout_s=10.0) for c in calls))
    assert [i for i, result in enumerate(results) if result.found] == [7]


@contract
async def test_a_writer_far_ahead_of_its_reader_waits(world: World) -> None:
    num_written = 0

    async def endless(call: m.GenerateCall) -> AsyncGenerator[m.GenerateChunk, None]:
        nonlocal num_written
        while True:
            num_written += 1
            yield m.GenerateChunk(num_written, tuple(range(4000)), None)

    channel = await world.channel_to({DECODE_GENERATE: endless})
    async with aclosing(channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=60.0)) as stream:
        await anext(stream)
        before = -1
        async with world.clock.timeout(50.0):
            while num_written > before:
                before = num_written
                await world.clock.sleep(0.3)
        await anext(stream)


# --- the contract: errors ---


@pytest.mark.parametrize("code", sorted(BY_CODE))
@contract
async def test_an_error_of_the_handler_is_raised_at_the_caller(world: World, code: str) -> None:
    error = BY_CODE[code]("naïve 说明 \N{PILE OF POO}\nline two", param="käse", retry_after_s=1.5)

    async def cancel(call: m.CancelCall) -> m.CancelResult:
        raise error

    async def generate(call: m.GenerateCall) -> AsyncGenerator[m.GenerateChunk, None]:
        yield m.GenerateChunk(0, (), None)
        yield m.GenerateChunk(1, (), None)
        raise error

    async def session(requests: AsyncIterator[m.SessionUp]) -> AsyncGenerator[m.SessionDown, None]:
        await anext(requests)
        raise error
        yield

    channel = await world.channel_to({ROUTER_CANCEL: cancel, DECODE_GENERATE: generate, SESSION: session})
    with pytest.raises(BatonError) as unary_error:
        await channel.unary(ROUTER_CANCEL, CALL, timeout_s=10.0)
    stream = channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=10.0)
    assert [(await anext(stream)).first_index, (await anext(stream)).first_index] == [0, 1]
    with pytest.raises(BatonError) as stream_error:
        await anext(stream)
    outbox = Outbox()
    outbox.say(1)
    with pytest.raises(BatonError) as session_error:
        await collect(channel.bidi(SESSION, outbox.requests()))
    for caught in (unary_error, stream_error, session_error):
        raised = caught.value
        assert (type(raised), raised.message, raised.param, raised.retry_after_s) == (
            type(error), error.message, "käse", 1.5
        )  # fmt: skip
    assert outbox.closed.is_set()


@contract
async def test_an_error_without_details_stays_without(world: World) -> None:
    async def cancel(call: m.CancelCall) -> m.CancelResult:
        raise Overloaded("")

    channel = await world.channel_to({ROUTER_CANCEL: cancel})
    with pytest.raises(Overloaded) as caught:
        await channel.unary(ROUTER_CANCEL, CALL, timeout_s=10.0)
    assert (caught.value.message, caught.value.param, caught.value.retry_after_s) == ("", None, None)


@contract
async def test_other_exceptions_arrive_as_internal_error_and_are_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def cancel(call: m.CancelCall) -> m.CancelResult:
        raise ZeroDivisionError("secret of the server")

    async def generate(call: m.GenerateCall) -> AsyncGenerator[m.GenerateChunk, None]:
        yield m.GenerateChunk(0, (), None)
        raise KeyError("secret of the server")

    channel = await world.channel_to({ROUTER_CANCEL: cancel, DECODE_GENERATE: generate})
    with caplog.at_level(logging.ERROR, "baton.rpc"):
        with pytest.raises(InternalError, match="ZeroDivisionError") as caught:
            await channel.unary(ROUTER_CANCEL, CALL, timeout_s=10.0)
        with pytest.raises(InternalError, match="KeyError"):
            await collect(channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=10.0))
    assert "secret" not in caught.value.message
    assert caplog.text.count("secret of the server") >= 2


@contract
async def test_a_handler_that_waited_for_something_cancelled_is_an_internal_error(world: World) -> None:
    async def cancel(call: m.CancelCall) -> m.CancelResult:
        other = asyncio.create_task(asyncio.Event().wait())
        asyncio.get_running_loop().call_soon(other.cancel)
        await other
        raise AssertionError

    channel = await world.channel_to({ROUTER_CANCEL: cancel})
    with pytest.raises(InternalError):
        await channel.unary(ROUTER_CANCEL, CALL, timeout_s=10.0)


@contract
async def test_a_method_that_is_not_served_is_an_internal_error(world: World) -> None:
    channel = await world.channel_to({ROUTER_CANCEL: found})
    with pytest.raises(InternalError, match="Get"):
        await channel.unary(STATUS_GET, m.StatusCall(), timeout_s=10.0)
    with pytest.raises(InternalError, match="ListWorkers"):  # of a service that is served
        await channel.unary(ROUTER_LIST_WORKERS, m.ListWorkersCall(), timeout_s=10.0)


@contract
async def test_what_the_requests_raise_is_raised_at_the_caller_and_cancels_the_handler(world: World) -> None:
    hanging = Hanging()
    channel = await world.channel_to(hanging.handlers)

    async def requests() -> AsyncGenerator[m.SessionUp, None]:
        yield m.Cancel(1)
        await hanging.started.wait()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await collect(channel.bidi(SESSION, requests(), timeout_s=10.0))
    await world.within(10.0, hanging.ended.wait())


# --- the contract: ends ---


@contract
async def test_a_deadline_ends_a_unary_call_and_cancels_its_handler(world: World) -> None:
    hanging = Hanging()
    channel = await world.channel_to(hanging.handlers)
    with pytest.raises(DeadlineExceeded):
        await world.within(10.0, channel.unary(ROUTER_CANCEL, CALL, timeout_s=0.3))
    await world.within(10.0, hanging.ended.wait())
    assert hanging.how == "cancelled"


@contract
async def test_a_deadline_ends_streams_and_cancels_their_handlers(world: World) -> None:
    for bidi in (False, True):
        hanging, outbox = Hanging(), Outbox()
        channel = await world.channel_to(hanging.handlers)
        outbox.say(1)
        stream: AsyncGenerator[Any, None] = (
            channel.bidi(SESSION, outbox.requests(), timeout_s=0.5)
            if bidi
            else channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=0.5)
        )
        await world.within(10.0, anext(stream))
        with pytest.raises(DeadlineExceeded):
            await world.within(10.0, anext(stream))
        await world.within(10.0, hanging.ended.wait())
        assert hanging.how == "cancelled"


@contract
async def test_a_cancelled_caller_cancels_a_unary_handler(world: World) -> None:
    hanging = Hanging()
    channel = await world.channel_to(hanging.handlers)
    calling = asyncio.create_task(channel.unary(ROUTER_CANCEL, CALL, timeout_s=60.0))
    await world.within(10.0, hanging.started.wait())
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await world.within(10.0, hanging.ended.wait())
    assert hanging.how == "cancelled"


@contract
async def test_a_caller_cancelled_while_it_waits_for_a_message_cancels_the_handler(world: World) -> None:
    hanging, outbox = Hanging(), Outbox()
    channel = await world.channel_to(hanging.handlers)
    session = channel.bidi(SESSION, outbox.requests())
    outbox.say(1)
    await world.within(10.0, anext(session))
    with pytest.raises(TimeoutError):
        async with world.clock.timeout(0.05):
            await anext(session)
    await world.within(10.0, hanging.ended.wait())
    await world.within(10.0, outbox.closed.wait())
    with pytest.raises(StopAsyncIteration):
        await anext(session)


@contract
async def test_a_caller_that_closes_a_stream_early_ends_the_handler(world: World) -> None:
    for bidi in (False, True):
        hanging, outbox = Hanging(), Outbox()
        channel = await world.channel_to(hanging.handlers)
        outbox.say(1)
        stream: AsyncGenerator[Any, None] = (
            channel.bidi(SESSION, outbox.requests())
            if bidi
            else channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=60.0)
        )
        await world.within(10.0, anext(stream))
        await stream.aclose()
        await world.within(10.0, hanging.ended.wait())
        assert outbox.closed.is_set() is bidi


@contract
async def test_a_cancelled_handler_cleans_up_to_its_end(world: World) -> None:
    cleaned = asyncio.Event()

    async def generate(call: m.GenerateCall) -> AsyncGenerator[m.GenerateChunk, None]:
        try:
            yield m.GenerateChunk(0, (), None)
            await asyncio.Event().wait()
        finally:
            await world.clock.sleep(0.6)
            cleaned.set()

    server = await world.serve({DECODE_GENERATE: generate})
    channel = world.connect(server.address)
    stream = channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=0.5)
    await world.within(10.0, anext(stream))
    with pytest.raises(TimeoutError):
        await world.within(0.1, anext(stream))
    await world.clock.sleep(0.5)  # the deadline passes meanwhile
    await world.within(10.0, server.aclose(0.0))
    assert cleaned.is_set()


@contract
async def test_a_handler_stuck_in_writing_is_closed_when_the_caller_leaves(world: World) -> None:
    closed = asyncio.Event()

    async def endless(call: m.GenerateCall) -> AsyncGenerator[m.GenerateChunk, None]:
        try:
            while True:
                yield m.GenerateChunk(0, tuple(range(4000)), None)
        finally:
            closed.set()

    channel = await world.channel_to({DECODE_GENERATE: endless})
    stream = channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=60.0)
    await anext(stream)
    await world.clock.sleep(0.3)
    await stream.aclose()
    await world.within(10.0, closed.wait())


@contract
async def test_nobody_listening_is_unavailable(world: World) -> None:
    server = await world.serve({ROUTER_CANCEL: found})
    await server.aclose(0.0)
    channel = world.connect(server.address)
    with pytest.raises(Unavailable):
        await world.within(10.0, channel.unary(ROUTER_CANCEL, CALL, timeout_s=60.0))
    with pytest.raises(Unavailable):
        await world.within(10.0, collect(channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=None)))
    outbox = Outbox()
    with pytest.raises(Unavailable):
        await world.within(10.0, collect(channel.bidi(SESSION, outbox.requests())))


@contract
async def test_a_killed_peer_is_unavailable_for_calls_in_flight_and_later_ones(world: World) -> None:
    address = await world.start_process()
    channel, outbox = world.connect(address), Outbox()
    await until_it_answers(world, channel)
    outbox.say(1)
    session = channel.bidi(SESSION, outbox.requests())
    stream = channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=None)
    await world.within(10.0, anext(session))
    await world.within(10.0, anext(stream))
    hang = m.CancelCall(RequestId("hang"))
    unary = asyncio.create_task(channel.unary(ROUTER_CANCEL, hang, timeout_s=60.0))
    await world.clock.sleep(0.2)

    await world.kill_process(address)
    for call in (anext(session), anext(stream), unary):
        with pytest.raises(Unavailable):
            await world.within(2.0, call)
    for _ in range(3):
        with pytest.raises(Unavailable):
            await world.within(2.0, channel.unary(ROUTER_CANCEL, CALL, timeout_s=60.0))


@contract
async def test_a_channel_reconnects_to_a_peer_that_came_back(world: World) -> None:
    address = await world.start_process()
    channel = world.connect(address)
    await until_it_answers(world, channel)
    for _ in range(2):
        await world.kill_process(address)
        with pytest.raises(Unavailable):
            while True:
                await channel.unary(ROUTER_CANCEL, CALL, timeout_s=5.0)
        await world.start_process(address)
        started = world.clock.now()
        await until_it_answers(world, channel)
        assert world.clock.now() - started < 5.0


@contract
async def test_a_closing_server_lets_running_calls_end_and_refuses_new_ones(world: World) -> None:
    release = asyncio.Event()

    async def slow(requests: AsyncIterator[m.SessionUp]) -> AsyncGenerator[m.SessionDown, None]:
        yield m.Failure((await anext(requests)).handle, "first", "")
        await release.wait()
        yield m.Failure(0, "last", "")

    server = await world.serve({SESSION: slow, ROUTER_CANCEL: found})
    channel = world.connect(server.address)
    session = channel.bidi(SESSION, cancels(1), timeout_s=60.0)
    await world.within(10.0, anext(session))
    closing = asyncio.create_task(server.aclose(grace_s=30.0))
    await world.clock.sleep(0.2)
    with pytest.raises(Unavailable):
        await world.within(10.0, world.connect(server.address).unary(ROUTER_CANCEL, CALL, timeout_s=60.0))
    assert not closing.done()
    release.set()
    assert [answer.code for answer in await collect(session)] == ["last"]
    await world.within(20.0, closing)


@contract
async def test_a_closing_server_cancels_what_outlives_its_grace(world: World) -> None:
    hanging = Hanging()
    server = await world.serve(hanging.handlers)
    channel = world.connect(server.address)
    stream = channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=None)
    await world.within(10.0, anext(stream))
    await world.within(20.0, server.aclose(grace_s=0.2))
    assert hanging.how == "cancelled"
    with pytest.raises(Unavailable):
        await world.within(10.0, anext(stream))
    await server.aclose(grace_s=0.2)


@contract
async def test_a_closed_channel_is_unavailable(world: World) -> None:
    hanging, outbox = Hanging(), Outbox()
    channel = await world.channel_to(hanging.handlers)
    outbox.say(1)
    session = channel.bidi(SESSION, outbox.requests())
    await world.within(10.0, anext(session))
    unary = asyncio.create_task(channel.unary(ROUTER_CANCEL, CALL, timeout_s=60.0))
    await world.clock.sleep(0.1)
    await channel.aclose()
    for call in (anext(session), unary, channel.unary(ROUTER_CANCEL, CALL, timeout_s=60.0)):
        with pytest.raises(Unavailable):
            await world.within(10.0, call)
    await world.within(10.0, hanging.ended.wait())
    await channel.aclose()


@contract
async def test_a_port_in_use_is_a_config_error_that_names_it(world: World) -> None:
    server = await world.serve({ROUTER_CANCEL: found})
    port = server.address.rpartition(":")[2]
    with pytest.raises(ConfigError, match=f"port {port} is in use"):
        await world.rpc.serve(server.address, {ROUTER_CANCEL: found})
    await server.aclose(0.0)
    again = await world.serve({ROUTER_CANCEL: found}, server.address)
    assert again.address == server.address
    await until_it_answers(world, world.connect(again.address))


# --- gRPC alone ---


@pytest.fixture
def grpc_world() -> GrpcWorld:
    return GrpcWorld()


def over_grpc(scenario: Scenario) -> Callable[..., None]:
    @wraps(scenario)
    def test(grpc_world: GrpcWorld) -> None:
        grpc_world.run(lambda world: scenario(grpc_world=world))

    return test


@asynccontextmanager
async def plain_channel(address: str) -> AsyncGenerator[grpc.aio.Channel, None]:
    """As a client that is not Baton opens it."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel


@over_grpc
async def test_health_is_per_service_and_overall_and_follows_set_serving(grpc_world: GrpcWorld) -> None:
    server = await grpc_world.serve({ROUTER_CANCEL: found, SESSION: echo})
    names = ("", "baton.v1.Router", "baton.v1.Decode")
    async with plain_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def statuses() -> set[int]:
            requests = [health_pb2.HealthCheckRequest(service=name) for name in names]
            return {(await stub.Check(request, timeout=10.0)).status for request in requests}

        assert await statuses() == {health_pb2.HealthCheckResponse.NOT_SERVING}
        server.set_serving(True)
        assert await statuses() == {health_pb2.HealthCheckResponse.SERVING}
        assert set((await stub.List(health_pb2.HealthListRequest(), timeout=10.0)).statuses) == set(names)
        server.set_serving(False)
        assert await statuses() == {health_pb2.HealthCheckResponse.NOT_SERVING}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="baton.v1.Prefill"), timeout=10.0)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@over_grpc
async def test_a_health_watch_tells_changes_and_ends_with_the_server(grpc_world: GrpcWorld) -> None:
    response = health_pb2.HealthCheckResponse
    server = await grpc_world.serve({ROUTER_CANCEL: found})
    async with plain_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="baton.v1.Router"), timeout=30.0)
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="other"), timeout=30.0)
        told = aiter(watch)
        assert (await anext(told)).status == response.NOT_SERVING
        server.set_serving(True)
        assert (await anext(told)).status == response.SERVING
        assert (await anext(aiter(unknown))).status == response.SERVICE_UNKNOWN
        await grpc_world.within(10.0, server.aclose(grace_s=20.0))
        assert [message.status async for message in told] == [response.NOT_SERVING]


@over_grpc
async def test_a_health_checking_client_reaches_a_serving_server(grpc_world: GrpcWorld) -> None:
    server = await grpc_world.serve({ROUTER_CANCEL: found})
    config = '{"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": "baton.v1.Router"}}'
    async with grpc.aio.insecure_channel(
        server.address, options=[("grpc.service_config", config)]
    ) as channel:
        cancel = channel.unary_unary(ROUTER_CANCEL.path)
        with pytest.raises(grpc.aio.AioRpcError):
            await cancel(codec.encode(CALL), timeout=10.0)
        server.set_serving(True)
        answer = await cancel(codec.encode(CALL), timeout=10.0, wait_for_ready=True)
        assert codec.decode(m.CancelResult, answer) == m.CancelResult(found=True)


@over_grpc
async def test_reflection_lists_all_services_and_describes_ours(grpc_world: GrpcWorld) -> None:
    server = await grpc_world.serve({ROUTER_CANCEL: found, SESSION: echo, STATUS_GET: found})

    def reflect() -> tuple[set[str], set[str]]:
        with grpc.insecure_channel(server.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            file = database.FindFileContainingSymbol("baton.v1.Decode")
            return set(database.get_services()), {method.name for method in file.service[0].method}

    services, methods = await asyncio.to_thread(reflect)
    assert services == {
        "baton.v1.Router",
        "baton.v1.Decode",
        "baton.v1.Status",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert methods == {"Session", "Generate"}


@over_grpc
async def test_other_clients_get_a_status_that_says_what_is_wrong(grpc_world: GrpcWorld) -> None:
    async def cancel(call: m.CancelCall) -> m.CancelResult:
        raise Overloaded("too much", retry_after_s=2.0)

    server = await grpc_world.serve({ROUTER_CANCEL: cancel, DECODE_GENERATE: steady_generate})
    async with plain_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as overloaded:
            await channel.unary_unary(ROUTER_CANCEL.path)(codec.encode(CALL), timeout=10.0)
        with pytest.raises(grpc.aio.AioRpcError) as garbage:
            await channel.unary_unary(ROUTER_CANCEL.path)(b"\xff", timeout=10.0)
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await collect(channel.unary_stream(DECODE_GENERATE.path)(b"", timeout=10.0))
    codes = [caught.value.code() for caught in (overloaded, garbage, missing)]
    assert codes == [
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.INVALID_ARGUMENT,
    ]
    assert overloaded.value.details() == "too much"
    assert missing.value.details() == "request: is missing"


@over_grpc
async def test_requests_that_do_not_fit_the_proto_are_refused_before_they_leave(
    grpc_world: GrpcWorld,
) -> None:
    hanging = Hanging()
    channel = await grpc_world.channel_to(hanging.handlers)
    with pytest.raises(InvalidRequest, match="handle"):
        await collect(channel.bidi(SESSION, cancels(1, -1), timeout_s=10.0))
    await grpc_world.within(10.0, hanging.ended.wait())
    with pytest.raises(InvalidRequest, match="request_id"):
        await channel.unary(ROUTER_CANCEL, m.CancelCall(RequestId("\ud800")), timeout_s=10.0)


@over_grpc
async def test_answers_that_do_not_fit_the_proto_are_internal_errors(grpc_world: GrpcWorld) -> None:
    async def generate(call: m.GenerateCall) -> AsyncGenerator[m.GenerateChunk, None]:
        yield m.GenerateChunk(-1, (), None)

    channel = await grpc_world.channel_to({DECODE_GENERATE: generate})
    with pytest.raises(InternalError):
        await collect(channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=10.0))


@over_grpc
async def test_an_answer_that_is_not_the_proto_is_an_internal_error_at_the_caller(
    grpc_world: GrpcWorld,
) -> None:
    async def wrong(requests: Any, context: Any) -> None:
        await context.write(b"\xff")

    server = grpc.aio.server()
    methods = {"Generate": grpc.stream_stream_rpc_method_handler(wrong)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(DECODE_GENERATE.service, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = grpc_world.connect(f"127.0.0.1:{port}")
    with pytest.raises(InternalError, match="wrongly"):
        await collect(channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=10.0))
    await server.stop(None)


@over_grpc
async def test_a_message_of_some_mib_passes(grpc_world: GrpcWorld) -> None:
    tokens = tuple(range(2_000_000))

    async def generate(call: m.GenerateCall) -> AsyncGenerator[m.GenerateChunk, None]:
        yield m.GenerateChunk(0, call.request.prompt_token_ids, None)

    channel = await grpc_world.channel_to({DECODE_GENERATE: generate})
    call = m.GenerateCall(Request(RequestId("r"), tokens), deadline_s=60.0)
    (chunk,) = await collect(channel.server_stream(DECODE_GENERATE, call, timeout_s=60.0))
    assert chunk.token_ids == tokens


@over_grpc
async def test_a_peer_that_hangs_with_its_connection_open_becomes_unavailable(grpc_world: GrpcWorld) -> None:
    address = await grpc_world.start_process()
    channel = grpc_world.connect(address)
    stream = channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=None)
    await grpc_world.within(10.0, anext(stream))
    os.kill(grpc_world.processes[address].pid, signal.SIGSTOP)
    with pytest.raises(Unavailable):
        await grpc_world.within(20.0, anext(stream))


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:http!", "no host:1", "192.0.2.1:0"])
def test_addresses_that_cannot_be_bound_are_config_errors(grpc_world: GrpcWorld, address: str) -> None:
    async def main(world: World) -> None:
        with pytest.raises(ConfigError, match="cannot listen"):
            await world.rpc.serve(address, {ROUTER_CANCEL: found})

    grpc_world.run(main)


def test_a_port_that_something_else_holds_is_a_config_error(grpc_world: GrpcWorld) -> None:
    async def main(world: World) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(ConfigError, match=f"port {port} is in use"):
                await world.rpc.serve(f"127.0.0.1:{port}", {ROUTER_CANCEL: found})

    grpc_world.run(main)


# --- in process alone ---


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


def test_messages_take_the_time_of_their_link(clock: VirtualClock) -> None:
    async def main() -> None:
        network = InprocRpcNetwork(clock, latency_s=0.010)
        rpc = InprocRpc(network, clock, "a")
        server = await rpc.serve("b:1", {ROUTER_CANCEL: found})
        channel = rpc.connect(server.address)
        await channel.unary(ROUTER_CANCEL, CALL, timeout_s=1.0)
        assert clock.now() == pytest.approx(0.020)
        network.set_link("a", "b:1", latency_s=1.0)
        with pytest.raises(DeadlineExceeded):
            await channel.unary(ROUTER_CANCEL, CALL, timeout_s=1.9)
        await channel.unary(ROUTER_CANCEL, CALL, timeout_s=2.1)
        assert clock.now() == pytest.approx(0.020 + 1.9 + 2.0)
        await server.aclose(1.0)

    clock.run(main())


def _event_log(seed: int) -> list[tuple[float, int, int]]:
    """When which message of which of three sessions arrived."""
    clock, log = VirtualClock(), []

    async def main() -> None:
        network = InprocRpcNetwork(clock, seed, latency_s=0.001, jitter_s=0.005)
        server = await InprocRpc(network, clock).serve("h:0", {SESSION: echo})

        async def one(caller: int) -> None:
            channel = InprocRpc(network, clock, f"caller-{caller}").connect(server.address)
            with suppress(Unavailable):
                async for answer in channel.bidi(SESSION, slow_cancels(), timeout_s=60.0):
                    log.append((clock.now(), caller, handle_of(answer)))

        async def slow_cancels() -> AsyncGenerator[m.SessionUp, None]:
            for handle in range(50):
                await clock.sleep(0.002)
                yield m.Cancel(handle)

        async with asyncio.TaskGroup() as tasks:
            for caller in range(3):
                tasks.create_task(one(caller))
            await clock.sleep(0.08)
            network.kill(server.address)

    clock.run(main())
    return log


def test_the_same_seed_gives_the_same_order_and_times() -> None:
    first = _event_log(seed=3)
    assert len(first) > 60
    assert first == _event_log(seed=3)
    assert first != _event_log(seed=4)
    for caller in range(3):
        handles = [handle for _, who, handle in first if who == caller]
        assert handles == list(range(len(handles)))


def test_a_short_partition_delays_and_a_long_one_is_unavailable_at_both_ends(clock: VirtualClock) -> None:
    async def main() -> None:
        network = InprocRpcNetwork(clock, detection_s=3.0)
        rpc, hanging, outbox = InprocRpc(network, clock, "a"), Hanging(), Outbox()
        server = await rpc.serve("b:1", hanging.handlers)
        channel = rpc.connect(server.address)
        session = channel.bidi(SESSION, outbox.requests())
        outbox.say(1)
        assert handle_of(await anext(session)) == 1

        network.partition("a", "b:1")
        outbox.say(2)
        outbox.say(3)
        asyncio.get_running_loop().call_later(2.0, network.heal, "a", "b:1")
        assert [handle_of(await anext(session)), handle_of(await anext(session))] == [2, 3]
        assert clock.now() == pytest.approx(2.0)

        network.partition("a", "b:1")
        outbox.say(4)
        with pytest.raises(Unavailable):
            await anext(session)
        assert clock.now() == pytest.approx(5.0)
        await hanging.ended.wait()
        assert hanging.how == "cancelled"
        with pytest.raises(Unavailable):
            await channel.unary(ROUTER_CANCEL, CALL, timeout_s=1.0)

        network.heal("a", "b:1")
        async with aclosing(channel.server_stream(DECODE_GENERATE, GENERATE, timeout_s=1.0)) as stream:
            assert (await anext(stream)).first_index == 0
        await server.aclose(0.0)

    clock.run(main())


@pytest.mark.parametrize("heals", [True, False])
def test_a_caller_that_leaves_during_a_partition_is_noticed_after_it(
    clock: VirtualClock, heals: bool
) -> None:
    async def main() -> None:
        network = InprocRpcNetwork(clock, detection_s=3.0)
        rpc, hanging = InprocRpc(network, clock, "a"), Hanging()
        server = await rpc.serve("b:1", hanging.handlers)
        stream = rpc.connect(server.address).server_stream(DECODE_GENERATE, GENERATE, timeout_s=None)
        await anext(stream)
        network.partition("a", "b:1")
        await stream.aclose()
        await clock.sleep(1.0)
        assert not hanging.ended.is_set()
        if heals:
            network.heal("a", "b:1")
        await hanging.ended.wait()
        assert clock.now() == pytest.approx(1.0 if heals else 3.0)
        await server.aclose(0.0)

    clock.run(main())


def test_the_calls_of_a_killed_process_are_cancelled_where_they_run(clock: VirtualClock) -> None:
    async def main() -> None:
        network, hanging = InprocRpcNetwork(clock), Hanging()
        server = await InprocRpc(network, clock, "b:1").serve("b:1", hanging.handlers)
        await InprocRpc(network, clock, "a:1").serve("a:1", {})
        channel = InprocRpc(network, clock, "a:1").connect("b:1")
        call = asyncio.create_task(channel.unary(ROUTER_CANCEL, CALL, timeout_s=60.0))
        await hanging.started.wait()
        network.kill("a:1")
        with pytest.raises(Unavailable):
            await call
        await hanging.ended.wait()
        assert hanging.how == "cancelled"
        await server.aclose(0.0)

    clock.run(main())


def test_streams_that_nobody_closed_end_quietly_with_the_loop(
    clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        network, hanging = InprocRpcNetwork(clock), Hanging()
        server = await InprocRpc(network, clock).serve("b:1", hanging.handlers)
        stream = (
            InprocRpc(network, clock).connect("b:1").server_stream(DECODE_GENERATE, GENERATE, timeout_s=None)
        )
        await anext(stream)
        left_open.append((server, stream))

    left_open: list[Any] = []
    clock.run(main())
    assert caplog.text == ""


def test_serving_is_what_the_server_said(clock: VirtualClock) -> None:
    async def main() -> None:
        network = InprocRpcNetwork(clock)
        server = await InprocRpc(network, clock).serve("h:0", {})
        assert not network.is_serving(server.address)
        server.set_serving(True)
        assert network.is_serving(server.address)
        await server.aclose(0.0)
        assert not network.is_serving(server.address)

    clock.run(main())


# --- the server process ---


async def _serve(address: str) -> None:
    clock = SystemClock()
    server = await GrpcRpc(clock).serve(address, steady_handlers(clock))
    server.set_serving(True)
    print(server.address, flush=True)  # noqa: T201
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
