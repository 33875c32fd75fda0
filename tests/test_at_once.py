"""Tokens that are written as they arrive, without waking anybody: the same bytes as by the reader, in the same order,
and only for as long as the client keeps up. Over the real server."""

import asyncio
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import orjson
import pytest
from router_parts import LENGTH, MODEL, STOP, Of, ScriptedFleet, ScriptedGenerator, Step, scripted_door

from baton.request import Request
from baton_router.app import HttpServer, create_app, serve_http
from baton_router.generation import AtOnce, Tokens, TokenStream, never

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
COMPLETION = {"model": MODEL, "prompt": "hi", "stream": True}
HEADERS = {"x-request-id": "r1"}
NUM_STEPS, STEP_TOKENS = 600, 2000


@dataclass
class SteppingGenerator(ScriptedGenerator):
    """The script a step at a time into a TokenStream, as the pipeline does."""

    offers: bool = True
    num_pushed: int = 0
    num_at_once: int = 0

    async def generate(
        self, request: Request, *, timeout_s: float, at_once: AtOnce = never
    ) -> AsyncGenerator[list[Tokens], None]:
        def counted(tokens: Tokens) -> bool:
            done = at_once(tokens)
            self.num_at_once += done
            return done

        stream = TokenStream(counted if self.offers else never)
        feeding = asyncio.create_task(self._feed(stream, super().generate(request, timeout_s=timeout_s)))
        try:
            while items := await stream.take():
                yield items
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    async def _feed(self, stream: TokenStream, script: AsyncGenerator[list[Tokens], None]) -> None:
        async with aclosing(script):
            async for [tokens] in script:
                stream.push(tokens)
                self.num_pushed += 1
                for _ in range(5):  # so that the reader waits again
                    await asyncio.sleep(0)
        stream.end()


@asynccontextmanager
async def serving(*script: Step, offers: bool = True) -> AsyncIterator[tuple[HttpServer, SteppingGenerator]]:
    generator = SteppingGenerator(lambda _: script, offers=offers)
    door, _ = scripted_door(generator=generator)
    async with await serve_http(create_app(door, ScriptedFleet()), "127.0.0.1", 0) as server:
        yield server, generator


async def streamed(body: dict[str, Any], *script: Step, offers: bool = True) -> tuple[bytes, int]:
    path = "chat/completions" if "messages" in body else "completions"
    async with serving(*script, offers=offers) as (server, generator), httpx.AsyncClient() as client:
        answer = await client.post(f"http://{server.address}/v1/{path}", json=body, headers=HEADERS)
        assert answer.status_code == 200
        return answer.content, generator.num_at_once


HELLO: list[Step] = ["he", "l", b"\xc3", b"\xb6", "lo", STOP]
TWO: list[Step] = ["a", Of(1, "x"), "b", Of(1, "y"), STOP, Of(1, "z"), Of(1, LENGTH)]


@pytest.mark.parametrize(
    ("body", "script", "num_at_once"),
    [
        (CHAT, HELLO, 4),
        (COMPLETION | {"stream_options": {"include_usage": True}}, HELLO, 4),
        (COMPLETION | {"logprobs": 2, "return_token_ids": True}, HELLO, 4),
        (CHAT | {"n": 2}, TWO, 4),
        (CHAT | {"stop": ["lo"]}, HELLO, 0),
    ],
)
async def test_the_bytes_are_those_that_the_reader_would_write(
    body: dict[str, Any], script: list[Step], num_at_once: int
) -> None:
    read, _ = await streamed(body, *script, offers=False)
    written, num = await streamed(body, *script)
    assert written == read
    assert num == num_at_once


async def test_a_client_that_does_not_keep_up_holds_up_its_own_stream_and_misses_nothing() -> None:
    script = [f"{i:05}" + "\0" * STEP_TOKENS for i in range(NUM_STEPS)]  # NUL is six bytes in JSON
    loop = asyncio.get_running_loop()
    async with serving(*script, STOP) as (server, generator):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            client.setblocking(False)
            await loop.sock_connect(client, (server.host, server.port))
            body = orjson.dumps(CHAT)
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            length = b"content-length: %d\r\n\r\n" % len(body)
            await loop.sock_sendall(client, head + length + body)
            async with asyncio.timeout(60):
                while generator.num_pushed <= NUM_STEPS:
                    await asyncio.sleep(0.01)
                assert 0 < generator.num_at_once < NUM_STEPS - 1
                data = bytearray()
                while not data.endswith(b"0\r\n\r\n"):
                    data += await loop.sock_recv(client, 1 << 20)
    assert [int(number) for number in re.findall(rb"(\d{5})\\u0000", data)] == list(range(NUM_STEPS))
    assert data.count(b"\\u0000") == NUM_STEPS * STEP_TOKENS


async def test_a_client_that_goes_ends_a_stream_that_wakes_nobody() -> None:
    async with serving("a", "b", "c", asyncio.Event()) as (server, generator), httpx.AsyncClient() as client:
        url = f"http://{server.address}/v1/chat/completions"
        async with client.stream("POST", url, json=CHAT) as answer, aclosing(answer.aiter_lines()) as lines:
            async for line in lines:
                if '"c"' in line:
                    break
        await generator.wait_until_ended(1)
        assert generator.num_at_once == 2


async def test_what_fails_at_once_is_raised_at_the_reader_and_nothing_follows() -> None:
    def broken(tokens: Tokens) -> bool:
        raise ValueError("a bug")

    stream = TokenStream(broken)
    reading = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    stream.push(Tokens(0, (1,), None))
    stream.push(Tokens(1, (2,), None))
    with pytest.raises(ValueError, match="a bug"):
        await reading


async def test_nothing_is_offered_before_the_reader_has_had_what_came_first() -> None:
    offered: list[Tokens] = []
    stream = TokenStream(lambda tokens: offered.append(tokens) is None)
    first, second, third = (Tokens(index, (index,), None) for index in range(3))
    stream.push(first)
    assert await stream.take() == [first]
    stream.push(second)  # the reader is busy with the first
    assert await stream.take() == [second]
    reading = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    stream.push(third)
    assert offered == [third]
    stream.end()
    assert await reading == []
