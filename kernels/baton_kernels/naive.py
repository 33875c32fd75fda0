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
class DecodePlan:
    """What `paged_decode_attention` needs to know about a batch. See `plan_decode`."""

    positions: Positions  # [B, C]
    bias: Tensor  # [B, 1, 1, C]: 0 for a position of the sequence, -inf beyond its end


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """What `paged_prefill_attention` needs to know about a chunk. See `plan_prefill`."""

    positions: Positions  # [C]
    mask: Tensor | None  # [T, C] bool; None where the chunk is the whole context


def plan_decode(
    block_tables: Tensor, context_lens: Tensor, max_context_len: int, block_size: int, dtype: torch.dtype
) -> DecodePlan:
    """block_tables [B, N] int64, padded with anything; context_lens [B] int64, the token of this step
    included."""
    index = torch.arange(max_context_len, device=block_tables.device)
    beyond = index >= context_lens[:, None]  # [B, C]
    index = index.masked_fill(beyond, 0)  # position 0 instead: always written, and its weight will be zero
    blocks = block_tables.gather(1, index // block_size)
    bias = torch.zeros(beyond.shape, dtype=dtype, device=beyond.device).masked_fill_(beyond, -torch.inf)
    return DecodePlan(Positions(blocks, index % block_size), bias[:, None, None])


def plan_prefill(block_table: Tensor, start: int, num_tokens: int, block_size: int) -> PrefillPlan:
    """A chunk of one sequence, tokens [start, start + num_tokens): each sees all positions up to its own.
    block_table [N] int64."""
    end = start + num_tokens
    mask = None
    if start > 0:
        mask = torch.ones(num_tokens, end, dtype=torch.bool, device=block_table.device).tril_(start)
    index = torch.arange(end, device=block_table.device)
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
    query: Tensor, k_cache: Tensor, v_cache: Tensor, plan: DecodePlan, scale: float
) -> Tensor:
    """One token per sequence: query [B, H, Dk] -> [B, H, Dv]."""
    num_seqs, num_heads, k_dim = query.shape
    key = read_kv(k_cache, plan.positions).transpose(1, 2)  # [B, Hkv, C, Dk]
    value = read_kv(v_cache, plan.positions).transpose(1, 2)
    # The query heads that share a KV head stand where a prompt's tokens would, so K and V are not repeated
    # for them.
    grouped = query.view(num_seqs, k_cache.shape[2], -1, k_dim)  # [B, Hkv, H / Hkv, Dk]
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=plan.bias, scale=scale)
    return out.reshape(num_seqs, num_heads, -1)


def paged_prefill_attention(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, plan: PrefillPlan, scale: float
) -> Tensor:
    """A chunk of one sequence: query [T, H, Dk] -> [T, H, Dv]. The chunk's own KV has been written before."""
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        read_kv(k_cache, plan.positions).transpose(0, 1)[None],
        read_kv(v_cache, plan.positions).transpose(0, 1)[None],
        attn_mask=plan.mask,
        is_causal=plan.mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
