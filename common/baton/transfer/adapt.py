"""Between a pool and the payload of a piece: in place where the bytes lie alike, by conversion where they do not.

    fits       the payload is runs of the pool's own blocks, heads and dtype: its buffers are `views`, no copy
    otherwise  the sender copies the heads that the receiver wants (`payload`), and the receiver writes what came with
               other blocks, heads or dtype into its pool (`scatter`)

Block tables cover the prompt from its first token on, so token t lies in block t // block_size. Nothing is written but
the tokens, layers and heads of the piece. bfloat16 is the upper half of a float32: widening is exact, narrowing rounds
to the nearest, ties to even, as everywhere else.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.kv.layout import BlockStorage, DeviceStorage, HostCopy, KVLayout, Storage
from baton.request import BlockId
from baton.transfer.wire import ELEMENT_BYTES, PieceHeader

Array = NDArray[Any]

_NUMPY = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16, "uint8": np.uint8}


def payload_bytes(layout: KVLayout, header: PieceHeader) -> int:
    box, element_bytes = header.box, ELEMENT_BYTES[header.dtype]
    return header.num_tokens * layout.token_bytes(*box[2:], element_bytes)


def fits(layout: KVLayout, header: PieceHeader) -> bool:
    return (
        header.run_tokens == layout.block_size
        and header.dtype == layout.dtype
        and (header.head_start, header.head_end) == layout.heads
    )


def can_convert(source: str, target: str) -> bool:
    return source == target or "uint8" not in (source, target)


class Landing(NamedTuple):
    """Where the receiver of a piece has it written."""

    buffers: list[memoryview]
    land: Callable[[], None]  # once its digest matched: what came is in the pool afterwards


def landing(storage: Storage, block_ids: Sequence[BlockId], header: PieceHeader) -> Landing:
    """In the pool itself, in a copy of whole blocks, or in memory from which it is scattered."""
    if fits(storage.layout, header) and not isinstance(storage, DeviceStorage):
        return Landing(views(storage, block_ids, header), _nothing)
    if isinstance(storage, DeviceStorage) and _is_whole_blocks(storage.layout, header):
        copy = storage.blank(*_touched(storage, block_ids, header))
        return Landing(views(copy, block_ids, header), copy.store)
    memory = memoryview(bytearray(header.num_bytes))
    if not memory:
        return Landing([], _nothing)
    return Landing([memory], partial(scatter, memory, storage, block_ids, header))


def payload(storage: Storage, block_ids: Sequence[BlockId], header: PieceHeader) -> list[memoryview]:
    """What the sender of this header sends; the header has the pool's dtype and any heads of it."""
    assert header.dtype == storage.layout.dtype
    if isinstance(storage, DeviceStorage):
        storage = _load(storage, block_ids, header)
    return (
        views(storage, block_ids, header)
        if fits(storage.layout, header)
        else _gather(storage, block_ids, header)
    )


def views(storage: BlockStorage, block_ids: Sequence[BlockId], header: PieceHeader) -> list[memoryview]:
    """The payload where it lies in the pool; of a header that `fits`."""
    layout = storage.layout
    found: list[memoryview] = []
    for start, end in header.runs():
        block, offset = divmod(start, layout.block_size)
        if end - start == layout.block_size:
            found.append(storage.region(block_ids[block], header.layer_start, header.layer_end))
            continue
        for layer in range(header.layer_start, header.layer_end):
            region = storage.region(block_ids[block], layer, layer + 1)
            for plane in _planes(layout, layer):
                row = plane.num_heads * plane.dim * layout.element_bytes
                at = plane.offset + offset * row
                if row:
                    found.append(region[at : at + (end - start) * row])
    return found


def scatter(payload: memoryview, storage: Storage, block_ids: Sequence[BlockId], header: PieceHeader) -> None:
    """Write a payload into the pool, converted to its dtype."""
    if isinstance(storage, DeviceStorage):
        copy = _load(storage, block_ids, header)
        scatter(payload, copy, block_ids, header)
        copy.store()
        return
    layout = storage.layout
    convert = _conversion(header.dtype, layout.dtype)
    source = np.frombuffer(payload, _NUMPY[header.dtype])
    at = 0
    for start, end in header.runs():
        for layer in range(header.layer_start, header.layer_end):
            heads = _local_heads(layout, layer, header)
            num_heads = heads.stop - heads.start
            for k_or_v, dim in enumerate((layout.layers[layer].k_dim, layout.layers[layer].v_dim)):
                size = (end - start) * num_heads * dim
                values = convert(source[at : at + size]).reshape(end - start, num_heads, dim)
                at += size
                for offset, target in _spans(storage, block_ids, layer, k_or_v, start, end):
                    target[:, heads] = values[offset : offset + len(target)]


