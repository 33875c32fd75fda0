"""One contract for both clocks, and what only the virtual one promises."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from baton.clock import Clock, DeadlockError, SystemClock, VirtualClock

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=["system", "virtual"])
def clock_and_run(request: pytest.FixtureRequest) -> tuple[Clock, Run]:
    if request.param == "system":
        return SystemClock(), asyncio.run
    clock = VirtualClock()
    return clock, clock.run


def test_time_moves_by_what_was_slept(clock_and_run: tuple[Clock, Run]) -> None:
    clock, run = clock_and_run

    async def main() -> float:
        start, start_wall = clock.now(), clock.wall()
        await clock.sleep(0.02)
        assert clock.wall() - start_wall >= 0.015
        return clock.now() - start

    assert run(main()) >= 0.02 - 1e-9


def test_a_timeout_interrupts_and_none_does_not(clock_and_run: tuple[Clock, Run]) -> None:
    clock, run = clock_and_run

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with clock.timeout(0.01):
                await asyncio.Event().wait()
        async with clock.timeout(None):
            await clock.sleep(0.001)

    run(main())


def test_a_sleep_can_be_cancelled(clock_and_run: tuple[Clock, Run]) -> None:
    clock, run = clock_and_run

    async def main() -> None:
        task = asyncio.create_task(clock.sleep(3600))
        await clock.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


def test_virtual_hours_are_exact_and_ordered() -> None:
    clock = VirtualClock()
    seen: list[tuple[float, str]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        seen.append((clock.now(), name))

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name, seconds in (("hour", 3600.0), ("minute", 60.0), ("day", 86400.0), ("same", 60.0)):
                tasks.create_task(sleeper(name, seconds))

    clock.run(main())
    assert seen == [(60.0, "minute"), (60.0, "same"), (3600.0, "hour"), (86400.0, "day")]


def test_waiting_for_nothing_is_a_deadlock_not_a_hang() -> None:
    clock = VirtualClock()

    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError):
        clock.run(main())
