"""A step's attention in plain torch: what runs on the CPU, and on any device for what the kernels do not cover."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baton.model.attention import Chunk, Options, PagedLayer
from baton_kernels import naive, planned


@dataclass(slots=True)
class NaiveStep:
    """Implements StepAttention."""

    layers: tuple[PagedLayer, ...]
    writes: naive.Positions  # [T], where the KV of this step's tokens goes
    num_decodes: int
    # Plans for each window that a layer has:
    decode: dict[
        naive.Window | None, planned.DecodePlan
    ]  # of the first num_decodes tokens; empty without any
    prefills: tuple[
        tuple[int, int, dict[naive.Window | None, planned.PrefillPlan]], ...
    ]  # tokens [start, end)
    on_written: Callable[[int], None] | None = None
    num_layers_seen: int = 0

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options
    ) -> Tensor:
        self.num_layers_seen += 1
        kv, k_cache, v_cache, window, writes = self.layers[module.layer_idx]  # type: ignore[index]
        if writes:
            value_kept = value[..., : v_cache.shape[-1]].to(v_cache.dtype)
            naive.write_kv(key.to(k_cache.dtype), value_kept, k_cache, v_cache, self.writes)
            if self.on_written is not None:
                self.on_written(kv)
        if v_cache.shape[-1] == 0:  # V is the front of K, see mla.py
            v_cache = k_cache[..., : value.shape[-1]]
        query, scale = query.to(k_cache.dtype), options.scale
        extra: dict[str, Any] = {"softcap": options.softcap, "sinks": options.sinks}
        outs = []
        if self.decode:
            decoding, decode = query[: self.num_decodes], self.decode[window]
            outs.append(planned.paged_decode_attention(decoding, k_cache, v_cache, decode, scale, **extra))
        for start, end, plans in self.prefills:
            chunk, plan = query[start:end], plans[window]
            outs.append(planned.paged_prefill_attention(chunk, k_cache, v_cache, plan, scale, **extra))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class NaivePlanner:
    """Implements Planner."""

    def __init__(self, layers: tuple[PagedLayer, ...], block_size: int, dtype: torch.dtype) -> None:
        self._layers = layers
        self._windows = {layer.window for layer in layers}
        self._block_size = block_size
        self._dtype = dtype

    def plan(self, chunks: Sequence[Chunk], positions: Tensor, blocks: Tensor) -> NaiveStep:
        num_decodes = sum(chunk.num_tokens == 1 for chunk in chunks)
        prefills, end = [], num_decodes
        for chunk in chunks[num_decodes:]:
            start, end = end, end + chunk.num_tokens
            prefills.append((start, end, self._plan_prefill(chunk, positions.device)))
        return NaiveStep(
            layers=self._layers,
            writes=naive.Positions(blocks, positions % self._block_size),
            num_decodes=num_decodes,
            decode=self._plan_decode(chunks[:num_decodes], positions[:num_decodes]),
            prefills=tuple(prefills),
        )

    def _plan_decode(
        self, chunks: Sequence[Chunk], positions: Tensor
    ) -> dict[naive.Window | None, planned.DecodePlan]:
        if not chunks:
            return {}
        tables = torch.from_numpy(padded_tables(chunks, np.int64)).to(positions.device)
        longest, lens = max(chunk.start for chunk in chunks) + 1, positions + 1
        return {
            window: planned.plan_decode(tables, lens, longest, self._block_size, self._dtype, window)
            for window in self._windows
        }

    def _plan_prefill(
        self, chunk: Chunk, device: torch.device
    ) -> dict[naive.Window | None, planned.PrefillPlan]:
        table = torch.tensor(chunk.block_table, device=device)
        return {
            window: planned.plan_prefill(table, chunk.start, chunk.num_tokens, self._block_size, window)
            for window in self._windows
        }


def padded_tables(chunks: Sequence[Chunk], dtype: type[np.integer[Any]]) -> np.ndarray[Any, Any]:
    """[len(chunks), the longest table], padded with zeros."""
    tables = np.zeros((len(chunks), max(len(chunk.block_table) for chunk in chunks)), dtype=dtype)
    for table, chunk in zip(tables, chunks, strict=True):
        table[: len(chunk.block_table)] = chunk.block_table
    return tables
