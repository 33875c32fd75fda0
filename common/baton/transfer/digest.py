"""The digest of a piece: what its KV is, whoever holds it in whatever layout, bound to what it is said to be.

1  row digest    A row is one token's K or V of one layer and one KV head. With its bytes as little-endian words w_j of
                 32 bits (16 or 8 where its length asks for it), t its token, p = 2 * layer (+ 1 for V) and h its head,
                 all counted over the whole prompt and model, and everything modulo 2^64:
                     row = mix(sum_j a_j * w_j  +  t * A + p * B + h * C)
2  token digest  The sum of its rows' digests. It is the same for any block size, and the sum over layer groups and
                 ranks of their own token digests: nothing depends on the order or on how the KV is cut.
3  block digest  Of UNIT tokens, whatever the pools' own blocks are: the sum of its token digests next to the prefix
                 hash, which is the sum of mix(t * A + token) over all tokens of the prompt up to its end.
4  piece digest  XXH3-128 over the model's identity, the header (wire version, epoch, layers, heads, dtype and all else
                 it says) and the block digests. This one travels, and says as much as all
                 of them side by side would: a change in one block digest changes it, and it is the piece that is
                 sent again or refused, never a block.

mix is a bijection, and so is the product of a word with an odd number: a change within one word of a row always
changes the token digest. Others go unnoticed with a chance of about 2^-33 if they stay in one row, 2^-64 else. It
finds corruption, truncation and mix-ups, not an adversary with access to the wire.

Why sums and not one hash over the bytes: XXH3 alone runs at some 50 GB/s on a CPU, ten times as fast, but it sees bytes
in one order only, so that it would depend on the layout or need a copy, and it cannot be spread over a GPU's programs.
Sums take one multiplication per word, cost little beside computing the KV (benchmarks/bench_digest.py), and programs
add theirs in any order.
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from baton.errors import TransferRefused
from baton.kv.layout import KVLayout
from baton.transfer.wire import ELEMENT_BYTES, PieceHeader

UNIT = 16  # tokens of a block digest

_MISMATCH = "does not match its digest"
_CHUNK_BYTES = 256 * 1024  # worked on at a time: stays in a core's cache
_TOKEN, _PLANE, _HEAD = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7  # A, B, C
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's

Words = NDArray[Any]


def mismatch(header: PieceHeader) -> TransferRefused:
    """The receiver's answer to a piece whose bytes changed on the way."""
    return TransferRefused(f"piece {header.sequence} {_MISMATCH}")


def is_mismatch(refusal: TransferRefused) -> bool:
    """True for such an answer, which crosses the wire as its message: the same piece may be sent again."""
    return refusal.message.endswith(_MISMATCH)


