"""Paged attention of the chunks of several sequences, each after its own prefix.

    query [T, H, DK], k_cache [num_blocks, block_size, Hkv, DK], v_cache [..., DV]  -->  [T, H, DV]
    query_starts [B + 1] int32: sequence b owns the tokens [query_starts[b], query_starts[b + 1])
    context_lens [B] int32: prefix and chunk together; block_tables [B, N] int32, padded with anything

The definition is `naive.paged_attention`: a token sees all positions up to its own. The chunk's own K and V have
been written before.

Grid: (Hkv, T // BLOCK_Q + B), a bound that needs no lengths on the host. A program takes BLOCK_Q tokens of one sequence
with all H / Hkv query heads of one KV head, so the rows of its tile are (token, head) and the prefix is read once for
all heads. Tiles before every row's diagonal and inside every row's window are attended without masks.

Floor: 2 * (DK + DV) * H floating-point operations for each (token, position it sees), over the tensor cores' rate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.attend import attend, first_visible, start_softmax


@triton.jit
def _find_sequence(starts_ptr, tile, num_seqs, BLOCK_Q: tl.constexpr):
    """The last b with query_starts[b] // BLOCK_Q + b <= tile: where each sequence gets its tiles, and one to
    spare."""
    low, high = 0, num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(starts_ptr + middle) // BLOCK_Q + middle
        low, high = tl.where(begins <= tile, middle, low), tl.where(begins <= tile, high, middle)
    return low


@triton.jit(
    do_not_specialize=["num_seqs", "stride_tb"],
    # Parts of a step's tensors begin anywhere.
    do_not_specialize_on_alignment=["table_ptr", "starts_ptr", "len_ptr"],
)
def _prefill_kernel(
    out_ptr,  # [T, H, DV]
    q_ptr,  # [T, H, DK]
    k_ptr,  # [num_blocks, BLOCK_SIZE, Hkv, DK]
    v_ptr,  # [num_blocks, BLOCK_SIZE, Hkv, DV]
    table_ptr,  # [B, N]
    starts_ptr,  # [B + 1]
    len_ptr,  # [B]
    sink_ptr,  # [H]
    num_seqs,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kp,
    stride_vb,
    stride_vp,
    stride_tb,
    scale,
    GROUP: tl.constexpr,
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
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    # Long chunks end with the tiles that see most: they go first, so that the short ones fill up the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq = _find_sequence(starts_ptr, tile, num_seqs, BLOCK_Q)
    q_start, q_end = tl.load(starts_ptr + seq), tl.load(starts_ptr + seq + 1)
    first = (tile - (q_start // BLOCK_Q + seq)) * BLOCK_Q  # the tile's first token, counted in the chunk
    q_len = q_end - q_start
    if first >= q_len:
        return
    context_len = tl.load(len_ptr + seq)
    first_pos = context_len - q_len + first
    last_pos = context_len - q_len + tl.minimum(first + BLOCK_Q, q_len) - 1

    rows = tl.arange(0, BLOCK_M)
    q_pos = tl.minimum(first_pos + rows // GROUP, last_pos)
    heads = (kv_head * GROUP + rows % GROUP).to(tl.int64)
    token = (q_start + first + rows // GROUP).to(tl.int64)
    valid = (rows < BLOCK_Q * GROUP) & (token < q_end)
    dk, dv = tl.arange(0, DK_PAD), tl.arange(0, DV_PAD)
    q = tl.load(
        q_ptr + (token * stride_qt + heads * stride_qh)[:, None] + dk[None, :],
        mask=valid[:, None] & (dk < DK)[None, :],
        other=0.0,
    )  # [BLOCK_M, DK_PAD]

    m, l = start_softmax(sink_ptr, heads, valid, HAS_SINKS)
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    k_ptr += kv_head * DK
    v_ptr += kv_head * DV
    table_ptr += seq.to(tl.int64) * stride_tb
    whole = 0  # before it no row needs a mask; with a window the whole range is short, and all of it gets one
    if WINDOW > 0:
        whole = tl.maximum(first_visible(first_pos, WINDOW, CHUNKED), 0) // BLOCK_N * BLOCK_N
    else:
        whole = (first_pos + 1) // BLOCK_N * BLOCK_N
        m, l, acc = attend(
            q, q_pos, m, l, acc, 0, whole, context_len, k_ptr, v_ptr, table_ptr,
            stride_kb, stride_kp, stride_vb, stride_vp, scale, False,
            WINDOW, CHUNKED, SOFTCAP, BLOCK_SIZE, BLOCK_N, DK, DV, DK_PAD, DV_PAD,
        )  # fmt: skip
    m, l, acc = attend(
        q, q_pos, m, l, acc, whole, last_pos + 1, context_len, k_ptr, v_ptr, table_ptr,
        stride_kb, stride_kp, stride_vb, stride_vp, scale, True,
        WINDOW, CHUNKED, SOFTCAP, BLOCK_SIZE, BLOCK_N, DK, DV, DK_PAD, DV_PAD,
    )  # fmt: skip
    num_heads = tl.num_programs(0) * GROUP
    tl.store(
        out_ptr + (token * num_heads + heads)[:, None] * DV + dv[None, :],
        (acc / l[:, None]).to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (dv < DV)[None, :],
    )


def paged_prefill_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    window: int | None = None,
    chunked: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See the module."""
    num_tokens, num_heads, dk = query.shape
    _, block_size, num_kv_heads, dv = v_cache.shape
    num_seqs = context_lens.shape[0]
    assert k_cache.shape[2:] == (num_kv_heads, dk) and k_cache.stride(3) == 1 and k_cache.stride(2) == dk
    assert v_cache.stride(3) == 1 and v_cache.stride(2) == dv
    assert num_heads % num_kv_heads == 0 and query.stride(2) == 1 and block_tables.stride(1) == 1
    assert query_starts.shape[0] == num_seqs + 1 and block_tables.shape[0] == num_seqs

    group = num_heads // num_kv_heads
    dk_pad, dv_pad = triton.next_power_of_2(dk), triton.next_power_of_2(dv)
    block_m, block_n, num_warps, num_stages = _tile_shape(
        max(dk_pad, dv_pad) * query.element_size(), query.element_size(), group
    )
    out = torch.empty(num_tokens, num_heads, dv, dtype=query.dtype, device=query.device)
    _prefill_kernel[(num_kv_heads, num_tokens // (block_m // group) + num_seqs)](
        out,
        query,
        k_cache,
        v_cache,
        block_tables,
        query_starts,
        context_lens,
        query if sinks is None else sinks,  # any pointer will do where there are none
        num_seqs,
        query.stride(0),
        query.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        block_tables.stride(0),
        scale,
        GROUP=group,
        HAS_SINKS=sinks is not None,
        WINDOW=window or 0,
        CHUNKED=chunked,
        SOFTCAP=softcap or 0.0,
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        DK=dk,
        DV=dv,
        DK_PAD=dk_pad,
        DV_PAD=dv_pad,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


def _tile_shape(row_bytes: int, element_bytes: int, group: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages: without spills, see the table of tests/kernels/compile_gate.py."""
    if element_bytes == 4:  # no tensor cores at full precision: operands live in registers
        shape = 16, 16, 8, 2
    elif row_bytes <= 256:
        shape = 128, 64, 8, 3
    else:
        shape = 64, 32, 8, 2
    return max(shape[0], triton.next_power_of_2(group)), *shape[1:]
