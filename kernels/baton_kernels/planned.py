"""Paged attention in plain torch, planned once per step for all layers: what runs where neither the native ops nor the
kernels do.

    B sequences that decode, T tokens of a chunk, C positions of context, H heads, Hkv KV heads, D dim
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from baton_kernels.naive import Positions, Window, attention, read_kv


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
