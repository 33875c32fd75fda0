"""RPC inside one process, over a network of links with latency, jitter and faults. Messages pass as they are.

    caller --- up ---> handler (a task per call)
           <-- down --

On a VirtualClock all of it is a function of the program and the seed: each link draws its jitter from a generator of
its own, and whatever has to be told in some order is kept in the order of its making.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any, NamedTuple

from baton.clock import Clock
from baton.errors import BatonError, ConfigError, DeadlineExceeded, InternalError, Unavailable, from_code
from baton.rpc.base import Channel, Handlers, Method, Req, Res, Rpc, Server
from baton.rpc.calls import Feeding, respond

MAX_UNREAD = 256  # messages of one direction of one call; then the writer waits
FIRST_FREE_PORT = 50000
_RESOLUTION_S = 1e-9  # rounding of a virtual clock


class InprocRpcNetwork:
    """Who listens where, the links between callers and servers, and the faults that a test switches on.

    A link belongs to a caller (the name of its InprocRpc) and a server's address. A partition is silence: what is
    under way waits, and when it lasts for `detection_s`, as with keepalive, both ends give up their calls.
    """

    def __init__(
        self,
        clock: Clock,
        seed: int = 0,
        *,
        latency_s: float = 0.0,
        jitter_s: float = 0.0,
        detection_s: float = 3.0,
    ) -> None:
        self.clock = clock
        self._seed = seed
        self._latency_s = latency_s
        self._jitter_s = jitter_s
        self._detection_s = detection_s
        self._servers: dict[str, _Server] = {}
        self._links: dict[tuple[str, str], _Link] = {}
        self._next_port = FIRST_FREE_PORT

    def kill(self, address: str) -> None:
        """The process at this address is gone: what it serves, and what it calls under that name."""
        self._servers.pop(address, None)
        for (caller, callee), link in self._links.items():
            if address in (caller, callee):
                link.lose(Unavailable(f"{address} is gone"))

    def partition(self, caller: str, address: str) -> None:
        self.link(caller, address).go_down()

    def heal(self, caller: str, address: str) -> None:
        self.link(caller, address).come_up()

    def set_link(self, caller: str, address: str, *, latency_s: float, jitter_s: float = 0.0) -> None:
        link = self.link(caller, address)
        link.latency_s, link.jitter_s = latency_s, jitter_s

    def is_serving(self, address: str) -> bool:
        """What a health check would see."""
        return address in self._servers and self._servers[address].serving

    def link(self, caller: str, address: str) -> "_Link":
        if (caller, address) not in self._links:
            rng = random.Random(f"{self._seed} {caller} {address}")
            link = _Link(self.clock, rng, self._latency_s, self._jitter_s, self._detection_s)
            self._links[caller, address] = link
        return self._links[caller, address]

    def server(self, address: str) -> "_Server":
        if address not in self._servers:
            raise Unavailable(f"nobody listens at {address}")
        return self._servers[address]

    def bind(self, address: str, handlers: Handlers, clock: Clock) -> "_Server":
        host, _, port = address.rpartition(":")
        if port == "0":
            address, self._next_port = f"{host}:{self._next_port}", self._next_port + 1
        if address in self._servers:
            raise ConfigError(f"port {port} is in use on {host}")
        self._servers[address] = server = _Server(self, address, handlers, clock)
        return server

    def unbind(self, server: "_Server") -> None:
        if self._servers.get(server.address) is server:
            del self._servers[server.address]


class InprocRpc(Rpc):
    """`name` is the caller's end of its links. A process that also serves takes its address for it."""

    def __init__(self, network: InprocRpcNetwork, clock: Clock, name: str = "caller") -> None:
        self._network = network
        self._clock = clock
        self._name = name

    async def serve(self, address: str, handlers: Handlers) -> Server:
        return self._network.bind(address, handlers, self._clock)

    def connect(self, address: str) -> Channel:
        return _Channel(self._network, self._name, address)


