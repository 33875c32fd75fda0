"""KV in device memory, on its way out or in: the blocks of one piece at a time pass through pinned host memory.

    out   load    device blocks are gathered on the device, then copied to the host in one go
    in    load, what came is written into the copy, store

Loading before storing keeps what a piece does not carry: other tokens of the same block, other heads. Copies are on the
current stream, behind whatever computes the KV there, and the caller waits for them.
"""

from collections.abc import Sequence

import torch

from baton.kv.layout import BlockStorage, DeviceStorage, KVLayout
from baton.kv.storage import KVStorage
from baton.request import BlockId


class PinnedCopy(BlockStorage):
    """Some blocks of a pool, in some of its layers. Implements BlockStorage for these alone."""

    def __init__(
        self, pool: KVStorage, block_ids: Sequence[BlockId], layer_start: int, layer_end: int
    ) -> None:
        self._pool = pool
        self._row = {block_id: row for row, block_id in enumerate(dict.fromkeys(block_ids))}
        self._start, end = (pool.layout.layer_offsets[layer] for layer in (layer_start, layer_end))
        self._columns = pool.data[:, self._start : end]
        self._ids = torch.tensor(list(self._row), dtype=torch.int64, device=pool.data.device)
        shape, pinned = (len(self._row), end - self._start), pool.data.device.type == "cuda"
        self._rows = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        self._rows.copy_(self._columns.index_select(0, self._ids))
        self._bytes = self._rows.view(-1).numpy().data

    @property
    def layout(self) -> KVLayout:
        return self._pool.layout

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    def region(self, block_id: BlockId, layer_start: int, layer_end: int) -> memoryview:
        start = self._row[block_id] * self._rows.shape[1] - self._start
        offsets = self.layout.layer_offsets
        return self._bytes[start + offsets[layer_start] : start + offsets[layer_end]]

    def store(self) -> None:
        self._columns.index_copy_(0, self._ids, self._rows.to(self._columns.device))


class StagedStorage(DeviceStorage):
    """The pool of a worker whose model runs on a device, as the hand-over sees it."""

    def __init__(self, pool: KVStorage) -> None:
        self._pool = pool

    @property
    def layout(self) -> KVLayout:
        return self._pool.layout

    def load(self, block_ids: Sequence[BlockId], layer_start: int, layer_end: int) -> PinnedCopy:
        return PinnedCopy(self._pool, block_ids, layer_start, layer_end)


def for_transfer(pool: KVStorage) -> KVStorage | StagedStorage:
    """What the hand-over gets to know of the pool."""
    return pool if pool.data.device.type == "cpu" else StagedStorage(pool)
