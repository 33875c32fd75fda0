"""A step's attention by the native ops, one call per layer for the whole ragged batch; and whole layers, see
fuse_layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from baton.model.attention import Chunk, Options, PagedLayer
from baton.model.naive_step import padded_tables
from baton_kernels.native import Native, Steps
from baton_kernels.native_layer import NativeLayer, PagedArgument, StepArgument


@dataclass(slots=True)
class NativeStep:
    """Implements StepAttention."""

    native: Native
    layers: tuple[PagedLayer, ...]
    blocks: Tensor  # [T] int64, where the KV of this step's tokens goes
    offsets: Tensor  # [T] int64, in the block
    steps: Steps
    paged: tuple[PagedArgument, ...]  # of each layer
    shared: StepArgument
    on_written: Callable[[int], None] | None = None
    num_layers_seen: int = 0

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options
    ) -> Tensor:
        self.num_layers_seen += 1
        kv, k_cache, v_cache, window, writes = self.layers[module.layer_idx]  # type: ignore[index]
        dtype = k_cache.dtype
        if writes:
            self.native.write_kv(key.to(dtype), k_cache, self.blocks, self.offsets)
            if v_cache.shape[-1]:
                self.native.write_kv(value.to(dtype), v_cache, self.blocks, self.offsets)
            if self.on_written is not None:
                self.on_written(kv)
        if v_cache.shape[-1] == 0:  # V is the front of K, see mla.py
            v_cache = k_cache[..., : value.shape[-1]]
        return self.native.paged_attention(
            query.to(dtype),
            k_cache,
            v_cache,
            self.steps,
            options.scale,
            window=window,
            softcap=options.softcap,
            sinks=options.sinks,
        )

    def run_layer(self, index: int, layer: NativeLayer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """All of decoder layer `index`: x [1, T, hidden] -> the same. cos and sin [1, T, R]."""
        self.num_layers_seen += 1
        kv, paged = self.layers[index].kv, self.paged[index]
        out = layer.write(x, cos, sin, paged, self.shared)
        if self.on_written is not None and self.layers[index].writes:
            self.on_written(kv)
        return layer.finish(out, paged, self.shared)


class NativePlanner:
    """Implements Planner."""

    def __init__(self, native: Native, layers: tuple[PagedLayer, ...], block_size: int) -> None:
        self._native = native
        self._layers = layers
        self._block_size = block_size
        self._paged = tuple(
            PagedArgument(layer.k_cache, layer.v_cache, layer.window, writes=layer.writes) for layer in layers
        )

    def plan(self, chunks: Sequence[Chunk], positions: Tensor, blocks: Tensor) -> NativeStep:
        starts = np.zeros(len(chunks) + 1, dtype=np.int32)
        np.cumsum([chunk.num_tokens for chunk in chunks], out=starts[1:])
        lens = np.array([chunk.start + chunk.num_tokens for chunk in chunks], dtype=np.int32)
        steps = Steps(*map(torch.from_numpy, (padded_tables(chunks, np.int32), starts, lens)))
        offsets = positions % self._block_size
        return NativeStep(
            native=self._native,
            layers=self._layers,
            blocks=blocks,
            offsets=offsets,
            steps=steps,
            paged=self._paged,
            shared=StepArgument(blocks, offsets, steps),
        )


def native_covers(native: Native, layer: PagedLayer) -> bool:
    """Heads of whole 32-bit words."""
    cache = layer.k_cache
    return native.supports(cache.dtype) and cache.shape[-1] * cache.element_size() % 4 == 0
