"""What both implementations do with a call: `respond` at the server, `Feeding` at the caller."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from baton.errors import BatonError, InternalError, InvalidRequest
from baton.rpc.base import Kind, Method

log = logging.getLogger(__name__)

Send = Callable[[Any], Awaitable[None]]


async def respond(method: Method[Any, Any], handler: Any, requests: AsyncIterator[Any], send: Send) -> None:
    """Run a handler of any kind and `send` its answers. Raises nothing but BatonErrors, and CancelledError when the
    task that runs it was cancelled."""
    try:
        await _run(method, handler, requests, send)
    except BatonError:
        raise
    except asyncio.CancelledError as error:
        if was_cancelled():
            raise
        raise _internal(method, error) from error  # the handler awaited something that someone else cancelled
    except Exception as error:
        raise _internal(method, error) from error


async def _run(method: Method[Any, Any], handler: Any, requests: AsyncIterator[Any], send: Send) -> None:
    if method.kind is Kind.BIDI:
        answers = handler(requests)
    else:
        request = await anext(requests, None)
        if request is None:
            raise InvalidRequest(f"{method.path} was called without a request")
        if method.kind is Kind.UNARY:
            await send(await handler(request))
            return
        answers = handler(request)
    async with aclosing(answers):
        async for answer in answers:
            await send(answer)


def _internal(method: Method[Any, Any], error: BaseException) -> InternalError:
    log.error("%s failed", method.path, exc_info=error)
    return InternalError(f"{method.path} failed: {type(error).__name__}")


def was_cancelled() -> bool:
    """Whether a CancelledError that is just passing was meant for this task."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Feeding:
    """While its block runs, a task of its own sends `requests`. Their end calls `done`, an exception calls `fail`."""

    def __init__(
        self,
        requests: AsyncIterator[Any],
        send: Send,
        done: Callable[[], Awaitable[None]],
        fail: Callable[[Exception], None],
    ) -> None:
        self._requests = requests
        self._send = send
        self._done = done
        self._fail = fail

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._feed())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _feed(self) -> None:
        try:
            async for request in self._requests:
                await self._send(request)
            await self._done()
        except Exception as error:
            self._fail(error)
        finally:
            if isinstance(self._requests, AsyncGenerator):
                await self._requests.aclose()
