"""Which blocks are free, shared or cached. Ids and hashes only: the bytes are elsewhere (kv.storage).

    free, empty --allocate--> used (ref_cnt 1) --release--> free, empty             nothing worth keeping
                                   | register(hash)
                                   v
                         used, cached --release--> free, cached --allocate--> used   evicted, hash forgotten
                              ^                        |
                              +--------- touch --------+                            prefix hit

A cached block keeps its content after its last user left, until its memory is needed.
"""

from collections import OrderedDict
from collections.abc import Iterator

from baton.kv.block import BlockHash
from baton.request import BlockId


class BlockPool:
    """Owns the reference counts, the free queue and the map from hash to block. One owner: the
    KVCacheManager."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_cnt = [0] * num_blocks
        self._hash: list[BlockHash | None] = [None] * num_blocks
        # Two blocks may hold the same content (computed at the same time); only the first is found by its
        # hash. We do not merge them, so block tables only ever grow at the end.
        self._cached: dict[BlockHash, BlockId] = {}
        # In eviction order: empty blocks, then cached ones, least recently used first. An OrderedDict because
        # a prefix hit takes a block out of the middle, which costs O(1) here.
        self._free: OrderedDict[BlockId, None] = OrderedDict.fromkeys(map(BlockId, range(num_blocks)))
        self._added: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    def __repr__(self) -> str:
        return f"BlockPool(used={self.num_used}, free={self.num_free}, cached={len(self._cached)})"

    @property
    def num_free(self) -> int:
        """Free or evictable."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def lookup(self, block_hash: BlockHash) -> BlockId | None:
        return self._cached.get(block_hash)

    def is_free(self, block_id: BlockId) -> bool:
        return self._ref_cnt[block_id] == 0

    def ref_cnt(self, block_id: BlockId) -> int:
        return self._ref_cnt[block_id]

    def allocate(self, num_blocks: int) -> list[BlockId]:
        """Blocks of unknown content with one reference each. The caller has checked num_free."""
        return [self._take_oldest() for _ in range(num_blocks)]

    def touch(self, block_id: BlockId) -> None:
        """One more reference to a cached block."""
        if self._ref_cnt[block_id] == 0:
            del self._free[block_id]
        self._ref_cnt[block_id] += 1

    def register(self, block_id: BlockId, block_hash: BlockHash) -> None:
        """A used block is full and immutable from now on, and is found by this hash."""
        assert self._hash[block_id] is None and self._ref_cnt[block_id] > 0
        if block_hash not in self._cached:
            self._hash[block_id] = block_hash
            self._cached[block_hash] = block_id
            _note(block_hash, self._added, self._removed)

    def forget(self, block_id: BlockId) -> None:
        """A used block's content is found by nobody any more; who has it keeps it."""
        assert self._ref_cnt[block_id] > 0
        self._uncache(block_id)

    def release(self, block_id: BlockId) -> None:
        assert self._ref_cnt[block_id] > 0
        self._ref_cnt[block_id] -= 1
        if self._ref_cnt[block_id] == 0:
            self._free[block_id] = None
            if self._hash[block_id] is None:
                self._free.move_to_end(block_id, last=False)

    @property
    def num_cached(self) -> int:
        """Blocks that have a name, used or free."""
        return len(self._cached)

    def cached_hashes(self) -> Iterator[BlockHash]:
        return iter(self._cached)

    def drain_events(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Hashes that were (added, removed) since the last call. What came and went in between is in
        neither."""
        added, removed = list(self._added), list(self._removed)
        self._added.clear()
        self._removed.clear()
        return added, removed

    def check_integrity(self) -> None:
        """Raises AssertionError. Used plus free is the whole pool by construction, if the free queue is
        right."""
        assert set(self._free) == {i for i, count in enumerate(self._ref_cnt) if count == 0}
        assert all(count >= 0 for count in self._ref_cnt)
        assert {h: i for i, h in enumerate(self._hash) if h is not None} == self._cached
        in_order = [self._hash[block_id] is not None for block_id in self._free]
        assert in_order == sorted(in_order), "a cached block would be evicted before an empty one"

    def _take_oldest(self) -> BlockId:
        block_id, _ = self._free.popitem(last=False)
        self._ref_cnt[block_id] = 1
        self._uncache(block_id)
        return block_id

    def _uncache(self, block_id: BlockId) -> None:
        block_hash = self._hash[block_id]
        if block_hash is not None:
            self._hash[block_id] = None
            del self._cached[block_hash]
            _note(block_hash, self._removed, self._added)


def _note(block_hash: BlockHash, events: dict[BlockHash, None], opposite: dict[BlockHash, None]) -> None:
    if block_hash in opposite:
        del opposite[block_hash]
    else:
        events[block_hash] = None
