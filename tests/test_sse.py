"""Streams, byte for byte and write for write."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from router_parts import EOS, LENGTH, MODEL, STOP, ScriptedFleet, ScriptedGenerator, Step, scripted_door

from baton.errors import Cancelled, InternalError, WorkerLost
from baton_router.app import create_app
from baton_router.openai.format import AnswerFormat
from baton_router.openai.sse import ChunkWriter, until_disconnect

CREATED = 1767225600
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
COMPLETION = {"model": MODEL, "prompt": "hi", "stream": True}


@dataclass
class Exchange:
    """One request to the ASGI application; `gone` is the client's end of it, `blocked` holds up its writes."""

    body: dict[str, Any]
    path: str = "/v1/chat/completions"
    sent: list[dict[str, Any]] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    blocked: asyncio.Event | None = None
    _asked: bool = False

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": orjson.dumps(self.body), "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if self.blocked is not None:
            await self.blocked.wait()

    async def run(self, *script: Step) -> ScriptedGenerator:
        door, generator = scripted_door(*script)
        await self.run_on(create_app(door, ScriptedFleet()))
        return generator

    async def run_on(self, app: Callable[..., Any]) -> None:
        headers = [(b"content-type", b"application/json"), (b"x-request-id", b"r1")]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await app(scope, self.receive, self.send)

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]


def chat_chunk(delta: dict[str, Any], finish_reason: str | None = None, **extra: Any) -> bytes:
    content = {
        "id": "chatcmpl-r1",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": MODEL,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
        **extra,
    }
    return b"data: " + orjson.dumps(content) + b"\n\n"


def completion_chunk(text: str, finish_reason: str | None = None, **extra: Any) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason, **extra}
    content = {
        "id": "cmpl-r1",
        "object": "text_completion",
        "created": CREATED,
        "model": MODEL,
        "choices": [choice],
    }
    return b"data: " + orjson.dumps(content) + b"\n\n"


ROLE = {"role": "assistant", "content": ""}
DONE = b"data: [DONE]\n\n"


async def test_a_chat_stream_byte_for_byte() -> None:
    exchange = Exchange(CHAT)
    await exchange.run("he", 'l"l\n', "ö", (EOS,), STOP)
    assert exchange.sent[0]["status"] == 200
    headers = dict(exchange.sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"x-request-id"] == b"r1"
    assert exchange.bodies == [
        chat_chunk(ROLE) + chat_chunk({"content": "he"}),  # with the first token, in one write
        chat_chunk({"content": 'l"l\n'}),
        chat_chunk({"content": "ö"}),
        chat_chunk({"content": ""}, "stop") + DONE,
    ]
    assert [message.get("more_body") for message in exchange.sent[1:]] == [True, True, True, False]


async def test_a_completion_stream_byte_for_byte() -> None:
    exchange = Exchange(COMPLETION, path="/v1/completions")
    await exchange.run("he", "llo", LENGTH)
    assert exchange.bodies == [
        completion_chunk("he"),
        completion_chunk("llo"),
        completion_chunk("", "length") + DONE,
    ]


