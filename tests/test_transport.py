"""One contract for every transport, then what only one of them promises."""

import asyncio
import atexit
import contextlib
import hashlib
import importlib.util
import os
import random
import secrets
import shutil
import signal
import socket
import ssl
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psutil
import pytest
import trustme
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.certificates import Certificates, load_certificates
from baton.clock import Clock, SystemClock, VirtualClock
from baton.config import TlsConfig
from baton.errors import ConfigError, TransferError, TransferRefused
from baton.request import RequestId
from baton.transfer import framing
from baton.transfer.base import MAX_IN_FLIGHT, Connection, Transport
from baton.transfer.best_of import BestOf
from baton.transfer.choose import available, make_transport
from baton.transfer.inproc import Faults, InprocNetwork, InprocTransport
from baton.transfer.shm import ShmTransport, boot_id, make_ring
from baton.transfer.tcp import TcpTransport
from baton.transfer.ucx import UcxTransport
from baton.transfer.ucx_library import _lanes
from baton.transfer.vector import Vector
from baton.transfer.wire import PieceHeader

T = TypeVar("T")
HAS_UCX = any(importlib.util.find_spec(library) for library in ("ucxx", "ucp"))
ucx_only = pytest.mark.skipif(not HAS_UCX, reason="neither ucxx nor ucx-py is installed")
KINDS = [
    "inproc",
    "tcp",
    "tcp-uvloop",
    "tls",
    "tls-uvloop",
    "shm",
    "shm-uvloop",
    pytest.param("ucx", marks=[pytest.mark.ucx, ucx_only]),
    pytest.param("ucx-uvloop", marks=[pytest.mark.ucx, ucx_only]),
]
PATIENCE_S = 60.0  # a test that takes longer hangs
PUSH_S = 30.0
PIECE_TIMEOUT_S = 20.0


class Sink:
    """Gives out buffers cut to `shape`, checks digests, and remembers everything."""

    def __init__(self) -> None:
        self.shape: Callable[[int], list[int]] = lambda num_bytes: [num_bytes] if num_bytes else []
        self.has_many_senders = False
        self.refuse_open: set[int] = set()
        self.refuse_close: set[int] = set()
        self.headers: list[PieceHeader] = []  # of all pieces that were opened
        self.transports: set[str] = set()  # that carried them
        self.events: list[tuple[str, int]] = []
        self.errors: dict[int, TransferError | None] = {}
        self.buffers: dict[int, list[bytearray]] = {}
        self.changed = asyncio.Event()
        self._open: set[int] = set()
        self._final: list[tuple[list[bytearray], bytes]] = []

    def open(self, header: PieceHeader, transport: str) -> Sequence[memoryview]:
        assert self.has_many_senders or not self._open, "two pieces of one connection are open at once"
        if header.sequence in self.refuse_open:
            raise TransferRefused(f"no room for {header.sequence}")
        self.headers.append(header)
        self.transports.add(transport)
        self.events.append(("open", header.sequence))
        buffers = self.buffers[header.sequence] = [bytearray(size) for size in self.shape(header.num_bytes)]
        self._open.add(header.sequence)
        self.changed.set()
        return [memoryview(buffer) for buffer in buffers]

    def close(self, header: PieceHeader, error: TransferError | None) -> None:
        self._open.remove(header.sequence)  # raises when it is closed twice
        self.events.append(("close", header.sequence))
        self.errors[header.sequence] = error
        self._final.append((self.buffers[header.sequence], self.content(header.sequence)))
        self.changed.set()
        if error is None and header.digest and header.digest != self._digest(header):
            raise TransferRefused("digest")
        if header.sequence in self.refuse_close:
            raise TransferRefused(f"{header.sequence} is not what it should be")

    def _digest(self, header: PieceHeader) -> bytes:
        return checksum([memoryview(buffer) for buffer in self.buffers[header.sequence]])

    def content(self, sequence: int) -> bytes:
        return b"".join(self.buffers[sequence])

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def until_open(self, sequence: int = 0) -> None:
        await self.until(lambda: ("open", sequence) in self.events)

    async def until_closed(self, sequence: int = 0) -> None:
        await self.until(lambda: ("close", sequence) in self.events)

    def check(self) -> None:
        assert not self._open, f"pieces {self._open} were never closed"
        for buffers, final in self._final:
            assert b"".join(buffers) == final, "a buffer was written after close"


@cache
def authority_of(name: str) -> trustme.CA:
    return trustme.CA()


@cache
def certificates(authority: str, name: str = "worker.baton") -> tuple[str, str, str]:
    """PEM files: a certificate by this authority, its key, the authority."""
    directory = Path(tempfile.mkdtemp(prefix="baton-test-tls-"))
    atexit.register(shutil.rmtree, directory)
    ca = authority_of(authority)
    ca.cert_pem.write_to_path(directory / "ca.pem")
    certificate = ca.issue_cert(name)
    certificate.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    return str(directory / "cert.pem"), str(directory / "key.pem"), str(directory / "ca.pem")


def tls_of(authority: str) -> Certificates | None:
    return load_certificates(TlsConfig(*certificates(authority)), "worker", SystemClock())


class World:
    """A sender and a receiver on one loop, made for one test."""

    def __init__(self, kind: str, clock: Clock) -> None:
        self.kind = kind
        self.clock = clock
        self.sink = Sink()
        self.address = ""
        self.network = InprocNetwork(clock, seed=1)
        self.receiver = self.make("receiver")
        self.sender = self.make("sender")

    def make(self, name: str) -> Transport:
        if self.kind == "inproc":
            return InprocTransport(self.network, self.clock, name, piece_timeout_s=PIECE_TIMEOUT_S)
        if self.kind == "tcp":
            return TcpTransport(self.clock, piece_timeout_s=PIECE_TIMEOUT_S)
        if self.kind == "tls":
            return TcpTransport(self.clock, piece_timeout_s=PIECE_TIMEOUT_S, tls=tls_of("fleet"))
        if self.kind == "shm":
            return ShmTransport(self.clock, piece_timeout_s=PIECE_TIMEOUT_S)
        return UcxTransport(self.clock, piece_timeout_s=PIECE_TIMEOUT_S)

    async def connect(self) -> Connection:
        return await self.sender.connect(self.address, timeout_s=PUSH_S)


Play = Callable[[World], Coroutine[Any, Any, None]]


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest) -> Callable[[Play], None]:
    kind, _, loop = request.param.partition("-")

    def run_play(play: Play) -> None:
        async def whole(clock: Clock) -> None:
            world = World(kind, clock)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    world.address = await world.receiver.listen(world.sink)
                    await play(world)
            finally:
                await world.sender.aclose()
                await world.receiver.aclose()
            assert asyncio.all_tasks() == {asyncio.current_task()}, "a task was left behind"
            world.sink.check()

        if kind == "inproc":
            clock = VirtualClock()
            clock.run(whole(clock))
        else:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop else None) as runner:
                runner.run(whole(SystemClock()))

    return run_play


NOISE = random.Random(0).randbytes(34 * 2**20)


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return NOISE[seed : seed + num_bytes]


