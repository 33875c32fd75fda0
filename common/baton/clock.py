"""Time, passed in. Control code never reads the machine's clock itself.

`SystemClock` is the real one. `VirtualClock` runs a whole system in one thread on an event loop whose time jumps
to the next timer as soon as nothing is ready: a simulated hour takes as long as its events take to process, and the
order of events is a pure function of the program and its seeds. Plain asyncio (`asyncio.timeout`, futures, queues)
works unchanged on it; threads and sockets do not belong there.
"""

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a monotonic scale; only differences mean anything."""
        ...

    def wall(self) -> float:
        """Unix time in seconds, for records that people and other machines read."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    def timeout(self, seconds: float | None) -> asyncio.Timeout:
        """`async with clock.timeout(s)` raises TimeoutError after `s` seconds; None never does."""
        ...


class SystemClock:
    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float | None) -> asyncio.Timeout:
        return asyncio.timeout(seconds)


class VirtualClock:
    """Starts at zero seconds, 2026-01-01 UTC on the wall. One instance per run."""

    EPOCH = 1767225600.0

    def __init__(self) -> None:
        self._selector = _JumpingSelector()

    def now(self) -> float:
        return self._selector.now_s

    def wall(self) -> float:
        return self.EPOCH + self._selector.now_s

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float | None) -> asyncio.Timeout:
        return asyncio.timeout(seconds)

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run to completion. Raises `DeadlockError` when nothing is ready and no timer is set."""
        with asyncio.Runner(loop_factory=lambda: _VirtualLoop(self._selector)) as runner:
            return runner.run(main)


class DeadlockError(RuntimeError):
    """Everything waits and nothing can ever wake it."""


class _JumpingSelector(selectors.SelectSelector):
    """Never waits: where a real loop would sleep, the loop's time moves forward instead. Holds no descriptor."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise DeadlockError("no task is ready and no timer is set")
        self.now_s += max(timeout, 0.0)
        return []


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, selector: _JumpingSelector) -> None:
        self._jumping = selector
        super().__init__(selector)
        # Timers closer than this fire together; 0 would let rounding stall the loop just before a timer.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._jumping.now_s
