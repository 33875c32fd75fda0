"""Gathers blocks of the pool into one contiguous buffer for the wire, and back, with a digest of each block on the way.

    pack:    wire[i] = pool[block_ids[i], start_byte : start_byte + num_bytes],  digests[i] = digest(wire[i])
    unpack:  pool[block_ids[i], start_byte : start_byte + num_bytes] = wire[i],  digests[i] = digest(wire[i])

    pool [num_blocks, block_bytes] uint8; wire [n, num_bytes] uint8; block_ids [n] int64; digests [n, 2] int32

A byte range of a block is a group of layers. The digest of words w_0 .. w_(k-1) of 32 bits, all arithmetic modulo 2^32:

    h_i = mix(w_i xor (i * 0x9E3779B1 + 0x7F4A7C15)),  mix = the finaliser of MurmurHash3, a bijection
    digest = (sum h_i,  sum (h_i xor h_i >> 15) * 0x846CA68B)

Sums do not depend on the order, so programs add theirs atomically and the digest is the same whatever the grid. A
change within a single word always changes the first sum; others go unnoticed with a chance of about 2^-64. It finds
corruption, truncation and mix-ups, not an adversary. The definitions are `reference.pack_blocks`, `unpack_blocks` and
`block_digests`.

Grid: (ceil(words / BLOCK), n). Floor: 2 * n * num_bytes over memory bandwidth; the digest reads nothing again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # words of one program: 8 KiB


@triton.jit
def _hash_words(words, i):
    """h_i of the formula, uint32."""
    h = words.to(tl.uint32, bitcast=True) ^ (i.to(tl.uint32) * 0x9E3779B1 + 0x7F4A7C15)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _move_blocks_kernel(
    pool_ptr,  # [num_blocks, ...] int32, from the first word of the range on
    wire_ptr,  # [n, num_words] int32
    digest_ptr,  # [n, 2] int32, zeros
    id_ptr,  # [n]
    stride,  # of the pool, in words
    num_words,
    TO_WIRE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    block = tl.load(id_ptr + row).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_words
    in_pool, on_wire = pool_ptr + block * stride + i, wire_ptr + row * num_words + i
    if TO_WIRE:
        words = tl.load(in_pool, mask=mask, other=0)
        tl.store(on_wire, words, mask=mask)
    else:
        words = tl.load(on_wire, mask=mask, other=0)
        tl.store(in_pool, words, mask=mask)
    h = _hash_words(words, i)
    first = tl.where(mask, h, 0).to(tl.int32, bitcast=True)
    second = tl.where(mask, (h ^ (h >> 15)) * 0x846CA68B, 0).to(tl.int32, bitcast=True)
    tl.atomic_add(digest_ptr + row * 2, tl.sum(first, 0), sem="relaxed")
    tl.atomic_add(digest_ptr + row * 2 + 1, tl.sum(second, 0), sem="relaxed")


def pack_blocks(pool: Tensor, block_ids: Tensor, start_byte: int, num_bytes: int) -> tuple[Tensor, Tensor]:
    """wire and digests. See the module."""
    wire = torch.empty(len(block_ids), num_bytes, dtype=torch.uint8, device=pool.device)
    return wire, _move(pool, block_ids, start_byte, wire, to_wire=True)


def unpack_blocks(pool: Tensor, block_ids: Tensor, start_byte: int, wire: Tensor) -> Tensor:
    """digests of what came over the wire; block_ids are all different. See the module."""
    return _move(pool, block_ids, start_byte, wire, to_wire=False)


def _move(pool: Tensor, block_ids: Tensor, start_byte: int, wire: Tensor, *, to_wire: bool) -> Tensor:
    num_blocks, num_bytes = wire.shape
    assert pool.dtype == wire.dtype == torch.uint8 and pool.stride(1) == 1
    assert wire.is_contiguous() and block_ids.shape == (num_blocks,) and block_ids.is_contiguous()
    assert start_byte % 4 == 0 and num_bytes % 4 == 0 and start_byte + num_bytes <= pool.shape[1]
    words = pool[:, start_byte : start_byte + num_bytes].view(torch.int32)
    digests = torch.zeros(num_blocks, 2, dtype=torch.int32, device=pool.device)
    _move_blocks_kernel[(triton.cdiv(num_bytes // 4, BLOCK), num_blocks)](
        words,
        wire.view(torch.int32),
        digests,
        block_ids,
        words.stride(0),
        num_bytes // 4,
        TO_WIRE=to_wire,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return digests
