"""A call to a prefill worker that is opened before it is known what to ask.

    opened --> ask: a request and its ticket --> the first token --> the push has ended
       +------------------------------------------------------------> aclose, at any time

To open a stream takes longer than a message takes on an open one, so that is done while the decode worker makes the
ticket. What goes wrong meanwhile is raised once somebody asks: until then there is nothing to repair.
"""

import asyncio
from collections.abc import AsyncGenerator

from baton.messages import PrefillAnswer, PrefillCall
from baton.rpc import PREFILL, Channel


class PrefillStream:
    """`ask` once, or never; `aclose` always."""

    def __init__(self, channel: Channel, timeout_s: float) -> None:
        self._calls: asyncio.Queue[PrefillCall] = asyncio.Queue()
        self._answers = channel.bidi(PREFILL, self._outgoing(), timeout_s=timeout_s)
        self._first = asyncio.create_task(self._open())

    async def ask(self, call: PrefillCall) -> AsyncGenerator[PrefillAnswer, None]:
        self._calls.put_nowait(call)
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
        yield await self._calls.get()
