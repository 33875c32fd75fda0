"""KV between workers of one process, over a simulated network: for tests and for whole fleets on a virtual clock.

    InprocConnection  --- _Line of _Message ---> ReceiverEnd task, at the transport that listens
                      <--- _Line of _Answer ---

`InprocNetwork` holds every transport, the speed of the links and the faults a test switched on. A message on a line is
a copy, as it would be in a kernel's buffers; what is on it when its sender closes still arrives. What befalls a piece
is a pure function of the network's seed, the piece's header and how often it was sent before: a seed replays a run,
and switching one fault on does not move the others.
"""

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from baton.clock import Clock
from baton.errors import ConfigError, TransferError, TransferRefused
from baton.transfer.base import PIECE_TIMEOUT_S, Connection, PieceSink, Transport
from baton.transfer.ends import ReceiverEnd, SenderEnd
from baton.transfer.vector import Vector
from baton.transfer.wire import PieceHeader

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities per piece."""

    drop: float = 0.0  # it never arrives, so its sender times out
    duplicate: float = 0.0  # it arrives twice
    flip: float = 0.0  # one bit of its payload is wrong


@dataclass(frozen=True, slots=True)
class _Message:
    header: bytes
    payload: bytes
    is_duplicate: bool = False


@dataclass(frozen=True, slots=True)
class _Answer:
    refusal: str | None


class InprocNetwork:
    """`latency_s` is one way; `bytes_per_s` holds for each connection. `faults` may be replaced at any time."""

    def __init__(
        self, clock: Clock, seed: int = 0, *, latency_s: float = 0.0, bytes_per_s: float | None = None
    ) -> None:
        self.clock = clock
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.faults = Faults()
        self._seed = seed
        self._num_sent: Counter[bytes] = Counter()  # by header, while faults are on
        self._transports: dict[str, InprocTransport] = {}
        self._links: list[_Link] = []
        self._partitions: set[frozenset[str]] = set()
        self._healed = asyncio.Event()

    def partition(self, a: str, b: str) -> None:
        """Nothing arrives between the two, and nobody is told. What is on the way waits for `heal`."""
        self._partitions.add(frozenset((a, b)))

    def heal(self, a: str, b: str) -> None:
        self._partitions.discard(frozenset((a, b)))
        self._healed.set()

    def kill(self, address: str) -> None:
        """The worker at this address is gone, without a word. Another transport may take its address."""
        transport = self._transports.pop(address, None)
        if transport is not None:
            transport.dead = True
        for link in [link for link in self._links if address in link.ends]:
            link.cut(TransferError(f"connection {' -> '.join(link.ends)} was reset"))

    # --- for transports and lines ---

    def register(self, transport: "InprocTransport") -> None:
        if transport.address in self._transports:
            raise ConfigError(f"{transport.address} is taken: give every transport an address of its own")
        self._transports[transport.address] = transport

    def unregister(self, transport: "InprocTransport") -> None:
        if self._transports.get(transport.address) is transport:
            del self._transports[transport.address]

    def listener(self, address: str) -> "InprocTransport":
        transport = self._transports.get(address)
        if transport is None or transport.sink is None:
            raise TransferError(f"nobody receives KV at {address}")
        return transport

    def add(self, link: "_Link") -> None:
        self._links.append(link)

    def remove(self, link: "_Link") -> None:
        self._links.remove(link)

    async def wait_connected(self, a: str, b: str) -> None:
        while frozenset((a, b)) in self._partitions:
            self._healed.clear()
            await self._healed.wait()

    def disturb(self, message: _Message) -> list[_Message]:
        """What becomes of a piece on its way."""
        if self.faults == Faults():
            return [message]
        draws = random.Random(b"%d/%d/%b" % (self._seed, self._num_sent[message.header], message.header))
        self._num_sent[message.header] += 1
        drop, duplicate, flip, where = (draws.random() for _ in range(4))
        if flip < self.faults.flip and message.payload:
            payload = bytearray(message.payload)
            bit = int(where * len(payload) * 8)
            payload[bit // 8] ^= 1 << bit % 8
            message = _Message(message.header, bytes(payload))
        if drop < self.faults.drop:
            return []
        if duplicate < self.faults.duplicate:
            return [message, _Message(message.header, message.payload, is_duplicate=True)]
        return [message]


class _Line(Generic[T]):
    """One direction of a connection: in order, `latency_s` after it was put. None is the end of the line."""

    def __init__(self, network: InprocNetwork, ends: tuple[str, str]) -> None:
        self._network = network
        self._ends = ends
        self._messages: deque[tuple[float, T | None]] = deque()
        self._arrived = asyncio.Event()

    def put(self, message: T | None) -> None:
        self._messages.append((self._network.clock.now() + self._network.latency_s, message))
        self._arrived.set()

    async def get(self) -> T | None:
        while not self._messages:
            self._arrived.clear()
            await self._arrived.wait()
        arrival_s, message = self._messages.popleft()
        await self._network.clock.sleep(max(0.0, arrival_s - self._network.clock.now()))
        await self._network.wait_connected(*self._ends)
        return message

    async def carry(self, num_bytes: int) -> None:
        """The time that so many bytes take to arrive; at least one turn of the loop."""
        bytes_per_s = self._network.bytes_per_s
        await self._network.clock.sleep(num_bytes / bytes_per_s if bytes_per_s else 0.0)
        await self._network.wait_connected(*self._ends)


class _Link:
    """A connection as the network sees it. `cut` breaks both ends at once."""

    def __init__(self, network: InprocNetwork, source: str, target: str) -> None:
        self.ends = (source, target)
        self.there: _Line[_Message] = _Line(network, self.ends)
        self.back: _Line[_Answer] = _Line(network, self.ends)
        self.cut_sender: Callable[[TransferError], None]
        self.cut_receiver: Callable[[], object]

    def cut(self, error: TransferError) -> None:
        self.cut_sender(error)
        self.cut_receiver()


class InprocConnection(SenderEnd):
    transport = "inproc"

    def __init__(self, network: InprocNetwork, link: _Link, on_closed: Callable[[SenderEnd], object]) -> None:
        super().__init__(network.clock, link.ends[1], on_closed)
        self._network = network
        self._link = link
        link.cut_sender = self._fail
        self._start(self._read_answers)

    async def _transmit(self, header: bytes, payload: Vector) -> None:
        copy = bytearray(payload.left)
        payload.gather(memoryview(copy))
        await self._clock.sleep(0)
        for message in self._network.disturb(_Message(header, bytes(copy))):
            self._link.there.put(message)

    async def _read_answers(self) -> None:
        while (answer := await self._link.back.get()) is not None:
            self._answered(None if answer.refusal is None else TransferRefused(answer.refusal))
        raise TransferError(f"{self.peer} closed the connection")

    def _disconnect(self) -> None:
        self._link.there.put(None)


class InprocTransport(Transport):
    name = "inproc"

    def __init__(
        self,
        network: InprocNetwork,
        clock: Clock,
        address: str,
        *,
        piece_timeout_s: float = PIECE_TIMEOUT_S,
    ) -> None:
        self.address = address
        self.sink: PieceSink | None = None
        self.dead = False
        self._network = network
        self._clock = clock
        self._piece_timeout_s = piece_timeout_s
        # In the order they were made, so that closing them is the same in every run.
        self._connections: dict[SenderEnd, None] = {}
        self._receiving: dict[asyncio.Task[None], None] = {}
        network.register(self)

    async def listen(self, sink: PieceSink) -> str:
        self.sink = sink
        return self.address

    async def connect(self, address: str, *, timeout_s: float) -> Connection:
        try:
            async with self._clock.timeout(timeout_s):
                await self._clock.sleep(2 * self._network.latency_s)
                await self._network.wait_connected(self.address, address)
        except TimeoutError:
            raise TransferError(f"{address} did not answer within {timeout_s:g} s") from None
        if self.dead:
            raise TransferError(f"{self.address} is dead")
        link = _Link(self._network, self.address, address)
        self._network.listener(address).accept(link)
        connection = InprocConnection(self._network, link, lambda end: self._connections.pop(end, None))
        self._connections[connection] = None
        return connection

    def accept(self, link: _Link) -> None:
        assert self.sink is not None
        task = asyncio.create_task(self._receive(link, ReceiverEnd(self.sink, self.name)))
        link.cut_receiver = task.cancel
        self._network.add(link)
        self._receiving[task] = None

        def ended(task: asyncio.Task[None]) -> None:
            self._network.remove(link)
            del self._receiving[task]

        task.add_done_callback(ended)

    async def _receive(self, link: _Link, end: ReceiverEnd) -> None:
        error = TransferError(f"connection {' -> '.join(link.ends)} was lost")
        try:
            while (message := await link.there.get()) is not None:
                async with self._clock.timeout(self._piece_timeout_s):
                    answer = await self._receive_piece(message, link, end)
                if not message.is_duplicate:
                    link.back.put(answer)
            error = TransferError(f"{link.ends[0]} closed the connection")
        except TransferError as cause:
            error = cause.with_traceback(None)
        except TimeoutError:
            error = TransferError("the sender stalled")
        except Exception as cause:
            error = TransferError(f"receiving failed: {cause!r}")
            log.exception("receiving KV from %s", link.ends[0])
        finally:
            end.abort(error)
            link.back.put(None)

    async def _receive_piece(self, message: _Message, link: _Link, end: ReceiverEnd) -> _Answer:
        """In two halves, so that a piece can be seen half written."""
        target = end.open(PieceHeader.decode(message.header))
        payload = memoryview(message.payload)
        half = len(payload) // 2
        for part in (payload[:half], payload[half:]):
            await link.there.carry(len(part))
            if target is not None:
                target.scatter(part)
        return _Answer(end.close())

    async def aclose(self) -> None:
        self._network.unregister(self)
        for task in list(self._receiving):
            task.cancel()
        await asyncio.gather(*self._receiving, return_exceptions=True)
        for connection in list(self._connections):
            await connection.aclose()