def checksum(payload: Sequence[memoryview]) -> bytes:
    return hashlib.blake2b(b"".join(payload), digest_size=16).digest()


def split(data: bytes, size: int) -> list[memoryview]:
    return [memoryview(data)[start : start + size] for start in range(0, len(data), size)]


def make_header(num_bytes: int, sequence: int = 0, **other: Any) -> PieceHeader:
    return PieceHeader(RequestId("r"), 1, sequence, 0, 1, 0, 1, num_bytes, **other)


async def push(
    connection: Connection,
    data: bytes,
    sequence: int = 0,
    *,
    size: int = 2**16,
    timeout_s: float = PUSH_S,
) -> None:
    payload = split(data, size)
    header = make_header(len(data), sequence, digest=checksum(payload))
    await connection.push(header, payload, timeout_s=timeout_s)


def in_blocks(size: int) -> Callable[[int], list[int]]:
    return lambda num_bytes: [min(size, num_bytes - start) for start in range(0, num_bytes, size)]


class TestContract:
    @pytest.mark.parametrize(
        ("num_bytes", "sent_in", "received_in"),
        [
            pytest.param(0, 1, 1, id="nothing"),
            pytest.param(1, 1, 1, id="one-byte"),
            pytest.param(5000, 3, 2, id="1667-buffers-into-2500"),
            pytest.param(300_000, 100, 7_777, id="3000-buffers-into-39"),
            pytest.param(2**20, 2**20, 2**20, id="exactly-1-MiB"),
            pytest.param(9 * 2**20 + 17, 2**16, 2**18 + 1, id="9-MiB-of-64-KiB-blocks"),
            pytest.param(33 * 2**20, 33 * 2**20, 2**24, id="one-large"),
        ],
    )
    def test_bytes_arrive_exactly(
        self, run: Callable[[Play], None], num_bytes: int, sent_in: int, received_in: int
    ) -> None:
        data = noise(num_bytes)

        async def play(world: World) -> None:
            world.sink.shape = in_blocks(received_in)
            connection = await world.connect()
            await push(connection, data, size=sent_in)
            assert world.sink.content(0) == data
            assert world.sink.errors == {0: None}

        run(play)

    def test_many_pieces_at_once_arrive_in_order(self, run: Callable[[Play], None]) -> None:
        pieces = [noise(1 + 37_123 * (n % 5), seed=n) for n in range(6 * MAX_IN_FLIGHT)]

        async def play(world: World) -> None:
            world.sink.shape = in_blocks(1000)
            connection = await world.connect()
            async with asyncio.TaskGroup() as tasks:
                for sequence, data in enumerate(pieces):
                    tasks.create_task(push(connection, data, sequence))
            assert world.sink.events == [
                (event, sequence) for sequence in range(len(pieces)) for event in ("open", "close")
            ]
            for sequence, data in enumerate(pieces):
                assert world.sink.content(sequence) == data

        run(play)

    def test_header_crosses_unchanged_and_both_ends_name_the_transport(
        self, run: Callable[[Play], None]
    ) -> None:
        header = PieceHeader(
            RequestId("ü" * 100), 4294967295, 4294967295, 65535, 65535, 4294967295, 4294967295, 3,
            b"d" * 64, 4294967295, -(2**63),
        )  # fmt: skip

        async def play(world: World) -> None:
            connection = await world.connect()
            with pytest.raises(TransferRefused, match="digest"):
                await connection.push(header, [memoryview(b"abc")], timeout_s=PUSH_S)
            assert world.sink.headers == [header]
            assert world.sink.transports == {world.receiver.name} == {connection.transport}

        run(play)

    def test_several_senders_do_not_mix(self, run: Callable[[Play], None]) -> None:
        async def play(world: World) -> None:
            others = [world.make(f"sender-{n}") for n in range(3)]
            sink = world.sink
            sink.open = lambda header, name: Sink.open(sinks[header.epoch], header, name)  # type: ignore[method-assign]
            sink.close = lambda header, error: Sink.close(sinks[header.epoch], header, error)  # type: ignore[method-assign]
            sinks = [Sink() for _ in others]
            try:
                async with asyncio.TaskGroup() as tasks:
                    for epoch, transport in enumerate(others):
                        connection = await transport.connect(world.address, timeout_s=PUSH_S)
                        for sequence in range(5):
                            header = PieceHeader(RequestId("r"), epoch, sequence, 0, 1, 0, 1, 2**21)
                            payload = memoryview(noise(2**21, epoch * 5 + sequence))
                            tasks.create_task(connection.push(header, [payload], timeout_s=PUSH_S))
            finally:
                for transport in others:
                    await transport.aclose()
            for epoch, each in enumerate(sinks):
                each.check()
                for sequence in range(5):
                    assert each.content(sequence) == noise(2**21, epoch * 5 + sequence)

        run(play)

    @pytest.mark.parametrize("num_bytes", [0, 10, 3 * 2**20])
    def test_refusals_reach_the_sender_and_the_connection_stays(
        self, run: Callable[[Play], None], num_bytes: int
    ) -> None:
        async def play(world: World) -> None:
            world.sink.refuse_open, world.sink.refuse_close = {0, 3}, {1}
            connection = await world.connect()
            with pytest.raises(TransferRefused, match="no room for 0"):
                await push(connection, noise(num_bytes), 0)
            with pytest.raises(TransferRefused, match="1 is not what it should be"):
                await push(connection, noise(num_bytes), 1)
            outcomes = await asyncio.gather(
                *(push(connection, noise(num_bytes, n), n) for n in (2, 3, 4)), return_exceptions=True
            )
            assert [type(outcome) for outcome in outcomes] == [type(None), TransferRefused, type(None)]
            assert not connection.closed
            assert world.sink.content(2) == noise(num_bytes, 2)
            assert world.sink.content(4) == noise(num_bytes, 4)

        run(play)

    def test_a_broken_sink_costs_the_connection_and_no_more(self, run: Callable[[Play], None]) -> None:
        async def play(world: World) -> None:
            world.sink.shape = lambda num_bytes: [num_bytes - 1]
            connection = await world.connect()
            with pytest.raises(TransferError):
                await push(connection, noise(1000))
            assert connection.closed
            await world.sink.until_closed()
            assert world.sink.errors[0] is not None
            world.sink.shape = in_blocks(100)
            await push(await world.connect(), noise(1000), 1)

        run(play)

    def test_cancel_before_the_piece_started_takes_effect_at_once(self, run: Callable[[Play], None]) -> None:
        async def play(world: World) -> None:
            connection = await world.connect()
            first = [asyncio.create_task(push(connection, noise(2**22, n), n)) for n in range(MAX_IN_FLIGHT)]
            late = asyncio.create_task(push(connection, noise(2**22), MAX_IN_FLIGHT))
            await asyncio.sleep(0)
            late.cancel()
            with pytest.raises(asyncio.CancelledError):
                await late
            await asyncio.gather(*first)
            assert not connection.closed
            await push(connection, b"after", 99)
            assert ("open", MAX_IN_FLIGHT) not in world.sink.events

        run(play)

    @pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
    def test_cancel_in_the_middle_leaves_the_payload_alone(
        self, run: Callable[[Play], None], turns: int
    ) -> None:
        data = bytearray(noise(2**24))

        async def play(world: World) -> None:
            connection = await world.connect()
            header = make_header(len(data), digest=checksum([memoryview(data)]))
            task = asyncio.create_task(connection.push(header, [memoryview(data)], timeout_s=PUSH_S))
            await world.sink.until_open()
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            # The payload is ours again: whatever the receiver accepts must be what it was before.
            data[:] = bytes(len(data))
            await world.sink.until_closed()
            if world.sink.errors[0] is None:
                assert world.sink.content(0) == noise(2**24)
            if not connection.closed:
                await push(connection, b"after", 1)
                assert world.sink.content(1) == b"after"

        run(play)
        data[:] = noise(2**24)

    def test_cancel_a_whole_batch_at_every_moment(self, run: Callable[[Play], None]) -> None:
        async def play(world: World) -> None:
            connection = await world.connect()
            for moment in range(30):
                if connection.closed:
                    connection = await world.connect()
                tasks = [
                    asyncio.create_task(push(connection, noise(200_000, n), 10 * moment + n))
                    for n in range(6)
                ]
                for _ in range(moment):
                    await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            if connection.closed:
                connection = await world.connect()
            await push(connection, b"after", 999)
            assert world.sink.content(999) == b"after"

        run(play)

    def test_a_peer_that_closes_is_noticed(self, run: Callable[[Play], None]) -> None:
        async def play(world: World) -> None:
            connection = await world.connect()
            idle = await world.connect()
            await push(connection, b"warm")
            tasks = [asyncio.create_task(push(connection, noise(2**24, n), 1 + n)) for n in range(6)]
            await world.sink.until_open(1)
            await world.receiver.aclose()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert any(isinstance(outcome, TransferError) for outcome in outcomes)
            assert connection.closed
            with pytest.raises(TransferError):
                await push(idle, b"x", 50, timeout_s=PUSH_S)
            assert idle.closed

        run(play)

    def test_a_sender_that_closes_in_the_middle(self, run: Callable[[Play], None]) -> None:
        async def play(world: World) -> None:
            connection = await world.connect()
            tasks = [asyncio.create_task(push(connection, noise(2**24, n), n)) for n in range(3)]
            await world.sink.until_open()
            await connection.aclose()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(outcome, TransferError)
            await world.sink.until_closed()
            assert connection.closed
            await connection.aclose()
            await push(await world.connect(), b"after", 9)

        run(play)

    def test_the_end_with_pieces_open(self, run: Callable[[Play], None]) -> None:
        """Both transports are closed by the frame; it checks that every open piece was closed once."""

        async def play(world: World) -> None:
            connection = await world.connect()
            tasks = [asyncio.create_task(push(connection, noise(2**24, n), n)) for n in range(3)]
            await world.sink.until_open()
            await world.sender.aclose()
            await asyncio.gather(*tasks, return_exceptions=True)

        run(play)

    def test_connecting_to_nobody(self, run: Callable[[Play], None]) -> None:
        async def play(world: World) -> None:
            gone = world.make("gone")
            address = await gone.listen(Sink())
            await gone.aclose()
            for wrong in (address, "", "nonsense", "tcp://127.0.0.1", "ucx://AAAA", "tcp://127.0.0.1:99999"):
                with pytest.raises(TransferError):
                    await world.sender.connect(wrong, timeout_s=0.5)
            await push(await world.connect(), b"still works")

        run(play)

    def test_connecting_is_cancelled(self, run: Callable[[Play], None]) -> None:
        async def play(world: World) -> None:
            for turns in range(8):
                task = asyncio.create_task(world.connect())
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await push(await world.connect(), b"still works")

        run(play)

    def test_a_payload_that_does_not_fit_its_header_hurts_nobody(self, run: Callable[[Play], None]) -> None:
        async def play(world: World) -> None:
            connection = await world.connect()
            with pytest.raises(Exception, match="its header says"):
                await connection.push(make_header(5), [memoryview(b"1234")], timeout_s=PUSH_S)
            await push(connection, b"still works")

        run(play)

    def test_a_worker_can_send_to_itself(self, run: Callable[[Play], None]) -> None:
        async def play(world: World) -> None:
            connection = await world.receiver.connect(world.address, timeout_s=PUSH_S)
            await push(connection, noise(3 * 2**20))
            assert world.sink.content(0) == noise(3 * 2**20)

        run(play)


