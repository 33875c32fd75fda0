"""Server-sent events, the router's hot path: one write per engine step and request.

A chunk is bytes that are the same for the whole request around the text as JSON. Chunks go straight to the server's
`send`, past the wrappers of the frameworks around us; only the start of the response passes through these. Nothing is
sent before the first token: an error until then is a plain response with its own status.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.engine.detokenizer import Delta
from baton.errors import BatonError, Cancelled
from baton.request import Request, TokenLogprobs
from baton_router.answer import CLIENT_GONE, Answer
from baton_router.answer_choice import Choice
from baton_router.generation import AtOnce, Tokens
from baton_router.openai.errors import BUG, error_body, response_to
from baton_router.openai.format import PLAIN, AnswerFormat, ChoiceStart, choice_starts, usage

log = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies: pass every event on at once
)


class Connection(Protocol):
    """What our own server lets an application do past its `send`."""

    @property
    def is_paused(self) -> bool:
        """The client does not keep up: what is to be sent waits for it."""
        ...

    def write_chunk(self, chunk: bytes) -> None:
        """Of a response that has started, and has no length."""
        ...


@dataclass(slots=True)
class Exchange:
    """One HTTP request and response, kept in the scope by the outermost application."""

    request_id: str
    arrival_s: float
    send: Send  # the server's own
    connection: Connection | None  # None: another server's
    status: int = 0  # as it is counted: of the response, or of the error that ended its stream
    is_complete: bool = False  # its last byte is sent, and the server says "disconnect" because of that


class ChunkWriter:
    """Deltas of one choice to the bytes of events."""

    __slots__ = (
        "_after_text",
        "_before_logprobs",
        "_before_text",
        "_end",
        "_format",
        "_has_begun",
        "_index",
        "_is_plain",
        "_opening",
        "_start",
        "_tail",
        "_usage_null",
    )

    def __init__(self, format: AnswerFormat, start: ChoiceStart = PLAIN, index: int = 0) -> None:
        self._format = format
        self._start = start
        self._has_begun = False
        self._is_plain = False  # has begun, and its chunks are text and nothing else
        kind = "chat.completion.chunk" if format.chat else "text_completion"
        common = {"id": format.id, "object": kind, "created": format.created, "model": format.model}
        self._opening = b"data: " + orjson.dumps(common)[:-1] + b',"choices":['
        self._index = b'{"index":%d,' % index
        key = b'"delta":{"content":' if format.chat else b'"text":'
        self._before_text = self._opening + self._index + key
        self._before_logprobs = (b"}" if format.chat else b"") + b',"logprobs":'
        self._after_text = self._before_logprobs + b'null,"finish_reason":'
        self._usage_null = b',"usage":null' if format.include_usage else b""
        self._end = b"}]" + self._usage_null + b"}\n\n"
        self._tail = self._after_text + b"null" + self._end

    def write(self, delta: Delta, logprobs: Sequence[TokenLogprobs] = ()) -> bytes:
        """b"" when there is nothing to say."""
        text, token_ids, finish_reason = delta
        if self._is_plain and finish_reason is None:  # nearly always
            return self._before_text + orjson.dumps(text) + self._tail if text else b""
        if not self._has_begun:
            return self._first(delta, logprobs)
        if finish_reason is None and not text and not token_ids:
            return b""
        return self._chunk(delta, logprobs)

    def _first(self, delta: Delta, logprobs: Sequence[TokenLogprobs]) -> bytes:
        """The first chunk; in a chat after one that says whose turn it is."""
        self._has_begun = True
        self._is_plain = self._format.prompt_token_ids is None and self._start.logprobs is None
        prompt = self._of_prompt()
        if not self._format.chat:
            text, token_ids, finish_reason = delta
            return self._chunk((self._start.echo + text, token_ids, finish_reason), logprobs, prompt)
        turn = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        return (
            self._opening
            + self._index
            + turn
            + prompt
            + self._usage_null
            + b"}\n\n"
            + self.write(delta, logprobs)
        )

    def _of_prompt(self) -> bytes:
        found = b""
        if self._format.prompt_token_ids is not None:
            found = b',"prompt_token_ids":' + orjson.dumps(self._format.prompt_token_ids)
        if self._start.prompt_logprobs:
            found += b',"prompt_logprobs":' + self._start.prompt_logprobs
        return found

    def _chunk(self, delta: Delta, logprobs: Sequence[TokenLogprobs], extra: bytes = b"") -> bytes:
        text, token_ids, finish_reason = delta
        after_text = self._after_text
        if self._start.logprobs is not None:
            rendered = orjson.dumps(self._start.logprobs.render(token_ids, logprobs))
            after_text = self._before_logprobs + rendered + b',"finish_reason":'
        if self._format.prompt_token_ids is not None:
            extra += b',"token_ids":' + orjson.dumps(token_ids)
        choice = (self._before_text, orjson.dumps(text), after_text, orjson.dumps(finish_reason), extra)
        return b"".join(choice) + self._end

    def usage(self, usage: dict[str, Any]) -> bytes:
        if not self._format.include_usage:
            return b""
        return self._opening + b'],"usage":' + orjson.dumps(usage) + b"}\n\n"


class EventStream(Response):
    """Opens the answer, writes it as it comes, closes it; also when the client goes first. Between the first words and
    the last its task is woken only where something has to be waited for."""

    _answer: Answer
    _direct: Connection | None = None  # where tokens may be written at once: between the first and the last

    def __init__(
        self,
        open_answer: Callable[[AtOnce], AbstractAsyncContextManager[Answer]],
        format_of: Callable[[Request], AnswerFormat],
    ) -> None:
        self._open_answer = open_answer
        self._format_of = format_of
        self._writers: list[ChunkWriter] = []  # one for each choice, as soon as the response has started
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["baton.exchange"]
        try:
            run = self._run(exchange, scope, receive, send)
            await until_disconnect(receive, run, lambda: exchange.is_complete)
        except Cancelled:
            exchange.status = CLIENT_GONE

    async def _run(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._open_answer(self._write_at_once) as self._answer:
                async for items in self._answer.tokens:
                    read = self._answer.read(items)
                    if not self._writers:
                        self._writers = await self._make_writers(self._answer)
                        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS]})
                        if not self._answer.request.sampling.stop:  # which might make any token the last
                            self._direct = exchange.connection
                    chunk = self._chunk(read)
                    if not self._answer.num_running:
                        exchange.is_complete = True
                        chunk += self._writers[0].usage(usage(self._answer)) + DONE
                        await exchange.send({"type": "http.response.body", "body": chunk, "more_body": False})
                        break
                    if chunk:
                        await exchange.send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            if not self._writers:
                await response_to(HttpRequest(scope), error)(scope, receive, send)
                return
            if not isinstance(error, BatonError):
                log.exception("the stream of request %s failed", exchange.request_id)
                error = BUG
            if not exchange.is_complete:
                exchange.status, exchange.is_complete = error.status, True
                await exchange.send(
                    {"type": "http.response.body", "body": error_events(error), "more_body": False}
                )

    def _write_at_once(self, tokens: Tokens) -> bool:
        """Neither the first words nor the last."""
        connection = self._direct
        if connection is None or tokens.finish_reason is not None or connection.is_paused:
            return False
        if chunk := self._chunk(self._answer.read([tokens])):
            connection.write_chunk(chunk)
        return True

    def _chunk(self, read: Sequence[tuple[Choice, Delta]]) -> bytes:
        if len(read) == 1:  # nearly always
            [(choice, delta)] = read
            return self._writers[choice.index].write(delta, choice.logprobs)
        return b"".join([self._writers[c.index].write(delta, c.logprobs) for c, delta in read])

    async def _make_writers(self, answer: Answer) -> list[ChunkWriter]:
        format = self._format_of(answer.request)
        starts = await choice_starts(format, answer)
        return [ChunkWriter(format, start, index) for index, start in enumerate(starts)]


def error_events(error: BatonError) -> bytes:
    return b"data: " + error_body(error) + b"\n\n" + DONE


async def until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, T], is_complete: Callable[[], bool] = lambda: False
) -> T:
    """The result of `work`, or Cancelled when the client goes before the response is complete; `work` has
    ended by then, cancelled.

    `work` gets a task of its own: each token wakes it, and not the frames of everything around it.
    """
    is_waiting = True

    def stop_waiting(_: asyncio.Task[T]) -> None:
        if is_waiting:
            waiting.reschedule(0.0)

    working = asyncio.create_task(work)
    try:
        async with asyncio.timeout(None) as waiting:
            working.add_done_callback(stop_waiting)
            try:
                await _disconnect(receive)
            finally:
                is_waiting = False
        if is_complete():
            return await working
    except TimeoutError:
        return await working
    finally:
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))
    if not working.cancelled() and working.exception() is None:
        return working.result()
    raise Cancelled("the client went away")


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
