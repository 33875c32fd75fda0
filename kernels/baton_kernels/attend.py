"""The inner loop of both attention kernels: online softmax over the tiles of one sequence's paged context.

    s[r, j] = scale * q[r] . k[j]                     soft-capped if asked for: cap * tanh(s / cap)
    o[r]    = sum_j exp(s[r, j]) v[j] / (sink + sum_j exp(s[r, j]))        over first(q_pos[r]) <= j <= q_pos[r]

first(p) is 0, or p - WINDOW + 1, or the last multiple of WINDOW where layers attend in chunks. The callers put the sink
(exp of a learned score per head, of a position without a value) into the initial `m` and `l`, or leave it out.

A row r is one (token, query head). All query heads that share a KV head stand in one tile of rows, so that K and V
are read once for all of them. Exponentials are taken to base 2; `m` and `l` are the running maximum and sum.

The block ids of a tile are loaded one iteration ahead and carried in a register. Loaded where they are used, the
compiler would divide its pipeline stages between the table and the cache behind it, and K and V would get a single
buffer (tests/kernels/compile_gate.py measures the shared memory, so that this stays true).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_block_ids(table_ptr, start, context_len, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of the tile of positions [start, start + BLOCK_N): a scalar where a block holds whole tiles, else
    [BLOCK_N]."""
    if BLOCK_SIZE % BLOCK_N == 0:
        ids = tl.load(table_ptr + start // BLOCK_SIZE, mask=start < context_len, other=0)
    else:
        pos = start + tl.arange(0, BLOCK_N)
        ids = tl.load(table_ptr + pos // BLOCK_SIZE, mask=pos < context_len, other=0)
    return ids


@triton.jit
def _load_tile(
    cache_ptr,  # of one head
    ids,
    pos,  # [BLOCK_N]
    context_len,
    stride_block,
    stride_pos,
    MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """[BLOCK_N, DIM_PAD]; zeros beyond the context and beyond DIM, whatever lies there."""
    dim = tl.arange(0, DIM_PAD)
    row = ids.to(tl.int64) * stride_block + (pos % BLOCK_SIZE) * stride_pos
    ptrs = cache_ptr + row[:, None] + dim[None, :]
    if MASKED and DIM != DIM_PAD:
        tile = tl.load(ptrs, mask=(pos < context_len)[:, None] & (dim < DIM)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(ptrs, mask=(pos < context_len)[:, None], other=0.0)
    elif DIM != DIM_PAD:
        tile = tl.load(ptrs, mask=(dim < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def _soft_cap(s, CAP: tl.constexpr):
    """CAP * tanh(s / CAP), written with exp2 alone: right at both infinities, and known to every backend."""
    return CAP * (1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2E / CAP)) + 1.0))


@triton.jit
def first_visible(pos, WINDOW: tl.constexpr, CHUNKED: tl.constexpr):
    """The first position that a token at `pos` sees, or below 0."""
    return pos // WINDOW * WINDOW if CHUNKED else pos - WINDOW + 1


@triton.jit
def start_softmax(sink_ptr, heads, valid, HAS_SINKS: tl.constexpr):
    """The initial m and l of rows of the heads `heads`."""
    if HAS_SINKS:
        m = tl.load(sink_ptr + heads, mask=valid, other=0.0).to(tl.float32) * LOG2E
        l = tl.full(heads.shape, 1.0, tl.float32)
    else:
        m = tl.full(heads.shape, float("-inf"), tl.float32)
        l = tl.zeros(heads.shape, tl.float32)
    return m, l


@triton.jit
def attend(
    q,  # [BLOCK_M, DK_PAD]
    q_pos,  # [BLOCK_M]
    m,  # [BLOCK_M] fp32
    l,  # [BLOCK_M] fp32
    acc,  # [BLOCK_M, DV_PAD] fp32
    start,  # a multiple of BLOCK_N
    end,
    context_len,
    k_ptr,  # this KV head of [num_blocks, BLOCK_SIZE, num_kv_heads, DK]
    v_ptr,  # this KV head of [num_blocks, BLOCK_SIZE, num_kv_heads, DV]
    table_ptr,  # this sequence's block ids
    stride_kb,
    stride_kp,
    stride_vb,
    stride_vp,
    scale,  # above 0
    MASKED: tl.constexpr,  # False: every row sees all of [start, end), which is a whole number of tiles
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """m, l and acc after the positions [start, end)."""
    to_log2 = LOG2E if SOFTCAP > 0 else scale * LOG2E
    ids = _load_block_ids(table_ptr, start, context_len, BLOCK_SIZE, BLOCK_N)
    for n in range(start, end, BLOCK_N):
        next_ids = _load_block_ids(table_ptr, n + BLOCK_N, context_len, BLOCK_SIZE, BLOCK_N)
        pos = n + tl.arange(0, BLOCK_N)
        k = _load_tile(k_ptr, ids, pos, context_len, stride_kb, stride_kp, MASKED, BLOCK_SIZE, DK, DK_PAD)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if SOFTCAP > 0:
            s = _soft_cap(s * scale, SOFTCAP)
        if MASKED:
            visible = pos[None, :] <= q_pos[:, None]
            if WINDOW > 0:
                visible &= pos[None, :] >= first_visible(q_pos, WINDOW, CHUNKED)[:, None]
            s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * to_log2)
        # A row may see nothing of a tile that is outside its window: keep -inf - -inf away from it.
        base = tl.where(m_new == float("-inf"), 0.0, m_new) if WINDOW > 0 else m_new
        p = tl.exp2(s * to_log2 - base[:, None])  # one fused multiply-add and one exponential for each score
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, 1)
        v = _load_tile(v_ptr, ids, pos, context_len, stride_vb, stride_vp, MASKED, BLOCK_SIZE, DV, DV_PAD)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = m_new
        ids = next_ids
    return m, l, acc