class Digester:
    """Makes the digests of one hand-over. Both ends have one, made of what each knows by itself."""

    def __init__(self, identity: str, prompt_token_ids: Sequence[int]) -> None:
        self._identity = identity.encode()
        self._prompt_token_ids = prompt_token_ids

    def digest(self, header: PieceHeader, layout: KVLayout, payload: Iterable[memoryview]) -> bytes:
        """16 bytes; `header.digest` itself does not count. `layout` says what the layers look like, not the blocks."""
        state = xxhash.xxh3_128(self._identity)
        state.update(replace(header, digest=b"").encode())
        if header.num_tokens:
            state.update(self._blocks(header, token_digests(header, layout, payload)))
        return state.digest()

    @cached_property
    def _prefixes(self) -> Words:
        """[i]: of the first i + 1 tokens. Made with the first piece, when the prompt is being computed already."""
        tokens = np.frombuffer(array("I", self._prompt_token_ids), np.uint32).astype(np.uint64)
        tokens += np.arange(len(tokens), dtype=np.uint64) * np.uint64(_TOKEN)
        return np.cumsum(_mix(tokens), dtype=np.uint64)

    def _blocks(self, header: PieceHeader, sums: Words) -> bytes:
        """The digests of every block of UNIT tokens that the piece has a part of."""
        first = (header.token_start // UNIT + 1) * UNIT
        starts = np.array([header.token_start, *range(first, header.token_end, UNIT)])
        ends = np.append(starts[1:], header.token_end)
        blocks = np.empty((2, len(starts)), np.uint64)
        blocks[0] = np.add.reduceat(sums, starts - header.token_start)
        blocks[1] = self._prefixes[ends - 1]
        return blocks.tobytes()


def token_digests(header: PieceHeader, layout: KVLayout, payload: Iterable[memoryview]) -> Words:
    """One uint64 for each token of the piece."""
    token_bytes = layout.token_bytes(*header.box[2:], ELEMENT_BYTES[header.dtype])
    sums = np.zeros(header.num_tokens, np.uint64)
    planes = _planes(layout, header.box[2:], ELEMENT_BYTES[header.dtype])
    for first, num_tokens, chunk in _chunks(header, payload, token_bytes):
        at = first - header.token_start
        target = sums[at : at + num_tokens * len(chunk)].reshape(len(chunk), num_tokens)
        for plane in planes:
            target += _plane_sums(plane, chunk, num_tokens, first)
    return sums


# --- rows ---


class _Planes(NamedTuple):
    """Neighbouring planes (K or V of a layer) of equal shape; their bytes lie `offset` per token into a run."""

    offset: int
    num_planes: int
    num_heads: int
    row_bytes: int
    first_plane: int
    first_head: int


@lru_cache(maxsize=256)
def _planes(
    layout: KVLayout, layers_and_heads: tuple[int, int, int, int], element_bytes: int
) -> tuple[_Planes, ...]:
    layer_start, layer_end, head_start, head_end = layers_and_heads
    found: list[_Planes] = []
    offset = 0
    for index in range(layer_start, layer_end):
        layer = layout.layers[index]
        num_heads = layout.num_heads(index, head_start, head_end)
        for k_or_v, dim in enumerate((layer.k_dim, layer.v_dim)):
            number, last = 2 * index + k_or_v, found[-1] if found else None
            if not num_heads * dim:
                continue
            shape = (num_heads, dim * element_bytes)
            if last and last[2:4] == shape and last.first_plane + last.num_planes == number:
                found[-1] = last._replace(num_planes=last.num_planes + 1)
            else:
                found.append(_Planes(offset, 1, *shape, number, head_start))
            offset += num_heads * dim * element_bytes
    return tuple(found)


def _chunks(
    header: PieceHeader, payload: Iterable[memoryview], token_bytes: int
) -> Iterator[tuple[int, int, Words]]:
    """Runs of equal length that follow one another: (first token, tokens per run, [runs, bytes])."""
    cut = _Cut(payload)
    for num_tokens, same in groupby(header.runs(), key=lambda run: run[1] - run[0]):
        runs = list(same)
        per_chunk = max(1, _CHUNK_BYTES // max(1, num_tokens * token_bytes))
        for at in range(0, len(runs), per_chunk):
            part = runs[at : at + per_chunk]
            chunk = cut.take(len(part) * num_tokens * token_bytes)
            yield part[0][0], num_tokens, chunk.reshape(len(part), -1)


class _Cut:
    """The payload, in parts that are copied only where they span several buffers."""

    def __init__(self, payload: Iterable[memoryview]) -> None:
        self._buffers = iter(payload)
        self._left = memoryview(b"")  # of the buffer that was begun

    def take(self, num_bytes: int) -> Words:
        parts: list[memoryview] = []
        while num_bytes:
            buffer = self._left or next(self._buffers).cast("B")
            part, self._left = buffer[:num_bytes], buffer[num_bytes:]
            parts.append(part)
            num_bytes -= len(part)
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), np.uint8)


def _plane_sums(planes: _Planes, runs: Words, num_tokens: int, first_token: int) -> Words:
    """The rows of these planes added up for each token of each run: [runs, tokens]."""
    num_rows = planes.num_planes * num_tokens * planes.num_heads
    at = planes.offset * num_tokens
    words = runs[:, at : at + num_rows * planes.row_bytes].view(_word_type(planes.row_bytes))
    shape = (len(runs), planes.num_planes, num_tokens, planes.num_heads)
    rows = words.astype(np.uint64).reshape(math.prod(shape), -1)
    digests = np.einsum("rw,w->r", rows, _word_keys(rows.shape[1])).reshape(shape)
    digests += _row_keys(planes, num_tokens)
    if len(runs) > 1 or first_token:
        starts = first_token + num_tokens * np.arange(len(runs), dtype=np.uint64)
        digests += (starts * np.uint64(_TOKEN)).reshape(-1, 1, 1, 1)
    _mix(digests)
    sums: Words = np.add.reduce(digests, axis=1) @ np.ones(planes.num_heads, np.uint64)
    return sums


def _word_type(row_bytes: int) -> type[np.unsignedinteger[Any]]:
    return np.uint32 if row_bytes % 4 == 0 else np.uint16 if row_bytes % 2 == 0 else np.uint8


@lru_cache(maxsize=64)
def _word_keys(num_words: int) -> Words:
    """a_j: splitmix64 from a fixed start, made odd."""
    keys = np.uint64(1) + np.arange(num_words, dtype=np.uint64)
    keys *= np.uint64(_TOKEN)
    return _mix(keys) | np.uint64(1)


@lru_cache(maxsize=256)
def _row_keys(planes: _Planes, num_tokens: int) -> Words:
    """t * A + p * B + h * C, with t counted from the run's beginning: [1, planes, tokens, heads]."""
    plane = np.arange(planes.first_plane, planes.first_plane + planes.num_planes, dtype=np.uint64)
    token = np.arange(num_tokens, dtype=np.uint64)
    head = np.arange(planes.first_head, planes.first_head + planes.num_heads, dtype=np.uint64)
    keys: Words = (
        (plane * np.uint64(_PLANE))[None, :, None, None]
        + (token * np.uint64(_TOKEN))[None, None, :, None]
        + (head * np.uint64(_HEAD))[None, None, None, :]
    )
    return keys


def _mix(x: Words) -> Words:
    """In place: splitmix64's finaliser."""
    x ^= x >> np.uint64(30)
    x *= _MIX_1
    x ^= x >> np.uint64(27)
    x *= _MIX_2
    x ^= x >> np.uint64(31)
    return x
