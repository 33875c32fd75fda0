"""Gathers blocks of the pool into one contiguous buffer for the wire, and back, with the digests of their tokens on the
way.

    pack:    wire[i] = pool[block_ids[i], a:b]          unpack:  pool[block_ids[i], a:b] = wire[i]
             digests[i, t] = digest of token t of block i, the same for both

    pool [num_blocks, block_bytes] uint8; block_ids, first_tokens [n] int64; wire [n, b - a] uint8
    digests [n, block_size] int64

The bytes a:b of a block are planes (K or V of a layer) of one shape, [planes, block_size, heads, row]. A row is one
token's K or V in one head. With its words w_j of 32 bits, t its token, p its plane and h its head, counted over the
whole sequence and model, the digest of a token is a sum over its rows, everything modulo 2^64:

    digest(t) = sum over p, h of mix(sum_j a_j * w_j  +  t * A + p * B + h * C)

with the odd a_j of `naive.word_keys` and mix = splitmix64's finaliser. Sums do not depend on an order, so programs
add theirs atomically, and a token's digest is the same for any block size and any grid, and the sum over parts of its
layers and heads. Both steps inside a row are bijections of a single word: a change of one word is always seen. It finds
corruption, truncation and mix-ups, not an adversary.

Layers of several shapes take a call for each run of equal planes; their digests add up. The definitions are
`naive.pack_blocks`, `unpack_blocks` and `token_digests`.

Grid: (ceil(rows / ROWS), n). Floor: 2 * n * (b - a) over memory bandwidth; the digest reads nothing again.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels import naive
from baton_kernels.naive import Planes

WORDS = 4096  # of one program: 16 KiB


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _row_digests(words, word_keys, token, plane, head):
    """words [ROWS, ROW_PAD] int32, zeros beyond a row; the others [ROWS] int64."""
    w = words.to(tl.uint32, bitcast=True).to(tl.uint64)
    x = tl.sum(w * word_keys.to(tl.uint64)[None, :], 1)
    x += token.to(tl.uint64) * 0x9E3779B97F4A7C15
    x += plane.to(tl.uint64) * 0xD1B54A32D192ED03
    x += head.to(tl.uint64) * 0x8CB92BA72F3D8DD7
    return _mix(x)


@triton.jit
def _move_blocks_kernel(
    pool_ptr,  # [num_blocks, ...] int32, from the first word of the planes on
    wire_ptr,  # [n, num_rows * ROW_WORDS] int32
    digest_ptr,  # [n, BLOCK_SIZE] int64, zeros
    id_ptr,  # [n]
    token_ptr,  # [n]
    key_ptr,  # [ROW_WORDS]
    stride,  # of the pool, in words
    num_rows,
    first_plane,
    first_head,
    TO_WIRE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    ROW_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    i = tl.program_id(1).to(tl.int64)
    block = tl.load(id_ptr + i)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, ROW_PAD)
    word = row[:, None] * ROW_WORDS + j[None, :]
    mask = (
        (row < num_rows)[:, None]
        if ROW_PAD == ROW_WORDS
        else (row < num_rows)[:, None] & (j < ROW_WORDS)[None, :]
    )
    in_pool = pool_ptr + block * stride + word
    on_wire = wire_ptr + i * num_rows * ROW_WORDS + word
    words = tl.load(in_pool if TO_WIRE else on_wire, mask=mask, other=0)
    tl.store(on_wire if TO_WIRE else in_pool, words, mask=mask)
    offset = row // NUM_HEADS % BLOCK_SIZE  # of the token in its block
    plane = first_plane + row // (NUM_HEADS * BLOCK_SIZE)
    keys = tl.load(key_ptr + j, mask=j < ROW_WORDS, other=0)
    token = tl.load(token_ptr + i) + offset
    digests = _row_digests(words, keys, token, plane, first_head + row % NUM_HEADS)
    tl.atomic_add(
        digest_ptr + i * BLOCK_SIZE + offset,
        digests.to(tl.int64, bitcast=True),
        mask=row < num_rows,
        sem="relaxed",
    )


def pack_blocks(
    pool: Tensor, block_ids: Tensor, first_tokens: Tensor, block_size: int, planes: Planes
) -> tuple[Tensor, Tensor]:
    """wire and digests. See the module."""
    num_bytes = planes.num_bytes(block_size)
    wire = torch.empty(len(block_ids), num_bytes, dtype=torch.uint8, device=pool.device)
    return wire, _move(pool, block_ids, first_tokens, block_size, planes, wire, to_wire=True)


def unpack_blocks(
    pool: Tensor, block_ids: Tensor, first_tokens: Tensor, block_size: int, planes: Planes, wire: Tensor
) -> Tensor:
    """digests of what came over the wire; block_ids are all different. See the module."""
    return _move(pool, block_ids, first_tokens, block_size, planes, wire, to_wire=False)


def _move(
    pool: Tensor,
    block_ids: Tensor,
    first_tokens: Tensor,
    block_size: int,
    planes: Planes,
    wire: Tensor,
    *,
    to_wire: bool,
) -> Tensor:
    n, num_bytes = len(block_ids), planes.num_bytes(block_size)
    assert pool.dtype == wire.dtype == torch.uint8 and pool.stride(1) == 1
    assert wire.shape == (n, num_bytes) and wire.is_contiguous()
    assert (
        block_ids.is_contiguous() and first_tokens.shape == block_ids.shape and first_tokens.is_contiguous()
    )
    assert (
        planes.start_byte % 4 == 0
        and planes.row_bytes % 4 == 0
        and planes.start_byte + num_bytes <= pool.shape[1]
    )
    words = pool[:, planes.start_byte : planes.start_byte + num_bytes].view(torch.int32)
    digests = torch.zeros(n, block_size, dtype=torch.int64, device=pool.device)
    num_rows, row_words = planes.num_planes * block_size * planes.num_heads, planes.row_bytes // 4
    row_pad = triton.next_power_of_2(row_words)
    rows = max(WORDS // row_pad, 1)
    _move_blocks_kernel[(triton.cdiv(num_rows, rows), n)](
        words,
        wire.view(torch.int32),
        digests,
        block_ids,
        first_tokens,
        _word_keys(row_words, pool.device),
        words.stride(0),
        num_rows,
        planes.first_plane,
        planes.first_head,
        TO_WIRE=to_wire,
        BLOCK_SIZE=block_size,
        NUM_HEADS=planes.num_heads,
        ROW_WORDS=row_words,
        ROW_PAD=row_pad,
        ROWS=rows,
        num_warps=4,
    )
    return digests


@lru_cache(maxsize=64)
def _word_keys(num_words: int, device: torch.device) -> Tensor:
    return naive.word_keys(num_words).to(device)
