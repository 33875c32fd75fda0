"""KV that the host cannot address goes through a copy of its blocks: the same bytes, and nothing beside them touched.

Run with pools in host memory that are treated as a device's; a CUDA device takes the same path with pinned memory."""

import pytest
import torch
from kv_pools import IDENTITY, digested, fill, layout_of, request_of, table, whole

from baton.clock import VirtualClock
from baton.handover.receive import Receiver
from baton.kv.layout import KVLayout
from baton.kv.staging import StagedStorage, for_transfer
from baton.kv.storage import KVStorage
from baton.transfer import adapt
from baton.transfer.wire import PieceHeader

NUM_TOKENS = 147  # ends in the middle of a block


def pool_of(layout: KVLayout) -> KVStorage:
    pool = KVStorage(layout, -(-NUM_TOKENS // layout.block_size) + 3)
    pool.data.fill_(0xA5)
    return pool


def pieces(layout: KVLayout) -> list[PieceHeader]:
    """Cut in the middle of blocks and of layers, and between blocks; the first tokens left out."""
    ranges = [(5, 40), (40, 64), (64, 128), (128, NUM_TOKENS)]
    cuts = [(start, end, layers) for start, end in ranges for layers in ((0, 1), (1, 3))]
    return [
        whole(layout, end, start, layer_start=layers[0], layer_end=layers[1], sequence=n,
              num_pieces=len(cuts) if n == len(cuts) - 1 else 0, first_token=7 if n == len(cuts) - 1 else -1)
        for n, (start, end, layers) in enumerate(cuts)
    ]  # fmt: skip


@pytest.mark.parametrize("block_sizes", [(16, 16), (64, 16), (16, 32)], ids=str)
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16")], ids=str)
@pytest.mark.parametrize("staged", ["sender", "receiver", "both"])
def test_the_same_bytes_with_and_without_a_copy(
    block_sizes: tuple[int, int], dtypes: tuple[str, str], staged: str
) -> None:
    source = pool_of(layout_of(block_sizes[0], dtypes[0]))
    source_ids = table(source.layout, NUM_TOKENS)
    fill(source, source_ids, NUM_TOKENS)
    request, results = request_of(NUM_TOKENS), []
    for through_copy in (False, True):
        target = pool_of(layout_of(block_sizes[1], dtypes[1]))
        sender = StagedStorage(source) if through_copy and staged != "receiver" else source
        receiver = Receiver(
            StagedStorage(target) if through_copy and staged != "sender" else target,
            IDENTITY,
            VirtualClock(),
            lambda kind, /, **fields: None,
        )
        receiver.expect(request, 1, table(target.layout, NUM_TOKENS, seed=1), 5, 10.0)
        for header in pieces(source.layout):
            header = digested(header, source, source_ids, request)
            buffers = receiver.open(header)
            for_wire = b"".join(adapt.payload(sender, source_ids, header))
            for buffer in buffers:
                buffer[:], for_wire = for_wire[: len(buffer)], for_wire[len(buffer) :]
            receiver.close(header, None)
        results.append(target.data.clone())
    assert torch.equal(*results)


def test_a_copy_holds_the_blocks_it_was_asked_for() -> None:
    pool = pool_of(layout_of(16))
    copy = StagedStorage(pool).load(table(pool.layout, 40), 1, 2)
    before = pool.data.clone()
    copy.region(table(pool.layout, 40)[1], 1, 2)[:4] = b"abcd"
    assert torch.equal(pool.data, before)
    copy.store()
    start = pool.layout.layer_offsets[1]
    assert bytes(pool.data[table(pool.layout, 40)[1], start : start + 4].tolist()) == b"abcd"
    with pytest.raises(KeyError):
        copy.region(table(pool.layout, NUM_TOKENS)[5], 1, 2)


def test_whole_blocks_come_into_blank_memory_and_change_nothing_before_they_are_stored() -> None:
    pool = pool_of(layout_of(16))
    ids, before = table(pool.layout, NUM_TOKENS), pool.data.clone()
    loaded: list[object] = []
    storage = StagedStorage(pool)
    storage.load = lambda *blocks: loaded.append(blocks)
    landing = adapt.landing(storage, ids, whole(pool.layout, 64, 32))
    for buffer in landing.buffers:
        buffer[:] = b"\x5a" * len(buffer)
    assert torch.equal(pool.data, before)
    landing.land()
    assert not loaded
    assert (pool.data[list(ids[2:4])] == 0x5A).all()
    others = [row for row in range(pool.num_blocks) if row not in ids[2:4]]
    assert torch.equal(pool.data[others], before[others])


def test_a_pool_that_the_host_can_address_is_not_copied() -> None:
    pool = pool_of(layout_of(16))
    assert for_transfer(pool) is pool