class _Channel(Channel):
    def __init__(self, network: InprocRpcNetwork, caller: str, address: str) -> None:
        self._network = network
        self._address = address
        self._link = network.link(caller, address)
        self._closed = False
        self._calls: dict[_Call, None] = {}

    async def unary(self, method: Method[Req, Res], request: Req, *, timeout_s: float) -> Res:
        async with aclosing(self.server_stream(method, request, timeout_s=timeout_s)) as answers:
            async for answer in answers:
                return answer
        raise InternalError(f"{method.path} ended without an answer")

    async def aclose(self) -> None:
        self._closed = True
        for call in tuple(self._calls):
            call.end(Unavailable(f"the channel to {self._address} is closed"))

    async def _stream(
        self, method: Method[Req, Res], requests: AsyncIterator[Req], timeout_s: float | None
    ) -> AsyncGenerator[Res, None]:
        call = self._open(method, timeout_s)
        self._calls[call] = None
        try:
            async with Feeding(requests, call.up.send, call.up.finish, call.end):
                async for answer in call.down:
                    yield answer
        finally:
            del self._calls[call]
            call.leave()

    def _open(self, method: Method[Any, Any], timeout_s: float | None) -> "_Call":
        if self._closed:
            raise Unavailable(f"the channel to {self._address} is closed")
        if self._link.is_lost:
            raise Unavailable(f"{self._address} cannot be reached")
        server = self._network.server(self._address)
        call = _Call(self._link, method, timeout_s)
        server.accept(call)
        return call


class _Server(Server):
    def __init__(self, network: InprocRpcNetwork, address: str, handlers: Handlers, clock: Clock) -> None:
        self.address = address
        self.serving = False
        self._network = network
        self._handlers = handlers
        self._clock = clock
        self._calls: dict[_Call, None] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def set_serving(self, serving: bool) -> None:
        self.serving = serving

    async def aclose(self, grace_s: float) -> None:
        self.serving = False
        self._network.unbind(self)
        try:
            async with self._clock.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            for call in tuple(self._calls):
                call.end(Unavailable(f"{self.address} is closed"))
            await self._idle.wait()

    def accept(self, call: "_Call") -> None:
        self._calls[call] = None
        self._idle.clear()
        call.start(self._handlers.get(call.method), self)

    def ended(self, call: "_Call") -> None:
        del self._calls[call]
        if not self._calls:
            self._idle.set()


class _Link:
    """`down_since` is None while messages pass. `calls` are those that a loss of the link would end."""

    def __init__(
        self, clock: Clock, rng: random.Random, latency_s: float, jitter_s: float, detection_s: float
    ) -> None:
        self.clock = clock
        self.latency_s = latency_s
        self.jitter_s = jitter_s
        self.down_since: float | None = None
        self.calls: dict[_Call, None] = {}
        self._rng = rng
        self._detection_s = detection_s
        self._giving_up: asyncio.TimerHandle | None = None

    @property
    def is_lost(self) -> bool:
        return self.down_since is not None and self._giving_up is None

    def delay(self) -> float:
        return self.latency_s + (self._rng.uniform(0.0, self.jitter_s) if self.jitter_s else 0.0)

    def go_down(self) -> None:
        if self.down_since is None:
            self.down_since = self.clock.now()
            self._giving_up = asyncio.get_running_loop().call_later(self._detection_s, self._give_up)

    def come_up(self) -> None:
        self.down_since = None
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
        for call in tuple(self.calls):
            call.link_is_up()

    def lose(self, error: BatonError) -> None:
        for call in tuple(self.calls):
            call.end(error)

    def _give_up(self) -> None:
        self._giving_up = None
        self.lose(Unavailable("the peer does not answer"))


