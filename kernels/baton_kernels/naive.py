"""Every op in plain torch: the definition, the reference of the kernels' tests, and what runs on the CPU.

A cache is one layer's K or V, [num_blocks, block_size, num_kv_heads, dim]; the last two dimensions are
contiguous, the strides of the first two are free (the blocks of one layer do not lie next to each other).
Position p of a sequence lies in block block_table[p // block_size] at offset p % block_size.

    T tokens of the step, B sequences that decode, C positions of context, H heads, Hkv KV heads, D dim

Positions that nobody wrote are never read, not even to be multiplied by zero: they may hold NaN.
"""

from dataclasses import dataclass, field
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(slots=True)
class Positions:
    """Where KV lies: block and offset, equal shapes. The same for all layers, so it is made once per step."""

    blocks: Tensor  # int64
    offsets: Tensor  # int64
    _rows: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def rows(self, block_stride: int, offset_stride: int) -> Tensor:
        """blocks * block_stride + offsets * offset_stride, computed once for each pair of strides."""
        key = block_stride, offset_stride
        if key not in self._rows:
            self._rows[key] = self.blocks * block_stride + self.offsets * offset_stride
        return self._rows[key]


@dataclass(frozen=True, slots=True)
class Window:
    """What a token of a layer sees besides itself: the last `size` positions, or, `chunked`, those since the last
    multiple of `size`."""

    size: int
    chunked: bool = False

    def first(self, positions: Tensor) -> Tensor:
        """The first position that a token at each of `positions` sees."""
        if self.chunked:
            return positions // self.size * self.size
        return (positions - self.size + 1).clamp_(min=0)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What `paged_decode_attention` needs to know about a batch. See `plan_decode`."""

    positions: Positions  # [B, C]
    bias: Tensor  # [B, 1, 1, C]: 0 for a position that the token sees, -inf beyond


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """What `paged_prefill_attention` needs to know about a chunk. See `plan_prefill`."""

    positions: Positions  # [C]
    mask: Tensor | None  # [T, C] bool; None where the chunk is the whole context


def plan_decode(
    block_tables: Tensor,
    context_lens: Tensor,
    max_context_len: int,
    block_size: int,
    dtype: torch.dtype,
    window: Window | None = None,
) -> DecodePlan:
    """block_tables [B, N] int64, padded with anything; context_lens [B] int64, the token of this step
    included."""
    width = max_context_len if window is None else min(max_context_len, window.size)
    index = torch.arange(width, device=block_tables.device)
    if window is None:
        beyond = index >= context_lens[:, None]  # [B, C]
        index = index.masked_fill(
            beyond, 0
        )  # position 0 instead: always written, and its weight will be zero
    else:
        first = window.first(context_lens - 1)[:, None]
        beyond = first + index >= context_lens[:, None]
        index = first + index.masked_fill(beyond, 0)
    blocks = block_tables.gather(1, index // block_size)
    bias = torch.zeros(beyond.shape, dtype=dtype, device=beyond.device).masked_fill_(beyond, -torch.inf)
    return DecodePlan(Positions(blocks, index % block_size), bias[:, None, None])


def plan_prefill(
    block_table: Tensor, start: int, num_tokens: int, block_size: int, window: Window | None = None
) -> PrefillPlan:
    """A chunk of one sequence, tokens [start, start + num_tokens): each sees the positions up to its own that
    `window` allows. block_table [N] int64."""
    end = start + num_tokens
    first, mask = 0, None
    if window is not None:
        tokens = torch.arange(start, end, device=block_table.device)
        firsts = window.first(tokens)  # [T], never falling
        first = int(window.first(torch.tensor([start]))[0])
        index = torch.arange(first, end, device=block_table.device)
        mask = (index <= tokens[:, None]) & (index >= firsts[:, None])
    elif start > 0:
        mask = torch.ones(num_tokens, end, dtype=torch.bool, device=block_table.device).tril_(start)
    index = torch.arange(first, end, device=block_table.device)
    return PrefillPlan(Positions(block_table[index // block_size], index % block_size), mask)


def write_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Positions) -> None:
    """key [T, Hkv, Dk], value [T, Hkv, Dv] into the caches at `positions` [T], which are all different."""
    k_cache[positions.blocks, positions.offsets] = key
    v_cache[positions.blocks, positions.offsets] = value


def read_kv(cache: Tensor, positions: Positions) -> Tensor:
    """cache[positions.blocks, positions.offsets]: [*positions.shape, Hkv, D].

    Written as a selection of rows, two to three times as fast as indexing with two tensors. A row is one
    position; rows start every gcd(strides) elements and may overlap, which is harmless for reading.
    """
    num_blocks, block_size, num_heads, dim = cache.shape
    step = gcd(cache.stride(0), cache.stride(1))
    block_stride, offset_stride = cache.stride(0) // step, cache.stride(1) // step
    num_rows = (num_blocks - 1) * block_stride + (block_size - 1) * offset_stride + 1
    rows = cache.as_strided((num_rows, num_heads * dim), (step, 1))
    index = positions.rows(block_stride, offset_stride)
    return rows.index_select(0, index.flatten()).view(*index.shape, num_heads, dim)


def paged_decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: DecodePlan,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One token per sequence: query [B, H, Dk] -> [B, H, Dv]. softcap and sinks: see `attention`."""
    num_seqs, num_heads, k_dim = query.shape
    key = read_kv(k_cache, plan.positions).transpose(1, 2)  # [B, Hkv, C, Dk]
    value = read_kv(v_cache, plan.positions).transpose(1, 2)
    # The query heads that share a KV head stand where a prompt's tokens would, so K and V are not repeated
    # for them.
    grouped = query.view(num_seqs, k_cache.shape[2], -1, k_dim)  # [B, Hkv, H / Hkv, Dk]
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=plan.bias, scale=scale)
    else:
        of_groups = None if sinks is None else sinks.view(k_cache.shape[2], -1)
        out = attention(grouped, key, value, plan.bias, scale, softcap, of_groups)
    return out.reshape(num_seqs, num_heads, -1)


def paged_prefill_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: PrefillPlan,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """A chunk of one sequence: query [T, H, Dk] -> [T, H, Dv]. The chunk's own KV has been written before.
    softcap and sinks: see `attention`."""
    query = query.transpose(0, 1)  # [H, T, Dk]
    key = read_kv(k_cache, plan.positions).transpose(0, 1)  # [Hkv, C, Dk]
    value = read_kv(v_cache, plan.positions).transpose(0, 1)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=plan.mask,
            is_causal=plan.mask is None,
            scale=scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)
    num_heads, num_tokens, k_dim = query.shape
    grouped = query.view(key.shape[0], -1, num_tokens, k_dim)  # [Hkv, H / Hkv, T, Dk]
    mask = plan.mask
    if mask is None:
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query.device).tril_()
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, -torch.inf)
    of_groups = None if sinks is None else sinks.view(key.shape[0], -1, 1)
    out = attention(grouped, key[:, None], value[:, None], bias, scale, softcap, of_groups)
    return out.reshape(num_heads, num_tokens, -1).transpose(0, 1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """softmax(cap(scale q k^T) + bias) v with cap(x) = softcap tanh(x / softcap); a sink takes its share of the
    softmax and gives nothing: exp(sink) in the denominator. query [..., T, Dk], key [..., C, Dk],
    value [..., C, Dv], bias broadcast to [..., T, C], sinks to [..., T]."""
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float() + bias
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks[..., None].float().expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return weights.to(value.dtype) @ value
