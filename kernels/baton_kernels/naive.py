"""Every op in plain torch: the definition, and the reference of the kernels' tests.

Same names, arguments and effects as the kernels. Arithmetic is in the inputs' precision, at least fp32, so that the
tests can ask for float64.

A cache is one layer's K or V, [num_blocks, block_size, num_kv_heads, dim]; the last two dimensions are
contiguous, the strides of the first two are free (the blocks of one layer do not lie next to each other).
Position p of a sequence lies in block block_table[p // block_size] at offset p % block_size.

    T tokens of the step, B sequences, C positions of context, H heads, Hkv KV heads, Dk and Dv dims

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


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    window: int | None = None,
    chunked: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The chunks of B sequences: query [T, H, Dk] -> [T, H, Dv]; with chunks of one token it is decoding.

    Sequence b owns the tokens [query_starts[b], query_starts[b + 1]), the last ones of its context_lens[b] positions.
    A token sees the positions up to its own; of these the last `window` ones, or, `chunked`, those since the last
    multiple of `window`. `softcap` replaces a score s by softcap * tanh(s / softcap). `sinks` [H] are scores of a
    position that has no value: they take weight away.
    """
    block_size, num_heads = k_cache.shape[1], query.shape[1]
    out = query.new_empty(*query.shape[:2], v_cache.shape[3])
    bounds = query_starts.tolist()
    for row, (start, end, length) in enumerate(zip(bounds, bounds[1:], context_lens.tolist(), strict=False)):
        index = torch.arange(length, device=query.device)
        where = Positions(block_tables[row, index // block_size].long(), index % block_size)
        key = read_kv(k_cache, where).repeat_interleave(num_heads // k_cache.shape[2], 1)  # [C, H, Dk]
        value = read_kv(v_cache, where).repeat_interleave(num_heads // v_cache.shape[2], 1)
        scores = torch.einsum("thd,chd->htc", query[start:end], key) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        own = index[length - (end - start) :, None]  # [t, 1]
        hidden = index > own  # [t, C]
        if window is not None:
            hidden |= index < (own // window * window if chunked else own - window + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, end - start, 1)), -1)
        weights = scores.softmax(-1)[..., :length]
        out[start:end] = torch.einsum("htc,chd->thd", weights, value)
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D]; cos, sin [T, R/2]: turns the pairs (x[i], x[i + R/2]), i < R/2; what lies beyond R stays."""
    half = cos.shape[1]
    wide = _widen(x)
    x1, x2, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), -1).to(x.dtype)


def rope_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """query [T, H, Dk] is turned in place; key, turned, and value go to slots [T] = block * block_size + offset, all
    different; a negative slot is not written."""
    if cos is not None and sin is not None:
        query.copy_(rope(query, cos, sin))
        key = rope(key, cos, sin)
    kept, block_size = slots >= 0, k_cache.shape[1]
    where = Positions(slots[kept] // block_size, slots[kept] % block_size)
    write_kv(key[kept], value[kept], k_cache, v_cache, where)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, offset: float = 0.0
) -> Tensor:
    """x, residual [T, D]: residual becomes x + residual (x where there is none); its RMSNorm is returned."""
    if residual is not None:
        x = residual.add_(x)
    wide = _widen(x)
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * (offset + weight.to(wide.dtype))).to(x.dtype)


def silu_mul(x: Tensor) -> Tensor:
    """x [T, 2F] = gate | up  ->  silu(gate) * up [T, F]."""
    gate, up = _widen(x).chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


def copy_blocks(pool: Tensor, src: Tensor, dst: Tensor) -> None:
    """pool [num_blocks, block_bytes]: pool[dst[i]] = pool[src[i]]; the destinations are all different and no sources;
    pairs with a negative source are skipped."""
    kept = src >= 0
    pool[dst[kept]] = pool[src[kept]]


@dataclass(frozen=True)
class Planes:
    """A part of every block: planes (K or V of a layer) of one shape, one after another."""

    start_byte: int  # in the block
    num_planes: int
    num_heads: int
    row_bytes: int  # one token, one head
    first_plane: int = 0  # its number in the model: 2 * layer, and 1 more for V
    first_head: int = 0

    def num_bytes(self, block_size: int) -> int:
        return self.num_planes * block_size * self.num_heads * self.row_bytes


def pack_blocks(
    pool: Tensor, block_ids: Tensor, first_tokens: Tensor, block_size: int, planes: Planes
) -> tuple[Tensor, Tensor]:
    """The planes of the blocks, [n, planes.num_bytes], and the digests of their tokens, [n, block_size] int64."""
    end_byte = planes.start_byte + planes.num_bytes(block_size)
    wire = pool[block_ids, planes.start_byte : end_byte]
    return wire, token_digests(wire, first_tokens, block_size, planes)


def unpack_blocks(
    pool: Tensor, block_ids: Tensor, first_tokens: Tensor, block_size: int, planes: Planes, wire: Tensor
) -> Tensor:
    """The way back; the digests of the tokens in `wire`."""
    pool[block_ids, planes.start_byte : planes.start_byte + wire.shape[1]] = wire
    return token_digests(wire, first_tokens, block_size, planes)


def token_digests(wire: Tensor, first_tokens: Tensor, block_size: int, planes: Planes) -> Tensor:
    """wire [n, num_bytes] uint8, first_tokens [n] -> [n, block_size] int64. The formula is in `wire_blocks`."""
    shape = len(wire), planes.num_planes, block_size, planes.num_heads, planes.row_bytes // 4
    words = wire.contiguous().view(torch.int32).long().view(shape) & 0xFFFF_FFFF
    place = [torch.arange(size, device=wire.device) for size in shape[1:4]]
    keys = (
        ((planes.first_plane + place[0]) * _signed(0xD1B54A32D192ED03))[:, None, None]
        + ((first_tokens[:, None] + place[1]) * _signed(0x9E3779B97F4A7C15))[:, None, :, None]
        + (planes.first_head + place[2]) * _signed(0x8CB92BA72F3D8DD7)
    )
    rows = (words * word_keys(shape[4]).to(wire.device)).sum(-1) + keys
    return _mix64(rows).sum((1, 3))


def word_keys(num_words: int) -> Tensor:
    """a_j of the digest's formula: splitmix64, made odd."""
    return _mix64(torch.arange(1, num_words + 1) * _signed(0x9E3779B97F4A7C15)) | 1


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    log_min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """logits [R, V]; the parameters [R], temperature 0: greedy. Tokens [R], -1 where the largest logit is not finite,
    and thresholds [R]: of logits / temperature the tokens at or above are kept. The formula is in `sample_tokens`."""
    greedy = temperature == 0
    scaled = _widen(logits) / torch.where(greedy, 1, temperature)[:, None]
    ordered = scaled.sort(-1, descending=True).values
    best, rank = ordered[:, :1], torch.arange(scaled.shape[1], device=scaled.device)
    weight = (ordered - best).exp().masked_fill(rank >= top_k[:, None], 0)
    before = weight.cumsum(-1) - weight
    enough = (before >= top_p[:, None] * weight.sum(-1, keepdim=True)) & (top_p < 1)[:, None]
    kept = (rank < top_k[:, None]) & ~enough
    limited = (top_k < scaled.shape[1]) | (top_p < 1)
    last = ordered.gather(1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)[:, 0]
    threshold = torch.maximum(best[:, 0] + log_min_p, last.masked_fill(~limited, -torch.inf))
    threshold = torch.where(greedy, best[:, 0], threshold)
    noise = gumbel(seeds, positions, torch.arange(scaled.shape[1], device=scaled.device))
    noise = noise.masked_fill(greedy[:, None], 0)
    tokens = (scaled + noise).masked_fill(scaled < threshold[:, None], -torch.inf).argmax(-1)
    return tokens.masked_fill(~best[:, 0].isfinite() | scaled.isnan().any(-1), -1), threshold


def gumbel(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Noise of the tokens `ids` [V] for seeds, positions [R] int64: [R, V] fp32, a pure function of the three."""
    key = _splitmix64(_splitmix64(seeds) ^ positions)[:, None]
    low = 0xFFFF_FFFF
    h = _mix32(ids * 0x9E3779B1 & low ^ key & low)
    h = _mix32(h ^ _shift(key, 32))
    uniform = ((h & 0x7FFF_FFFF).float() + 0.5) * 2.0**-31
    return -(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24).double())).log().float()


def _mix32(h: Tensor) -> Tensor:
    """MurmurHash3's finaliser, of 32 bits in int64."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFF_FFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFF_FFFF
    return h ^ (h >> 16)


def _splitmix64(word: Tensor) -> Tensor:
    return _mix64(word + _signed(0x9E3779B97F4A7C15))


def _mix64(word: Tensor) -> Tensor:
    """splitmix64's finaliser, on int64."""
    word = (word ^ _shift(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ _shift(word, 27)) * _signed(0x94D049BB133111EB)
    return word ^ _shift(word, 31)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shift(word: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's is arithmetic."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
