"""Sends a workload to a target at its times. The target may be a server (`client`) or a system in this
process on a virtual clock; the same code drives both.

    open loop     one task per request, started at its planned time whether or not earlier ones have ended
    closed loop   one task per user, who takes the next request of the workload when the last one ended
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from baton.clock import Clock
from baton_loadtest.record import RequestRecord
from baton_loadtest.workload import PlannedRequest, Workload


class Target(Protocol):
    async def send(self, request: PlannedRequest, planned_s: float) -> RequestRecord:
        """One request, start to end. `planned_s` is on the runner's clock. What goes wrong on the way is told
        in the record, never raised; cancelled, it gives everything back and lets CancelledError through."""
        ...


@dataclass(frozen=True, slots=True)
class Extent:
    """How long to go on: a number of requests, a time, or whichever comes first. Warm-up requests come before
    and are counted in neither."""

    num_requests: int | None = None
    duration_s: float | None = None
    num_warmup: int = 0

    def limit(self, requests: Iterator[PlannedRequest]) -> Iterator[PlannedRequest]:
        return (
            requests if self.num_requests is None else islice(requests, self.num_warmup + self.num_requests)
        )


@dataclass(slots=True)
class Runner:
    """The counts may be read at any time; `on_record` gets each record as its request ends."""

    target: Target
    clock: Clock
    on_record: Callable[[RequestRecord], None]
    num_started: int = 0
    num_in_flight: int = 0
    max_in_flight: int = 0

    async def run(self, workload: Workload, extent: Extent) -> None:
        """Returns when the last answer ended. Cancelled, it cancels what is in flight first."""
        requests = extent.limit(workload.requests())
        if workload.concurrency is None:
            await self._open_loop(requests, extent)
        else:
            await self._closed_loop(requests, extent, workload.concurrency)

    async def _open_loop(self, requests: Iterator[PlannedRequest], extent: Extent) -> None:
        start_s = self.clock.now()
        stop = _Stop(extent)
        async with asyncio.TaskGroup() as tasks:
            for request in requests:
                planned_s = start_s + request.at_s
                if stop.reached(request, planned_s):
                    return
                # Sleep even when late: tasks that were started must get their turn before the next one.
                await self.clock.sleep(max(planned_s - self.clock.now(), 0.0))
                tasks.create_task(self._one(request, planned_s))

    async def _closed_loop(
        self, requests: Iterator[PlannedRequest], extent: Extent, concurrency: int
    ) -> None:
        stop = _Stop(extent)

        async def user() -> None:
            for request in requests:
                planned_s = self.clock.now()
                if stop.reached(request, planned_s):
                    return
                await self._one(request, planned_s)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(user())

    async def _one(self, request: PlannedRequest, planned_s: float) -> None:
        self.num_started += 1
        self.num_in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.num_in_flight)
        try:
            record = await self.target.send(request, planned_s)
        finally:
            self.num_in_flight -= 1
        self.on_record(record)


@dataclass(slots=True)
class _Stop:
    """The time runs from the planned send of the first request after the warm-up."""

    extent: Extent
    end_s: float = float("inf")

    def reached(self, request: PlannedRequest, planned_s: float) -> bool:
        if self.extent.duration_s is not None and request.index == self.extent.num_warmup:
            self.end_s = planned_s + self.extent.duration_s
        return planned_s >= self.end_s
