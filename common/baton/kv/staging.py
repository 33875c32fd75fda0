"""KV in device memory, on its way out or in: the blocks of one piece at a time pass through pinned host memory.

    out   load    device blocks are gathered on the device, then copied to the host in one go
    in    load, what came is written into the copy, store

Loading before storing keeps what a piece does not carry: other tokens of the same block, other heads. A piece of whole
blocks comes into blank memory instead. Copies have a stream of their own, so the caller waits for them alone and not
for the step that runs: KV that leaves was written by a step that has ended, and KV that comes is in no batch yet.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from baton.kv.layout import BlockStorage, DeviceStorage, KVLayout
from baton.kv.storage import KVStorage
from baton.request import BlockId


class PinnedCopy(BlockStorage):
    """Some blocks of a pool, in some of its layers. Implements BlockStorage for these alone."""

    def __init__(
        self,
        pool: KVStorage,
        block_ids: Sequence[BlockId],
        layer_start: int,
        layer_end: int,
        copies: "_Copies",
    ) -> None:
        self._pool = pool
        self._copies = copies
        self._row = {block_id: row for row, block_id in enumerate(dict.fromkeys(block_ids))}
        self._start, end = (pool.layout.layer_offsets[layer] for layer in (layer_start, layer_end))
        self._columns = pool.data[:, self._start : end]
        shape, pinned = (len(self._row), end - self._start), pool.data.device.type == "cuda"
        self._rows = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        with copies.done():
            self._ids = torch.tensor(list(self._row), dtype=torch.int64, device=pool.data.device)
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

    def load(self) -> None:
        with self._copies.done():
            self._rows.copy_(self._columns.index_select(0, self._ids), non_blocking=True)

    def store(self) -> None:
        with self._copies.done():
            rows = self._rows.to(self._columns.device, non_blocking=True)
            self._columns.index_copy_(0, self._ids, rows)


class _Copies:
    """The stream of the copies."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def done(self) -> Iterator[None]:
        """What is asked for inside has been done when it is left."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


class StagedStorage(DeviceStorage):
    """The pool of a worker whose model runs on a device, as the hand-over sees it."""

    def __init__(self, pool: KVStorage) -> None:
        self._pool = pool
        self._copies = _Copies(pool.data.device)

    @property
    def layout(self) -> KVLayout:
        return self._pool.layout

    def load(self, block_ids: Sequence[BlockId], layer_start: int, layer_end: int) -> PinnedCopy:
        copy = self.blank(block_ids, layer_start, layer_end)
        copy.load()
        return copy

    def blank(self, block_ids: Sequence[BlockId], layer_start: int, layer_end: int) -> PinnedCopy:
        return PinnedCopy(self._pool, block_ids, layer_start, layer_end, self._copies)


def for_transfer(pool: KVStorage) -> KVStorage | StagedStorage:
    """What the hand-over gets to know of the pool."""
    return pool if pool.data.device.type == "cpu" else StagedStorage(pool)
