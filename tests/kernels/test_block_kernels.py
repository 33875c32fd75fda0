"""The kernels that move whole blocks: copies, the wire buffer, the digests on the way."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from baton.kv.layout import KVLayout, LayerLayout
from baton.request import RequestId
from baton.transfer.digest import token_digests
from baton.transfer.wire import PieceHeader
from baton_kernels import naive
from baton_kernels.copy_blocks import copy_blocks
from baton_kernels.naive import Planes
from baton_kernels.wire_blocks import pack_blocks, unpack_blocks

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    # numpy's remarks on overflows and wrap-arounds that the kernels mean, and on lanes that are masked later
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
# start_byte, planes, heads, row_bytes, block_size
SHAPES = [(0, 1, 1, 4, 1), (64, 3, 2, 16, 4), (8, 2, 3, 60, 5), (0, 2, 2, 256, 16), (100, 1, 1, 576, 3)]


def random_pool(num_blocks: int, block_bytes: int) -> torch.Tensor:
    return torch.randint(256, (num_blocks, block_bytes), dtype=torch.uint8)


@pytest.mark.parametrize("block_bytes", [4, 1000, 20_000], ids="{}B".format)
def test_copy_blocks(block_bytes: int) -> None:
    pool = random_pool(7, block_bytes)
    src, dst = torch.tensor([5, 0, -1, 5]), torch.tensor([1, 6, 2, 3])
    wanted = pool.clone()
    naive.copy_blocks(wanted, src, dst)
    copy_blocks(pool, src, dst)
    assert torch.equal(pool, wanted)
    assert torch.equal(pool[3], pool[5]) and torch.equal(pool[6], pool[0])


def make_planes(start: int, num_planes: int, num_heads: int, row_bytes: int) -> Planes:
    return Planes(start, num_planes, num_heads, row_bytes, first_plane=6, first_head=2)


def shape_id(shape: tuple[int, ...]) -> str:
    return "from{}-{}x{}-{}B-P{}".format(*shape)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_pack_then_unpack_is_the_identity(shape: tuple[int, ...]) -> None:
    planes, block_size = make_planes(*shape[:4]), shape[4]
    start, end = planes.start_byte, planes.start_byte + planes.num_bytes(block_size)
    pool, ids = random_pool(6, end + 12), torch.tensor([4, 1, 2])
    tokens = torch.tensor([0, block_size, 2**33])
    wire, digests = pack_blocks(pool, ids, tokens, block_size, planes)
    assert torch.equal(wire, pool[ids, start:end])
    assert torch.equal(digests, naive.token_digests(wire, tokens, block_size, planes))

    other = random_pool(6, end + 12)
    wanted = other.clone()
    there = torch.tensor([0, 5, 3])
    wanted[there, start:end] = wire
    assert torch.equal(unpack_blocks(other, there, tokens, block_size, planes, wire), digests)
    assert torch.equal(other, wanted)


def test_a_token_s_digest_does_not_depend_on_the_layout() -> None:
    """Two blocks of 8 tokens are one of 16; the digests of the halves of the heads add up, and those of the layers."""
    num_planes, num_heads = 4, 6
    whole = torch.randint(256, (1, num_planes, 16, num_heads, 20), dtype=torch.uint8)
    zero = torch.zeros(1, dtype=torch.int64)

    def digests(
        part: torch.Tensor, first_tokens: torch.Tensor, first_plane: int = 0, first_head: int = 0
    ) -> torch.Tensor:
        n, planes, block_size, heads, row_bytes = part.shape
        kind = Planes(0, planes, heads, row_bytes, first_plane, first_head)
        ids = torch.arange(n)
        return pack_blocks(part.reshape(n, -1), ids, first_tokens, block_size, kind)[1]

    wanted = digests(whole, zero)
    blocks = whole.view(num_planes, 2, 8, num_heads, 20).transpose(0, 1)
    assert torch.equal(digests(blocks, torch.tensor([0, 8])).flatten(), wanted[0])
    halves = digests(whole[:, :, :, :3], zero), digests(whole[:, :, :, 3:], zero, first_head=3)
    assert torch.equal(sum(halves), wanted)
    layers = digests(whole[:, :1], zero), digests(whole[:, 1:], zero, first_plane=1)
    assert torch.equal(sum(layers), wanted)


def test_the_digest_sees_flips_swaps_and_shifts() -> None:
    planes, block_size = Planes(0, 2, 2, 64), 4  # rows of 64 bytes, tokens of 256
    wire = random_pool(1, planes.num_bytes(block_size)).repeat(8, 1)
    wire[1, 777] ^= 1
    wire[2, :8] = wire[0, [4, 5, 6, 7, 0, 1, 2, 3]]  # words of a row
    wire[3, :128] = wire[0, :128].roll(64)  # heads of a token
    wire[4] = wire[0].roll(128)  # tokens
    wire[5] = wire[0].roll(512)  # planes
    wire[6, -4:] = 0
    tokens = torch.zeros(8, dtype=torch.int64)
    tokens[7] = 16
    digests = naive.token_digests(wire, tokens, block_size, planes).sum(1)
    assert len(set(digests.tolist())) == len(wire)


def test_a_change_of_one_word_is_always_seen() -> None:
    wire = torch.zeros(2048, 64, dtype=torch.uint8)
    wire.view(torch.int32)[:, 2] = torch.randperm(2**20)[:2048].int()
    digests = naive.token_digests(wire, torch.zeros(2048, dtype=torch.int64), 1, Planes(0, 1, 1, 64))
    assert len(set(digests.flatten().tolist())) == 2048


def test_the_digest_is_that_of_the_hand_over() -> None:
    """Bit for bit what `baton.transfer.digest` computes on the CPU: a GPU's sender and a CPU's receiver agree."""
    layout = KVLayout(16, (LayerLayout(2, 8, 4),) * 3, "float32", 4)
    pool, ids, first = random_pool(4, layout.block_bytes), torch.tensor([3, 1]), torch.tensor([32, 48])
    header = PieceHeader(
        RequestId("r"),
        1,
        0,
        1,
        3,
        32,
        64,
        2 * layout.group_bytes(1, 3),
        head_end=2,
        run_tokens=16,
        dtype="float32",
    )
    total = torch.zeros(2, 16, dtype=torch.int64)
    for layer in (1, 2):
        k_bytes = 16 * 2 * 8 * 4
        for plane, start, row_bytes in ((0, 0, 32), (1, k_bytes, 16)):
            planes = Planes(layout.layer_offsets[layer] + start, 1, 2, row_bytes, 2 * layer + plane)
            total += pack_blocks(pool, ids, first, 16, planes)[1]
    group = pool[ids, layout.layer_offsets[1] :].contiguous()
    theirs = token_digests(header, layout, [memoryview(row.numpy()) for row in group.cpu()])
    assert total.flatten().tolist() == theirs.view("int64").tolist()
