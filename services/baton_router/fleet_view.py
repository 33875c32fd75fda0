"""What the front doors may know of the fleet, and whether it could serve a request now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.errors import BatonError
from baton.messages import BlockLedger, Role, WorkerRecord
from baton.request import WorkerId
from baton_router.canary import PairCounts


@dataclass(frozen=True, slots=True)
class IndexHealth:
    kind: str  # redis | memory
    healthy: bool
    detail: str = ""  # the latest error


class ReadyWorker(Protocol):
    @property
    def record(self) -> WorkerRecord: ...


class FleetView(Protocol):
    """Read on the event loop; what is returned is a snapshot."""

    def records(self) -> Sequence[WorkerRecord]:
        """Every worker that is known, ready or not."""
        ...

    def ready(self) -> Sequence[ReadyWorker]:
        """Workers that can take a request now."""
        ...

    def pairs(self) -> Sequence[tuple[WorkerRecord, WorkerRecord]]:
        """(prefill, decode) pairs that could carry a request now."""
        ...

    def transport(self, prefill: WorkerId, decode: WorkerId) -> str | None:
        """What really carried KV between the two; None before it did."""
        ...

    def bytes_per_s(self, prefill: WorkerId, decode: WorkerId) -> float | None:
        """Measured while KV was on the wire between the two; None before any was."""
        ...

    def unproven_pairs(self) -> Mapping[tuple[WorkerId, WorkerId], str]:
        """Pairs that fit and carry nothing, and why; "" while one is tried for the first time."""
        ...

    def refused_pairs(self) -> Mapping[tuple[WorkerId, WorkerId], str]:
        """Pairs that do not fit, and why."""
        ...

    def pair_counts(self) -> Mapping[tuple[WorkerId, WorkerId], PairCounts]:
        """What went wrong between pairs since this router started."""
        ...

    def unreachable(self) -> Mapping[str, str]:
        """Workers that are known and not linked, and configured addresses where no worker answers: why not."""
        ...

    def index_health(self) -> IndexHealth: ...

    async def blocks(self) -> Mapping[WorkerId, BlockLedger | BatonError]:
        """Asks every worker who holds its blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Readiness:
    ready: bool
    reasons: tuple[str, ...]  # what is missing; with `ready` these say why the service is degraded

    @property
    def status(self) -> str:
        if not self.ready:
            return "unavailable"
        return "degraded" if self.reasons else "ok"


def readiness(fleet: FleetView) -> Readiness:
    roles = [role for link in fleet.ready() for role in link.record.roles]
    reasons = [f"{where} is not used: {why}" for where, why in fleet.unreachable().items()]
    if Role.DECODE not in roles:
        return Readiness(False, ("no decode worker is ready", *reasons))
    if Role.PREFILL not in roles:
        reasons.append("no prefill worker is ready: prompts are computed on decode workers")
    unproven = dict(fleet.unproven_pairs())
    if not fleet.pairs() and "" in unproven.values():
        return Readiness(False, ("the first pair of workers is proving itself",))
    silent = {**unproven, **fleet.refused_pairs()}
    reasons += [f"{p} -> {d} carries nothing: {why}" for (p, d), why in silent.items() if why]
    serves_alone = any(set(link.record.roles) == set(Role) for link in fleet.ready())
    if Role.PREFILL in roles and not (fleet.pairs() or unproven or serves_alone):
        reasons.append("no prefill worker fits a decode worker: prompts are computed on decode workers")
    index = fleet.index_health()
    if not index.healthy:
        reasons.append(
            f"the prefix index ({index.kind}) does not answer: {index.detail or 'no reason known'}"
        )
    return Readiness(True, tuple(reasons))


def transports_in_use(fleet: FleetView) -> list[str]:
    used = (fleet.transport(prefill.worker_id, decode.worker_id) for prefill, decode in fleet.pairs())
    return sorted({name for name in used if name})
