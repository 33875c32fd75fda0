"""A scripted HTTP/1.1 server for the tests of the load test: each request is answered by a list of steps, and
what the client did is counted."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import orjson


@dataclass(frozen=True)
class Step:
    """`wait` is awaited first; then `data` is written as it is; then the connection is aborted if `abort`."""

    data: bytes = b""
    wait: Callable[[], Any] | None = None
    abort: bool = False


@dataclass
class Received:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


Script = Callable[[Received], Sequence[Step]]


@dataclass
class ScriptedServer:
    script: Script
    received: list[Received] = field(default_factory=list)
    num_opened: int = 0
    num_open: int = 0
    max_open: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    port: int = 0

    async def __aenter__(self) -> "ScriptedServer":
        self._loop = asyncio.get_running_loop()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        await self.wait_until(lambda: self.num_open == 0)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, waiting: Coroutine[Any, Any, None]) -> None:
        """From another thread."""
        asyncio.run_coroutine_threadsafe(waiting, self._loop).result(60)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30), self.changed:
            await self.changed.wait_for(condition)

    async def _count(self, change: int) -> None:
        async with self.changed:
            self.num_open += change
            self.num_opened += max(change, 0)
            self.max_open = max(self.max_open, self.num_open)
            self.changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._count(+1)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    await self._answer(await self._read(reader), reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            await self._count(-1)

    async def _read(self, reader: asyncio.StreamReader) -> Received:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        received = Received(method, path, headers, orjson.loads(body) if body else None)
        async with self.changed:
            self.received.append(received)
            self.changed.notify_all()
        return received

    async def _answer(
        self, received: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        # The client sends nothing before its answer ended, so a byte or an end from it is a hang-up.
        hang_up = asyncio.ensure_future(reader.read(1))
        try:
            for step in self.script(received):
                if step.wait is not None:
                    waiting = asyncio.ensure_future(step.wait())
                    await asyncio.wait((waiting, hang_up), return_when=asyncio.FIRST_COMPLETED)
                    if not waiting.done():
                        waiting.cancel()
                        raise ConnectionResetError
                    waiting.result()
                writer.write(step.data)
                await writer.drain()
                if step.abort:
                    writer.transport.abort()
                    raise ConnectionResetError
        finally:
            hang_up.cancel()
            with suppress(asyncio.CancelledError):
                if await hang_up == b"":
                    raise ConnectionResetError


async def forever() -> None:
    await asyncio.Event().wait()


def pause(seconds: float) -> Callable[[], Any]:
    return lambda: asyncio.sleep(seconds)


def head(status: int = 200, content_type: str = "text/event-stream", *extra: str) -> bytes:
    """Of a chunked answer."""
    lines = [
        f"HTTP/1.1 {status} Reason",
        f"content-type: {content_type}",
        "transfer-encoding: chunked",
        *extra,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


END = chunk(b"")
DONE = b"data: [DONE]\n\n"


def sse(event: Any) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"


def text_event(text: str, finish: str | None = None) -> bytes:
    return sse({"id": "cmpl-1", "choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def chat_event(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return sse({"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def usage_event(num_prompt: int, num_output: int, num_cached: int | None = None) -> bytes:
    usage: dict[str, Any] = {"prompt_tokens": num_prompt, "completion_tokens": num_output}
    if num_cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": num_cached}
    return sse({"id": "cmpl-1", "choices": [], "usage": usage})


def stream(*events: bytes) -> list[Step]:
    """A whole answer, one chunk per event."""
    return [Step(head()), *(Step(chunk(event)) for event in events), Step(chunk(DONE) + END)]


def plain(status: int, body: bytes, content_type: str = "application/json") -> list[Step]:
    lines = [f"HTTP/1.1 {status} Reason", f"content-type: {content_type}", f"content-length: {len(body)}"]
    return [Step("\r\n".join([*lines, "", ""]).encode() + body)]


def good_answer(*words: str) -> list[Step]:
    events = [text_event(f"{word} ") for word in words]
    return stream(*events, text_event("", "length"), usage_event(10, len(words)))


@contextmanager
def serving(script: Script) -> Iterator[ScriptedServer]:
    """The server on a thread of its own, for clients that bring their own event loop."""
    ready, holder = threading.Event(), {}

    async def serve() -> None:
        async with ScriptedServer(script) as server:
            holder["server"], holder["stop"] = server, asyncio.Event()
            holder["loop"] = asyncio.get_running_loop()
            ready.set()
            await holder["stop"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    try:
        yield holder["server"]
    finally:
        holder["loop"].call_soon_threadsafe(holder["stop"].set)
        thread.join(30)
        assert not thread.is_alive()