async def test_usage_comes_last_and_is_null_before() -> None:
    exchange = Exchange(CHAT | {"stream_options": {"include_usage": True}})
    await exchange.run("he", STOP)
    num_prompt = len("user: hi\nassistant: ")
    usage = {
        "prompt_tokens": num_prompt,
        "completion_tokens": 2,
        "total_tokens": num_prompt + 2,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    opening = chat_chunk({})[: chat_chunk({}).index(b'{"index"')]
    assert exchange.bodies == [
        chat_chunk(ROLE, usage=None) + chat_chunk({"content": "he"}, usage=None),
        chat_chunk({"content": ""}, "stop", usage=None)
        + (opening + b'],"usage":' + orjson.dumps(usage) + b"}\n\n")
        + DONE,
    ]


async def test_token_ids_in_chunks() -> None:
    exchange = Exchange(COMPLETION | {"return_token_ids": True}, path="/v1/completions")
    await exchange.run("h", b"\xc3", b"\xb6", (EOS,), STOP)
    assert exchange.bodies == [
        completion_chunk("h", prompt_token_ids=[257, *b"hi"], token_ids=[ord("h")]),
        completion_chunk("", token_ids=[0xC3]),
        completion_chunk("ö", token_ids=[0xB6]),
        completion_chunk("", token_ids=[EOS]),
        completion_chunk("", "stop", token_ids=[]) + DONE,
    ]


async def test_half_a_character_is_no_chunk() -> None:
    exchange = Exchange(CHAT)
    await exchange.run("h", b"\xc3", b"\xb6", STOP)
    assert exchange.bodies[1:] == [chat_chunk({"content": "ö"}), chat_chunk({"content": ""}, "stop") + DONE]


async def test_a_stop_string_across_chunks() -> None:
    exchange = Exchange(CHAT | {"stop": ["STOP"]})
    forever = asyncio.Event()
    generator = await exchange.run("abS", "x", "yST", "OP and more", forever)
    assert exchange.bodies == [
        chat_chunk(ROLE) + chat_chunk({"content": "ab"}),
        chat_chunk({"content": "Sx"}),
        chat_chunk({"content": "y"}),
        chat_chunk({"content": ""}, "stop") + DONE,
    ]
    assert generator.ended == ["r1"]


async def test_an_answer_of_one_step_is_one_write() -> None:
    exchange = Exchange(CHAT)
    door, generator = scripted_door()
    generator.script = lambda _: [STOP]
    await exchange.run_on(create_app(door, ScriptedFleet()))
    assert exchange.bodies == [chat_chunk(ROLE) + chat_chunk({"content": ""}, "stop") + DONE]


async def test_an_error_in_the_stream_is_an_event_and_a_clean_end() -> None:
    exchange = Exchange(CHAT)
    await exchange.run("he", WorkerLost("worker decode-0 was lost"))
    error = {
        "message": "worker decode-0 was lost",
        "type": "server_error",
        "param": None,
        "code": "worker_lost",
    }
    assert exchange.bodies[1:] == [b"data: " + orjson.dumps({"error": error}) + b"\n\n" + DONE]
    assert exchange.sent[-1]["more_body"] is False


async def test_a_bug_in_the_stream_ends_it_too(caplog: pytest.LogCaptureFixture) -> None:
    exchange = Exchange(CHAT)
    await exchange.run("he", RuntimeError("secret"))
    assert b"secret" not in exchange.bodies[-1]
    assert exchange.bodies[-1].endswith(DONE)
    assert InternalError.code.encode() in exchange.bodies[-1]
    assert "secret" in caplog.text


async def test_nothing_is_sent_before_the_first_token() -> None:
    go = asyncio.Event()
    exchange = Exchange(CHAT)
    running = asyncio.ensure_future(exchange.run(go, "he", STOP))
    for _ in range(20):
        await asyncio.sleep(0)
    assert exchange.sent == []
    go.set()
    await running
    assert len(exchange.sent) == 3


async def test_a_slow_reader_holds_up_its_own_stream() -> None:
    exchange = Exchange(CHAT, blocked=asyncio.Event())
    running = asyncio.ensure_future(exchange.run("a", "b", "c", STOP))
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(exchange.sent) == 1
    assert exchange.blocked is not None
    exchange.blocked.set()
    await running
    assert b"".join(exchange.bodies).count(b"data: ") == 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[], ["begun"]])
async def test_the_generator_is_closed_when_the_client_goes(stream: bool, script: list[Step]) -> None:
    door, generator = scripted_door(*script, asyncio.Event())
    exchange = Exchange(CHAT | {"stream": stream})
    running = asyncio.ensure_future(exchange.run_on(create_app(door, ScriptedFleet())))
    while not generator.requests:
        await asyncio.sleep(0)
    exchange.gone.set()
    await running
    assert generator.ended == ["r1"]


