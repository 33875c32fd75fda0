"""The kernels that move whole blocks: copies, the wire buffer, the digests on the way."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from baton_kernels import reference
from baton_kernels.copy_blocks import copy_blocks
from baton_kernels.wire_blocks import pack_blocks, unpack_blocks

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # numpy's remarks on overflows and wrap-arounds that the kernels mean, and on lanes that are masked later
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
RANGES = [(64, 0, 64), (1200, 400, 404), (40_000, 8_000, 20_000)]
RANGE_IDS = [f"{block_bytes}B-from{start}-{num_bytes}B" for block_bytes, start, num_bytes in RANGES]


def random_pool(num_blocks: int, block_bytes: int) -> torch.Tensor:
    return torch.randint(256, (num_blocks, block_bytes), dtype=torch.uint8)


@pytest.mark.parametrize("block_bytes", [4, 1000, 20_000], ids="{}B".format)
def test_copy_blocks(block_bytes: int) -> None:
    pool = random_pool(7, block_bytes)
    src, dst = torch.tensor([5, 0, -1, 5]), torch.tensor([1, 6, 2, 3])
    wanted = pool.clone()
    reference.copy_blocks(wanted, src, dst)
    copy_blocks(pool, src, dst)
    assert torch.equal(pool, wanted)
    assert torch.equal(pool[3], pool[5]) and torch.equal(pool[6], pool[0])


@pytest.mark.parametrize(
    ("block_bytes", "start", "num_bytes"), RANGES, ids=(f"{r[0]}B-from{r[1]}-{r[2]}B" for r in RANGES)
)
def test_pack_then_unpack_is_the_identity(block_bytes: int, start: int, num_bytes: int) -> None:
    pool, ids = random_pool(6, block_bytes), torch.tensor([4, 1, 2])
    wire, digests = pack_blocks(pool, ids, start, num_bytes)
    assert torch.equal(wire, pool[ids, start : start + num_bytes])
    assert torch.equal(digests, reference.block_digests(wire))

    other = random_pool(6, block_bytes)
    wanted = other.clone()
    there = torch.tensor([0, 5, 3])
    wanted[there, start : start + num_bytes] = wire
    assert torch.equal(unpack_blocks(other, there, start, wire), digests)
    assert torch.equal(other, wanted)


def test_the_digest_sees_flips_swaps_and_shifts() -> None:
    wire = random_pool(1, 4096).repeat(6, 1)
    wire[1, 777] ^= 1
    wire[2, :8] = wire[0, [4, 5, 6, 7, 0, 1, 2, 3]]
    wire[3] = wire[0].roll(4)
    wire[4, 4092:] = 0
    wire[5] = wire[0].roll(2048)
    assert len(set(map(tuple, reference.block_digests(wire).tolist()))) == 6


def test_the_digest_depends_on_the_length_even_of_zeros() -> None:
    lengths = [reference.block_digests(torch.zeros(1, n, dtype=torch.uint8)) for n in (4, 8, 16)]
    assert len({tuple(digest[0].tolist()) for digest in lengths}) == 3


def test_a_change_of_one_word_always_changes_the_first_sum() -> None:
    wire = torch.zeros(2048, 16, dtype=torch.uint8)
    wire.view(torch.int32)[:, 2] = torch.randperm(2**20)[:2048].int()
    assert len(set(reference.block_digests(wire)[:, 0].tolist())) == 2048
