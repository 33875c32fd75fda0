"""How the KV of one block lies in memory. Torch-free: sizes and offsets only.

A block is one contiguous run of bytes, layer after layer, in each layer first all K then all V:

    block := layer 0 | layer 1 | ...
    layer := K [block_size, num_kv_heads, k_dim] | V [block_size, num_kv_heads, v_dim]

so the bytes of a group of layers lie together, and a hand-over sends each (block, layer group) as one run.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol, TypeAlias

from baton.request import BlockId


@dataclass(frozen=True)
class LayerLayout:
    num_kv_heads: int
    k_dim: int
    v_dim: int

    def num_elements(self, block_size: int) -> int:
        return block_size * self.num_kv_heads * (self.k_dim + self.v_dim)


@dataclass(frozen=True)
class KVLayout:
    """`dtype` is a name both sides know ("float32", "bfloat16"); `element_bytes` its size.

    With num_shards > 1 the pool is one of so many equal slices of each layer's KV heads, as a rank of a tensor-parallel
    worker has them, and `layers` says what this slice holds. Heads are counted over the whole model everywhere else.
    """

    block_size: int
    layers: tuple[LayerLayout, ...]
    dtype: str
    element_bytes: int
    shard: int = 0
    num_shards: int = 1

    def __post_init__(self) -> None:
        assert self.num_shards == 1 or len({layer.num_kv_heads for layer in self.layers}) == 1

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def layer_offsets(self) -> tuple[int, ...]:
        """num_layers + 1 byte offsets into a block; the last one is block_bytes."""
        sizes = (layer.num_elements(self.block_size) * self.element_bytes for layer in self.layers)
        return tuple(accumulate(sizes, initial=0))

    @property
    def block_bytes(self) -> int:
        return self.layer_offsets[-1]

    @cached_property
    def heads(self) -> tuple[int, int]:
        """[start, end) of the KV heads in this pool; a layer with fewer has those below its own number."""
        num_heads = max(layer.num_kv_heads for layer in self.layers)
        return self.shard * num_heads, (self.shard + 1) * num_heads

    def num_heads(self, layer: int, head_start: int, head_end: int) -> int:
        """How many of these heads that layer has."""
        end = min(head_end, self.layers[layer].num_kv_heads * self.num_shards)
        return max(0, end - head_start)

    def token_bytes(
        self, layer_start: int, layer_end: int, head_start: int, head_end: int, element_bytes: int
    ) -> int:
        """Of one token's K and V in these layers and heads."""
        return element_bytes * sum(
            self.num_heads(index, head_start, head_end) * (layer.k_dim + layer.v_dim)
            for index, layer in enumerate(self.layers[layer_start:layer_end], layer_start)
        )

    def group_bytes(self, layer_start: int, layer_end: int) -> int:
        return self.layer_offsets[layer_end] - self.layer_offsets[layer_start]

    def describe(self) -> str:
        """Equal strings mean equal bytes; part of the worker fingerprint."""
        shapes = ";".join(f"{layer.num_kv_heads}x{layer.k_dim}/{layer.v_dim}" for layer in self.layers)
        slice_ = f":{self.shard}/{self.num_shards}" if self.num_shards > 1 else ""
        return f"{self.block_size}:{self.dtype}:{shapes}{slice_}"


class BlockStorage(Protocol):
    """The bytes of all blocks of one worker. Whoever writes a region must own the block (see kv.block_pool)."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def num_blocks(self) -> int: ...

    def region(self, block_id: BlockId, layer_start: int, layer_end: int) -> memoryview:
        """Writable bytes of layers [layer_start, layer_end) of one block; no copy."""
        ...


class HostCopy(BlockStorage, Protocol):
    """Of a few blocks of a device."""

    def store(self) -> None:
        """What was written to it goes into the pool."""
        ...


class DeviceStorage(ABC):
    """Blocks of one worker that the host cannot address; see kv.staging."""

    @property
    @abstractmethod
    def layout(self) -> KVLayout: ...

    @abstractmethod
    def load(self, block_ids: Sequence[BlockId], layer_start: int, layer_end: int) -> HostCopy:
        """These blocks as they are now."""

    @abstractmethod
    def blank(self, block_ids: Sequence[BlockId], layer_start: int, layer_end: int) -> HostCopy:
        """Memory for these blocks, with anything in it: to be stored when all of it has been written."""


Storage: TypeAlias = BlockStorage | DeviceStorage  # what a hand-over reads from and writes to
