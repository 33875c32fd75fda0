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
from typing import Any, TypeVar

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.engine.detokenizer import Delta
from baton.errors import BatonError, Cancelled
from baton.request import Request, TokenLogprobs
from baton_router.front_door import CLIENT_GONE, Answer
from baton_router.openai.errors import BUG, error_body, response_to
from baton_router.openai.logprobs import LogprobsFormat

log = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies: pass every event on at once
)


@dataclass(slots=True)
class Exchange:
    """One HTTP request and response, kept in the scope by the outermost application."""

    request_id: str
    arrival_s: float
    send: Send  # the server's own
    status: int = 0  # as it is counted: of the response, or of the error that ended its stream
    is_complete: bool = False  # its last byte is sent, and the server says "disconnect" because of that


@dataclass(frozen=True, slots=True)
class StreamFormat:
    """What a stream of this request looks like."""

    id: str
    created: int
    model: str
    chat: bool
    include_usage: bool
    prompt_token_ids: tuple[int, ...] | None  # None: token ids were not asked for
    logprobs: LogprobsFormat | None = None


class ChunkWriter:
    """Deltas to the bytes of events."""

    __slots__ = (
        "_after_text",
        "_before_logprobs",
        "_before_text",
        "_end",
        "_format",
        "_opening",
        "_tail",
        "_usage_null",
        "_with_token_ids",
    )

    def __init__(self, format: StreamFormat) -> None:
        self._format = format
        kind = "chat.completion.chunk" if format.chat else "text_completion"
        common = {"id": format.id, "object": kind, "created": format.created, "model": format.model}
        self._opening = b"data: " + orjson.dumps(common)[:-1] + b',"choices":['
        self._before_text = self._opening + (
            b'{"index":0,"delta":{"content":' if format.chat else b'{"index":0,"text":'
        )
        self._before_logprobs = (b"}" if format.chat else b"") + b',"logprobs":'
        self._after_text = self._before_logprobs + b'null,"finish_reason":'
        self._usage_null = b',"usage":null' if format.include_usage else b""
        self._end = b"}]" + self._usage_null + b"}\n\n"
        self._tail = self._after_text + b"null" + self._end
        self._with_token_ids = format.prompt_token_ids is not None

    def first(self, delta: Delta, logprobs: Sequence[TokenLogprobs] = ()) -> bytes:
        """The first chunk; in a chat after one that says whose turn it is."""
        prompt = b""
        if self._with_token_ids:
            prompt = b',"prompt_token_ids":' + orjson.dumps(self._format.prompt_token_ids)
        if not self._format.chat:
            return self._chunk(delta, logprobs, prompt)
        choice = (
            b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        )
        return self._opening + choice + prompt + self._usage_null + b"}\n\n" + self.chunk(delta, logprobs)

    def chunk(self, delta: Delta, logprobs: Sequence[TokenLogprobs] = ()) -> bytes:
        """b"" when there is nothing to say."""
        text, _, finish_reason = delta
        if finish_reason is None and not self._with_token_ids and not logprobs:
            return self._before_text + orjson.dumps(text) + self._tail if text else b""
        return self._chunk(delta, logprobs)

    def _chunk(self, delta: Delta, logprobs: Sequence[TokenLogprobs], extra: bytes = b"") -> bytes:
        text, token_ids, finish_reason = delta
        after_text = self._after_text
        if self._format.logprobs is not None and logprobs:
            rendered = orjson.dumps(self._format.logprobs.render(token_ids, logprobs))
            after_text = self._before_logprobs + rendered + b',"finish_reason":'
        if self._with_token_ids:
            extra += b',"token_ids":' + orjson.dumps(token_ids)
        choice = (self._before_text, orjson.dumps(text), after_text, orjson.dumps(finish_reason), extra)
        return b"".join(choice) + self._end

    def usage(self, usage: dict[str, Any]) -> bytes:
        if not self._format.include_usage:
            return b""
        return self._opening + b'],"usage":' + orjson.dumps(usage) + b"}\n\n"


class EventStream(Response):
    """Opens the answer, writes it as it comes, closes it; also when the client goes first."""

    def __init__(
        self,
        open_answer: Callable[[], AbstractAsyncContextManager[Answer]],
        format_of: Callable[[Request], StreamFormat],
        usage: Callable[[Answer], dict[str, Any]],
    ) -> None:
        self._open_answer = open_answer
        self._format_of = format_of
        self._usage = usage
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["baton.exchange"]
        try:
            run = self._run(exchange, scope, receive, send)
            await until_disconnect(receive, run, lambda: exchange.is_complete)
        except Cancelled:
            exchange.status = CLIENT_GONE

    async def _run(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False
        try:
            async with self._open_answer() as answer:
                writer = ChunkWriter(self._format_of(answer.request))
                async for items in answer.tokens:
                    delta = answer.read(items)
                    if has_begun:
                        chunk = writer.chunk(delta, answer.logprobs)
                    else:
                        has_begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS]})
                        chunk = writer.first(delta, answer.logprobs)
                    if delta[2] is not None:
                        exchange.is_complete = True
                        chunk += writer.usage(self._usage(answer)) + DONE
                        await exchange.send({"type": "http.response.body", "body": chunk, "more_body": False})
                        break
                    if chunk:
                        await exchange.send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            if not has_begun:
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
