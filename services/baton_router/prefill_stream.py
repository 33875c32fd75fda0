"""Calls to a prefill worker that are opened before it is known what to ask.

    opened --> begin: a request --> ask: its ticket --> the first token --> the push has ended
       +-----> ask: a request and its ticket -----------^
       +--------------------------------------------------------------------> aclose, at any time

To open a stream takes longer than a message takes on an open one. So one is kept open for the next request that may
begin ahead of its ticket (`PrefillStreams`), and of any other request it is opened while the decode worker makes the
ticket. What comes back before somebody asks, good or bad, waits: without a ticket there is nothing to stream, and
nothing to repair.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from baton.messages import PrefillAnswer, PrefillBegin, PrefillCall, PrefillTicket
from baton.request import Request
from baton.rpc import PREFILL, PREFILL_AHEAD, Channel


class PrefillStream:
    """`begin` of one that is ahead, then `ask`: each once, or never; `aclose` always."""

    def __init__(self, channel: Channel, timeout_s: float | None, *, is_ahead: bool) -> None:
        self.is_ahead = is_ahead
        self._up: asyncio.Queue[PrefillBegin | PrefillTicket | PrefillCall] = asyncio.Queue()
        self._answers: AsyncGenerator[PrefillAnswer, None]
        if is_ahead:
            self._answers = channel.bidi(PREFILL_AHEAD, self._outgoing(2), timeout_s=timeout_s)
        else:
            self._answers = channel.bidi(PREFILL, self._outgoing(1), timeout_s=timeout_s)
        self._first = asyncio.create_task(self._open())

    @property
    def has_answer(self) -> bool:
        """Or has ended."""
        return self._first.done()

    def begin(self, request: Request) -> None:
        self._up.put_nowait(PrefillBegin(request))

    async def ask(self, call: PrefillCall) -> AsyncGenerator[PrefillAnswer, None]:
        self._up.put_nowait(PrefillTicket(call.ticket) if self.is_ahead else call)
        if (first := await self._first) is not None:
            yield first
            async for answer in self._answers:
                yield answer

    async def aclose(self) -> None:
        """The worker stops what it was asked for."""
        self._first.cancel()
        await asyncio.gather(self._first, return_exceptions=True)
        await self._answers.aclose()

    async def _open(self) -> PrefillAnswer | None:
        return await anext(self._answers, None)

    async def _outgoing(self, num_messages: int) -> AsyncGenerator[Any, None]:
        for _ in range(num_messages):
            yield await self._up.get()


class PrefillStreams:
    """Those to one worker. Owns the spare one, which nobody has taken yet."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._spare: PrefillStream | None = None
        self._closed = False

    async def take(self, timeout_s: float, ahead: Request | None) -> PrefillStream:
        """For one request, which begins now if it is `ahead`. The caller closes it, in time."""
        stream = None if ahead is None else await self._take_spare()
        if stream is None:
            stream = PrefillStream(self._channel, timeout_s, is_ahead=ahead is not None)
        if ahead is not None:
            stream.begin(ahead)
        return stream

    async def refill(self) -> None:
        """Now is a good time to open the spare one. It has no deadline: whoever takes it has one."""
        if not self._closed and (self._spare is None or self._spare.has_answer):
            await self._discard()
            self._spare = PrefillStream(self._channel, None, is_ahead=True)

    async def aclose(self) -> None:
        """Those taken are their takers'."""
        self._closed = True
        await self._discard()

    async def _take_spare(self) -> PrefillStream | None:
        """None: there is none, or it broke."""
        if self._spare is not None and self._spare.has_answer:
            await self._discard()
        spare, self._spare = self._spare, None
        return spare

    async def _discard(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            await spare.aclose()
