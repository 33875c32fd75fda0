"""How fast KV blocks cross between two processes of one machine, and what it costs.

Measured: scattered blocks of one pool, pushed as pieces of about 4 MiB (MAX_IN_FLIGHT at once) into scattered blocks
of another process's pool, over each transport; no digests, no engine. Beside it, in the same rounds and turn by turn,
as many bytes through one blocking socket from one buffer into one buffer: the ceiling of Python and loopback. Ratios
to that ceiling carry over to other machines, GB/s do not (1 GB = 1e9 bytes).

    python benchmarks/bench_transfer.py [--rounds 7] [--megabytes 512] [--transports tcp,ucx] [--loop uvloop]

CPU seconds are of the sending and the receiving process. `lag` is how late a 1 ms timer on the sender's loop fires
during transfers: a stand-in for what gRPC on that loop sees. `idle` is the CPU use of both processes while all
connections are open and nothing is sent. The last line of stdout is one JSON object.
"""

import argparse
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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import psutil
import uvloop

from baton.clock import SystemClock
from baton.errors import TransferError
from baton.request import RequestId
from baton.transfer.base import MAX_IN_FLIGHT, Connection
from baton.transfer.choose import available, make_transport
from baton.transfer.wire import PieceHeader

HOST = "127.0.0.1"
KIB, MIB = 2**10, 2**20
PIECE_BYTES = 4 * MIB
SHAPES = {"2048 x 64 KiB": (2048, 64 * KIB), "512 x 256 KiB": (512, 256 * KIB)}
IDLE_S = 3.0


