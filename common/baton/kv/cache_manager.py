"""Block tables of sequences: what the scheduler asks for blocks.

A sequence's table is filled front to back: first the blocks of a cached prefix, shared with others and never
written again, then blocks of its own. A block is shared only once it is full and committed, so nobody writes
to a shared one.

A fork takes the prompt's blocks from a sibling instead, with or without a prefix cache. The block of the last prompt
token is its own: it computes this token again, to draw its first one. What that block holds before this token is
copied by the next step; until then the sibling's block is kept, whatever becomes of the sibling.

A sequence that has to give way may be swapped out: what it has computed is kept in host memory and comes back into new
blocks, or into those of its own that are still in the prefix cache.
"""

from collections import Counter
from collections.abc import Iterator

from baton.engine.sequence import Sequence
from baton.kv.block import BlockCopy, BlockHash, extend_hashes, num_blocks_for, root_hash
from baton.kv.block_pool import BlockPool
from baton.kv.offload import HostBlocks
from baton.request import BlockId


class KVCacheManager:
    """Owns the pool, and of a Sequence: block_table, block_hashes, block_copy, host_blocks, num_computed_tokens,
    num_cached_tokens."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        fingerprint: str,
        *,
        enable_prefix_caching: bool = True,
        host_blocks: HostBlocks | None = None,
    ) -> None:
        self.block_size = block_size
        self._fingerprint = fingerprint
        self._enable_prefix_caching = enable_prefix_caching
        self._pool = BlockPool(num_blocks)
        self._host = host_blocks
        self._owners: dict[Sequence, None] = {}
        self._swapped: dict[Sequence, None] = {}  # those with blocks in host memory

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def num_used_blocks(self) -> int:
        return self._pool.num_used

    def match_prefix(self, sequence: Sequence) -> list[BlockId]:
        """The longest run of cached blocks that the sequence begins with; takes nothing.

        The last token is never part of a hit: it has to be computed, or to arrive, for its logits; and a hit
        on its block would make it write to a shared one. Nor is there one for a sequence that waits for what the
        model says of its prompt.
        """
        if not self._enable_prefix_caching or sequence.prompt_scores is not None:
            return []
        return self._cached_run(sequence, (len(sequence.token_ids) - 1) // self.block_size)

    def _cached_run(self, sequence: Sequence, num_blocks: int) -> list[BlockId]:
        self._extend_hashes(sequence, num_blocks)
        hits: list[BlockId] = []
        for block_hash in sequence.block_hashes[:num_blocks]:
            block_id = self._pool.lookup(block_hash)
            if block_id is None:
                break
            hits.append(block_id)
        return hits

    def allocate(self, sequence: Sequence, num_tokens: int, *, keep_free: int = 0) -> bool:
        """Make the table cover num_tokens positions: all of it or, answering False, nothing at all.

        A sequence without blocks takes its cached prefix first, which then counts as computed. `keep_free`
        blocks must be left over.
        """
        num_missing = num_blocks_for(num_tokens, self.block_size) - len(sequence.block_table)
        if num_missing <= 0:
            return True
        hits = [] if sequence.block_table else self.match_prefix(sequence)
        num_new = num_missing - len(hits)
        num_taken = num_new + sum(self._pool.is_free(block_id) for block_id in hits)
        if num_taken > max(0, self._pool.num_free - keep_free):
            return False
        # Hits first: otherwise a new block could evict one of them.
        for block_id in hits:
            self._pool.touch(block_id)
        if hits:
            sequence.block_table.extend(hits)
            num_hit_tokens = len(hits) * self.block_size
            sequence.num_computed_tokens = max(num_hit_tokens, sequence.num_computed_tokens)
            sequence.num_cached_tokens = min(num_hit_tokens, sequence.num_prompt_tokens)
        sequence.block_table.extend(self._pool.allocate(num_new))
        self._owners[sequence] = None
        if sequence.host_blocks:
            self._swap_in(sequence, len(hits))
        return True

    def hold(self, sequence: Sequence) -> None:
        """Take what is cached of its tokens, their last block included, and nothing else."""
        hits = self._cached_run(sequence, len(sequence.token_ids) // self.block_size)
        for block_id in hits:
            self._pool.touch(block_id)
        sequence.block_table.extend(hits)
        sequence.num_computed_tokens = sequence.num_cached_tokens = len(hits) * self.block_size
        self._owners[sequence] = None

    def forget(self, sequence: Sequence) -> None:
        """What its blocks hold is not to be trusted: no other sequence begins with them from now on."""
        for block_id in sequence.block_table:
            self._pool.forget(block_id)

    def can_swap_out(self, sequence: Sequence) -> bool:
        if self._host is None or sequence.block_copy is not None:
            return False
        return 0 < self._num_to_swap(sequence) <= self._host.num_free

    def num_swap_bytes(self, sequence: Sequence) -> int:
        return 0 if self._host is None else self._num_to_swap(sequence) * self._host.block_bytes

    def swap_out(self, sequence: Sequence) -> None:
        """Like `free`, but what is computed stays computed: `allocate` brings it back. No step may be running that
        writes to its blocks."""
        assert self._host is not None and not sequence.num_steps_in_flight
        num_computed_tokens = sequence.num_computed_tokens
        host_blocks = self._host.store(sequence.block_table[: self._num_to_swap(sequence)])
        self.free(sequence)
        sequence.host_blocks, sequence.num_computed_tokens = host_blocks, num_computed_tokens
        self._swapped[sequence] = None

    def can_fork(self, parent: Sequence) -> bool:
        """Its whole prompt is in its blocks."""
        return bool(parent.block_table) and parent.num_computed_tokens >= parent.num_prompt_tokens

    def fork(self, sequence: Sequence, parent: Sequence, num_tokens: int, *, keep_free: int = 0) -> bool:
        """Like `allocate` of a sequence without blocks, with the parent's prompt as its prefix."""
        num_shared, num_to_copy = divmod(sequence.num_prompt_tokens - 1, self.block_size)
        num_new = num_blocks_for(num_tokens, self.block_size) - num_shared
        if num_new > max(0, self._pool.num_free - keep_free):
            return False
        shared = parent.block_table[:num_shared]
        for block_id in shared:
            self._pool.touch(block_id)
        own = self._pool.allocate(num_new)
        if num_to_copy:
            sequence.block_copy = BlockCopy(parent.block_table[num_shared], own[0])
            self._pool.touch(sequence.block_copy.source)
        sequence.block_table.extend((*shared, *own))
        sequence.block_hashes = parent.block_hashes[:num_shared]
        sequence.num_computed_tokens = sequence.num_cached_tokens = sequence.num_prompt_tokens - 1
        self._owners[sequence] = None
        return True

    def commit(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """KV of the first num_computed_tokens tokens is in the blocks: those that became full can be
        shared."""
        self._drop_copy(sequence)
        num_full_before = sequence.num_computed_tokens // self.block_size
        sequence.num_computed_tokens = num_computed_tokens
        self._share(sequence, num_full_before)

    def free(self, sequence: Sequence) -> None:
        """Give all blocks back; nothing is computed any more. Full ones stay cached until their memory is
        needed."""
        self._drop_copy(sequence)
        # In reverse, so that the end of a chain is evicted before its beginning.
        for block_id in reversed(sequence.block_table):
            self._pool.release(block_id)
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0
        self._owners.pop(sequence, None)
        self._free_host_blocks(sequence)

    def owners(self) -> Iterator[Sequence]:
        """Every sequence that holds blocks, an aborted one whose step still runs among them."""
        return iter(self._owners)

    @property
    def num_cached(self) -> int:
        return self._pool.num_cached

    def cached_hashes(self) -> Iterator[BlockHash]:
        return self._pool.cached_hashes()

    def drain_events(self) -> tuple[list[BlockHash], list[BlockHash]]:
        return self._pool.drain_events()

    def check_integrity(self) -> None:
        """Raises AssertionError unless every used block is in exactly as many tables as it has references, those of
        copies to be made included."""
        self._pool.check_integrity()
        tables = Counter(block_id for owner in self._owners for block_id in owner.block_table)
        tables.update(owner.block_copy.source for owner in self._owners if owner.block_copy is not None)
        assert all(self._pool.ref_cnt(block_id) == count for block_id, count in tables.items())
        assert len(tables) == self.num_used_blocks, "a used block is in no table: leaked"
        assert self.num_used_blocks + self.num_free_blocks == self.num_blocks
        if self._host is not None:
            self._host.check_integrity(i for sequence in self._swapped for i in sequence.host_blocks)
        for owner in self._owners:
            assert len(set(owner.block_table)) == len(owner.block_table)
            assert owner.num_computed_tokens <= len(owner.block_table) * self.block_size

    def _num_to_swap(self, sequence: Sequence) -> int:
        return num_blocks_for(sequence.num_computed_tokens, self.block_size)

    def _swap_in(self, sequence: Sequence, num_hits: int) -> None:
        """What is not in the prefix cache any more."""
        assert self._host is not None
        num_stored = len(sequence.host_blocks)
        self._host.load(sequence.host_blocks[num_hits:], sequence.block_table[num_hits:num_stored])
        self._free_host_blocks(sequence)
        self._share(sequence, num_hits)

    def _share(self, sequence: Sequence, first: int) -> None:
        """Its full blocks from the first-th on can be found by others."""
        num_full = sequence.num_computed_tokens // self.block_size
        if first >= num_full or not self._enable_prefix_caching:
            return
        self._extend_hashes(sequence, num_full)
        for index in range(first, num_full):
            self._pool.register(sequence.block_table[index], sequence.block_hashes[index])

    def _free_host_blocks(self, sequence: Sequence) -> None:
        if self._host is not None and sequence.host_blocks:
            self._host.free(sequence.host_blocks)
            sequence.host_blocks = []
            del self._swapped[sequence]

    def _drop_copy(self, sequence: Sequence) -> None:
        """It has been made, or is not needed any more."""
        if sequence.block_copy is not None:
            self._pool.release(sequence.block_copy.source)
            sequence.block_copy = None

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        hashes = sequence.block_hashes
        if len(hashes) >= num_blocks:
            return
        parent = hashes[-1] if hashes else self._root(sequence)
        tokens = sequence.token_ids[: num_blocks * self.block_size]
        hashes.extend(extend_hashes(parent, tokens, self.block_size, len(hashes)))

    def _root(self, sequence: Sequence) -> BlockHash:
        return root_hash(self._fingerprint, self.block_size, sequence.request.cache_salt)
