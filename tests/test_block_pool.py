"""A block is free, used or cached, never two of them in a way that loses content or memory."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.kv.block import BlockHash
from baton.kv.block_pool import BlockPool
from baton.request import BlockId


def _hash(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


def _fill(pool: BlockPool, numbers: range) -> list[BlockId]:
    """One used, cached block per number."""
    blocks = pool.allocate(len(numbers))
    for block_id, number in zip(blocks, numbers, strict=True):
        pool.register(block_id, _hash(number))
    return blocks


def _release_all(pool: BlockPool, blocks: list[BlockId]) -> None:
    for block_id in blocks:
        pool.release(block_id)


def test_a_released_block_stays_cached_until_its_memory_is_needed() -> None:
    pool = BlockPool(4)
    _release_all(pool, _fill(pool, range(4)))
    assert pool.num_free == 4 and len(list(pool.cached_hashes())) == 4
    pool.allocate(1)
    assert pool.lookup(_hash(0)) is None
    assert pool.lookup(_hash(1)) is not None


def test_the_least_recently_used_goes_first_and_empty_blocks_before_all() -> None:
    pool = BlockPool(6)
    cached = _fill(pool, range(4))
    empty = pool.allocate(1)
    _release_all(pool, [*cached, *empty])
    pool.touch(cached[0])
    pool.release(cached[0])  # used again: last to go
    assert set(pool.allocate(2)) == {empty[0], BlockId(5)}
    assert pool.allocate(4) == [cached[1], cached[2], cached[3], cached[0]]


def test_a_hit_takes_the_block_out_of_the_free_queue() -> None:
    pool = BlockPool(3)
    blocks = _fill(pool, range(3))
    _release_all(pool, blocks)
    pool.touch(blocks[1])
    assert pool.num_free == 2 and pool.num_used == 1
    assert blocks[1] not in pool.allocate(2)
    pool.check_integrity()


def test_the_second_block_with_the_same_content_is_not_found_and_not_kept() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.register(first, _hash(1))
    pool.register(second, _hash(1))
    assert pool.lookup(_hash(1)) == first
    _release_all(pool, [first, second])
    assert pool.allocate(2) == [second, BlockId(2)]
    assert pool.lookup(_hash(1)) == first


def test_events_tell_the_net_change() -> None:
    pool = BlockPool(2)
    blocks = _fill(pool, range(2))
    assert pool.drain_events() == ([_hash(0), _hash(1)], [])
    _release_all(pool, blocks)
    _fill(pool, range(5, 7))
    assert pool.drain_events() == ([_hash(5), _hash(6)], [_hash(0), _hash(1)])
    assert pool.drain_events() == ([], [])
    _release_all(pool, [BlockId(0), BlockId(1)])
    _release_all(pool, _fill(pool, range(8, 10)))
    _fill(pool, range(5, 7))  # 5 and 6 went and came back, 8 and 9 came and went
    assert pool.drain_events() == ([], [])


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls, against a plain model of who holds what."""

    NUM_BLOCKS = 6

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS)
        self.held: list[BlockId] = []  # one entry per reference
        self.known: set[BlockHash] = set()  # what a listener to the events believes
        self.registered: set[BlockId] = set()  # used and full

    @rule(count=st.integers(0, NUM_BLOCKS))
    def allocate(self, count: int) -> None:
        count = min(count, self.pool.num_free)
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count and not set(blocks) & set(self.held)
        self.registered -= set(blocks)
        self.held += blocks

    @precondition(lambda self: self.held)
    @rule(data=st.data(), number=st.integers(0, 8))
    def register(self, data: st.DataObject, number: int) -> None:
        block_id = data.draw(st.sampled_from(self.held))
        if block_id not in self.registered:
            self.pool.register(block_id, _hash(number))
            if self.pool.lookup(_hash(number)) == block_id:
                self.registered.add(block_id)

    @rule(number=st.integers(0, 8))
    def hit(self, number: int) -> None:
        block_id = self.pool.lookup(_hash(number))
        if block_id is not None:
            self.pool.touch(block_id)
            self.held.append(block_id)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(self.held))
        self.held.remove(block_id)
        self.pool.release(block_id)

    @rule()
    def listen(self) -> None:
        added, removed = self.pool.drain_events()
        assert not set(added) & set(removed)
        assert set(removed) <= self.known and not set(added) & self.known
        self.known = self.known - set(removed) | set(added)
        assert self.known == set(self.pool.cached_hashes())

    @invariant()
    def counts_are_right(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == len(set(self.held))
        assert all(self.pool.ref_cnt(block_id) == self.held.count(block_id) for block_id in self.held)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