class _Call:
    """Lives until the caller has left and the handler has ended."""

    def __init__(self, link: _Link, method: Method[Any, Any], timeout_s: float | None) -> None:
        self.method = method
        self.up = _Pipe(link)
        self.down = _Pipe(link)
        self._link = link
        self._timeout_s = timeout_s
        self._left = False
        self._told = False
        self._handling: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def start(self, handler: Any, server: _Server) -> None:
        self._link.calls[self] = None
        self.up.put(_OPENED)
        self._handling = asyncio.create_task(self._handle(handler, server.address))
        self._handling.add_done_callback(lambda _: self._handler_ended(server))
        if self._timeout_s is not None:
            late = DeadlineExceeded(f"{self.method.path} took longer than {self._timeout_s:g} s")
            self._deadline = asyncio.get_running_loop().call_later(self._timeout_s, self.end, late)

    def end(self, error: Exception) -> None:
        """Cut off in the middle, at both ends at once."""
        self.up.cut(error)
        self.down.cut(error)
        self._cancel_handler()

    def leave(self) -> None:
        """The caller wants no more. A handler that still runs hears of it when the link has carried the news."""
        self._left = True
        self.down.cut(None)
        if self._handling is None or self._handling.done():
            self._forget()
        elif self._link.down_since is None:
            self._tell_handler()

    def link_is_up(self) -> None:
        self.up.link_is_up()
        self.down.link_is_up()
        if self._left:
            self._tell_handler()

    async def _handle(self, handler: Any, address: str) -> None:
        try:
            await anext(self.up)  # _OPENED: from here on the server knows of the call
            if handler is None:
                raise InternalError(f"{self.method.path} is not served at {address}")
            await respond(self.method, handler, self.up, self.down.send)
        except BatonError as error:
            self.down.put(_End(error))
        else:
            self.down.put(_End(None))

    def _handler_ended(self, server: _Server) -> None:
        server.ended(self)
        if self._left:
            self._forget()

    def _forget(self) -> None:
        self._link.calls.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()

    def _tell_handler(self) -> None:
        if (delay := self._link.delay()) > 0.0:
            asyncio.get_running_loop().call_later(delay, self._cancel_handler)
        else:
            self._cancel_handler()

    def _cancel_handler(self) -> None:
        """Once: whatever else happens to the call, the handler may clean up in peace."""
        if self._handling is not None and not self._told:
            self._told = True
            self._handling.cancel()


_OPENED = object()


class _End(NamedTuple):
    """The last thing that comes out of a pipe. No error: the writer had no more to say."""

    error: Exception | None


class _Pipe(AsyncIterator[Any]):
    """One direction of one call. Messages come out in order, none before it has crossed the link."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        self._messages: deque[tuple[float, Any]] = deque()  # (when it arrives, message)
        self._last_arrival = 0.0
        self._closed = False  # what is written from now on gets lost
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()

    async def send(self, message: Any) -> None:
        """Waits while the reader is far behind, and for ever once there is none: the writer will be cancelled."""
        while self._closed or len(self._messages) >= MAX_UNREAD:
            self._writable.clear()
            await self._writable.wait()
        self.put(message)

    async def finish(self) -> None:
        self.put(_End(None))

    def put(self, message: Any) -> None:
        if not self._closed:
            self._messages.append((self._arrival(), message))
            self._readable.set()

    def link_is_up(self) -> None:
        """What was written meanwhile sets out now."""
        for i, (arrival, message) in enumerate(self._messages):
            if arrival == math.inf:
                self._messages[i] = (self._arrival(), message)
        self._readable.set()

    def cut(self, error: Exception | None) -> None:
        """What has not arrived by now never will."""
        if self._closed:
            return
        while self._messages and not self._is_due(self._messages[-1][0]):
            self._messages.pop()
        self._messages.append((0.0, _End(error)))
        self._closed = True
        self._readable.set()

    async def __anext__(self) -> Any:
        while not (self._messages and self._is_due(self._messages[0][0])):
            await self._wait()
        _, message = self._messages[0]
        if isinstance(message, _End):  # stays there for the next reading
            raise StopAsyncIteration if message.error is None else _anew(message.error)
        self._messages.popleft()
        self._writable.set()
        return message

    def _arrival(self) -> float:
        if self._link.down_since is not None:
            return math.inf
        self._last_arrival = max(self._last_arrival, self._link.clock.now() + self._link.delay())
        return self._last_arrival

    def _is_due(self, arrival: float) -> bool:
        """A link that is down still gives out what arrived before, and news of its own end (arrival 0)."""
        link = self._link
        if link.down_since is not None and arrival > link.down_since:
            return False
        return arrival <= link.clock.now() + _RESOLUTION_S

    async def _wait(self) -> None:
        self._readable.clear()
        clock, is_up = self._link.clock, self._link.down_since is None
        wait_s = self._messages[0][0] - clock.now() if self._messages and is_up else None
        with suppress(TimeoutError):
            async with clock.timeout(wait_s):
                await self._readable.wait()


def _anew(error: Exception) -> Exception:
    """One fault ends many calls; each caller gets an exception of its own."""
    if isinstance(error, BatonError):
        return from_code(error.code, error.message, error.param, error.retry_after_s)
    return error
