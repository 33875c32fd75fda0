"""Copies whole blocks inside the pool, all layers in one launch: the write half of copy-on-write.

    pool[dst[i]] = pool[src[i]]        pool [num_blocks, block_bytes] uint8; src, dst [n] int64

The destinations are all different and none of them is a source. A pair with a negative source (padding of a captured
launch) is skipped. The definition is `naive.copy_blocks`.

Grid: (ceil(words / BLOCK), n), a word being 4 bytes. Floor: 2 * n * block_bytes over memory bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # words of one program: 16 KiB


@triton.jit
def _copy_blocks_kernel(
    pool_ptr,  # [num_blocks, num_words] int32
    src_ptr,  # [n]
    dst_ptr,  # [n]
    stride,
    num_words,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(1)
    src, dst = tl.load(src_ptr + pair).to(tl.int64), tl.load(dst_ptr + pair).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (i < num_words) & (src >= 0)
    tl.store(pool_ptr + dst * stride + i, tl.load(pool_ptr + src * stride + i, mask=mask), mask=mask)


def copy_blocks(pool: Tensor, src: Tensor, dst: Tensor) -> None:
    """See the module."""
    assert pool.dtype == torch.uint8 and pool.stride(1) == 1 and pool.shape[1] % 4 == 0
    assert src.shape == dst.shape and src.is_contiguous() and dst.is_contiguous()
    words = pool.view(torch.int32)
    grid = triton.cdiv(words.shape[1], BLOCK), len(src)
    _copy_blocks_kernel[grid](words, src, dst, words.stride(0), words.shape[1], BLOCK=BLOCK, num_warps=8)