def _nothing() -> None:
    pass


def _is_whole_blocks(layout: KVLayout, header: PieceHeader) -> bool:
    ends = header.token_start, header.token_end
    return header.num_bytes > 0 and fits(layout, header) and not any(end % layout.block_size for end in ends)


def _load(storage: DeviceStorage, block_ids: Sequence[BlockId], header: PieceHeader) -> HostCopy:
    return storage.load(*_touched(storage, block_ids, header))


def _touched(
    storage: Storage, block_ids: Sequence[BlockId], header: PieceHeader
) -> tuple[Sequence[BlockId], int, int]:
    """The blocks and layers of this piece."""
    size = storage.layout.block_size
    blocks = block_ids[header.token_start // size : -(-header.token_end // size)]
    return blocks, header.layer_start, header.layer_end


def _gather(storage: BlockStorage, block_ids: Sequence[BlockId], header: PieceHeader) -> list[memoryview]:
    layout = storage.layout
    parts: list[memoryview] = []
    for start, end in header.runs():
        for layer in range(header.layer_start, header.layer_end):
            for k_or_v in (0, 1):
                spans = _spans(storage, block_ids, layer, k_or_v, start, end)
                heads = _local_heads(layout, layer, header)
                whole = np.concatenate([array[:, heads] for _, array in spans])
                parts.append(whole.reshape(-1).view(np.uint8).data)
    return [part for part in parts if len(part)]


class _Plane(NamedTuple):
    """K or V of one layer of one block."""

    offset: int  # bytes from the layer's beginning
    num_heads: int
    dim: int


def _planes(layout: KVLayout, index: int) -> tuple[_Plane, _Plane]:
    layer = layout.layers[index]
    k_bytes = layout.block_size * layer.num_kv_heads * layer.k_dim * layout.element_bytes
    return _Plane(0, layer.num_kv_heads, layer.k_dim), _Plane(k_bytes, layer.num_kv_heads, layer.v_dim)


def _spans(
    storage: BlockStorage, block_ids: Sequence[BlockId], layer: int, k_or_v: int, start: int, end: int
) -> Iterator[tuple[int, Array]]:
    """Tokens [start, end) of one plane, block by block: (tokens before it, [tokens, heads, dim] in the pool)."""
    layout = storage.layout
    plane, size = _planes(layout, layer)[k_or_v], layout.block_size
    shape = (size, plane.num_heads, plane.dim)
    for block in range(start // size, -(-end // size)):
        region = storage.region(block_ids[block], layer, layer + 1)
        count = size * plane.num_heads * plane.dim
        whole = np.frombuffer(region, _NUMPY[layout.dtype], count, plane.offset).reshape(shape)
        first, last = max(start, block * size), min(end, (block + 1) * size)
        yield first - start, whole[first - block * size : last - block * size]


def _local_heads(layout: KVLayout, layer: int, header: PieceHeader) -> slice:
    first = header.head_start - layout.heads[0]
    return slice(first, first + layout.num_heads(layer, header.head_start, header.head_end))


# --- dtypes ---


def _conversion(source: str, target: str) -> Callable[[Array], Array]:
    assert can_convert(source, target)
    if source == target:
        return lambda values: values
    widen = _widened if source == "bfloat16" else _as_float32
    narrow = {"bfloat16": _to_bfloat16, "float16": _to_float16, "float32": _as_float32}[target]
    return lambda values: narrow(widen(values))


def _as_float32(values: Array) -> Array:
    return values.astype(np.float32, copy=False)


def _widened(values: Array) -> Array:
    return (values.astype(np.uint32) << 16).view(np.float32)


def _to_float16(values: Array) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def _to_bfloat16(values: Array) -> Array:
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    # A NaN keeps its upper half, made quiet: rounding could carry it over into infinity or zero.
    return np.where(np.isnan(values), (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)
