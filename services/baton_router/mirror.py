"""The router's own copy of the prefix index: a placement asks it thousands of times per second, without I/O.

    watch -> apply(event) -> match(hashes)
      ^                        the ticket of the chosen worker says what it really holds -> confirm(...)
      |  index away: the view stays, `healthy` is False, watch again
      '- index back: workers of the view that do not show up again within `grace_s` are dropped

What is here is a hint. A claim too many costs a ticket that says less than hoped, one too few a prefix
computed again.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from baton.clock import Clock
from baton.errors import BatonError
from baton.index.base import BlocksChanged, IndexEvent, PrefixIndex, WorkerJoined, WorkerLeft
from baton.kv.block import BlockHash
from baton.messages import WorkerRecord
from baton.request import WorkerId

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0


@dataclass(slots=True)
class _Worker:
    record: WorkerRecord
    bit: int  # its place in the masks, a power of two
    hashes: set[BlockHash] = field(default_factory=set)


class PrefixMirror:
    """Changed by `apply` and `confirm` only, on the event loop; only `run` and `wait_for` suspend."""

    def __init__(self, clock: Clock, *, grace_s: float = 15.0) -> None:
        """`grace_s` is longer than the lease of the workers: whoever lives has renewed by then."""
        self._clock = clock
        self._grace_s = grace_s
        self._workers: dict[WorkerId, _Worker] = {}
        self._owners: dict[BlockHash, int] = {}  # mask of the workers that claim the block, never 0
        self._by_bit: dict[int, WorkerId] = {}
        self._everyone = 0  # mask of all workers
        self._free_bits: list[int] = []
        self._unconfirmed: set[WorkerId] = set()  # known from before the index was lost, not seen since
        self._changed = asyncio.Event()
        self.healthy = False  # the index answers
        self.last_error = "the prefix index has not answered yet"
        self.num_stale_claims = 0  # blocks that a worker was said to hold and did not

    # --- the view ---

    @property
    def num_blocks(self) -> int:
        """Different blocks that anybody claims."""
        return len(self._owners)

    def records(self) -> list[WorkerRecord]:
        return [self._workers[worker_id].record for worker_id in sorted(self._workers)]

    def record(self, worker_id: WorkerId) -> WorkerRecord | None:
        worker = self._workers.get(worker_id)
        return None if worker is None else worker.record

    def match(self, hashes: Sequence[BlockHash]) -> dict[WorkerId, int]:
        """For every known worker, how many leading `hashes` it claims without a gap."""
        matched = dict.fromkeys(self._workers, 0)
        owners, alive = self._owners, self._everyone
        for num, block_hash in enumerate(hashes):
            still = alive & owners.get(block_hash, 0)
            if still != alive:
                self._end(matched, alive & ~still, num)
                alive = still
                if not alive:
                    break
        self._end(matched, alive, len(hashes))
        return matched

    def _end(self, matched: dict[WorkerId, int], mask: int, num: int) -> None:
        """The workers in `mask` match `num` blocks and no more."""
        while mask and num:
            bit = mask & -mask
            matched[self._by_bit[bit]] = num
            mask ^= bit

    def confirm(self, worker_id: WorkerId, hashes: Sequence[BlockHash], num_held: int) -> None:
        """The worker itself said that of `hashes` it holds the first `num_held`: drop its claims to the rest.
        The caller passes only blocks that the worker could have answered for."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        stale = [block_hash for block_hash in hashes[num_held:] if block_hash in worker.hashes]
        self.num_stale_claims += len(stale)
        self._drop_claims(worker, stale)

    async def wait_for(self, predicate: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until `predicate()` holds, asked after each event. False when `timeout_s` passed first."""
        try:
            async with self._clock.timeout(timeout_s):
                while not predicate():
                    await self._changed.wait()
        except TimeoutError:
            return predicate()
        return True

    # --- following the index ---

    def apply(self, event: IndexEvent) -> None:
        match event:
            case WorkerJoined(record):
                self._unconfirmed.discard(record.worker_id)
                self._join(record)
            case WorkerLeft(worker_id, incarnation):
                self._leave(worker_id, incarnation)
            case BlocksChanged():
                self._change(event)
        self._notify()

    async def run(self, index: PrefixIndex) -> None:
        """Until cancelled."""
        retry_s = FIRST_RETRY_S
        while True:
            began = self._clock.now()
            try:
                await self._subscribe(index)
                await self._follow(index)
            except BatonError as error:
                self._lost(error)
            if self._clock.now() - began > LAST_RETRY_S:
                retry_s = FIRST_RETRY_S  # it worked for a while: this is a new failure
            await self._clock.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _subscribe(self, index: PrefixIndex) -> None:
        await index.workers()  # a watch says nothing as long as nobody is there; this answers
        if not self.healthy:
            log.info("the prefix index answers")
        self.healthy, self.last_error = True, ""
        self._unconfirmed = set(self._workers)
        self._notify()

    async def _follow(self, index: PrefixIndex) -> None:
        cleaner = asyncio.create_task(self._drop_unconfirmed())
        try:
            async with aclosing(index.watch()) as events:
                async for event in events:
                    self.apply(event)
        finally:
            cleaner.cancel()
            await asyncio.wait([cleaner])

    async def _drop_unconfirmed(self) -> None:
        await self._clock.sleep(self._grace_s)
        for worker_id in sorted(self._unconfirmed):
            self.apply(WorkerLeft(worker_id, self._workers[worker_id].record.incarnation))

    def _lost(self, error: BatonError) -> None:
        if self.healthy:
            log.warning("lost the prefix index, going on with what is known: %s", error.message)
        self.healthy, self.last_error = False, error.message
        self._notify()

    # --- changing the view ---

    def _join(self, record: WorkerRecord) -> None:
        worker = self._workers.get(record.worker_id)
        if worker is None:
            bit = self._free_bits.pop() if self._free_bits else 1 << len(self._workers)
            self._workers[record.worker_id] = _Worker(record, bit)
            self._by_bit[bit] = record.worker_id
            self._everyone |= bit
            return
        if worker.record.incarnation != record.incarnation:
            self._drop_claims(worker, list(worker.hashes))
        worker.record = record

    def _leave(self, worker_id: WorkerId, incarnation: str) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or worker.record.incarnation != incarnation:
            return
        self._drop_claims(worker, list(worker.hashes))
        del self._workers[worker_id], self._by_bit[worker.bit]
        self._everyone ^= worker.bit
        self._free_bits.append(worker.bit)
        self._unconfirmed.discard(worker_id)

    def _change(self, event: BlocksChanged) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is None or worker.record.incarnation != event.incarnation:
            return
        if event.snapshot:
            self._drop_claims(worker, list(worker.hashes.difference(event.added)))
        self._drop_claims(worker, event.removed)
        self._add_claims(worker, event.added)

    def _add_claims(self, worker: _Worker, hashes: Sequence[BlockHash]) -> None:
        owners, bit = self._owners, worker.bit
        for block_hash in hashes:
            owners[block_hash] = owners.get(block_hash, 0) | bit
        worker.hashes.update(hashes)

    def _drop_claims(self, worker: _Worker, hashes: Sequence[BlockHash]) -> None:
        owners, others = self._owners, ~worker.bit
        for block_hash in hashes:
            if rest := owners.get(block_hash, 0) & others:
                owners[block_hash] = rest
            else:
                owners.pop(block_hash, None)
        worker.hashes.difference_update(hashes)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
