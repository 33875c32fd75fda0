"""Two processes that push KV blocks over every transport, and the ceilings beside them; driven by bench_transfer.py.

sender (this process)                 receiver (`python transfer_pair.py TRANSPORT,... CERTIFICATES`)
one connection per transport ------>  one listener per transport, one sink
one blocking socket --------------->  the same bytes read into one buffer
one gRPC channel ------------------>  a server on the receiving loop
"""

import asyncio
import json
import mmap
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import trustme
import uvloop

from baton.certificates import load_certificates
from baton.clock import SystemClock
from baton.config import TlsConfig
from baton.errors import TransferError
from baton.messages import BlockLedger, BlocksCall
from baton.request import RequestId, WorkerId
from baton.rpc import STATUS_BLOCKS, GrpcRpc
from baton.transfer.base import MAX_IN_FLIGHT, Connection, Transport
from baton.transfer.choose import make_transport
from baton.transfer.wire import PieceHeader

HOST = "127.0.0.1"
KIB, MIB = 2**10, 2**20
PIECE_BYTES = 4 * MIB
POOL_BYTES = 128 * MIB  # larger than any cache, as a pool of KV is
SHAPES = {"contiguous": PIECE_BYTES, "256 KiB": 256 * KIB, "64 KiB": 64 * KIB}  # bytes of a block
IDLE_S = 3.0
PAUSE_S = 0.002  # between two gRPC calls
MEMCPY, SOCKET, TLS = "memcpy", "raw socket", "tcp + TLS"


