"""A step's attention by the Triton kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baton.model.attention import Chunk, Options, PagedLayer
from baton.model.memory import to_device
from baton.model.naive_step import padded_tables
from baton_kernels.cache_write import rope_write_kv
from baton_kernels.decode_attention import choose_num_splits, paged_decode_attention
from baton_kernels.naive import rope
from baton_kernels.prefill_attention import paged_prefill_attention


@dataclass(slots=True)
class TritonStep:
    """Implements StepAttention. Everything that the kernels read is in device memory, nothing is read back."""

    layers: tuple[PagedLayer, ...]
    slots: Tensor  # [T] int64: block * block_size + offset of each token's KV, negative for padding
    block_tables: Tensor  # [B, N] int32, decoding sequences first
    context_lens: Tensor  # [B] int32, the step's tokens included; 0 for padding
    query_starts: Tensor  # [B - num_decodes + 1] int32: where each chunk begins, counted from the first chunk
    num_decodes: int
    num_sms: int
    on_written: Callable[[int], None] | None = None
    num_layers_seen: int = 0

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options
    ) -> Tensor:
        self.num_layers_seen += 1
        kv, k_cache, v_cache, window, writes = self.layers[module.layer_idx]  # type: ignore[index]
        dtype, n = k_cache.dtype, self.num_decodes
        query = query.to(dtype)
        if writes:
            cos, sin = options.rope or (None, None)
            rope_write_kv(query, key.to(dtype), value.to(dtype), k_cache, v_cache, self.slots, cos, sin)
            if self.on_written is not None:
                self.on_written(kv)
        elif options.rope is not None:
            query = rope(query, *options.rope)
        kinds: dict[str, Any] = {"softcap": options.softcap, "sinks": options.sinks}
        if window is not None:
            kinds |= {"window": window.size, "chunked": window.chunked}
        outs = []
        if n > 0:
            num_splits = self._num_splits(k_cache)
            tables, lens = self.block_tables[:n], self.context_lens[:n]
            outs.append(
                paged_decode_attention(
                    query[:n], k_cache, v_cache, tables, lens, options.scale, num_splits=num_splits, **kinds
                )
            )
        if len(query) > n:
            tables, lens = self.block_tables[n:], self.context_lens[n:]
            outs.append(
                paged_prefill_attention(
                    query[n:], k_cache, v_cache, tables, self.query_starts, lens, options.scale, **kinds
                )
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _num_splits(self, k_cache: Tensor) -> int:
        """By what the table has room for: lengths stay on the device."""
        room = self.block_tables.shape[1] * k_cache.shape[1]
        return choose_num_splits(self.num_decodes, k_cache.shape[2], room, self.num_sms)


class TritonPlanner:
    """Implements Planner."""

    def __init__(self, layers: tuple[PagedLayer, ...], block_size: int, num_sms: int) -> None:
        self._layers = layers
        self._block_size = block_size
        self.num_sms = num_sms

    def plan(self, chunks: Sequence[Chunk], positions: Tensor, blocks: Tensor) -> TritonStep:
        num_decodes = sum(chunk.num_tokens == 1 for chunk in chunks)
        lens = [chunk.start + chunk.num_tokens for chunk in chunks]
        starts = np.cumsum([0, *(chunk.num_tokens for chunk in chunks[num_decodes:])])
        device = positions.device
        return TritonStep(
            layers=self._layers,
            slots=blocks * self._block_size + positions % self._block_size,
            block_tables=to_device(padded_tables(chunks, np.int32), device),
            context_lens=to_device(np.array(lens, dtype=np.int32), device),
            query_starts=to_device(starts.astype(np.int32), device),
            num_decodes=num_decodes,
            num_sms=self.num_sms,
        )
