"""Rotary embedding of query and key, and the write of key and value to the paged cache, in one launch.

    (x[i], x[i + R/2])  -->  (x[i] cos[i] - x[i + R/2] sin[i],  x[i + R/2] cos[i] + x[i] sin[i])    i < R/2

    query [T, H, DK] turned in place; key [T, Hkv, DK] and value [T, Hkv, DV] to slots [T] int64 of the caches, where
    slot = block * block_size + offset and a negative slot (padding) is not written; cos, sin [T, R/2] of any dtype

The dimensions from R on are not turned. Without cos and sin (R = 0) it is the write alone, for models that turn query
and key themselves. The definition is `naive.rope_write_kv`.

Grid: (T, ceil(H / HEADS) + ceil(Hkv / HEADS)); the first programs of a token turn query heads, the last ones take KV
heads. Several heads make one program's tile, so that a thread moves 16 bytes at a time.

Floor: query twice, key and value twice, cos and sin once, over memory bandwidth.
"""

import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # of one program


@triton.jit
def _turn(
    src_ptr, dst_ptr, cos_ptr, sin_ptr, src_heads, dst_heads, valid,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """The dimensions [0, 2 * HALF) of a tile of heads; src_heads and dst_heads [HEADS] are where each begins."""
    i = tl.arange(0, HALF_PAD)
    mask = valid[:, None] & (i < HALF)[None, :]
    cos = tl.load(cos_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    src, dst = src_ptr + src_heads[:, None] + i[None, :], dst_ptr + dst_heads[:, None] + i[None, :]
    x1 = tl.load(src, mask=mask, other=0.0).to(tl.float32)  # [HEADS, HALF_PAD]
    x2 = tl.load(src + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(dst, (x1 * cos - x2 * sin).to(dst_ptr.dtype.element_ty), mask=mask)
    tl.store(dst + HALF, (x2 * cos + x1 * sin).to(dst_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _copy(
    src_ptr, dst_ptr, src_heads, dst_heads, valid, START: tl.constexpr, END: tl.constexpr, PAD: tl.constexpr
):
    """The dimensions [START, END) of a tile of heads."""
    i = START + tl.arange(0, PAD)
    mask = valid[:, None] & (i < END)[None, :]
    x = tl.load(src_ptr + src_heads[:, None] + i[None, :], mask=mask)
    tl.store(dst_ptr + dst_heads[:, None] + i[None, :], x, mask=mask)


@triton.jit
def _rope_write_kernel(
    q_ptr,  # [T, H, DK]
    k_ptr,  # [T, Hkv, DK]
    v_ptr,  # [T, Hkv, DV]
    k_cache_ptr,  # [num_blocks, BLOCK_SIZE, Hkv, DK]
    v_cache_ptr,  # [num_blocks, BLOCK_SIZE, Hkv, DV]
    slot_ptr,  # [T]
    cos_ptr,  # [T, HALF]
    sin_ptr,  # [T, HALF]
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kb,
    stride_kp,
    stride_vb,
    stride_vp,
    stride_ct,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,  # of the DK - 2 * HALF dimensions that are not turned
    DV_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    Q_PROGRAMS: tl.constexpr,  # 0 where nothing is turned
):
    token, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos_ptr += token * stride_ct
    sin_ptr += token * stride_ct
    if program < Q_PROGRAMS:
        head = program * HEADS + tl.arange(0, HEADS).to(tl.int64)
        q_ptr += token * stride_qt
        _turn(
            q_ptr,
            q_ptr,
            cos_ptr,
            sin_ptr,
            head * stride_qh,
            head * stride_qh,
            head < NUM_HEADS,
            HALF,
            HALF_PAD,
        )
    else:
        slot = tl.load(slot_ptr + token)
        head = (program - Q_PROGRAMS) * HEADS + tl.arange(0, HEADS).to(tl.int64)
        valid = (head < NUM_KV_HEADS) & (slot >= 0)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        k_ptr += token * stride_kt
        v_ptr += token * stride_vt
        k_cache_ptr += block * stride_kb + offset * stride_kp
        v_cache_ptr += block * stride_vb + offset * stride_vp
        if HALF > 0:
            _turn(k_ptr, k_cache_ptr, cos_ptr, sin_ptr, head * stride_kh, head * DK, valid, HALF, HALF_PAD)
        if DK > 2 * HALF:
            _copy(k_ptr, k_cache_ptr, head * stride_kh, head * DK, valid, 2 * HALF, DK, REST_PAD)
        _copy(v_ptr, v_cache_ptr, head * stride_vh, head * DV, valid, 0, DV, DV_PAD)


def rope_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """See the module."""
    num_tokens, num_heads, dk = query.shape
    _, block_size, num_kv_heads, dv = v_cache.shape
    assert key.shape == (num_tokens, num_kv_heads, dk) and value.shape == (num_tokens, num_kv_heads, dv)
    assert query.stride(2) == key.stride(2) == value.stride(2) == 1
    assert k_cache.stride(2) == dk and v_cache.stride(2) == dv and slots.is_contiguous()
    half = 0
    if cos is not None and sin is not None:
        half = cos.shape[1]
        assert (
            2 * half <= dk and cos.shape == sin.shape and cos.stride() == sin.stride() and cos.stride(1) == 1
        )
    q_programs = triton.cdiv(num_heads, HEADS) if half else 0
    table = query if cos is None else cos  # any pointer will do where nothing is turned
    _rope_write_kernel[(num_tokens, q_programs + triton.cdiv(num_kv_heads, HEADS))](
        query,
        key,
        value,
        k_cache,
        v_cache,
        slots,
        table,
        table if sin is None else sin,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        table.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        DK=dk,
        DV=dv,
        HALF=half,
        HALF_PAD=triton.next_power_of_2(max(half, 1)),
        REST_PAD=triton.next_power_of_2(max(dk - 2 * half, 1)),
        DV_PAD=triton.next_power_of_2(dv),
        HEADS=HEADS,
        Q_PROGRAMS=q_programs,
        num_warps=1,
    )
