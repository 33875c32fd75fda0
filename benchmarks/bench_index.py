"""What the prefix index costs: a private Redis server on this machine, one client process, one call at a time.

    python benchmarks/bench_index.py [--redis-server EXECUTABLE] [--reps 300]

Prints medians in microseconds; the last line is one JSON object. `match` asks 16 workers of which all share a
16-block system prompt and one holds the whole chain; the mirror's look-up is of a 2,048-token prompt (128 blocks of
16) over 64 workers.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from baton.clock import SystemClock
from baton.errors import Unavailable
from baton.index.base import BlocksChanged, WorkerJoined
from baton.index.redis import RedisIndex
from baton.kv.block import BlockHash, block_hashes, root_hash
from baton.messages import Load, Role, WorkerRecord
from baton.request import WorkerId
from baton_router.mirror import PrefixMirror

CHAIN = block_hashes(root_hash("bench", 16, ""), range(256 * 16), 16)
RNG = random.Random(0)


def record_of(worker_id: WorkerId, num_running: int = 0) -> WorkerRecord:
    load = Load(num_running=num_running, prefill_tokens_per_s=1e4, decode_step_s=0.01)
    return WorkerRecord(
        worker_id, "a", (Role.DECODE,), "127.0.0.1:1", ("tcp",), "m", "f" * 32, 16, 1000, 4096, 1, load=load
    )


def random_blocks(count: int) -> list[BlockHash]:
    return [BlockHash(RNG.randbytes(16)) for _ in range(count)]


async def median_us(call: Callable[[], Awaitable[object]], reps: int) -> float:
    seconds = []
    for _ in range(reps):
        began = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - began)
    return round(statistics.median(seconds) * 1e6, 1)


async def bench_redis(url: str, reps: int) -> dict[str, float]:
    index = RedisIndex(url, "bench", SystemClock(), timeout_s=30.0)
    while True:
        try:
            await index.workers()
            break
        except Unavailable:
            await asyncio.sleep(0.02)  # the server is starting
    workers = [WorkerId(f"w{i:02}") for i in range(16)]
    for worker_id in workers:
        await index.renew(record_of(worker_id), lease_s=600.0)
        await index.publish(worker_id, "a", random_blocks(5000) + CHAIN[:16], [], snapshot=True)
    await index.publish(workers[0], "a", CHAIN, [])
    figures = {}
    same, counter = record_of(workers[1]), iter(range(10**9))
    figures["renew, same facts"] = await median_us(lambda: index.renew(same, lease_s=600.0), reps)
    changing = lambda: index.renew(record_of(workers[1], next(counter)), lease_s=600.0)  # noqa: E731
    figures["renew, new load"] = await median_us(changing, reps)
    for count in (64, 256):
        hashes = CHAIN[:count]
        assert (await index.match(hashes, workers))[workers[0]] == count
        figures[f"match {count} blocks x 16 workers"] = await median_us(
            lambda h=hashes: index.match(h, workers), reps
        )
    strangers = random_blocks(256)
    figures["match nothing x 16 workers"] = await median_us(lambda: index.match(strangers, workers), reps)
    for count in (16, 64, 256):
        publish = lambda n=count: index.publish(workers[2], "a", random_blocks(n), [])  # noqa: E731
        figures[f"publish {count} blocks"] = await median_us(publish, reps)
    many = random_blocks(62_500)
    snapshot = lambda: index.publish(workers[3], "a", many, [], snapshot=True)  # noqa: E731
    figures["publish snapshot of 62,500"] = await median_us(snapshot, 5)
    await index.aclose()
    return figures


def bench_mirror(reps: int) -> dict[str, float]:
    mirror = PrefixMirror(SystemClock())
    for i in range(64):
        worker_id = WorkerId(f"w{i:02}")
        mirror.apply(WorkerJoined(record_of(worker_id)))
        held = (*CHAIN[: 16 + 2 * (i % 57)], *random_blocks(5000))
        mirror.apply(BlocksChanged(worker_id, "a", held, (), snapshot=True))
    seconds = []
    for _ in range(reps):
        began = time.perf_counter()
        mirror.match(CHAIN[:128])
        seconds.append(time.perf_counter() - began)
    return {"mirror: 128 blocks x 64 workers": round(statistics.median(seconds) * 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--redis-server", default=shutil.which("redis-server") or "redis-server")
    parser.add_argument("--reps", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        socket = Path(directory) / "redis.sock"
        command = [
            args.redis_server,
            "--port",
            "0",
            "--unixsocket",
            str(socket),
            "--save",
            "",
            "--dir",
            directory,
        ]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            figures = asyncio.run(bench_redis(f"unix://{socket}", args.reps))
        finally:
            server.terminate()
            server.wait()
    figures |= bench_mirror(20 * args.reps)
    for name, value in figures.items():
        print(f"{name:34} {value:10.1f} us")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
