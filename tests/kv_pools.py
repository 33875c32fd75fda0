"""Pools of plain bytes for tests of the hand-over, and what goes from one into the other without a transport."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from baton.kv.layout import KVLayout, LayerLayout
from baton.request import BlockId, Request, RequestId
from baton.transfer import adapt
from baton.transfer.digest import Digester
from baton.transfer.wire import ELEMENT_BYTES, PieceHeader

IDENTITY = "model"


class Pool:
    """Implements BlockStorage."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.data = memoryview(bytearray(b"\xa5" * (layout.block_bytes * num_blocks)))

    def region(self, block_id: BlockId, layer_start: int, layer_end: int) -> memoryview:
        base, offsets = block_id * self.layout.block_bytes, self.layout.layer_offsets
        return self.data[base + offsets[layer_start] : base + offsets[layer_end]]


def layout_of(
    block_size: int,
    dtype: str = "float32",
    *,
    heads: int = 4,
    shard: int = 0,
    num_shards: int = 1,
    num_layers: int = 3,
    dims: tuple[int, int] = (8, 8),
) -> KVLayout:
    """One rank's layout of a model with so many KV heads."""
    layer = LayerLayout(heads // num_shards, *dims)
    return KVLayout(block_size, (layer,) * num_layers, dtype, ELEMENT_BYTES[dtype], shard, num_shards)


def table(layout: KVLayout, num_tokens: int, seed: int = 0) -> list[BlockId]:
    """Shuffled, with holes."""
    num_blocks = -(-num_tokens // layout.block_size)
    order = np.random.default_rng(seed).permutation(num_blocks + 3)[:num_blocks]
    return [BlockId(int(block)) for block in order]


def pool_for(layout: KVLayout, num_tokens: int) -> Pool:
    return Pool(layout, -(-num_tokens // layout.block_size) + 3)


def request_of(num_tokens: int, name: str = "r", seed: int = 0) -> Request:
    prompt = np.random.default_rng(seed).integers(0, 50_000, num_tokens)
    return Request(RequestId(name), tuple(prompt.tolist()))


def whole(layout: KVLayout, num_tokens: int, start: int = 0, **other: object) -> PieceHeader:
    """Everything from `start` on in one piece, as the owner of a pool of this layout sends it."""
    header = PieceHeader(
        RequestId("r"), 1, 0, 0, layout.num_layers, start, num_tokens, 0, head_start=layout.heads[0],
        head_end=layout.heads[1], run_tokens=layout.block_size, dtype=layout.dtype,
    )  # fmt: skip
    header = replace(header, **other)  # type: ignore[arg-type]
    return replace(header, num_bytes=adapt.payload_bytes(layout, header))


def fill(pool: Pool, block_ids: Sequence[BlockId], num_tokens: int, seed: int = 0) -> None:
    """The same values for the same (token, layer, head), whatever the layout; floats that are exact in any dtype."""
    layout = pool.layout
    header = replace(whole(layout, num_tokens), dtype="float32")
    adapt.scatter(memoryview(canonical(header, layout, seed)), pool, block_ids, header)


def canonical(header: PieceHeader, layout: KVLayout, seed: int) -> bytes:
    parts = []
    for layer, k_or_v, start, end in _planes(header):
        shape = layout.layers[layer]
        dim = (shape.k_dim, shape.v_dim)[k_or_v]
        total = shape.num_kv_heads * layout.num_shards
        values = plane_values(seed, layer, k_or_v, total, dim)
        parts.append(values[start:end, header.head_start : header.head_end].tobytes())
    return b"".join(parts)


@lru_cache(maxsize=64)
def plane_values(seed: int, layer: int, k_or_v: int, heads: int, dim: int) -> NDArray[np.float32]:
    """[tokens, heads, dim]"""
    rng = np.random.default_rng([seed, layer, k_or_v])
    values: NDArray[np.float32] = (rng.integers(-128, 128, (512, heads, dim)) / 64).astype(np.float32)
    return values


def _planes(header: PieceHeader) -> Iterator[tuple[int, int, int, int]]:
    for start, end in header.runs():
        for layer in range(header.layer_start, header.layer_end):
            for k_or_v in (0, 1):
                yield layer, k_or_v, start, end


def digested(header: PieceHeader, pool: Pool, block_ids: Sequence[BlockId], request: Request) -> PieceHeader:
    digester = Digester(IDENTITY, request.prompt_token_ids)
    payload = adapt.payload(pool, block_ids, header)
    return replace(header, digest=digester.digest(header, pool.layout, payload))
