"""Server-sent events, the router's hot path: one write per engine step and request.

A chunk is bytes that are the same for the whole request around the text as JSON. Chunks go straight to the server's
`send`, past the wrappers of the frameworks around us; only the start of the response passes through these. Nothing is
sent before the first token: an error until then is a plain response with its own status.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.engine.detokenizer import Delta
from baton.errors import BatonError, Cancelled, InternalError
from baton.request import Request
from baton_router.front_door import CLIENT_GONE, Answer
from baton_router.openai.errors import error_body, error_response

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


@dataclass(frozen=True, slots=True)
class StreamFormat:
    """What a stream of this request looks like."""

    id: str
    created: int
    model: str
    chat: bool
    include_usage: bool
    prompt_token_ids: tuple[int, ...] | None  # None: token ids were not asked for


class ChunkWriter:
    """Deltas to the bytes of events."""

    def __init__(self, format: StreamFormat) -> None:
        self._format = format
        kind = "chat.completion.chunk" if format.chat else "text_completion"
        common = {"id": format.id, "object": kind, "created": format.created, "model": format.model}
        self._opening = b"data: " + orjson.dumps(common)[:-1] + b',"choices":['
        self._before_text = self._opening + (
            b'{"index":0,"delta":{"content":' if format.chat else b'{"index":0,"text":'
        )
        self._after_text = (b"}" if format.chat else b"") + b',"logprobs":null,"finish_reason":'
        self._usage_null = b',"usage":null' if format.include_usage else b""
        self._end = b"}]" + self._usage_null + b"}\n\n"
        self._tail = self._after_text + b"null" + self._end
        self._with_token_ids = format.prompt_token_ids is not None

    def first(self, delta: Delta) -> bytes:
        """The first chunk; in a chat after one that says whose turn it is."""
        prompt = b""
        if self._with_token_ids:
            prompt = b',"prompt_token_ids":' + orjson.dumps(self._format.prompt_token_ids)
        if not self._format.chat:
            return self._chunk(delta, prompt)
        choice = (
            b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        )
        return self._opening + choice + prompt + self._usage_null + b"}\n\n" + self.chunk(delta)

    def chunk(self, delta: Delta) -> bytes:
        """b"" when there is nothing to say."""
        if delta.finish_reason is None and not self._with_token_ids:
            return self._before_text + orjson.dumps(delta.text) + self._tail if delta.text else b""
        return self._chunk(delta)

    def _chunk(self, delta: Delta, extra: bytes = b"") -> bytes:
        if self._with_token_ids:
            extra += b',"token_ids":' + orjson.dumps(delta.token_ids)
        text, reason = orjson.dumps(delta.text), orjson.dumps(delta.finish_reason)
        return b"".join((self._before_text, text, self._after_text, reason, extra, self._end))

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
            await until_disconnect(receive, self._run(exchange, scope, receive, send))
        except Cancelled:
            exchange.status = CLIENT_GONE

    async def _run(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._open_answer() as answer:
            try:
                first = await answer.take()
            except BatonError as error:
                await error_response(error)(scope, receive, send)
                return
            assert first is not None
            await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS]})
            try:
                await self._stream(answer, first, exchange.send)
            except BatonError as error:
                await self._fail(error, exchange)
            except Exception:
                log.exception("the stream of request %s failed", answer.request.request_id)
                await self._fail(InternalError("an error of ours; it is in the router's log"), exchange)

    async def _stream(self, answer: Answer, first: Delta, send: Send) -> None:
        writer = ChunkWriter(self._format_of(answer.request))
        chunk = writer.first(first)
        while answer.finish_reason is None:
            if chunk:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            delta = await answer.take()
            assert delta is not None
            chunk = writer.chunk(delta)
        last = chunk + writer.usage(self._usage(answer)) + DONE
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _fail(self, error: BatonError, exchange: Exchange) -> None:
        exchange.status = error.status
        event = b"data: " + error_body(error) + b"\n\n"
        await exchange.send({"type": "http.response.body", "body": event + DONE, "more_body": False})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or Cancelled when the client goes first; `work` has ended by then, cancelled."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        watching.result()
        raise Cancelled("the client went away")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
