"""All links of one router, kept equal to what the mirror knows of the workers."""

import asyncio
from collections.abc import Sequence

from baton.clock import Clock
from baton.config import RouterConfig
from baton.errors import BatonError
from baton.events import Emit
from baton.index.base import BlocksChanged, PrefixIndex, WorkerJoined, WorkerLeft
from baton.kv.block import BlockHash
from baton.messages import BlockLedger, Role, StatusCall, WorkerRecord, WorkerStatus
from baton.request import WorkerId
from baton.rpc import STATUS_WATCH, Rpc
from baton_router.canary import Canary, PairCounts, Trial
from baton_router.fleet_view import IndexHealth
from baton_router.mirror import PrefixMirror
from baton_router.placement import can_pair, why_no_pair
from baton_router.prefix_paths import PrefixPaths
from baton_router.workers import RECONNECT_S, Link

LEDGER_TIMEOUT_S = 2.0


class Fleet:
    """Owns the links. Workers are found through the index, and at the addresses it was given."""

    def __init__(
        self,
        config: RouterConfig,
        rpc: Rpc,
        mirror: PrefixMirror,
        index: PrefixIndex | None,
        clock: Clock,
        emit: Emit,
    ) -> None:
        self.mirror = mirror
        self._config = config
        self._rpc = rpc
        self._index = index
        self._clock = clock
        self._emit = emit
        self.canary = Canary(clock, emit, interval_s=config.canary_interval_s)
        self.prefix_paths = PrefixPaths(clock, self.canary.is_proven)
        self.changed = asyncio.Event()  # a link rose, fell, came or went; the canary waits for it
        self._links: dict[WorkerId, tuple[Link, asyncio.Task[None]]] = {}
        self._silent: dict[str, str] = {}  # configured addresses where no worker answers: why not
        # While `run` runs; a link's own bug ends the router loudly.
        self._tasks: asyncio.TaskGroup | None = None

    def ready(self) -> list[Link]:
        """Links that can take a request now, in the order of their ids."""
        links = sorted(self._links.items())
        return [link for _, (link, _) in links if link.up and not link.record.draining]

    def link(self, worker_id: WorkerId) -> Link:
        return self._links[worker_id][0]

    def records(self) -> list[WorkerRecord]:
        return [link.record for _, (link, _) in sorted(self._links.items())]

    def pairs(self) -> list[tuple[WorkerRecord, WorkerRecord]]:
        """(prefill, decode) pairs that may carry a request now: they fit, and they have proven it."""
        return [pair for pair in self.fitting_pairs() if self.canary.is_proven(*pair)]

    def transport(self, prefill: WorkerId, decode: WorkerId) -> str | None:
        return self._links[prefill][0].transports.get(decode)

    def bytes_per_s(self, prefill: WorkerId, decode: WorkerId) -> float | None:
        rate = self._links[prefill][0].rates.get(decode)
        return rate.bytes_per_s if rate is not None else None

    def unproven_pairs(self) -> dict[tuple[WorkerId, WorkerId], str]:
        """Pairs that fit and carry nothing, and why; "" for those that are being tried for the first time."""
        verdicts = {(p.worker_id, d.worker_id): self.canary.verdict(p, d) for p, d in self.fitting_pairs()}
        return {pair: verdict.reason if verdict else "" for pair, verdict in verdicts.items()
                if verdict is None or not verdict.proven}  # fmt: skip

    def fitting_pairs(self) -> list[tuple[WorkerRecord, WorkerRecord]]:
        return [(p, d) for p, d in self._possible_pairs() if can_pair(p, d)]

    def refused_pairs(self) -> dict[tuple[WorkerId, WorkerId], str]:
        """Pairs that do not fit, and why."""
        reasons = {(p.worker_id, d.worker_id): why_no_pair(p, d) for p, d in self._possible_pairs()}
        return {pair: why for pair, why in reasons.items() if why}

    def pair_counts(self) -> dict[tuple[WorkerId, WorkerId], PairCounts]:
        return self.canary.counts

    def _possible_pairs(self) -> list[tuple[WorkerRecord, WorkerRecord]]:
        records = [link.record for link in self.ready()]
        prefills = [record for record in records if Role.PREFILL in record.roles]
        decodes = [record for record in records if Role.DECODE in record.roles]
        return [(p, d) for p in prefills for d in decodes]

    def unreachable(self) -> dict[str, str]:
        """Workers that are known and not linked, and configured addresses where no worker answers: why not."""
        links = {str(worker_id): link.why_down for worker_id, (link, _) in sorted(self._links.items())}
        return {where: why for where, why in (links | self._silent).items() if why}

    async def blocks(self) -> dict[WorkerId, BlockLedger | BatonError]:
        """Every worker's block ledger, or why it did not answer."""
        worker_ids = sorted(self._links)
        asked = (self._links[worker_id][0].blocks(LEDGER_TIMEOUT_S) for worker_id in worker_ids)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        ledgers: dict[WorkerId, BlockLedger | BatonError] = {}
        for worker_id, answer in zip(worker_ids, answers, strict=True):
            if not isinstance(answer, BlockLedger | BatonError):
                raise answer
            ledgers[worker_id] = answer
        return ledgers

    def index_health(self) -> IndexHealth:
        if self._index is None:
            return IndexHealth("memory", healthy=True)
        return IndexHealth("redis", self.mirror.healthy, self.mirror.last_error)

    async def run(self, trial: Trial) -> None:
        """Until cancelled. `trial` is how the canary has a request served by a pair of its choice."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                if self._index is not None:
                    tasks.create_task(self.mirror.run(self._index))
                for address in self._config.workers:
                    tasks.create_task(self._follow(address))
                tasks.create_task(self._reconcile_loop())
                tasks.create_task(self.canary.run(self.fitting_pairs, self.changed, trial))
        finally:
            await self._drop(tuple(self._links))

    # --- finding workers ---

    async def _reconcile_loop(self) -> None:
        while True:
            records = {record.worker_id: record for record in self.mirror.records()}
            await self._drop(
                [w for w, (link, _) in self._links.items() if not _same_process(link.record, records.get(w))]
            )
            for worker_id, record in records.items():
                if worker_id not in self._links:
                    self._add(record)
            await self.mirror.wait_for(self._out_of_step, timeout_s=None)

    def _out_of_step(self) -> bool:
        records = {record.worker_id: record for record in self.mirror.records()}
        links = {worker_id: link.record for worker_id, (link, _) in self._links.items()}
        return records.keys() != links.keys() or any(
            not _same_process(record, records[worker_id]) for worker_id, record in links.items()
        )

    async def _follow(self, address: str) -> None:
        """A worker at a configured address tells its claims itself: how a fleet works without an index."""
        channel = self._rpc.connect(address)
        while True:
            record: WorkerRecord | None = None
            stream = channel.server_stream(STATUS_WATCH, StatusCall(blocks=True), timeout_s=None)
            try:
                while True:
                    async with self._clock.timeout(self._config.session_timeout_s):
                        status = await anext(stream)
                    record = status.record
                    self._silent.pop(address, None)
                    self._tell_mirror(status)
            except StopAsyncIteration:
                why = "it ended its stream"
            except TimeoutError:
                why = f"it said nothing for {self._config.session_timeout_s:g} s"
            except BatonError as error:
                why = error.message
            finally:
                await stream.aclose()
            if record is None and self._silent.get(address) != why:
                self._emit("worker.unreachable", address=address, why=why)
            self._silent[address] = why
            if record is not None:
                self.mirror.apply(WorkerLeft(record.worker_id, record.incarnation))
            await self._clock.sleep(RECONNECT_S)

    def _tell_mirror(self, status: WorkerStatus) -> None:
        record = status.record
        self.mirror.apply(WorkerJoined(record))
        if status.snapshot or status.added or status.removed:
            added = tuple(BlockHash(claim) for claim in status.added)
            removed = tuple(BlockHash(claim) for claim in status.removed)
            self.mirror.apply(
                BlocksChanged(record.worker_id, record.incarnation, added, removed, status.snapshot)
            )

    # --- links ---

    def _add(self, record: WorkerRecord) -> None:
        timeout_s = self._config.session_timeout_s
        link = Link(record, self._rpc, self._clock, self._emit, timeout_s, self._link_changed)
        assert self._tasks is not None
        self._links[record.worker_id] = (link, self._tasks.create_task(link.run()))
        self._emit("worker.joined", worker=record.worker_id, roles=list(record.roles))

    def _link_changed(self, link: Link) -> None:
        if not link.up:
            self.canary.forget(link.record.worker_id)
        self.changed.set()

    async def _drop(self, worker_ids: Sequence[WorkerId]) -> None:
        for worker_id in worker_ids:
            link, running = self._links.pop(worker_id)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await link.aclose()
            self._emit("worker.left", worker=worker_id)


def _same_process(known: WorkerRecord, told: WorkerRecord | None) -> bool:
    return told is not None and told.incarnation == known.incarnation
