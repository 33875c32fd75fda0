"""What one watcher of a RedisIndex knows, and what each message does to it: decisions only, no I/O.

    change stream ----> apply(change) ----> events for the caller, or None: load that worker anew
    load of a worker -> loaded(...)   ----> its record and a snapshot
    sweep ------------> reconcile(...)      what the stream has not said: behind(), lapsed()

Sequence numbers (see `index.scripts`) decide everything. Not greater than the known one: already contained,
because loads overlap with the stream. One more: apply. Anything else: something was lost, load. A worker of
which nothing more is heard is caught by `reconcile`, which is told every worker's number from time to time;
so a trimmed stream, a flushed server or a clock set back costs a moment, never a wrong view for good.
"""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.index.base import BlocksChanged, IndexEvent, WorkerJoined, WorkerLeft
from baton.index.record import decode_record
from baton.kv.block import HASH_BYTES, BlockHash
from baton.messages import WorkerRecord
from baton.request import WorkerId

CHECK_S = 1.0  # a watcher compares its view with Redis this often
MIN_CHECK_S = 0.005  # and not more often than this while a lease is about to end


class Op(enum.StrEnum):
    JOIN = "join"  # a fresh registration; it holds nothing yet
    RENEW = "renew"  # new facts
    BLOCKS = "blocks"
    SNAPSHOT = "snapshot"
    RELOAD = "reload"  # a snapshot too large for the stream
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the stream."""

    op: Op
    worker_id: WorkerId
    incarnation: str
    seq: int
    record: WorkerRecord | None = None  # JOIN, RENEW
    lease_s: float = 0.0  # JOIN, RENEW
    added: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """One worker as it lies in Redis. `hashes` may contain changes later than `seq`: applying them again is
    harmless."""

    record: WorkerRecord
    seq: int
    lease_s: float
    hashes: tuple[BlockHash, ...]


def parse_change(fields: Mapping[bytes, bytes]) -> Change:
    """Raises ValueError (KeyError for a missing field) for what is no entry of ours."""
    op = Op(fields[b"op"].decode())
    worker_id = WorkerId(fields[b"worker"].decode())
    change = Change(op, worker_id, fields[b"inc"].decode(), int(fields[b"seq"]))
    if op in (Op.JOIN, Op.RENEW):
        record = checked_record(fields[b"record"], worker_id, change.incarnation)
        return Change(op, worker_id, change.incarnation, change.seq, record, int(fields[b"lease_ms"]) / 1000)
    if op in (Op.BLOCKS, Op.SNAPSHOT):
        added, removed = unpack_hashes(fields[b"add"]), unpack_hashes(fields[b"del"])
        return Change(op, worker_id, change.incarnation, change.seq, added=added, removed=removed)
    return change


def checked_record(raw: bytes, worker_id: WorkerId, incarnation: str) -> WorkerRecord:
    """Raises ValueError also when the record speaks of another worker than the place where it was found."""
    record = decode_record(raw)
    if (record.worker_id, record.incarnation) != (worker_id, incarnation):
        raise ValueError("a worker record in the place of another")
    return record


def unpack_hashes(packed: bytes) -> tuple[BlockHash, ...]:
    if len(packed) % HASH_BYTES:
        raise ValueError(f"{len(packed)} bytes are no whole number of hashes")
    return tuple(BlockHash(packed[i : i + HASH_BYTES]) for i in range(0, len(packed), HASH_BYTES))


@dataclass(slots=True)
class _Known:
    incarnation: str
    seq: int
    lease_end: float


@dataclass(slots=True)
class WatchState:
    """Belongs to one watcher. Times are of its own clock."""

    _known: dict[WorkerId, _Known] = field(default_factory=dict)
    _expected: dict[WorkerId, tuple[str, int]] = field(default_factory=dict)
    _listed: set[WorkerId] = field(default_factory=set)  # workers whose lease Redis held at the last sweep

    def apply(self, change: Change, now: float) -> list[IndexEvent] | None:
        worker_id, known = change.worker_id, self._known.get(change.worker_id)
        if known is not None and change.seq <= known.seq:
            return []
        if change.op is Op.LEFT:
            return self._forget(worker_id)
        if change.op is Op.JOIN:
            return self._join(change, known, now)
        follows = known is not None and (change.incarnation, change.seq) == (known.incarnation, known.seq + 1)
        if known is None or not follows or change.op is Op.RELOAD:
            return None
        known.seq = change.seq
        self._expected.pop(worker_id, None)
        if change.record is not None:
            known.lease_end = now + change.lease_s
            return [WorkerJoined(change.record)]
        snapshot = change.op is Op.SNAPSHOT
        return [BlocksChanged(worker_id, change.incarnation, change.added, change.removed, snapshot)]

    def loaded(self, loaded: Loaded, now: float) -> list[IndexEvent]:
        record = loaded.record
        self._note(record.worker_id, record.incarnation, loaded.seq, now + loaded.lease_s)
        held = BlocksChanged(record.worker_id, record.incarnation, loaded.hashes, (), snapshot=True)
        return [WorkerJoined(record), held]

    def reconcile(
        self, lease_ends: Mapping[WorkerId, float], expected: Mapping[WorkerId, tuple[str, int]]
    ) -> None:
        """Take what Redis says of all workers: when their leases end, and the number each one has reached."""
        self._listed = set(lease_ends)
        self._expected = dict(expected)
        for worker_id, lease_end in lease_ends.items():
            if worker_id in self._known:
                self._known[worker_id].lease_end = lease_end

    @property
    def reconciling(self) -> bool:
        return bool(self._expected)

    def behind(self) -> list[WorkerId]:
        """To be asked once the stream is read up to the last `reconcile`: workers that it did not explain."""
        behind = [w for w, number in sorted(self._expected.items()) if self._number(w) != number]
        self._expected.clear()
        return behind

    def lapsed(self, now: float) -> list[IndexEvent]:
        """Workers that Redis no longer lists, without having said so, and whose last known lease is over.
        Until then they stay: after a restart of Redis they are back within one renewal."""
        lapsed = [w for w, known in self._known.items() if w not in self._listed and known.lease_end <= now]
        return [event for worker_id in sorted(lapsed) for event in self._forget(worker_id)]

    def check_due(self, checked_at: float) -> float:
        """When to sweep again after `checked_at`: regularly, and as soon as a lease may have ended."""
        lease_end = min((known.lease_end for known in self._known.values()), default=math.inf)
        return min(checked_at + CHECK_S, max(checked_at + MIN_CHECK_S, lease_end))

    def _join(self, change: Change, known: _Known | None, now: float) -> list[IndexEvent]:
        assert change.record is not None
        self._note(change.worker_id, change.incarnation, change.seq, now + change.lease_s)
        joined = WorkerJoined(change.record)
        if known is None or known.incarnation != change.incarnation:
            return [joined]
        return [joined, BlocksChanged(change.worker_id, change.incarnation, (), (), snapshot=True)]

    def _note(self, worker_id: WorkerId, incarnation: str, seq: int, lease_end: float) -> None:
        self._known[worker_id] = _Known(incarnation, seq, lease_end)
        self._listed.add(worker_id)
        self._expected.pop(worker_id, None)

    def _forget(self, worker_id: WorkerId) -> list[IndexEvent]:
        self._expected.pop(worker_id, None)
        known = self._known.pop(worker_id, None)
        return [] if known is None else [WorkerLeft(worker_id, known.incarnation)]

    def _number(self, worker_id: WorkerId) -> tuple[str, int] | None:
        known = self._known.get(worker_id)
        return None if known is None else (known.incarnation, known.seq)