class Pool:
    """Blocks in one allocation, handed out in a shuffled order, as of a pool that has been in use for a while."""

    def __init__(self, block_bytes: int, seed: int) -> None:
        # Aligned, as the pool of an engine is: an odd start costs a copy a third of its speed.
        self.memory = memoryview(mmap.mmap(-1, POOL_BYTES))
        self.memory[:] = os.urandom(MIB) * (POOL_BYTES // MIB)
        self.num_blocks = POOL_BYTES // block_bytes
        self._order = random.Random(seed).sample(range(self.num_blocks), self.num_blocks)
        self._block_bytes = block_bytes

    def blocks(self, start: int, num_blocks: int) -> list[memoryview]:
        size = self._block_bytes
        return [self.memory[i * size : (i + 1) * size] for i in self._order[start : start + num_blocks]]


def pools(seed: int) -> dict[int, Pool]:
    return {size: Pool(size, seed) for size in SHAPES.values()}


def make(name: str, certificates: str) -> Transport:
    """`certificates` is a directory that `make_certificates` filled."""
    if name != TLS:
        return make_transport(name, SystemClock(), HOST)
    files = (f"{certificates}/{file}.pem" for file in ("cert", "key", "ca"))
    tls = load_certificates(TlsConfig(*files), "worker", SystemClock())
    return make_transport("tcp", SystemClock(), HOST, tls=tls)


def make_certificates(directory: Path) -> None:
    ca = trustme.CA()
    certificate = ca.issue_cert("worker.baton")
    ca.cert_pem.write_to_path(directory / "ca.pem")
    certificate.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    certificate.private_key_pem.write_to_path(directory / "key.pem")


def cpu_seconds(pid: int) -> float:
    """The process's CPU clock, exact to the nanosecond."""
    return time.clock_gettime((~pid << 3) | 2)


# --- the receiving process ---


class PoolSink:
    """A piece has as many tokens as blocks; its bytes for each say which of the shapes it belongs to."""

    def __init__(self) -> None:
        self._pools = pools(seed=1)

    def open(self, header: PieceHeader, transport: str) -> Sequence[memoryview]:
        pool = self._pools[header.num_bytes // header.num_tokens]
        return pool.blocks(header.token_start, header.num_tokens)

    def close(self, header: PieceHeader, error: TransferError | None) -> None:
        pass


async def receive(names: list[str], certificates: str) -> None:
    sink, transports = PoolSink(), [make(name, certificates) for name in names]
    plain = socket.create_server((HOST, 0))
    threading.Thread(target=receive_plain, args=(plain,), daemon=True).start()
    server = await GrpcRpc(SystemClock()).serve(f"{HOST}:0", {STATUS_BLOCKS: answer})
    addresses = [await transport.listen(sink) for transport in transports]
    print(json.dumps([plain.getsockname()[1], server.address, *addresses]), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the sender leaves


async def answer(call: BlocksCall) -> BlockLedger:
    return BlockLedger(WorkerId("receiver"), 0, 0, 0, 0, ())


def receive_plain(listener: socket.socket) -> None:
    buffer = memoryview(mmap.mmap(-1, POOL_BYTES))
    connection, _ = listener.accept()
    while True:
        left = len(buffer)
        while left:
            num_bytes = connection.recv_into(buffer[-left:])
            if not num_bytes:
                return
            left -= num_bytes
        connection.sendall(b"k")


# --- the sending process ---


@dataclass
class Samples:
    gb_per_s: list[float] = field(default_factory=list)
    send_cpu_s: list[float] = field(default_factory=list)  # per GB
    receive_cpu_s: list[float] = field(default_factory=list)

    def over(self, ceiling: "Samples") -> list[float]:
        """Ratios, round by round: what the machine does meanwhile hits both."""
        return [mine / theirs for mine, theirs in zip(self.gb_per_s, ceiling.gb_per_s, strict=True)]

    @property
    def cpu_s(self) -> tuple[float, float]:
        return statistics.median(self.send_cpu_s), statistics.median(self.receive_cpu_s)


class Pair:
    """Both processes, connected. All measurements move `num_bytes`, a multiple of the pool's size."""

    def __init__(self, num_bytes: int, receiver: "subprocess.Popen[bytes]") -> None:
        self._num_bytes = num_bytes
        self._pids = (os.getpid(), receiver.pid)
        self._pools = pools(seed=2)
        self._targets = pools(seed=1)
        self._connections: dict[str, Connection] = {}
        self._transports: list[Transport] = []
        self.samples: dict[tuple[str, str], Samples] = {}
        self.grpc_ms: dict[str, list[float]] = {}

    @classmethod
    @asynccontextmanager
    async def running(cls, names: list[str], num_bytes: int, certificates: str) -> AsyncIterator[Self]:
        receiver = subprocess.Popen(  # noqa: ASYNC220 - before anything is measured
            [sys.executable, __file__, ",".join(names), certificates],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        pair = cls(num_bytes, receiver)
        try:
            assert receiver.stdout is not None
            port, grpc_address, *addresses = json.loads(receiver.stdout.readline())
            pair._socket = socket.create_connection((HOST, port))
            pair._channel = GrpcRpc(SystemClock()).connect(grpc_address)
            for name, address in zip(names, addresses, strict=True):
                transport = make(name, certificates)
                pair._transports.append(transport)
                pair._connections[name] = await transport.connect(address, timeout_s=10)
            yield pair
            await pair._channel.aclose()
        finally:
            for transport in pair._transports:
                await transport.aclose()
            receiver.kill()
            receiver.communicate()

    async def round(self) -> None:
        """Every transport and every ceiling once, shape by shape."""
        for shape, block_bytes in SHAPES.items():
            await self._measure((MEMCPY, shape), lambda size=block_bytes: self._memcpy(size))
            await self._measure((SOCKET, shape), self._plain)
            for name in self._connections:
                await self._measure((name, shape), lambda n=name, size=block_bytes: self._push(n, size))

    async def grpc_during(self, name: str, seconds: float) -> None:
        """How long a call from this loop to the receiving one takes while KV goes from one to the other."""

        async def transfer() -> None:
            while True:
                await self._push(name, SHAPES["64 KiB"])

        moving = asyncio.create_task(transfer())
        times = self.grpc_ms.setdefault(name, [])
        ends_s = time.perf_counter() + seconds
        while (started_s := time.perf_counter()) < ends_s:
            await self._channel.unary(STATUS_BLOCKS, BlocksCall(), timeout_s=10)
            times.append(1e3 * (time.perf_counter() - started_s))
            await asyncio.sleep(PAUSE_S)
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)

    async def idle_percent(self) -> list[float]:
        """Of a core, while all connections are open and nothing is sent."""
        before = [cpu_seconds(pid) for pid in self._pids]
        await asyncio.sleep(IDLE_S)
        return [100 * (cpu_seconds(pid) - b) / IDLE_S for pid, b in zip(self._pids, before, strict=True)]

    async def _measure(self, key: tuple[str, str], work: Callable[[], Awaitable[None]]) -> None:
        samples = self.samples.setdefault(key, Samples())
        before = [cpu_seconds(pid) for pid in self._pids]
        started_s = time.perf_counter()
        await work()
        seconds = time.perf_counter() - started_s
        sent, received = (cpu_seconds(pid) - b for pid, b in zip(self._pids, before, strict=True))
        gigabytes = self._num_bytes / 1e9
        samples.gb_per_s.append(gigabytes / seconds)
        samples.send_cpu_s.append(sent / gigabytes)
        samples.receive_cpu_s.append(received / gigabytes)

    async def _push(self, name: str, block_bytes: int) -> None:
        pool, per_piece = self._pools[block_bytes], PIECE_BYTES // block_bytes
        room = asyncio.Semaphore(MAX_IN_FLIGHT)

        async def piece(sequence: int, start: int) -> None:
            end, num_bytes = start + per_piece, per_piece * block_bytes
            header = PieceHeader(RequestId("bench"), 0, sequence, 0, 1, start, end, num_bytes)
            try:
                payload = pool.blocks(start, per_piece)
                await self._connections[name].push(header, payload, timeout_s=60)
            finally:
                room.release()

        async with asyncio.TaskGroup() as tasks:
            for sequence in range(self._num_bytes // PIECE_BYTES):
                await room.acquire()
                tasks.create_task(piece(sequence, sequence * per_piece % pool.num_blocks))

    async def _memcpy(self, block_bytes: int) -> None:
        source, target = self._pools[block_bytes], self._targets[block_bytes]
        for _ in range(self._num_bytes // POOL_BYTES):
            blocks = (pool.blocks(0, pool.num_blocks) for pool in (source, target))
            for a, b in zip(*blocks, strict=True):
                b[:] = a

    async def _plain(self) -> None:
        buffer, times = self._pools[PIECE_BYTES].memory, self._num_bytes // POOL_BYTES

        def everything() -> None:
            for _ in range(times):
                self._socket.sendall(buffer)
            for _ in range(times):
                self._socket.recv(1)

        await asyncio.to_thread(everything)


if __name__ == "__main__":
    uvloop.run(receive(sys.argv[1].split(","), sys.argv[2]))
