"""Sequences share a block only if they begin alike, and nobody writes to a block that another one reads."""

import hashlib

import hypothesis.strategies as st
import pytest
from fake_model import FakeStorage
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.clock import SystemClock
from baton.engine.sequence import Sequence
from baton.kv.block import HASH_BYTES, BlockHash, block_hashes, extend_hashes, num_blocks_for, root_hash
from baton.kv.cache_manager import KVCacheManager
from baton.kv.layout import KVLayout, LayerLayout
from baton.kv.offload import HostBlocks
from baton.kv.storage import KVStorage
from baton.request import BlockId, Request, RequestId

BLOCK_SIZE = 4


def _sequence(prompt: list[int], salt: str = "") -> Sequence:
    return Sequence(Request(RequestId("r"), tuple(prompt), cache_salt=salt), token_ids=list(prompt))


def _manager(num_blocks: int = 16, **options: bool) -> KVCacheManager:
    return KVCacheManager(num_blocks, BLOCK_SIZE, "model", **options)


def _compute(kv: KVCacheManager, sequence: Sequence) -> None:
    assert kv.allocate(sequence, len(sequence.token_ids))
    kv.commit(sequence, len(sequence.token_ids))


@pytest.mark.parametrize(
    ("num_tokens", "num_hits"), [(1, 0), (3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (20, 3)]
)
def test_a_hit_never_holds_the_last_token(num_tokens: int, num_hits: int) -> None:
    kv = _manager()
    tokens = list(range(100, 113))  # three full blocks and one token
    _compute(kv, _sequence(tokens))
    again = _sequence([*tokens, *range(50)][:num_tokens])
    assert len(kv.match_prefix(again)) == num_hits
    assert kv.allocate(again, num_tokens + 1)
    assert again.num_computed_tokens == again.num_cached_tokens == num_hits * BLOCK_SIZE
    kv.check_integrity()


def test_nothing_is_shared_across_salts() -> None:
    kv = _manager()
    _compute(kv, _sequence(list(range(9)), "tenant a"))
    assert len(kv.match_prefix(_sequence(list(range(9)), "tenant a"))) == 2
    assert kv.match_prefix(_sequence(list(range(9)), "tenant b")) == []


def test_equal_blocks_behind_different_beginnings_are_different() -> None:
    kv = _manager()
    _compute(kv, _sequence([1, 1, 1, 1, 5, 6, 7, 8, 9]))
    assert kv.match_prefix(_sequence([2, 2, 2, 2, 5, 6, 7, 8, 9])) == []


def test_without_prefix_caching_nothing_is_found() -> None:
    kv = _manager(enable_prefix_caching=False)
    _compute(kv, _sequence(list(range(9))))
    assert kv.match_prefix(_sequence(list(range(9)))) == []
    assert kv.drain_events() == ([], [])


def test_all_or_nothing() -> None:
    kv = _manager(num_blocks=4)
    first = _sequence(list(range(8)))
    _compute(kv, first)
    second = _sequence([*range(8), *range(20, 36)])  # hits two blocks, needs four more
    assert not kv.allocate(second, 24)
    assert second.block_table == [] and second.num_computed_tokens == 0 and kv.num_used_blocks == 2
    kv.check_integrity()


def test_hits_are_counted_as_taken_when_they_are_free() -> None:
    kv = _manager(num_blocks=4)
    first = _sequence(list(range(9)))
    _compute(kv, first)
    kv.free(first)
    assert kv.num_free_blocks == 4
    second = _sequence([*range(8), *range(20, 28)])
    assert not kv.allocate(second, 17)  # two hits and three more
    assert kv.allocate(second, 16)
    assert second.num_cached_tokens == 8 and kv.num_free_blocks == 0
    kv.check_integrity()


def test_keep_free_leaves_a_reserve() -> None:
    kv = _manager(num_blocks=4)
    assert not kv.allocate(_sequence(list(range(12))), 12, keep_free=2)
    assert kv.allocate(_sequence(list(range(8))), 8, keep_free=2)


def test_the_end_of_a_chain_is_evicted_before_its_beginning() -> None:
    kv = _manager(num_blocks=4)
    first = _sequence(list(range(16)))
    _compute(kv, first)
    kv.free(first)
    assert kv.allocate(_sequence([99] * 8), 8)
    assert len(kv.match_prefix(_sequence(list(range(17))))) == 2


def test_generated_tokens_are_cached_too() -> None:
    kv = _manager()
    first = _sequence(list(range(6)))
    _compute(kv, first)
    for token in (70, 71, 72):
        first.token_ids.append(token)
        assert kv.allocate(first, len(first.token_ids))
        kv.commit(first, len(first.token_ids))
    assert len(kv.match_prefix(_sequence([*range(6), 70, 71, 72]))) == 2


class CacheMachine(RuleBasedStateMachine):
    """Any order of admission, growth, forks, swapping, completion and preemption, over real bytes."""

    NUM_BLOCKS = 10

    def __init__(self) -> None:
        super().__init__()
        self.storage = FakeStorage(self.NUM_BLOCKS, BLOCK_SIZE)
        self.host = HostBlocks(
            self.storage, 6 * self.storage.layout.block_bytes, SystemClock(), lambda num_bytes, seconds: None
        )
        self.kv = _manager(self.NUM_BLOCKS)
        self.sequences: list[Sequence] = []
        self.swapped: list[Sequence] = []

    @initialize(enable_prefix_caching=st.booleans())
    def start(self, enable_prefix_caching: bool) -> None:
        self.kv = KVCacheManager(
            self.NUM_BLOCKS,
            BLOCK_SIZE,
            "model",
            enable_prefix_caching=enable_prefix_caching,
            host_blocks=self.host,
        )

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), salt=st.sampled_from(["", "b"]))
    def admit(self, prompt: list[int], salt: str) -> None:
        sequence = _sequence(prompt, salt)
        free_before = self.kv.num_free_blocks
        if self.kv.allocate(sequence, len(prompt) + 1):
            self.sequences.append(sequence)
        else:
            assert self.kv.num_free_blocks == free_before and not sequence.block_table

    @precondition(lambda self: any(self.kv.can_fork(s) for s in self.sequences))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from([s for s in self.sequences if self.kv.can_fork(s)]))
        child = _sequence(list(parent.request.prompt_token_ids), parent.request.cache_salt)
        free_before = self.kv.num_free_blocks
        if self.kv.fork(child, parent, len(child.token_ids) + 1):
            self.sequences.append(child)
        else:
            assert self.kv.num_free_blocks == free_before and not child.block_table

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), count=st.integers(1, 9))
    def compute(self, data: st.DataObject, count: int) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        start = sequence.num_computed_tokens
        end = min(start + count, len(sequence.token_ids))
        if not self.kv.allocate(sequence, end):
            return
        if sequence.block_copy is not None:
            self.storage.copy(*sequence.block_copy)
        for block_id in sequence.block_table[start // BLOCK_SIZE : num_blocks_for(end, BLOCK_SIZE)]:
            owners = [s for s in self.sequences if block_id in s.block_table]
            assert owners == [sequence], "writes to a shared block"
        self.storage.write(sequence.block_table, start, sequence.token_ids[start:end])
        self.kv.commit(sequence, end)
        if end == len(sequence.token_ids):
            sequence.token_ids.append(data.draw(st.integers(0, 1)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        self.kv.free(sequence)

    @precondition(lambda self: any(self.kv.can_swap_out(s) for s in self.sequences))
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from([s for s in self.sequences if self.kv.can_swap_out(s)]))
        self.sequences.remove(sequence)
        self.swapped.append(sequence)
        num_computed_tokens = sequence.num_computed_tokens
        self.kv.swap_out(sequence)
        assert not sequence.block_table and sequence.num_computed_tokens == num_computed_tokens

    @precondition(lambda self: self.swapped)
    @rule(data=st.data(), abort=st.booleans())
    def swap_in_or_abort(self, data: st.DataObject, abort: bool) -> None:
        sequence = data.draw(st.sampled_from(self.swapped))
        num_computed_tokens = sequence.num_computed_tokens
        if abort:
            self.kv.free(sequence)
            assert not sequence.host_blocks
        elif self.kv.allocate(sequence, len(sequence.token_ids) + 1):
            assert sequence.num_computed_tokens >= num_computed_tokens and not sequence.host_blocks
            self.sequences.append(sequence)
        else:
            assert sequence.num_computed_tokens == num_computed_tokens and not sequence.block_table
            return
        self.swapped.remove(sequence)

    @invariant()
    def integrity(self) -> None:
        self.kv.check_integrity()
        assert bool(self.swapped) == (self.host.num_free < self.host.num_blocks)

    @invariant()
    def every_table_shows_its_own_tokens(self) -> None:
        for sequence in self.sequences:
            table, num_computed = list(sequence.block_table), sequence.num_computed_tokens
            if sequence.block_copy is not None:
                source, destination = sequence.block_copy
                assert table[num_computed // BLOCK_SIZE] == destination
                table[num_computed // BLOCK_SIZE] = source  # it is there that its content is still
            expected = b"".join(token.to_bytes(4, "little") for token in sequence.token_ids[:num_computed])
            assert self.storage.read(table, num_computed) == expected


CacheMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestCache = CacheMachine.TestCase


def test_storage_views_and_regions_are_the_same_bytes() -> None:
    layout = KVLayout(2, (LayerLayout(1, 3, 2), LayerLayout(2, 2, 2)), "float32", 4)
    storage = KVStorage(layout, 3)
    k, v = storage.layer_views(1)
    assert k.shape == (3, 2, 2, 2) and v.shape == (3, 2, 2, 2)
    k[2], v[2] = 1.5, -2.0
    region = storage.region(BlockId(2), 1, 2).cast("f")
    assert region.tolist() == [1.5] * 8 + [-2.0] * 8
    region[0] = 7.0
    assert k[2, 0, 0, 0] == 7.0
    assert bytes(storage.region(BlockId(2), 0, 1)) == bytes(layout.group_bytes(0, 1))
    assert len(storage.region(BlockId(0), 0, 2)) == layout.block_bytes
    k, v = KVStorage(layout, 3, fill_nan=True).layer_views(0)
    assert k.isnan().all() and v.isnan().all()


def test_a_block_hash_is_blake2b_of_its_parent_and_its_tokens() -> None:
    """Workers of two releases share an index: what is hashed may not change."""
    tokens = [0, 1, 255, 256, 2**31, 2**32 - 1, 7, 8, 9]
    root = root_hash("f", 4, "tenant")
    expected, parent = [], root
    for start in (0, 4):
        block = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + 4])
        parent = BlockHash(hashlib.blake2b(parent + block, digest_size=HASH_BYTES).digest())
        expected.append(parent)
    assert block_hashes(root, tokens, 4) == expected
    assert list(extend_hashes(expected[0], tokens, 4, 1)) == expected[1:]
    assert block_hashes(root, tokens[:3], 4) == []
