"""One worker process, whatever its roles: the step loop, its place in the fleet, and its status.

A `Worker` is built from an engine and handed to the role services, which add requests to the engine and listen to
what each step did. It registers under a lease, publishes which prefix blocks it holds, and answers the Status service.

    run():  step loop      while there is work: one engine step, tell the listeners, note changed blocks
            register loop  renew the lease, publish changes; after a lapse or an index restart a snapshot
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

from baton.clock import Clock
from baton.engine.batch import StepOutput
from baton.engine.engine import Engine
from baton.engine.sequence import Sequence, SequenceStatus
from baton.errors import Unavailable
from baton.events import Emit
from baton.index.base import PrefixIndex
from baton.kv.block import BlockHash
from baton.messages import (
    BlockLedger,
    BlocksCall,
    Holder,
    Load,
    Purpose,
    Role,
    StatusCall,
    WorkerRecord,
    WorkerStatus,
)
from baton.rpc import STATUS_BLOCKS, STATUS_GET, STATUS_WATCH, Handlers, Rpc
from baton.transfer.rate import Rate

Explainer = Callable[[Holder], Holder]
StepListener = Callable[[StepOutput], None]
Ready = Callable[[WorkerRecord], None]

_COALESCE_S = 0.02  # from a change until it is told
_BUSY_S = 0.1  # of a worker that decodes: between two messages of changes at least
_PURPOSES = {SequenceStatus.RESERVED: Purpose.RECEIVING, SequenceStatus.HELD: Purpose.LEASED}


@dataclass(slots=True)
class _Changes:
    """Claims that one subscriber has not sent yet; a block that came and went meanwhile leaves no trace of coming."""

    added: dict[BlockHash, None] = field(
        default_factory=dict
    )  # ordered: the event log must not depend on hashing
    removed: dict[BlockHash, None] = field(default_factory=dict)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    told_s: float = -math.inf  # when the latest message left

    def note(self, added: list[BlockHash], removed: list[BlockHash]) -> None:
        for block_hash in removed:
            self.added.pop(block_hash, None)
            self.removed[block_hash] = None
        for block_hash in added:
            self.removed.pop(block_hash, None)
            self.added[block_hash] = None
        if added or removed:
            self.ready.set()

    def take(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        taken = tuple(self.added), tuple(self.removed)
        self.added.clear()
        self.removed.clear()
        self.ready.clear()
        return taken


class Worker:
    """Owns the engine's loop; `record` is what the fleet is told. Confined to one event loop."""

    def __init__(
        self,
        record: WorkerRecord,
        engine: Engine,
        clock: Clock,
        emit: Emit,
        *,
        index: PrefixIndex | None,
        lease_s: float,
        heartbeat_s: float,
    ) -> None:
        self.engine = engine
        self._record = record
        self._clock = clock
        self._emit = emit
        self._index = index
        self._lease_s = lease_s
        self._heartbeat_s = heartbeat_s
        self._listeners: list[StepListener] = []
        self._explainers: list[Explainer] = []
        self._subscribers: list[_Changes] = []
        self._progress = asyncio.Event()  # a step ended, or blocks came back between steps
        self.index_reachable = index is not None
        self.wire = Rate()  # of what this worker sends

    @property
    def record(self) -> WorkerRecord:
        return replace(self._record, load=self.load())

    def load(self) -> Load:
        return replace(self.engine.load(), transfer_bytes_per_s=self.wire.bytes_per_s or 0.0)

    def listen(self, listener: StepListener) -> None:
        """Called on the loop after every step, in the order of registration; must not block or raise."""
        self._listeners.append(listener)

    def unlisten(self, listener: StepListener) -> None:
        self._listeners.remove(listener)

    def drain(self) -> None:
        """Tell the fleet to place nothing here any more."""
        self._record = replace(self._record, draining=True)
        for changes in self._subscribers:
            changes.ready.set()

    def admit(self) -> None:
        """Grant what fits now; called after an arrival or when blocks came back between steps. Listeners hear of it."""
        self._tell(StepOutput(outputs=(), admitted=self.engine.admit(), num_tokens=0, seconds=0.0))
        self._note_blocks()

    async def serve(
        self,
        rpc: Rpc,
        address: str,
        handlers: Handlers,
        *,
        stop: asyncio.Event,
        grace_s: float,
        ready: Ready,
        advertise_host: str | None = None,
    ) -> None:
        """From binding the address to giving everything back: serve until `stop` is set, then take no new work, let
        what runs end for `grace_s` seconds, leave the index and close. `advertise_host` is how peers reach this host
        when it is not by the address bound."""
        server = await rpc.serve(address, {**self.status_handlers(), **handlers})
        try:
            self._record = replace(self._record, address=_advertised(server.address, advertise_host))
            running = asyncio.create_task(self.run())
            stopping = asyncio.create_task(stop.wait())
            server.set_serving(True)
            ready(self.record)
            try:
                await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
                if not running.done():
                    server.set_serving(False)
                    await self._wind_down(grace_s)
            finally:
                for task in (running, stopping):
                    task.cancel()
                (failure, _) = await asyncio.gather(running, stopping, return_exceptions=True)
            await self.withdraw()
            if isinstance(failure, Exception):
                raise failure
        finally:
            await server.aclose(grace_s=0.1)

    async def _wind_down(self, grace_s: float) -> None:
        self.drain()
        try:
            async with self._clock.timeout(grace_s):
                while self.engine.num_sequences:
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            self._emit("worker.stopped_busy", worker=self._record.worker_id)

    async def run(self) -> None:
        """Until cancelled. An error of the step loop ends the worker: its supervisor starts a new one."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._step_loop())
            if self._index is not None:
                tasks.create_task(self._register_loop(self._index))

    async def withdraw(self) -> None:
        """Leave the index at once instead of when the lease ends."""
        if self._index is not None:
            try:
                await self._index.withdraw(self._record.worker_id, self._record.incarnation)
            except Unavailable as error:
                self._emit("worker.withdraw_failed", why=error.message)

    async def _step_loop(self) -> None:
        while True:
            await self.engine.work.wait()
            self._tell(await self.engine.step())
            self._note_blocks()

    def _tell(self, output: StepOutput) -> None:
        self._progress.set()
        for listener in tuple(self._listeners):
            listener(output)

    def _note_blocks(self) -> None:
        added, removed = self.engine.block_events()
        for changes in self._subscribers:
            changes.note(added, removed)

    # --- the index ---

    async def _register_loop(self, index: PrefixIndex) -> None:
        """Renew every third of the lease, publish changes in between."""
        changes = self._subscribe()
        snapshot_due, renew_at_s = True, self._clock.now()
        while True:
            try:
                if self._clock.now() >= renew_at_s:
                    renew_at_s = self._clock.now() + self._lease_s / 3
                    known = await index.renew(self.record, lease_s=self._lease_s)
                    snapshot_due = snapshot_due or not known
                if snapshot_due or changes.ready.is_set():
                    published = await self._publish(index, changes, snapshot_due)
                    snapshot_due = not published
                    if not published:
                        renew_at_s = (
                            self._clock.now() + self._heartbeat_s
                        )  # the lease lapsed: soon, not in a spin
                self._set_reachable(True)
            except Unavailable as error:
                self._set_reachable(False, error.message)
                snapshot_due, renew_at_s = True, self._clock.now()
                await self._clock.sleep(self._heartbeat_s)
                continue
            await self._wait(changes, max(0.0, renew_at_s - self._clock.now()))

    async def _publish(self, index: PrefixIndex, changes: _Changes, snapshot: bool) -> bool:
        added, removed = changes.take()
        if snapshot:
            added, removed = tuple(self.engine.cached_hashes()), ()
        record = self._record
        return await index.publish(record.worker_id, record.incarnation, added, removed, snapshot=snapshot)

    def _set_reachable(self, reachable: bool, why: str = "") -> None:
        if reachable != self.index_reachable:
            self._emit("index.back" if reachable else "index.lost", why=why)
        self.index_reachable = reachable

    # --- the Status service ---

    def status_handlers(self) -> Handlers:
        return {STATUS_GET: self._get, STATUS_WATCH: self._watch, STATUS_BLOCKS: self._blocks}

    def explain(self, explainer: Explainer) -> None:
        """Role services know more of a request's blocks than the engine: lease, epoch, what is on the wire."""
        self._explainers.append(explainer)

    async def _blocks(self, call: BlocksCall) -> BlockLedger:
        engine, now_s = self.engine, self._clock.now()
        return BlockLedger(
            worker_id=self._record.worker_id,
            num_blocks=engine.num_blocks,
            num_used=engine.num_used_blocks,
            num_free=engine.num_blocks - engine.num_used_blocks,
            num_cached=engine.num_cached_blocks,
            holders=tuple(self._holder(sequence, now_s) for sequence in engine.owners()),
        )

    def blocks_by_purpose(self) -> dict[Purpose, int]:
        """Shared blocks count for each of their holders. Called at every step."""
        counts = dict.fromkeys(Purpose, 0)
        for sequence in self.engine.owners():
            purpose = _PURPOSES.get(sequence.status, Purpose.RUNNING)
            if purpose is Purpose.RECEIVING:  # or given up meanwhile
                purpose = self._holder(sequence, sequence.admitted_s).purpose
            counts[purpose] += len(sequence.block_table)
        return counts

    def _holder(self, sequence: Sequence, now_s: float) -> Holder:
        purpose = _PURPOSES.get(sequence.status, Purpose.RUNNING)
        blocks = tuple(sequence.block_table)
        holder = Holder(sequence.request_id, purpose, blocks, now_s - sequence.admitted_s)
        for explain in self._explainers:
            holder = explain(holder)
        return holder

    async def _get(self, call: StatusCall) -> WorkerStatus:
        return self._status(sequence=0)

    async def _watch(self, call: StatusCall) -> AsyncGenerator[WorkerStatus, None]:
        changes = self._subscribe()
        try:
            held = tuple(self.engine.cached_hashes()) if call.blocks else ()
            yield replace(self._status(sequence=0), snapshot=True, added=held)
            sequence = 0
            while True:
                await self._wait(changes, self._heartbeat_s)
                added, removed = changes.take()
                if not call.blocks:
                    added, removed = (), ()
                sequence += 1
                yield replace(self._status(sequence), added=added, removed=removed)
        finally:
            self._subscribers.remove(changes)

    def _status(self, sequence: int) -> WorkerStatus:
        return WorkerStatus(self.record, num_used_blocks=self.engine.num_used_blocks, sequence=sequence)

    def _subscribe(self) -> _Changes:
        self._note_blocks()  # what happened so far is part of the snapshot, not a change
        changes = _Changes()
        self._subscribers.append(changes)
        return changes

    async def _wait(self, changes: _Changes, seconds: float) -> None:
        """Until there is something to tell, and a moment longer so that one message tells the work of several steps.
        While a worker decodes nearly every step changes some block, and a message costs both ends as much as many
        tokens; of its load routers hear in their sessions."""
        least_s = _BUSY_S if Role.DECODE in self._record.roles else 0.0
        try:
            async with self._clock.timeout(seconds):
                await changes.ready.wait()
                await self._clock.sleep(max(_COALESCE_S, changes.told_s + least_s - self._clock.now()))
        except TimeoutError:
            pass
        changes.told_s = self._clock.now()


def _advertised(address: str, host: str | None) -> str:
    return address if host is None else f"{host}:{address.rpartition(':')[2]}"