class Pool:
    """Blocks in one allocation, handed out in a shuffled order, as a pool that has been in use for a while."""

    def __init__(self, num_blocks: int, block_bytes: int, seed: int) -> None:
        # Aligned, as the pool of an engine is: an odd start costs a copy a third of its speed.
        self._memory = memoryview(mmap.mmap(-1, num_blocks * block_bytes))
        self._memory[:] = os.urandom(MIB) * (len(self._memory) // MIB)
        self._order = random.Random(seed).sample(range(num_blocks), num_blocks)
        self._block_bytes = block_bytes

    def blocks(self, start: int, num_blocks: int) -> list[memoryview]:
        size = self._block_bytes
        return [self._memory[i * size : (i + 1) * size] for i in self._order[start : start + num_blocks]]


class PoolSink:
    """A piece has as many tokens as blocks; its bytes for each say which of the shapes it belongs to."""

    def __init__(self) -> None:
        self._pools = {size: Pool(number, size, seed=1) for number, size in SHAPES.values()}

    def open(self, header: PieceHeader) -> Sequence[memoryview]:
        pool = self._pools[header.num_bytes // header.num_tokens]
        return pool.blocks(header.token_start, header.num_tokens)

    def close(self, header: PieceHeader, error: TransferError | None) -> None:
        pass


async def receive(names: list[str]) -> None:
    """The other process: one listener per transport, and the plain socket in a thread."""
    sink, transports = PoolSink(), [make_transport(name, SystemClock(), HOST) for name in names]
    plain = socket.create_server((HOST, 0))
    threading.Thread(target=receive_plain, args=(plain,), daemon=True).start()
    addresses = [await transport.listen(sink) for transport in transports]
    print(json.dumps([plain.getsockname()[1], *addresses]), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the sender leaves


def receive_plain(listener: socket.socket) -> None:
    buffer = memoryview(bytearray(16 * MIB))
    connection, _ = listener.accept()
    while True:
        left = len(buffer)
        while left:
            num_bytes = connection.recv_into(buffer[-left:])
            if not num_bytes:
                return
            left -= num_bytes
        connection.sendall(b"k")


@dataclass
class Result:
    gb_per_s: list[float] = field(default_factory=list)
    of_plain: list[float] = field(default_factory=list)
    send_cpu_s: list[float] = field(default_factory=list)  # per GB
    receive_cpu_s: list[float] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        lags = sorted(self.lag_ms) or [0.0]
        return {
            "gb_per_s": round(statistics.median(self.gb_per_s), 2),
            "of_plain": round(statistics.median(self.of_plain), 2),
            "of_plain_min": round(min(self.of_plain), 2),
            "of_plain_max": round(max(self.of_plain), 2),
            "send_cpu_s_per_gb": round(statistics.median(self.send_cpu_s), 2),
            "receive_cpu_s_per_gb": round(statistics.median(self.receive_cpu_s), 2),
            "lag_p50_ms": round(lags[len(lags) // 2], 2),
            "lag_p99_ms": round(lags[int(len(lags) * 0.99)], 2),
        }


def cpu_seconds(process: psutil.Process) -> float:
    return time.clock_gettime((~process.pid << 3) | 2)  # the process's CPU clock, exact to the nanosecond


class Bench:
    def __init__(self, receiver: psutil.Process, num_bytes: int) -> None:
        self._processes = (psutil.Process(), receiver)
        self._num_bytes = num_bytes
        self._pools = {shape: Pool(*numbers, seed=2) for shape, numbers in SHAPES.items()}
        self.results: dict[str, Result] = {}

    async def blocks(self, name: str, connection: Connection, shape: str) -> None:
        num_blocks, block_bytes = SHAPES[shape]
        per_piece = PIECE_BYTES // block_bytes
        pool = self._pools[shape]
        room = asyncio.Semaphore(MAX_IN_FLIGHT)

        async def piece(sequence: int, start: int) -> None:
            end, num_bytes = start + per_piece, per_piece * block_bytes
            header = PieceHeader(RequestId("bench"), 0, sequence, 0, 1, start, end, num_bytes)
            await connection.push(header, pool.blocks(start, per_piece), timeout_s=60)
            room.release()

        async def everything() -> None:
            async with asyncio.TaskGroup() as tasks:
                for sequence in range(self._num_bytes // PIECE_BYTES):
                    await room.acquire()
                    tasks.create_task(piece(sequence, sequence * per_piece % num_blocks))

        await self._measure(f"{name} {shape}", everything)

    async def plain(self, sock: socket.socket) -> None:
        buffer = memoryview(bytearray(16 * MIB))

        def everything() -> None:
            for _ in range(self._num_bytes // len(buffer)):
                sock.sendall(buffer)
            for _ in range(self._num_bytes // len(buffer)):
                sock.recv(1)

        async def in_thread() -> None:
            await asyncio.to_thread(everything)

        await self._measure("plain socket", in_thread)

    async def _measure(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        result = self.results.setdefault(what, Result())
        watching = asyncio.create_task(watch_lag(result.lag_ms))
        before = [cpu_seconds(process) for process in self._processes]
        started_s = time.perf_counter()
        await work()
        seconds = time.perf_counter() - started_s
        cpu = [cpu_seconds(process) - b for process, b in zip(self._processes, before, strict=True)]
        watching.cancel()
        gigabytes = self._num_bytes / 1e9
        result.gb_per_s.append(gigabytes / seconds)
        result.of_plain.append(gigabytes / seconds / self.results["plain socket"].gb_per_s[-1])
        result.send_cpu_s.append(cpu[0] / gigabytes)
        result.receive_cpu_s.append(cpu[1] / gigabytes)

    async def idle_percent(self) -> list[float]:
        before = [cpu_seconds(process) for process in self._processes]
        await asyncio.sleep(IDLE_S)
        return [
            round(100 * (cpu_seconds(process) - b) / IDLE_S, 2)
            for process, b in zip(self._processes, before, strict=True)
        ]


async def watch_lag(lags_ms: list[float]) -> None:
    while True:
        started_s = time.perf_counter()
        await asyncio.sleep(0.001)
        lags_ms.append(1e3 * (time.perf_counter() - started_s) - 1)


async def send(options: argparse.Namespace) -> None:
    names: list[str] = options.transports
    receiver = subprocess.Popen(  # noqa: ASYNC220 - before anything is measured
        [sys.executable, __file__, "--receive", "--transports", ",".join(names), "--loop", options.loop],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    transports = {name: make_transport(name, SystemClock(), HOST) for name in names}
    try:
        assert receiver.stdout is not None
        port, *addresses = json.loads(receiver.stdout.readline())
        bench = Bench(psutil.Process(receiver.pid), options.megabytes * MIB)
        sock = socket.create_connection((HOST, port))
        connections = {
            name: await transports[name].connect(address, timeout_s=10)
            for name, address in zip(names, addresses, strict=True)
        }
        for round_ in range(options.rounds + 1):
            for shape in SHAPES:
                await bench.plain(sock)
                for name in names:
                    await bench.blocks(name, connections[name], shape)
            if round_ == 0:
                bench.results.clear()  # first touch of every buffer
        idle = await bench.idle_percent()
    finally:
        for transport in transports.values():
            await transport.aclose()
        receiver.kill()
        receiver.communicate()
    report(bench.results, idle, options)


def report(results: dict[str, Result], idle: list[float], options: argparse.Namespace) -> None:
    summaries = {what: result.summary() for what, result in results.items()}
    print(f"{'':24}  GB/s   of plain (min-max)   CPU s/GB send + receive   lag p50 / p99 ms")
    for what, s in summaries.items():
        print(
            f"{what:24} {s['gb_per_s']:5.2f}   {s['of_plain']:5.2f}  ({s['of_plain_min']:.2f}-"
            f"{s['of_plain_max']:.2f})      {s['send_cpu_s_per_gb']:5.2f} + {s['receive_cpu_s_per_gb']:.2f}"
            f"           {s['lag_p50_ms']:8.2f} / {s['lag_p99_ms']:.2f}"
        )
    print(f"idle: {idle[0]} % of a core in the sender, {idle[1]} % in the receiver")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(json.dumps({"loop": options.loop, "rounds": options.rounds, "idle_percent": idle, **summaries}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--transports", type=lambda names: names.split(","), default=available())
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    options = parser.parse_args()
    work = receive(options.transports) if options.receive else send(options)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if options.loop == "uvloop" else None) as runner:
        runner.run(work)


if __name__ == "__main__":
    main()