@pytest.mark.parametrize("script", [["a", STOP], ["a", "Xb"], ["a", WorkerLost("lost")]])
async def test_a_client_that_has_everything_may_go_while_the_generator_is_being_closed(
    script: list[Step],
) -> None:
    door, generator = scripted_door(*script)
    generator.num_turns_to_end = 20
    exchange = Exchange(CHAT | {"stop": ["X"]})

    async def send(message: dict[str, Any]) -> None:
        exchange.sent.append(message)
        if message["type"] == "http.response.body" and not message["more_body"]:
            exchange.gone.set()

    exchange.send = send  # type: ignore[method-assign]
    await exchange.run_on(create_app(door, ScriptedFleet()))
    assert generator.ended == ["r1"]
    labels = {
        "endpoint": "/v1/chat/completions",
        "status": "503" if isinstance(script[1], WorkerLost) else "200",
    }
    assert door.metrics.registry.get_sample_value("baton_router_requests_total", labels) == 1


async def test_the_generator_is_closed_when_the_client_reads_no_more_and_goes() -> None:
    door, generator = scripted_door("a", "b", asyncio.Event())
    exchange = Exchange(CHAT, blocked=asyncio.Event())
    running = asyncio.ensure_future(exchange.run_on(create_app(door, ScriptedFleet())))
    while not exchange.sent:
        await asyncio.sleep(0)
    exchange.gone.set()
    await running
    assert generator.ended == ["r1"]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_generator_is_closed_when_the_server_gives_up(stream: bool) -> None:
    door, generator = scripted_door("a", asyncio.Event())
    exchange = Exchange(CHAT | {"stream": stream})
    running = asyncio.ensure_future(exchange.run_on(create_app(door, ScriptedFleet())))
    while not generator.requests:
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert generator.ended == ["r1"]


async def test_header_and_first_token_leave_in_one_turn_of_the_loop() -> None:
    """uvloop gathers what is written in one turn into one system call."""
    exchange = Exchange(CHAT)
    num_turns: list[int] = []
    count = 0

    def turn() -> None:
        nonlocal count
        count += 1
        if len(num_turns) < 2:
            asyncio.get_running_loop().call_soon(turn)

    async def send(message: dict[str, Any]) -> None:
        num_turns.append(count)

    turn()
    exchange.send = send  # type: ignore[method-assign]
    await exchange.run("first", STOP)
    assert num_turns[0] == num_turns[1]


def test_chunks_hold_any_text() -> None:
    format = AnswerFormat('id"\n', 1, "m\\ö", scripted_door()[0].token_text, chat=True)
    for text in ("", '"', "\\", "\n\r\t\0", "\u2028", "東京 👍🏽", "</s>", "data: [DONE]\n\n", "\ufffd"):
        chunk = ChunkWriter(format).write((text, (), STOP))
        *_, last = chunk.removesuffix(b"\n\n").split(b"\n\n")
        content = orjson.loads(last.removeprefix(b"data: "))
        assert content["choices"][0]["delta"]["content"] == text
        assert content["id"] == 'id"\n'
        assert b"\n" not in last


# --- until_disconnect ---


async def _never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def _soon() -> dict[str, Any]:
    await asyncio.sleep(0.001)
    return {"type": "http.disconnect"}


async def test_work_that_ends_is_returned() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await until_disconnect(_never, work()) == 7
    with pytest.raises(ZeroDivisionError):
        await until_disconnect(_never, _divide())


async def _divide() -> float:
    return 1 / 0


async def test_work_has_cleaned_up_when_the_client_is_gone() -> None:
    steps = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    with pytest.raises(Cancelled):
        await until_disconnect(_soon, work())
    assert steps == ["cleaned up"]
