"""Memory on huge pages, for what is read in every step: weights and KV.

With pages of 4 KiB a core spends a good part of a step on address translation; where the system grants larger ones
on request, one thread reads half as much again per second (`benchmarks/bench_cpu.py`).
"""

import mmap
import sys

import torch
from torch import Tensor

_CHUNK_BYTES = 64 * 2**20  # of address space: what is not touched takes no memory
_ALIGNMENT = 64


def huge_empty(num_bytes: int) -> Tensor:
    """uint8, zeros. Freed with the last tensor that uses it."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Arena:
    """Hands out pieces of large chunks, so that small tensors lie on huge pages too."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """uint8, zeros."""
        if num_bytes > len(self._chunk):
            self._chunk = huge_empty(max(num_bytes, _CHUNK_BYTES))
        taken = self._chunk[:num_bytes]
        self._chunk = self._chunk[-(-num_bytes // _ALIGNMENT) * _ALIGNMENT :]
        return taken
