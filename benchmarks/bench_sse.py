"""What a streamed token costs the router: CPU of the router process per SSE event, without fleet, model or TLS.

    python benchmarks/bench_sse.py [--streams 256] [--seconds 10] [--tokens 64] [--gap-ms 20] [--reps 3]

A server process runs the real HTTP application (uvicorn, uvloop, httptools) over a scripted generator: one ticker
hands every open request one token per `--gap-ms`, as a decode worker's steps do, through the pipeline's own
`TokenStream`. A client process keeps `--streams` chat streams open for `--seconds` and counts their events.

    app      everything a request passes: parsing, validation, chat template, tokenising, detokenising, metrics
    floor    the same server and ticker around a bare ASGI function that sends ready-made bytes

CPU is user + system time of the server process; the cost of starting and ending a request (65 events here) is
spread over its events. Both processes share the machine's cores. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import os
import random
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvloop
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from baton.chat_template import ChatTemplate
from baton.clock import SystemClock
from baton.garbage import tune_garbage_collector
from baton.messages import Role, WorkerRecord
from baton.request import FinishReason, Request, WorkerId
from baton.tokenizer import Tokenizer
from baton_router.app import App, create_app, serve_http
from baton_router.fleet_view import IndexHealth
from baton_router.front_door import FrontDoor
from baton_router.generation import AtOnce, Record, Tokens, TokenStream, never
from baton_router.metrics import RouterMetrics

BODY = orjson.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "tell me a story"}], "stream": True}
)
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
REQUEST = HEAD + b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
VOCAB_SIZE = 4096


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--gap-ms", type=float, default=20.0)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--serve", choices=["app", "floor"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(args.serve, args.gap_ms / 1e3, args.tokens))
        return
    results: dict[str, Any] = {}
    print(f"{'server':8} {'CPU us/event':>13} {'events/s':>10}   each repetition's us/event")
    runs_of: dict[str, list[dict[str, float]]] = {"app": [], "floor": []}
    for _ in range(args.reps):
        for server, runs in runs_of.items():
            runs.append(measure(server, args))
    for server, runs in runs_of.items():
        costs = [round(run["us_per_event"], 1) for run in runs]
        rate = statistics.median(run["events_per_s"] for run in runs)
        results[server] = {
            "us_per_event": statistics.median(costs),
            "all": costs,
            "events_per_s": round(rate),
        }
        print(f"{server:8} {statistics.median(costs):13.1f} {rate:10.0f}   {costs}")
    print(json.dumps({"streams": args.streams, "tokens": args.tokens, "gap_ms": args.gap_ms} | results))


# --- server process ---


@dataclass
class Ticker:
    """The generator: every `gap_s` each open request gets a token."""

    gap_s: float
    num_tokens: int
    open: dict[TokenStream, int] = field(default_factory=dict)  # -> tokens given so far
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        next_s = loop.time()
        while True:
            next_s = max(next_s + self.gap_s, loop.time())
            await asyncio.sleep(next_s - loop.time())
            for stream, index in list(self.open.items()):
                last = index + 1 == self.num_tokens
                reason = FinishReason.LENGTH if last else None
                stream.push(Tokens(index, (self.rng.randrange(VOCAB_SIZE),), reason))
                self.open[stream] = index + 1
                if last:
                    del self.open[stream]

    async def generate(
        self, request: Request, *, timeout_s: float, at_once: AtOnce = never
    ) -> AsyncGenerator[list[Tokens], None]:
        stream = Stream(at_once)
        self.open[stream] = 0
        try:
            while tokens := await stream.take():
                yield tokens
                if tokens[-1].finish_reason is not None:
                    return
        finally:
            self.open.pop(stream, None)

    def drop(self, request_id: str, sample: int) -> None:
        raise NotImplementedError

    def cancel(self, request_id: str) -> bool:
        return False

    def record(self, request_id: str) -> Record | None:
        return None


class Stream(TokenStream):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Fleet:
    """Nothing in it is asked for on the way of a token."""

    def __init__(self) -> None:
        self._worker = WorkerRecord(WorkerId("d"), "1", (Role.DECODE,), "", (), "m", "", 16, 1, 4096, 1)

    def records(self) -> list[WorkerRecord]:
        return [self._worker]

    def ready(self) -> list[Any]:
        return []

    def pairs(self) -> list[tuple[WorkerRecord, WorkerRecord]]:
        return []

    def index_health(self) -> IndexHealth:
        return IndexHealth("memory", True)


def tokenizer() -> Tokenizer:
    """Byte level, as most of today's models: all bytes, and words of two to five letters."""
    rng = random.Random(0)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    while len(pieces) < VOCAB_SIZE:
        pieces.append(f"\u0120{len(pieces):x}" + "".join(rng.choices("abcdefgh", k=3)))
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, chat_template=ChatTemplate(TEMPLATE, {}, SystemClock()))


async def serve(server: str, gap_s: float, num_tokens: int) -> None:
    ticker = Ticker(gap_s, num_tokens)
    door = FrontDoor(
        ticker,
        tokenizer(),
        ("m",),
        lambda: 4096,
        SystemClock(),
        random.Random(0),
        RouterMetrics(CollectorRegistry()),
    )
    app = create_app(door, Fleet()) if server == "app" else Floor(ticker, door)
    ticking = asyncio.create_task(ticker.run())
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with await serve_http(app, "127.0.0.1", 0) as http:
        print(http.port, flush=True)
        tune_garbage_collector()
        await stop.wait()
    ticking.cancel()


class Floor(App):
    def __init__(self, ticker: Ticker, door: FrontDoor) -> None:
        super().__init__(self._bare, {}, door, None)
        self._ticker = ticker

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._bare(scope, receive, send)

    async def _bare(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        chunk = (
            b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","choices":[{"text":" token"}]}'
            + b" " * 90
        )
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async for _ in self._ticker.generate(None, timeout_s=0.0):  # type: ignore[arg-type]
            await send({"type": "http.response.body", "body": chunk + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


# --- client ---


class Client:
    """Keeps streams open, each on its own connection, and asks again as soon as an answer has ended. A bare loop
    over sockets, so that it takes little of the cores it shares with the server."""

    def __init__(self, port: int, num_streams: int) -> None:
        self.num_events = 0
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        for _ in range(num_streams):
            connection = socket.create_connection(("127.0.0.1", port))
            self._sockets[connection.fileno()] = connection
            self._poll.register(connection, select.EPOLLIN)
            connection.sendall(REQUEST)

    def run(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for number, _ in self._poll.poll(0.1):
                connection = self._sockets[number]
                data = connection.recv(65536)
                if not data:
                    raise ConnectionError("the server closed a stream")
                self.num_events += data.count(b"data: ")
                if data.endswith(b"0\r\n\r\n"):
                    connection.sendall(REQUEST)

    def close(self) -> None:
        for connection in self._sockets.values():
            connection.close()
        self._poll.close()


def measure(server: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--serve", server, "--tokens", str(args.tokens)]
    command += ["--gap-ms", str(args.gap_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        client = Client(int(process.stdout.readline()), args.streams)
        client.run(1.0)  # to the steady state
        num_before, cpu_before, began = client.num_events, cpu_s(process.pid), time.perf_counter()
        client.run(args.seconds)
        num, cpu = client.num_events - num_before, cpu_s(process.pid) - cpu_before
        elapsed = time.perf_counter() - began
        client.close()
        return {"us_per_event": cpu / num * 1e6, "events_per_s": num / elapsed}
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def cpu_s(pid: int) -> float:
    """User and system time."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
