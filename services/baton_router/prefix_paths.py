"""Ways by which a prefill worker may fetch a prefix from its owner: which are fit to be used.

A way that failed is left alone for a while: fetching is there to be fast, and computing is always right.
"""

from collections.abc import Callable

from baton.clock import Clock
from baton.messages import Fetched, FetchOutcome, WorkerRecord
from baton.request import WorkerId

REST_S = 30.0  # after a failure
_BAD = (FetchOutcome.LATE, FetchOutcome.FAILED)

IsProven = Callable[[WorkerRecord, WorkerRecord], bool]


class PrefixPaths:
    def __init__(self, clock: Clock, is_proven: IsProven) -> None:
        """`is_proven(p, d)`: KV of p means on d what it means on p."""
        self._clock = clock
        self._is_proven = is_proven
        self._resting_until_s: dict[tuple[WorkerId, WorkerId], float] = {}  # (owner, prefill worker)

    def can_fetch(self, owner: WorkerRecord, prefill: WorkerRecord, decode: WorkerRecord) -> bool:
        """`prefill` and `decode` are a proven pair. What an owner's KV means is proven against one of the two."""
        way = owner.worker_id, prefill.worker_id
        if self._clock.now() < self._resting_until_s.get(way, 0.0):
            return False
        return (
            owner.worker_id == decode.worker_id
            or self._is_proven(owner, decode)
            or self._is_proven(prefill, owner)
        )

    def note(self, prefill: WorkerId, fetched: Fetched) -> None:
        way = fetched.source_id, prefill
        if fetched.outcome in _BAD or fetched.num_mismatches:
            self._forget_rested()
            self._resting_until_s[way] = self._clock.now() + REST_S

    def _forget_rested(self) -> None:
        now_s = self._clock.now()
        self._resting_until_s = {way: at_s for way, at_s in self._resting_until_s.items() if at_s > now_s}
