"""The prefix index: which worker is there, and which prefix blocks it holds.

The index is a hint and a meeting place. Every claim is confirmed by the worker that owns it (the Ticket says
what it really holds), so a stale claim costs time and never correctness. Claims live under a lease: a worker
that stops renewing vanishes with all its blocks at once.

The newest incarnation of a worker wins: as soon as one that was not seen before registers, the claims of the
one before are gone, and a late message of that one changes nothing while its successor is there.

`MemoryIndex` (index.memory) serves one process (tests, laptop without Redis); `RedisIndex` (index.redis) a
fleet. One contract test runs on both.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from baton.kv.block import BlockHash
from baton.messages import WorkerRecord
from baton.request import WorkerId


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A new worker, a new incarnation, or new facts about a known one (load, draining)."""

    record: WorkerRecord


@dataclass(frozen=True, slots=True)
class WorkerLeft:
    worker_id: WorkerId
    incarnation: str


@dataclass(frozen=True, slots=True)
class BlocksChanged:
    """`snapshot`: `added` is all that this incarnation holds; forget what was known before."""

    worker_id: WorkerId
    incarnation: str
    added: tuple[BlockHash, ...]
    removed: tuple[BlockHash, ...]
    snapshot: bool = False


IndexEvent = WorkerJoined | WorkerLeft | BlocksChanged


class PrefixIndex(ABC):
    # --- the worker's side ---

    @abstractmethod
    async def renew(self, record: WorkerRecord, *, lease_s: float) -> bool:
        """Register or renew. False: this incarnation was not known (first time, lease lapsed, index
        restarted), so the caller must `publish` a snapshot now. Also False, and without effect, for an
        incarnation that a newer one has replaced: its `publish` answers False too. Raises Unavailable when
        the index cannot be reached."""

    @abstractmethod
    async def publish(
        self,
        worker_id: WorkerId,
        incarnation: str,
        added: Sequence[BlockHash],
        removed: Sequence[BlockHash],
        *,
        snapshot: bool = False,
    ) -> bool:
        """Change this incarnation's claims, `removed` before `added`; a snapshot's `added` replaces all of
        them. False: its lease lapsed meanwhile, renew first. Raises Unavailable: what arrived is unknown,
        publish a snapshot."""

    @abstractmethod
    async def withdraw(self, worker_id: WorkerId, incarnation: str) -> None:
        """Leave at once with all claims. Of an incarnation that is not the current one: nothing happens."""

    # --- the router's side ---

    @abstractmethod
    async def workers(self) -> list[WorkerRecord]:
        """All whose lease holds, ordered by id. Raises Unavailable."""

    @abstractmethod
    async def match(self, hashes: Sequence[BlockHash], workers: Sequence[WorkerId]) -> dict[WorkerId, int]:
        """For each of `workers` how many leading `hashes` it claims without a gap; 0 when unknown. Raises
        Unavailable."""

    @abstractmethod
    def watch(self) -> AsyncGenerator[IndexEvent, None]:
        """First all that is known (WorkerJoined, then a BlocksChanged snapshot, for each worker), then every
        change as it happens, a lapsed lease as WorkerLeft. A lost event is repaired by a fresh snapshot.
        Raises Unavailable when the index goes away: watch again later; what the watcher knew stays useful as
        a hint."""

    @abstractmethod
    async def aclose(self) -> None: ...
