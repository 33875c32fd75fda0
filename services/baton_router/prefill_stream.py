"""A call to a prefill worker that is opened before it is known what to ask.

    opened --> ask: a request and its ticket --> the first token --> the push has ended
       +------------------------------------------------------------> aclose, at any time

To open a stream takes longer than a message takes on an open one, so that is done while the decode worker makes the
ticket. `ahead`, the prompt is computed meanwhile, too; then what follows is the ticket alone. What comes back before,
good or bad, waits until somebody asks: without a ticket there is nothing to stream, and nothing to repair.
"""

import asyncio
from collections.abc import AsyncGenerator

from baton.messages import PrefillAnswer, PrefillBegin, PrefillCall, PrefillTicket, PrefillUp
from baton.request import Request
from baton.rpc import PREFILL, PREFILL_AHEAD, Channel


class PrefillStream:
    """`ask` once, or never; `aclose` always."""

    def __init__(self, channel: Channel, timeout_s: float, ahead: Request | None) -> None:
        self.is_ahead = ahead is not None
        self._call: asyncio.Queue[PrefillCall] = asyncio.Queue()
        if ahead is None:
            self._answers = channel.bidi(PREFILL, self._outgoing(), timeout_s=timeout_s)
        else:
            self._answers = channel.bidi(PREFILL_AHEAD, self._outgoing_ahead(ahead), timeout_s=timeout_s)
        self._first = asyncio.create_task(self._open())

    async def ask(self, call: PrefillCall) -> AsyncGenerator[PrefillAnswer, None]:
        self._call.put_nowait(call)
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

    async def _outgoing(self) -> AsyncGenerator[PrefillCall, None]:
        yield await self._call.get()

    async def _outgoing_ahead(self, request: Request) -> AsyncGenerator[PrefillUp, None]:
        yield PrefillBegin(request)
        yield PrefillTicket((await self._call.get()).ticket)
