"""A decoder layer by the native ops in two calls: up to its KV in the cache, and the rest.

    x += out(attention(rotate(qkv(norm(x)))));  x += down(silu(gate) * up, of norm(x))

Each operation of it does and rounds what the one of the same name in `native.py` does, so the result is the same to the
last bit; what is saved is the way through Python between them, a fifth of a small model's step.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from baton_kernels.naive import Window
from baton_kernels.native import CacheArgument, Native, PackedWeight, Steps, cache_argument

_pointer, _index = ctypes.c_void_p, ctypes.c_int64


class Norm(NamedTuple):
    """See Native.rms_norm."""

    weight: Tensor
    eps: float
    shifted: bool


class Linear(NamedTuple):
    weight: PackedWeight
    bias: Tensor | None


class LayerParts(NamedTuple):
    before: Norm  # of the attention's input
    qkv: Linear  # heads of the queries, of the keys, of the values
    query: Norm | None  # of each head, before it is turned
    key: Norm | None
    out: Linear
    after: Norm  # of the MLP's input
    gate_up: PackedWeight  # see Native.gated_linear
    down: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    sinks: Tensor | None  # [num_heads]


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _pointer), ("eps", ctypes.c_float), ("shifted", ctypes.c_int32))


class _Weight(ctypes.Structure):
    _fields_ = (
        ("packed", _pointer),
        ("bias", _pointer),
        ("words", _index),
        ("columns", _index),
        ("scales", _pointer),
        ("offsets", _pointer),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("before", "query", "key", "after")),
        *((name, _Weight) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _index) for name in ("hidden", "heads", "kv_heads", "head_dim")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sinks", _pointer),
    )


class _Paged(ctypes.Structure):
    _fields_ = (
        ("key", CacheArgument),
        ("value", CacheArgument),
        *((name, _index) for name in ("block_shift", "window", "chunked", "writes")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("x", "out", "cos", "sin")),
        *((name, _index) for name in ("half", "tokens")),
        *((name, _pointer) for name in ("blocks", "offsets", "tables")),
        ("table_stride", _index),
        *((name, _pointer) for name in ("starts", "lens")),
        ("seqs", _index),
        *((name, _pointer) for name in ("normed", "qkv", "attended", "gated")),
    )


class PagedArgument:
    """A layer's cache, see naive.paged_attention. The block size is a power of two."""

    def __init__(self, k_cache: Tensor, v_cache: Tensor, window: Window | None, *, writes: bool) -> None:
        """`writes`: False where it reads the KV of another layer."""
        self.call = _Paged(
            cache_argument(k_cache),
            cache_argument(v_cache),
            k_cache.shape[1].bit_length() - 1,
            window.size if window else 0,
            bool(window and window.chunked),
            writes,
        )


class StepArgument:
    """What the layers of one step share, and the memory between their operations."""

    def __init__(self, blocks: Tensor, offsets: Tensor, steps: Steps) -> None:
        """blocks and offsets [T] int64, see naive.write_kv."""
        self._held = blocks, offsets, steps
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self.call = _Step(
            blocks=blocks.data_ptr(),
            offsets=offsets.data_ptr(),
            tables=steps.tables.data_ptr(),
            table_stride=steps.tables.stride(0),
            starts=steps.starts.data_ptr(),
            lens=steps.lens.data_ptr(),
            seqs=len(steps.lens),
        )

    def lend(self, widths: tuple[int, ...], x: Tensor) -> None:
        """Memory of [T, width] each, of x's dtype; what the layer before left in it is gone."""
        row = x.element_size() * x.shape[-2]
        needed = row * sum(widths)
        if needed > len(self._scratch):
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        at = self._scratch.data_ptr()
        for name, width in zip(("normed", "qkv", "attended", "gated"), widths, strict=True):
            setattr(self.call, name, at)
            at += row * width


class NativeLayer:
    def __init__(self, native: Native, parts: LayerParts) -> None:
        self.parts = parts
        self._native = native
        self._sinks = None if parts.sinks is None else parts.sinks.float().contiguous()
        hidden = len(parts.before.weight)
        num_columns = (parts.num_heads + 2 * parts.num_kv_heads) * parts.head_dim
        self._widths = hidden, num_columns, parts.num_heads * parts.head_dim, parts.gate_up.out_features // 2
        self._call = _Layer(
            *map(_norm, (parts.before, parts.query, parts.key, parts.after)),
            *map(_weight, (parts.qkv, parts.out, Linear(parts.gate_up, None), parts.down)),
            hidden,
            parts.num_heads,
            parts.num_kv_heads,
            parts.head_dim,
            parts.scale,
            parts.softcap or 0.0,
            None if self._sinks is None else self._sinks.data_ptr(),
        )

    def write(self, x: Tensor, cos: Tensor, sin: Tensor, paged: PagedArgument, step: StepArgument) -> Tensor:
        """x [..., T, hidden]; cos and sin [..., T, R], see Native.rotate; all contiguous. The KV is in the cache
        afterwards. Returns memory for `finish`, which comes next."""
        out = torch.empty_like(x)
        call = step.call
        step.lend(self._widths, x)
        call.x, call.out, call.tokens = x.data_ptr(), out.data_ptr(), x.shape[-2]
        call.cos, call.sin, call.half = cos.data_ptr(), sin.data_ptr(), cos.shape[-1] // 2
        self._native.layer_write(x.dtype, self._call, paged.call, call)
        return out

    def finish(self, out: Tensor, paged: PagedArgument, step: StepArgument) -> Tensor:
        """[..., T, hidden]."""
        self._native.layer_finish(out.dtype, self._call, paged.call, step.call)
        return out


def _norm(norm: Norm | None) -> _Norm:
    return _Norm() if norm is None else _Norm(norm.weight.data_ptr(), norm.eps, norm.shifted)


def _weight(linear: Linear) -> _Weight:
    data, num_columns, _, scales, offsets = linear.weight
    return _Weight(
        data.data_ptr(),
        None if linear.bias is None else linear.bias.data_ptr(),
        data.shape[1],
        num_columns,
        None if scales is None else scales.data_ptr(),
        None if offsets is None else offsets.data_ptr(),
    )