@contextlib.asynccontextmanager
async def peer(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    script = str(Path(__file__).with_name("transport_peer.py"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, script, *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.fixture(params=["tcp", "shm", pytest.param("ucx", marks=[pytest.mark.ucx, ucx_only])])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.asynccontextmanager
async def transport_of(name: str, **options: Any) -> AsyncIterator[Transport]:
    makers = {"tcp": TcpTransport, "shm": ShmTransport, "ucx": UcxTransport}
    transport: Transport = makers[name](SystemClock(), **options)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield transport
    finally:
        await transport.aclose()


def virtual(play: Callable[[VirtualClock], Coroutine[Any, Any, T]]) -> T:
    clock = VirtualClock()
    return clock.run(play(clock))


class TestSimulatedNetwork:
    """Faults of the in-process network, on a virtual clock."""

    @staticmethod
    def stormy(seed: int, faults: Faults) -> list[object]:
        """What happened to 60 pieces, when, and to whom."""

        async def play(clock: VirtualClock) -> list[object]:
            network = InprocNetwork(clock, seed, latency_s=0.01, bytes_per_s=1e6)
            network.faults = faults
            sink = Sink()
            sink.has_many_senders = True
            receiver, sender = InprocTransport(network, clock, "d"), InprocTransport(network, clock, "p")
            log: list[object] = []
            await receiver.listen(sink)

            async def one(sequence: int) -> None:
                await clock.sleep(0.05 * (sequence // 3))
                connection = connections[sequence % 2]
                if connection.closed:
                    connection = connections[sequence % 2] = await sender.connect("d", timeout_s=1)
                try:
                    await push(connection, noise(1000 + sequence, sequence), sequence, timeout_s=0.5)
                    log.append((clock.now(), sequence, "accepted"))
                except TransferError as error:
                    log.append((clock.now(), sequence, error.message))

            connections = [await sender.connect("d", timeout_s=1) for _ in range(2)]
            await asyncio.gather(*(one(sequence) for sequence in range(60)))
            await sender.aclose()
            await receiver.aclose()
            return [*log, *sink.events]

        return virtual(play)

    def test_a_seed_replays_every_fault(self) -> None:
        faults = Faults(drop=0.1, duplicate=0.2, flip=0.2)
        first = self.stormy(7, faults)
        assert first == self.stormy(7, faults)
        assert first != self.stormy(8, faults)
        outcomes = {str(entry[2]) for entry in first if len(entry) == 3}  # type: ignore[arg-type, index]
        assert {"accepted", "digest", "d did not acknowledge a piece within 0.5 s"} <= outcomes

    def test_one_fault_does_not_move_another(self) -> None:
        def flipped(log: list[object]) -> set[object]:
            return {entry[1] for entry in log if entry[-1] == "digest"}  # type: ignore[index]

        alone = flipped(self.stormy(3, Faults(flip=0.3)))
        assert alone
        assert alone == flipped(self.stormy(3, Faults(flip=0.3, duplicate=0.5)))

    def test_a_duplicate_gets_no_second_answer(self) -> None:
        async def play(clock: VirtualClock) -> None:
            network, sink = InprocNetwork(clock), Sink()
            network.faults = Faults(duplicate=1.0)
            receiver, sender = InprocTransport(network, clock, "d"), InprocTransport(network, clock, "p")
            connection = await sender.connect(await receiver.listen(sink), timeout_s=1)
            for sequence in range(5):
                await push(connection, b"abc", sequence)
            assert not connection.closed
            await sink.until(lambda: len(sink.events) == 20)
            await sender.aclose()
            await receiver.aclose()

        virtual(play)

    def test_time_on_the_link(self) -> None:
        async def play(clock: VirtualClock) -> None:
            network = InprocNetwork(clock, latency_s=0.25, bytes_per_s=1000)
            receiver, sender = InprocTransport(network, clock, "d"), InprocTransport(network, clock, "p")
            connection = await sender.connect(await receiver.listen(Sink()), timeout_s=1)
            assert clock.now() == pytest.approx(0.5)
            await push(connection, noise(2000))
            assert clock.now() == pytest.approx(0.5 + 0.25 + 2 + 0.25)
            await sender.aclose()
            await receiver.aclose()

        virtual(play)

    def test_so_many_in_flight_and_no_more(self) -> None:
        async def play(clock: VirtualClock) -> None:
            network = InprocNetwork(clock, latency_s=1)
            receiver, sender = InprocTransport(network, clock, "d"), InprocTransport(network, clock, "p")
            connection = await sender.connect(await receiver.listen(Sink()), timeout_s=5)
            tasks = [asyncio.create_task(push(connection, b"x", n)) for n in range(MAX_IN_FLIGHT + 6)]
            await clock.sleep(0.5)
            assert repr(connection) == f"<InprocConnection d open: 6 waiting, {MAX_IN_FLIGHT} out>"
            started_s = clock.now() - 0.5
            await asyncio.gather(*tasks)
            assert clock.now() - started_s == pytest.approx(2 * 3)
            await sender.aclose()
            await receiver.aclose()

        virtual(play)

    def test_a_partition_heals(self) -> None:
        async def play(clock: VirtualClock) -> None:
            network, sink = InprocNetwork(clock, latency_s=0.1), Sink()
            receiver, sender = InprocTransport(network, clock, "d"), InprocTransport(network, clock, "p")
            connection = await sender.connect(await receiver.listen(sink), timeout_s=1)
            network.partition("p", "d")
            task = asyncio.create_task(push(connection, b"late", timeout_s=5))
            with pytest.raises(TransferError, match="within"):
                await sender.connect("d", timeout_s=1)
            await clock.sleep(1)
            assert sink.events == []
            network.heal("d", "p")
            await task
            assert sink.content(0) == b"late"
            await sender.aclose()
            await receiver.aclose()

        virtual(play)

    def test_a_partition_that_lasts_costs_both_sides_the_piece(self) -> None:
        async def play(clock: VirtualClock) -> None:
            network, sink = InprocNetwork(clock, bytes_per_s=1e6), Sink()
            receiver = InprocTransport(network, clock, "d", piece_timeout_s=PIECE_TIMEOUT_S)
            sender = InprocTransport(network, clock, "p")
            connection = await sender.connect(await receiver.listen(sink), timeout_s=1)
            task = asyncio.create_task(push(connection, noise(10**6), timeout_s=2))
            await sink.until_open()
            network.partition("p", "d")
            with pytest.raises(TransferError, match="within 2 s"):
                await task
            assert clock.now() == pytest.approx(2)
            await sink.until_closed()
            assert clock.now() == pytest.approx(PIECE_TIMEOUT_S)
            assert str(sink.errors[0]) == "the sender stalled"
            await sender.aclose()
            await receiver.aclose()

        virtual(play)

    @pytest.mark.parametrize("victim", ["p", "d"])
    def test_a_killed_worker_breaks_its_connections(self, victim: str) -> None:
        async def play(clock: VirtualClock) -> None:
            network, sink = InprocNetwork(clock, bytes_per_s=1e6), Sink()
            receiver, sender = InprocTransport(network, clock, "d"), InprocTransport(network, clock, "p")
            connection = await sender.connect(await receiver.listen(sink), timeout_s=1)
            task = asyncio.create_task(push(connection, noise(10**6)))
            await sink.until_open()
            killed_s = clock.now()
            network.kill(victim)
            with pytest.raises(TransferError, match="reset"):
                await task
            await sink.until_closed()
            assert sink.errors[0] is not None
            assert connection.closed
            assert clock.now() == killed_s
            with pytest.raises(TransferError):
                await sender.connect("d", timeout_s=1)
            again = InprocTransport(network, clock, victim)
            address = await again.listen(sink) if victim == "d" else "d"
            await push(await (again if victim == "p" else sender).connect(address, timeout_s=1), b"x", 1)
            for transport in (sender, receiver, again):
                await transport.aclose()

        virtual(play)


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def somebody(talk: Talk) -> AsyncIterator[str]:
    """Listens where a receiver should."""
    talking: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talking.add(task)
        try:
            with contextlib.suppress(ConnectionError):
                await talk(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in talking:
            task.cancel()
        await asyncio.gather(*talking, return_exceptions=True)


class TestTcpOnTheWire:
    """Bytes that no Baton worker sends."""

    HELLO = framing.hello()
    HEADER = make_header(100).encode()
    FRAME = struct.pack("<I", len(HEADER)) + HEADER
    HOSTILE: ClassVar = {
        "nothing": b"",
        "another protocol": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "half a hello": HELLO[:3],
        "another version": b"BATN" + struct.pack("<HH", 998, 999),
        "endless header": HELLO + struct.pack("<I", 2**32 - 1) + bytes(10**6),
        "empty header": HELLO + struct.pack("<I", 0),
        "header cut short": HELLO + FRAME[:-1],
        "header of another version": HELLO + FRAME[:4] + struct.pack("<H", 7) + FRAME[6:],
        "header with spare bytes": HELLO + struct.pack("<I", len(HEADER) + 1) + HEADER + b"x",
        "piece cut short": HELLO + FRAME + bytes(99),
        "piece that is too long": HELLO + FRAME + bytes(100) + b"\xff" * 1000,
        "exabytes": HELLO + FRAME[:4] + HEADER[:40] + struct.pack("<Q", 2**62) + HEADER[48:] + bytes(10**6),
    }

    @staticmethod
    async def _after(attack: bytes, *, then_close: bool) -> tuple[Sink, bool]:
        """Who listens is attacked, then used. Returns what its sink saw, and whether it hung up at once."""
        sink = Sink()
        sink.has_many_senders = True
        sink_open = sink.open

        def careful_open(header: PieceHeader, transport: str) -> Sequence[memoryview]:
            if header.num_bytes > 2**20:
                raise TransferRefused("too large")
            return sink_open(header, transport)

        sink.open = careful_open  # type: ignore[method-assign]
        async with transport_of("tcp", piece_timeout_s=0.5) as transport:
            address = await transport.listen(sink)
            reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
            writer.write(attack)
            hung_up = True
            with contextlib.suppress(ConnectionError):
                if then_close:
                    writer.write_eof()
                try:
                    await asyncio.wait_for(reader.read(), timeout=0.2)
                except TimeoutError:
                    hung_up = False
            await push(await transport.connect(address, timeout_s=PUSH_S), b"good", 1)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        sink.check()
        assert sink.content(1) == b"good"
        return sink, hung_up

    @pytest.mark.parametrize("then_close", [True, False])
    @pytest.mark.parametrize("what", HOSTILE)
    async def test_a_hostile_sender_does_no_harm(self, what: str, then_close: bool) -> None:
        sink, hung_up = await self._after(self.HOSTILE[what], then_close=then_close)
        assert (sink.errors.get(0, "never opened") is None) == (what == "piece that is too long")
        may_still_come = what in ("nothing", "half a hello", "header cut short", "piece cut short")
        assert hung_up or (may_still_come and not then_close)

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_random_damage_does_no_harm(self, data: st.DataObject) -> None:
        good = bytearray(self.HELLO + (self.FRAME + bytes(100)) * 2)
        for _ in range(data.draw(st.integers(1, 4))):
            good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
        with asyncio.Runner() as runner:
            runner.run(self._after(bytes(good[: data.draw(st.integers(0, len(good)))]), then_close=True))

    @pytest.mark.parametrize(
        "answers",
        [
            pytest.param(b"", id="closes"),
            pytest.param(b"\x00\x00\x00" * 5, id="answers-too-often"),
            pytest.param(b"\x07\x00\x00", id="unknown-status"),
            pytest.param(b"\x01\xff\xff" + bytes(70000), id="endless-reason"),
            pytest.param(b"\x01\x04\x00ab", id="reason-cut-short"),
        ],
    )
    async def test_a_hostile_receiver_does_no_harm(self, answers: bytes) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(framing.hello() + answers)
            await reader.readexactly(len(self.HELLO) + len(self.FRAME) + 100)

        async with somebody(talk) as address, transport_of("tcp") as transport:
            connection = await transport.connect(address, timeout_s=PUSH_S)
            with pytest.raises(TransferError) as caught:
                await connection.push(make_header(100), [memoryview(bytes(100))], timeout_s=PUSH_S)
                await connection.push(make_header(100), [memoryview(bytes(100))], timeout_s=PUSH_S)
            assert not isinstance(caught.value, TransferRefused)
            assert connection.closed

    async def test_an_answer_before_the_piece_is_sent_gives_no_payload_back(self) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(framing.hello())
            await reader.readexactly(len(self.HELLO) + 4)
            writer.write(framing.encode_answer(None))
            await asyncio.Event().wait()

        async with somebody(talk) as address, transport_of("tcp") as transport:
            connection = await transport.connect(address, timeout_s=PUSH_S)
            task = asyncio.create_task(push(connection, NOISE))
            for _ in range(2):
                await asyncio.wait([task], timeout=0.2)
                assert not task.done(), "the payload is still being read"
                task.cancel()
            await asyncio.wait([task])
            assert connection.closed

    @pytest.mark.parametrize(
        ("greeting", "message"),
        [
            (b"HTTP/1.1 400 Bad Request\r\n", "not a Baton worker"),
            (b"BATN" + struct.pack("<HH", 9, 9), "wire versions 9 to 9"),
            (b"", "closed the connection|connection lost"),
            (None, "did not answer within"),
        ],
    )
    async def test_connecting_to_somebody_else(self, greeting: bytes | None, message: str) -> None:
        async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if greeting is None:
                await asyncio.Event().wait()
            else:
                writer.write(greeting)

        async with somebody(talk) as address, transport_of("tcp") as transport:
            with pytest.raises(TransferError, match=message):
                await transport.connect(address, timeout_s=0.5)

    async def test_where_it_listens(self) -> None:
        for host, shown in (("127.0.0.1", "tcp://127.0.0.1:"), ("::1", "tcp://[::1]:")):
            async with transport_of("tcp", host=host) as transport, transport_of("tcp") as sender:
                address = await transport.listen(Sink())
                assert address.startswith(shown)
                await push(await sender.connect(address, timeout_s=PUSH_S), b"x")
                port = int(address.rpartition(":")[2])
                with pytest.raises(ConfigError, match="in use"):
                    await TcpTransport(SystemClock(), host, port).listen(Sink())
        with pytest.raises(ConfigError, match="advertise_host"):
            TcpTransport(SystemClock(), "0.0.0.0")
        async with transport_of("tcp", host="0.0.0.0", advertise_host="localhost") as transport:
            address = await transport.listen(Sink())
            assert address.startswith("tcp://localhost:")
            await push(await transport.connect(address, timeout_s=PUSH_S), b"x")


class TestTls:
    """Who is let in, and what those are told who are not."""

    PLAIN = "the peer speaks TLS: set tls.cert, tls.key and tls.ca here too"

    @pytest.mark.parametrize(
        ("receiver", "sender", "message"),
        [
            pytest.param("fleet", None, PLAIN, id="plain-sender"),
            pytest.param(None, "fleet", "the peer speaks no TLS: set tls.cert", id="plain-receiver"),
            pytest.param("fleet", "other", "certificate is not accepted here", id="another-authority"),
        ],
    )
    async def test_peers_that_do_not_fit(
        self, receiver: str | None, sender: str | None, message: str
    ) -> None:
        sink = Sink()
        async with (
            transport_of("tcp", tls=receiver and tls_of(receiver)) as transport,
            transport_of("tcp", tls=sender and tls_of(sender)) as other,
            transport_of("tcp", tls=receiver and tls_of(receiver)) as good,
        ):
            address = await transport.listen(sink)
            with pytest.raises(TransferError, match=message):
                await other.connect(address, timeout_s=PUSH_S)
            await push(await good.connect(address, timeout_s=PUSH_S), b"good")
        assert [header.sequence for header in sink.headers] == [0]
        sink.check()

    async def test_a_sender_without_a_certificate_gets_no_hello(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(certificates("fleet")[2])
        async with transport_of("tcp", tls=tls_of("fleet")) as transport:
            port = int((await transport.listen(Sink())).rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
                await reader.read()
            writer.close()

    async def test_nothing_readable_is_on_the_wire(self) -> None:
        """Through a relay that keeps what it forwards."""
        seen = bytearray()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", port)

            async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
                while data := await source.read(2**16):
                    seen.extend(data)
                    target.write(data)
                target.close()

            await asyncio.gather(forward(reader, back), forward(there, writer))

        sink, secret = Sink(), b"what nobody else may read" * 1000
        async with (
            transport_of("tcp", tls=tls_of("fleet")) as transport,
            transport_of("tcp", tls=tls_of("fleet")) as sender,
        ):
            port = int((await transport.listen(sink)).rpartition(":")[2])
            async with somebody(relay) as address:
                connection = await sender.connect(address, timeout_s=PUSH_S)
                await push(connection, secret)
                await connection.aclose()
        assert sink.content(0) == secret
        assert len(seen) > len(secret)
        assert b"nobody" not in seen and b"BATN" not in seen

    async def test_a_router_is_no_worker(self) -> None:
        """Of the same authority, but in another role: neither side takes it."""
        async with transport_of("tcp", tls=tls_of("fleet")) as transport:
            port = int((await transport.listen(Sink())).rpartition(":")[2])
            router = certificates("fleet", "router.baton")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.load_verify_locations(router[2])
            context.load_cert_chain(router[0], router[1])
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                assert await reader.read() == b""  # no hello
            writer.close()

            async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.read()
                writer.close()

            accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            accepting.load_cert_chain(router[0], router[1])
            server = await asyncio.start_server(hang, "127.0.0.1", 0, ssl=accepting)
            address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            with pytest.raises(TransferError, match=r"certificate is not valid for 'worker\.baton'"):
                await transport.connect(address, timeout_s=PUSH_S)
            server.close()
            await server.wait_closed()

    async def test_connections_take_the_certificate_that_is_there_by_then(self, tmp_path: Path) -> None:
        for file, source in zip(("cert", "key", "ca"), certificates("fleet"), strict=True):
            shutil.copy(source, tmp_path / file)
        files = [str(tmp_path / name) for name in ("cert", "key", "ca")]
        tls = load_certificates(TlsConfig(*files), "worker", SystemClock())
        sink = Sink()
        async with (
            transport_of("tcp", tls=tls) as transport,
            transport_of("tcp", tls=tls_of("fleet")) as former,
            transport_of("tcp", tls=tls_of("other")) as renewed,
        ):
            address = await transport.listen(sink)
            running = await former.connect(address, timeout_s=PUSH_S)
            await push(running, b"before")
            for target, source in zip(files, certificates("other"), strict=True):
                shutil.copy(source, target)
            await push(await renewed.connect(address, timeout_s=PUSH_S), b"after")
            await push(running, b"still there")
            with pytest.raises(TransferError, match="not accepted here"):
                await former.connect(address, timeout_s=PUSH_S)

    def test_ucx_is_refused_with_certificates(self) -> None:
        with pytest.raises(ConfigError, match="ucx cannot encrypt"):
            make_transport("ucx", SystemClock(), "127.0.0.1", tls=tls_of("fleet"))


@pytest.mark.ucx
@ucx_only
class TestUcxOnly:
    @pytest.mark.skipif(not importlib.util.find_spec("ucxx"), reason="ucx-py keeps sockets until the end")
    async def test_it_listens_on_loopback_only_and_closes_its_sockets(self) -> None:
        process = psutil.Process()
        before = {(c.laddr, c.raddr) for c in process.net_connections()}
        async with transport_of("ucx") as transport, transport_of("ucx") as sender:
            connection = await sender.connect(await transport.listen(Sink()), timeout_s=PUSH_S)
            await push(connection, b"x")
            ours = {(c.laddr, c.raddr) for c in process.net_connections()} - before
            assert ours
            assert {local.ip for local, _ in ours} == {"127.0.0.1"}
        assert not {(c.laddr, c.raddr) for c in process.net_connections()} & ours

    async def test_an_idle_transport_costs_nothing(self) -> None:
        async with transport_of("ucx") as transport, transport_of("ucx") as sender:
            connection = await sender.connect(await transport.listen(Sink()), timeout_s=PUSH_S)
            await push(connection, b"x")
            started_s = time.process_time()
            await asyncio.sleep(1)
            assert time.process_time() - started_s < 0.05

    async def test_memory_of_a_closed_connection_comes_back(self) -> None:
        async with transport_of("ucx") as transport, transport_of("ucx") as sender:
            address = await transport.listen(Sink())
            for sequence in range(40):
                connection = await sender.connect(address, timeout_s=PUSH_S)
                await push(connection, noise(3000), sequence)
                await connection.aclose()
            await push(await sender.connect(address, timeout_s=PUSH_S), b"x", 99)
            for each in (transport, sender):
                assert len(each._worker._operations) < 20  # type: ignore[attr-defined]


class TestShmOnly:
    """No name, no leftover, no way in for others, no way to the other's memory."""

    @staticmethod
    def rings() -> list[str]:
        """This process's mappings of rings: who may do what with each."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sorted(line.split()[1] for line in lines if "memfd:baton-kv" in line)

    @staticmethod
    def names() -> set[str]:
        sockets = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
        files = {str(path) for path in Path("/dev/shm").iterdir()}
        return {name for name in sockets | files if "baton" in name}

    async def test_a_sender_can_write_to_the_ring_only_and_the_receiver_only_reads_it(self) -> None:
        async with transport_of("shm") as transport, transport_of("shm") as sender:
            connection = await sender.connect(await transport.listen(Sink()), timeout_s=PUSH_S)
            assert self.rings() == ["r--s", "rw-s"]
            await connection.aclose()

    async def test_memory_of_a_closed_connection_comes_back(self) -> None:
        async with transport_of("shm") as transport, transport_of("shm") as sender:
            num_open, sink = psutil.Process().num_fds(), Sink()
            sink.has_many_senders = True
            address = await transport.listen(sink)
            kept = [await sender.connect(address, timeout_s=PUSH_S) for _ in range(20)]
            await asyncio.gather(*(push(each, noise(3000), n) for n, each in enumerate(kept)))
            for connection in kept:
                await connection.aclose()
            while transport._receiving:  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
            assert self.rings() == []
            assert psutil.Process().num_fds() == num_open + 1  # the listener

    @pytest.mark.parametrize("role", ["send", "receive"])
    async def test_nothing_is_left_of_a_killed_peer(self, role: str) -> None:
        before = self.names()
        sink = Sink()
        async with transport_of("shm") as transport:
            if role == "send":
                address = await transport.listen(sink)
                async with peer("send", "shm", address, str(2**26)) as process:
                    await sink.until_open()
                    process.kill()
                    await sink.until_closed()
            else:
                async with peer("receive", "shm") as process:
                    connection = await transport.connect(await address_of(process), timeout_s=PUSH_S)
                    task = asyncio.create_task(push(connection, bytes(2**26)))
                    await asyncio.sleep(0)
                    process.kill()
                    with pytest.raises(TransferError):
                        await task
        assert self.rings() == []
        assert self.names() == before
        sink.check()

    async def test_another_host_is_told_apart_before_anything_is_tried(self) -> None:
        async with transport_of("shm") as transport, transport_of("shm") as sender:
            address = await transport.listen(Sink())
            elsewhere = address.replace(boot_id(), "11111111-2222-3333-4444-555555555555")
            with pytest.raises(TransferError, match="on another host"):
                await sender.connect(elsewhere, timeout_s=PUSH_S)

    async def test_another_user_is_refused_by_either_side(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with transport_of("shm") as transport, transport_of("shm") as sender:
            address = await transport.listen(Sink())
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
            with pytest.raises(TransferError, match=f"runs as user {os.getuid()}, this worker as 12345"):
                await sender.connect(address, timeout_s=PUSH_S)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(sock, "\0baton-kv-" + address.rpartition("/")[2])
                assert await loop.sock_recv(sock, 100) == b"", "said hello to another user"

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
    async def test_a_process_of_another_user_is_refused(self) -> None:
        async with transport_of("shm") as transport:
            name = "\\0baton-kv-" + (await transport.listen(Sink())).rpartition("/")[2]
            code = (
                "import os, socket; os.setuid(65534); peer = socket.socket(socket.AF_UNIX); "
                f"peer.connect('{name}'); print(peer.recv(100))"
            )
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-Ic", code, stdout=asyncio.subprocess.PIPE
            )
            output, _ = await process.communicate()
            assert output == b"b''\n"

    @pytest.mark.parametrize(
        ("attack", "then"),
        [
            pytest.param(b"", "closes", id="nothing"),
            pytest.param(b"GET / HTTP/1.1\r\n", "closes", id="another protocol"),
            pytest.param(TestTcpOnTheWire.HELLO + struct.pack("<I", 2**31), "closes", id="endless header"),
            pytest.param(
                TestTcpOnTheWire.HELLO + TestTcpOnTheWire.FRAME + struct.pack("<I", 101),
                "piece",
                id="too long",
            ),
            pytest.param(
                TestTcpOnTheWire.HELLO + TestTcpOnTheWire.FRAME + struct.pack("<I", 0),
                "piece",
                id="empty chunk",
            ),
        ],
    )
    async def test_a_hostile_sender_does_no_harm(self, attack: bytes, then: str) -> None:
        sink, loop = Sink(), asyncio.get_running_loop()
        sink.has_many_senders = True
        async with transport_of("shm", piece_timeout_s=0.5) as transport:
            address = await transport.listen(sink)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, "\0baton-kv-" + address.rpartition("/")[2])
                await loop.sock_sendall(sock, attack)
                sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    while await loop.sock_recv(sock, 1000):
                        pass
            await push(await transport.connect(address, timeout_s=PUSH_S), b"good", 1)
        assert (sink.errors.get(0) is not None) == (then == "piece")
        assert sink.content(1) == b"good"
        sink.check()

    @pytest.mark.parametrize(
        ("give", "message"),
        [
            pytest.param(lambda sock: sock.sendall(bytes(6)), "shared no memory", id="nothing"),
            pytest.param(lambda sock: give(sock, os.memfd_create("x"), 4), "not sealed", id="can-shrink"),
            pytest.param(lambda sock: give(sock, make_ring(1, 4096), 4), "smaller", id="too-small"),
            pytest.param(lambda sock: give(sock, make_ring(), 2**15), "sensible size", id="huge"),
            pytest.param(
                lambda sock: give(sock, os.open("/dev/zero", os.O_RDWR), 4), "not sealed", id="device"
            ),
        ],
    )
    async def test_memory_that_could_vanish_is_not_taken(
        self, give: Callable[[socket.socket], None], message: str
    ) -> None:
        token = secrets.token_hex(8)
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"\0baton-kv-{token}")
            listener.listen()
            listener.setblocking(False)
            async with transport_of("shm") as sender:
                connecting = asyncio.create_task(
                    sender.connect(f"shm://{boot_id()}/{token}", timeout_s=PUSH_S)
                )
                sock, _ = await loop.sock_accept(listener)
                with sock:
                    sock.sendall(framing.hello())
                    give(sock)
                    with pytest.raises(TransferError, match=message):
                        await connecting
        assert self.rings() == []

    async def test_a_receiver_that_frees_what_is_free(self) -> None:
        async with transport_of("shm") as transport, transport_of("shm") as sender:
            connection = await sender.connect(await transport.listen(Sink()), timeout_s=PUSH_S)
            with pytest.raises(TransferError, match="freed a slot that was not in use"):
                connection._line.slot_free()  # type: ignore[attr-defined]


def give(sock: socket.socket, fd: int, num_slots: int) -> None:
    socket.send_fds(sock, [struct.pack("<HI", num_slots, 2**20)], [fd])
    os.close(fd)


class TestChoice:
    def test_names(self) -> None:
        assert available() == (["shm", "ucx", "tcp"] if HAS_UCX else ["shm", "tcp"])
        for name in available():
            assert make_transport(name, SystemClock(), "127.0.0.1").name == name
        assert make_transport("auto", SystemClock(), "127.0.0.1").names == ("shm", "tcp")
        with pytest.raises(ConfigError, match="choose auto, shm, ucx or tcp"):
            make_transport("rdma", SystemClock(), "127.0.0.1")

    @pytest.mark.parametrize("installed", [True, False])
    def test_who_has_rdma_expects_it_and_is_told_why_not(
        self,
        installed: bool,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        (tmp_path / "mlx5_0").touch()
        monkeypatch.setattr("baton.transfer.choose._RDMA_DEVICES", tmp_path)
        if not installed:
            for library in ("ucxx", "ucp", "ucp._libs.ucx_api"):
                monkeypatch.setitem(sys.modules, library, None)
        elif not HAS_UCX:
            pytest.skip("neither ucxx nor ucx-py is installed")
        assert make_transport("auto", SystemClock(), "127.0.0.1").names == ("shm", "tcp")
        (record,) = caplog.records
        assert (record.levelname, record.message) == ("WARNING", "this host has RDMA, but KV goes over TCP")
        assert ("built without RDMA" if installed else "pip install") in record.fields["why"]  # type: ignore[attr-defined]

    @ucx_only
    def test_ucx_says_what_it_could_use(self) -> None:
        assert not UcxTransport(SystemClock()).has_fast_network
        lines = (
            "# resource 0 : md 0 dev 0 -- self/memory\n# resource 1 : md 1 dev 1 flags -- rc_mlx5/mlx5_0:1"
        )
        assert _lanes(lines) == {"self", "rc_mlx5"}

    def test_without_ucx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for library in ("ucxx", "ucp", "ucp._libs.ucx_api"):
            monkeypatch.setitem(sys.modules, library, None)
        assert available() == ["shm", "tcp"]
        with pytest.raises(ConfigError, match=r"pip install 'baton-llm\[ucx\]'") as caught:
            make_transport("ucx", SystemClock(), "127.0.0.1")
        assert "\n" not in caught.value.message

    async def test_choosing_loads_no_ucx(self) -> None:
        code = "import sys, baton.transfer.choose as c; c.available(); sys.exit('ucxx' in sys.modules)"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
        assert await process.wait() == 0


@given(
    st.lists(st.integers(0, 50), max_size=30),
    st.lists(st.integers(1, 60), max_size=30),
    st.integers(1, 40),
    st.integers(1, 5),
)
def test_vectors_copy_every_byte_once(
    source_cut: list[int], target_cut: list[int], max_bytes: int, max_buffers: int
) -> None:
    data = noise(sum(source_cut), 1)
    starts = [sum(source_cut[:n]) for n in range(len(source_cut))]
    source = Vector([memoryview(data)[a : a + n] for a, n in zip(starts, source_cut, strict=True)])
    buffers = [bytearray(size) for size in target_cut] + [bytearray(len(data))]
    target = Vector([memoryview(buffer) for buffer in buffers])
    staging = memoryview(bytearray(max_bytes))
    seen = b""
    while source.left:
        parts = source.peek(max_bytes, max_buffers)
        assert 0 < len(parts) <= max_buffers
        assert 0 < sum(map(len, parts)) <= max_bytes
        head = b"".join(parts)[: 1 + len(seen) % max_bytes]
        num_bytes = source.gather(staging[: len(head)])
        assert staging[:num_bytes] == head[:num_bytes]
        target.scatter(staging[:num_bytes])
        seen += head[:num_bytes]
    assert seen == data
    assert b"".join(buffers)[: len(data)] == data


class TestBestOf:
    """A receiver listens on several transports; the sender takes the best that gets through, and says so."""

    @staticmethod
    @contextlib.asynccontextmanager
    async def receiver_and_sender(
        theirs: Sequence[str] = ("shm", "tcp"), ours: Sequence[str] = ("shm", "tcp")
    ) -> AsyncIterator[tuple[str, Transport]]:
        clock = SystemClock()
        makers = {"shm": ShmTransport, "tcp": TcpTransport}
        receiver, sender = (
            BestOf(clock, [makers[name](clock) for name in names]) for names in (theirs, ours)
        )
        try:
            yield await receiver.listen(Sink()), sender
        finally:
            await sender.aclose()
            await receiver.aclose()

    @staticmethod
    def news(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
        records = [record for record in caplog.records if record.name == "baton.transfer.best_of"]
        return [(record.levelname, record.fields) for record in records]  # type: ignore[attr-defined]

    async def test_shared_memory_on_one_host(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        async with self.receiver_and_sender() as (address, sender):
            connection = await sender.connect(address, timeout_s=PUSH_S)
            assert connection.transport == "shm"
            await push(connection, noise(3 * 2**20))
            assert self.news(caplog) == [("INFO", {"transport": "shm", "to": address.split(",")[0]})]

    async def test_tcp_to_another_host_is_no_surprise(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        async with self.receiver_and_sender() as (address, sender):
            elsewhere = address.replace(boot_id(), "11111111-2222-3333-4444-555555555555")
            connection = await sender.connect(elsewhere, timeout_s=PUSH_S)
            assert connection.transport == "tcp"
            assert [level for level, _ in self.news(caplog)] == ["INFO"]

    async def test_a_better_way_that_does_not_get_through_is_a_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As between two containers of one host, each with a network of its own."""
        async with self.receiver_and_sender() as (address, sender):
            unreachable = f"shm://{boot_id()}/{secrets.token_hex(16)},{address.split(',')[1]}"
            connection = await sender.connect(unreachable, timeout_s=PUSH_S)
            assert connection.transport == "tcp"
            ((level, fields),) = self.news(caplog)
            assert (level, fields["transport"]) == ("WARNING", "tcp")
            assert "Connection refused" in fields["shm_failed"]

    async def test_what_one_of_them_was_told_to_use_is_used(self) -> None:
        async with self.receiver_and_sender(ours=["tcp"]) as (address, sender):
            assert (await sender.connect(address, timeout_s=PUSH_S)).transport == "tcp"

    async def test_nothing_in_common(self) -> None:
        async with self.receiver_and_sender(theirs=["shm"], ours=["tcp"]) as (address, sender):
            with pytest.raises(TransferError, match="the receiver has shm, this worker tcp"):
                await sender.connect(address, timeout_s=PUSH_S)

    async def test_nothing_gets_through(self) -> None:
        async with self.receiver_and_sender() as (address, sender):
            pass
        async with self.receiver_and_sender() as (_, sender):
            with pytest.raises(TransferError, match=r"shm: cannot connect .*; tcp: cannot connect "):
                await sender.connect(address, timeout_s=PUSH_S)

    async def test_a_receiver_that_hangs_costs_the_deadline_once(self) -> None:
        async with transport_of("tcp") as any_transport, peer("receive", "auto") as process:
            address = await address_of(process)
            process.send_signal(signal.SIGSTOP)
            sender = BestOf(SystemClock(), [ShmTransport(SystemClock()), any_transport])
            started_s = time.monotonic()
            with pytest.raises(TransferError, match=r"shm: .*did not answer.*; tcp: .*did not answer"):
                await sender.connect(address, timeout_s=1.0)
            assert time.monotonic() - started_s > 0.9
            process.send_signal(signal.SIGCONT)
            assert (await sender.connect(address, timeout_s=PUSH_S)).transport == "shm"
            await sender.aclose()


class TestProcesses:
    """What only another process can do: die without a word, or stop in the middle and live."""

    BYTES = 256 * 2**20

    async def test_a_killed_sender_closes_its_open_piece(self, name: str) -> None:
        async with transport_of(name) as transport:
            sink = Sink()
            address = await transport.listen(sink)
            async with peer("send", name, address, str(self.BYTES)) as process:
                await sink.until_open()
                process.kill()
                await sink.until_closed()
            assert sink.errors[0] is not None
            connection = await transport.connect(address, timeout_s=PUSH_S)
            await push(connection, b"still works", 1)
        sink.check()

    async def test_a_stopped_sender_does_not_keep_buffers(self, name: str) -> None:
        async with transport_of(name, piece_timeout_s=1.0) as transport:
            sink = Sink()
            address = await transport.listen(sink)
            async with peer("send", name, address, str(self.BYTES)) as process:
                await sink.until_open()
                process.send_signal(signal.SIGSTOP)
                await sink.until_closed()
                assert sink.errors[0] is not None
                process.send_signal(signal.SIGCONT)
                await process.wait()  # its connection is gone, which ends it; what it still sent went nowhere
        sink.check()

    async def test_a_killed_receiver_is_noticed(self, name: str) -> None:
        async with transport_of(name) as transport, peer("receive", name) as process:
            connection = await transport.connect(await address_of(process), timeout_s=PUSH_S)
            idle = await transport.connect(await address_of(process, again=True), timeout_s=PUSH_S)
            await push(connection, b"warm")
            task = asyncio.create_task(push(connection, bytes(self.BYTES), 1))
            await asyncio.sleep(0)
            process.kill()
            with pytest.raises(TransferError):
                await task
            assert connection.closed
            while not idle.closed:
                await asyncio.sleep(0.01)

    async def test_a_stopped_receiver_is_timed_out(self, name: str) -> None:
        async with transport_of(name) as transport, peer("receive", name) as process:
            connection = await transport.connect(await address_of(process), timeout_s=PUSH_S)
            await push(connection, b"warm")
            process.send_signal(signal.SIGSTOP)
            tasks = [
                asyncio.create_task(push(connection, noise(2**24), 1 + n, timeout_s=0.5)) for n in range(6)
            ]
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(outcome, TransferError)
            assert connection.closed
            with pytest.raises(TransferError, match="within"):
                await transport.connect(await address_of(process, again=True), timeout_s=0.5)
            process.send_signal(signal.SIGCONT)
            again = await transport.connect(await address_of(process, again=True), timeout_s=PUSH_S)
            await push(again, b"still works")


async def address_of(process: asyncio.subprocess.Process, *, again: bool = False) -> str:
    if not again:
        assert process.stdout is not None
        process.kv_address = (await process.stdout.readline()).decode().strip()  # type: ignore[attr-defined]
    return str(process.kv_address)  # type: ignore[attr-defined]
