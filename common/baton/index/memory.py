"""The prefix index inside one process.

Time enters in two ways: every call first drops the leases that have lapsed, and a watcher that waits for news
wakes at the next lease end by itself. So a silent worker is reported to watchers without a task that polls.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from baton.clock import Clock
from baton.errors import Unavailable
from baton.index.base import BlocksChanged, IndexEvent, PrefixIndex, WorkerJoined, WorkerLeft
from baton.kv.block import BlockHash
from baton.messages import WorkerRecord
from baton.request import WorkerId

# Timers may fire this much early and sums of floats round: a lease that ends within it has ended.
CLOCK_SLACK_S = 1e-6


@dataclass(slots=True)
class _Entry:
    record: WorkerRecord
    lease_end: float
    replaced: set[str]  # earlier incarnations, refused as long as this entry lives
    hashes: dict[BlockHash, None] = field(default_factory=dict)  # ordered: the same snapshot in every run


@dataclass(slots=True, eq=False)
class _Inbox:
    """What one watcher has not consumed yet."""

    events: deque[IndexEvent]
    news: asyncio.Event = field(default_factory=asyncio.Event)


class MemoryIndex(PrefixIndex):
    """All state changes are synchronous; the methods are coroutines only because the contract's are."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entries: dict[WorkerId, _Entry] = {}
        self._inboxes: list[_Inbox] = []
        self._closed = False

    async def renew(self, record: WorkerRecord, *, lease_s: float) -> bool:
        self._begin()
        lease_end = self._clock.now() + lease_s
        entry = self._entries.get(record.worker_id)
        if entry is not None and record.incarnation in entry.replaced:
            return False
        if entry is None or entry.record.incarnation != record.incarnation:
            replaced = entry.replaced | {entry.record.incarnation} if entry else set()
            self._entries[record.worker_id] = _Entry(record, lease_end, replaced)
            self._announce(WorkerJoined(record))
            return False
        if lease_end < entry.lease_end:
            self._wake()
        entry.lease_end = lease_end
        if entry.record != record:
            entry.record = record
            self._announce(WorkerJoined(record))
        return True

    async def publish(
        self,
        worker_id: WorkerId,
        incarnation: str,
        added: Sequence[BlockHash],
        removed: Sequence[BlockHash],
        *,
        snapshot: bool = False,
    ) -> bool:
        self._begin()
        entry = self._current(worker_id, incarnation)
        if entry is None:
            return False
        if snapshot:
            entry.hashes.clear()
        for block_hash in removed:
            entry.hashes.pop(block_hash, None)
        entry.hashes.update(dict.fromkeys(added))
        if snapshot or added or removed:
            self._announce(BlocksChanged(worker_id, incarnation, tuple(added), tuple(removed), snapshot))
        return True

    async def withdraw(self, worker_id: WorkerId, incarnation: str) -> None:
        self._begin()
        if self._current(worker_id, incarnation) is not None:
            self._drop(worker_id)

    async def workers(self) -> list[WorkerRecord]:
        self._begin()
        return [self._entries[worker_id].record for worker_id in sorted(self._entries)]

    async def match(self, hashes: Sequence[BlockHash], workers: Sequence[WorkerId]) -> dict[WorkerId, int]:
        self._begin()
        return {worker_id: self._num_leading(hashes, worker_id) for worker_id in workers}

    async def watch(self) -> AsyncGenerator[IndexEvent, None]:
        self._begin()
        inbox = _Inbox(deque(self._state()))
        self._inboxes.append(inbox)
        try:
            while True:
                while inbox.events:
                    yield inbox.events.popleft()
                await self._news(inbox)
                self._begin()
        finally:
            self._inboxes.remove(inbox)

    async def aclose(self) -> None:
        self._closed = True
        self._wake()

    def _begin(self) -> None:
        """First line of every call: refuse after aclose, then let the clock take what has lapsed."""
        if self._closed:
            raise Unavailable("the prefix index is closed")
        now = self._clock.now() + CLOCK_SLACK_S
        lapsed = [(entry.lease_end, w) for w, entry in self._entries.items() if entry.lease_end <= now]
        for _, worker_id in sorted(lapsed):
            self._drop(worker_id)

    def _current(self, worker_id: WorkerId, incarnation: str) -> _Entry | None:
        entry = self._entries.get(worker_id)
        return entry if entry is not None and entry.record.incarnation == incarnation else None

    def _drop(self, worker_id: WorkerId) -> None:
        entry = self._entries.pop(worker_id)
        self._announce(WorkerLeft(worker_id, entry.record.incarnation))

    def _num_leading(self, hashes: Sequence[BlockHash], worker_id: WorkerId) -> int:
        entry = self._entries.get(worker_id)
        if entry is None:
            return 0
        return next((i for i, block_hash in enumerate(hashes) if block_hash not in entry.hashes), len(hashes))

    def _state(self) -> list[IndexEvent]:
        events: list[IndexEvent] = []
        for worker_id in sorted(self._entries):
            entry = self._entries[worker_id]
            events.append(WorkerJoined(entry.record))
            held = tuple(entry.hashes)
            events.append(BlocksChanged(worker_id, entry.record.incarnation, held, (), snapshot=True))
        return events

    def _announce(self, event: IndexEvent) -> None:
        for inbox in self._inboxes:
            inbox.events.append(event)
        self._wake()

    def _wake(self) -> None:
        for inbox in self._inboxes:
            inbox.news.set()

    async def _news(self, inbox: _Inbox) -> None:
        """Return when something was announced, the index was closed, or the next lease ends."""
        lease_end = min((entry.lease_end for entry in self._entries.values()), default=None)
        wait_s = None if lease_end is None else max(0.0, lease_end - self._clock.now())
        inbox.news.clear()
        try:
            async with self._clock.timeout(wait_s):
                await inbox.news.wait()
        except TimeoutError:
            pass  # a lease may have ended: `_begin` looks
