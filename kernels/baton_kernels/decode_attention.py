"""Paged attention of one token per sequence, its context split over programs.

    query [B, H, DK], k_cache [num_blocks, block_size, Hkv, DK], v_cache [..., DV]  -->  [B, H, DV]
    block_tables [B, N] int32, padded with anything; context_lens [B] int32, the token of this step included

The definition is `naive.paged_attention` with one token per sequence. A sequence of length 0 (padding of a captured
batch) gives zeros.

Grid of `_split_kernel`: (Hkv, num_splits, B); each program attends for the H / Hkv query heads of one KV head to one
share of the context's tiles and leaves a normalised partial result with its log-sum-exp. Grid of `_reduce_kernel`:
(H, B); it weighs the shares. With one split the first kernel writes the result itself.

Lengths are read on the device only, grids and `num_splits` follow from shapes: a launch may be captured in a CUDA graph
and replayed with other lengths and tables.

Floor: the bytes of K and V in the context, B * context_len * Hkv * (DK + DV) * element size, over memory bandwidth.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.attend import attend, first_visible, start_softmax

MIN_ROWS = 16  # of a matrix instruction
MAX_SPLITS = 32
MIN_POSITIONS_PER_SPLIT = 256
PROGRAMS_PER_SM = (
    3  # that fit beside each other, by their shared memory with 64 positions of 128 numbers in 16 bits
)
MIN_UTILIZATION = 0.8


@triton.jit(do_not_specialize=["stride_tb"], do_not_specialize_on_alignment=["table_ptr", "len_ptr"])
def _split_kernel(
    out_ptr,  # [B, H, DV], or [B, H, NUM_SPLITS, DV] fp32
    lse_ptr,  # [B, H, NUM_SPLITS] fp32
    q_ptr,  # [B, H, DK]
    k_ptr,  # [num_blocks, BLOCK_SIZE, Hkv, DK]
    v_ptr,  # [num_blocks, BLOCK_SIZE, Hkv, DV]
    table_ptr,  # [B, N]
    len_ptr,  # [B]
    sink_ptr,  # [H]
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kp,
    stride_vb,
    stride_vp,
    stride_tb,
    scale,
    NUM_SPLITS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    kv_head, split, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    context_len = tl.load(len_ptr + seq)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(first_visible(context_len - 1, WINDOW, CHUNKED), 0) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(context_len - first, BLOCK_N), NUM_SPLITS) * BLOCK_N
    start = first + split * share
    end = tl.minimum(start + share, context_len)

    rows = tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + rows
    dk, dv = tl.arange(0, DK_PAD), tl.arange(0, DV_PAD)
    q = tl.load(
        q_ptr + seq * stride_qb + heads[:, None] * stride_qh + dk[None, :],
        mask=(rows < GROUP)[:, None] & (dk < DK)[None, :],
        other=0.0,
    )  # [BLOCK_M, DK_PAD]
    m, l = start_softmax(sink_ptr, heads, rows < GROUP, HAS_SINKS)
    if HAS_SINKS and split > 0:  # it counts once
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
    m, l, acc = attend(
        q,
        tl.zeros([BLOCK_M], tl.int32) + (context_len - 1),
        m,
        l,
        tl.zeros([BLOCK_M, DV_PAD], tl.float32),
        start,
        end,
        context_len,
        k_ptr + kv_head * DK,
        v_ptr + kv_head * DV,
        table_ptr + seq * stride_tb,
        stride_kb,
        stride_kp,
        stride_vb,
        stride_vp,
        scale,
        True,
        WINDOW,
        CHUNKED,
        SOFTCAP,
        BLOCK_SIZE,
        BLOCK_N,
        DK,
        DV,
        DK_PAD,
        DV_PAD,
    )
    num_heads = tl.num_programs(0) * GROUP
    place = ((seq * num_heads + heads) * NUM_SPLITS + split).to(tl.int64)  # [BLOCK_M]
    out = acc / tl.where(l > 0, l, 1.0)[:, None]
    tl.store(
        out_ptr + place[:, None] * DV + dv[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(rows < GROUP)[:, None] & (dv < DV)[None, :],
    )
    if NUM_SPLITS > 1:
        lse = tl.where(l > 0, m + tl.log2(l), float("-inf"))
        tl.store(lse_ptr + place, lse, mask=rows < GROUP)


@triton.jit
def _reduce_kernel(
    out_ptr,  # [B, H, DV]
    partial_ptr,  # [B, H, NUM_SPLITS, DV] fp32
    lse_ptr,  # [B, H, NUM_SPLITS] fp32, -inf for a share without positions
    NUM_SPLITS: tl.constexpr,
    DV: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    split, dv = tl.arange(0, SPLITS_PAD), tl.arange(0, DV_PAD)
    lse = tl.load(lse_ptr + row * NUM_SPLITS + split, mask=split < NUM_SPLITS, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))  # [SPLITS_PAD]
    partial = tl.load(
        partial_ptr + (row * NUM_SPLITS + split)[:, None] * DV + dv[None, :],
        mask=(weight > 0)[:, None] & (dv < DV)[None, :],
        other=0.0,
    )
    total = tl.sum(weight, 0)
    out = tl.sum(partial * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * DV + dv, out.to(out_ptr.dtype.element_ty), mask=dv < DV)


def choose_num_splits(num_seqs: int, num_kv_heads: int, max_context_len: int, num_sms: int) -> int:
    """A power of two, so that few variants are compiled: about two programs for each multiprocessor, each with
    at least MIN_POSITIONS_PER_SPLIT positions if all sequences were as long as they may become. Where there are more
    programs than run at a time, up to four times as many if the last of them would leave most of the device idle."""
    most = max(1, min(MAX_SPLITS, max_context_len // MIN_POSITIONS_PER_SPLIT))
    num_programs = num_seqs * num_kv_heads
    waves = num_programs / (PROGRAMS_PER_SM * num_sms)
    if waves > 1:
        options = [splits for splits in (1, 2, 4) if splits <= most]
        full = (s for s in options if waves * s / math.ceil(waves * s) >= MIN_UTILIZATION)
        return next(full, options[-1])
    return 1 << (max(1, min(most, 2 * num_sms // num_programs)).bit_length() - 1)


def paged_decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    window: int | None = None,
    chunked: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """See the module. `num_splits` changes the speed, and the result by rounding only."""
    num_seqs, num_heads, dk = query.shape
    _, block_size, num_kv_heads, dv = v_cache.shape
    _check_cache(k_cache, num_kv_heads, dk)
    _check_cache(v_cache, num_kv_heads, dv)
    assert num_heads % num_kv_heads == 0 and query.stride(2) == 1
    assert block_tables.stride(1) == 1 and block_tables.shape[0] == num_seqs == context_lens.shape[0]
    if num_splits is None:
        max_context_len = block_tables.shape[1] * block_size
        num_splits = choose_num_splits(num_seqs, num_kv_heads, max_context_len, _num_sms(query.device))

    group = num_heads // num_kv_heads
    dk_pad, dv_pad = triton.next_power_of_2(dk), triton.next_power_of_2(dv)
    block_n, num_warps, num_stages = _tile_shape(
        max(dk_pad, dv_pad) * query.element_size(), query.element_size()
    )
    out = torch.empty(num_seqs, num_heads, dv, dtype=query.dtype, device=query.device)
    partial, lse = out, out  # not used by a single split
    if num_splits > 1:
        partial = torch.empty(num_seqs, num_heads, num_splits, dv, dtype=torch.float32, device=query.device)
        lse = torch.empty(num_seqs, num_heads, num_splits, dtype=torch.float32, device=query.device)
    _split_kernel[(num_kv_heads, num_splits, num_seqs)](
        partial,
        lse,
        query,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        query if sinks is None else sinks,  # any pointer will do where there are none
        query.stride(0),
        query.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        block_tables.stride(0),
        scale,
        NUM_SPLITS=num_splits,
        GROUP=group,
        HAS_SINKS=sinks is not None,
        WINDOW=window or 0,
        CHUNKED=chunked,
        SOFTCAP=softcap or 0.0,
        BLOCK_SIZE=block_size,
        BLOCK_M=max(MIN_ROWS, triton.next_power_of_2(group)),
        BLOCK_N=block_n,
        DK=dk,
        DV=dv,
        DK_PAD=dk_pad,
        DV_PAD=dv_pad,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if num_splits > 1:
        _reduce_kernel[(num_heads, num_seqs)](
            out,
            partial,
            lse,
            NUM_SPLITS=num_splits,
            DV=dv,
            SPLITS_PAD=triton.next_power_of_2(num_splits),
            DV_PAD=dv_pad,
            num_warps=4,
        )
    return out


def _tile_shape(row_bytes: int, element_bytes: int) -> tuple[int, int, int]:
    """BLOCK_N, num_warps, num_stages: without spills, see the table of tests/kernels/compile_gate.py."""
    if element_bytes == 4:  # no tensor cores at full precision: operands live in registers
        return 16, 8, 3
    return (64, 4, 3) if row_bytes <= 256 else (32, 4, 3)


def _check_cache(cache: Tensor, num_kv_heads: int, dim: int) -> None:
    assert cache.shape[2:] == (num_kv_heads, dim) and cache.stride(3) == 1 and cache.stride(2) == dim


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
