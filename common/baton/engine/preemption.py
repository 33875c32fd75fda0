"""How a sequence gives its blocks up: their KV goes to host memory, or is computed again later.

    swapping costs        2 x bytes / measured copy rate
    computing again       tokens / measured prefill rate

The cheaper one is taken; what has not been measured yet is taken for nothing, swapping first, so it will be."""

from baton.engine.rates import StepRates
from baton.engine.sequence import Sequence
from baton.kv.cache_manager import KVCacheManager


class Preemption:
    """Counts what it did."""

    def __init__(self, kv: KVCacheManager, rates: StepRates) -> None:
        self.num_swapped = 0
        self.num_recomputed = 0
        self._kv = kv
        self._rates = rates

    def give_up(self, sequence: Sequence) -> None:
        if self._kv.can_swap_out(sequence) and self._swap_is_cheaper(sequence):
            self._kv.swap_out(sequence)
            self.num_swapped += 1
        else:
            self._kv.free(sequence)
            self.num_recomputed += 1

    def _swap_is_cheaper(self, sequence: Sequence) -> bool:
        swap_s = self._rates.swap_s(2 * self._kv.num_swap_bytes(sequence))
        return swap_s == 0 or swap_s < self._rates.prefill_s(sequence.num_computed_tokens)
