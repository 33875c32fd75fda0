"""The CPU's ops in C++ for x86-64 with AVX-512: linear layers over packed weights, and attention over the paged
cache. See `native.cpp`.

Without the library (see `native_build`), or on another CPU, `load` says why; whoever asks has plain torch to fall
back on.

A row of a result does not depend on the other rows, on their number or on the number of threads, to the last bit.
"""

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from baton_kernels.naive import Window
from baton_kernels.native_build import Unavailable, find_library

_BITS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}

_PANEL = 64  # columns that are packed together

_pointer, _int, _index = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class PackedWeight(NamedTuple):
    """Of a linear layer, [out_features, in_features]."""

    data: Tensor  # int32 [panels, words, 64]: column n of the result is at [n // 64, :, n % 64]
    out_features: int
    dtype: torch.dtype
    # Of int8 weights, [64 panels], by column: what they are to be multiplied by, and 128 times their sum.
    scales: Tensor | None = None  # float32
    offsets: Tensor | None = None  # int32

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight: ids [...] -> [..., in_features]; of int8 weights in float32."""
        rows = self.data[ids // _PANEL, :, ids % _PANEL].view(self.dtype)
        return rows if self.scales is None else rows * self.scales[ids][..., None]


class Steps(NamedTuple):
    """The ragged batch of an attention step: sequence b owns the tokens [starts[b], starts[b + 1]), the last ones of
    its lens[b] positions."""

    tables: Tensor  # [B, N] int32
    starts: Tensor  # [B + 1] int32
    lens: Tensor  # [B] int32


class _Linear(ctypes.Structure):
    _fields_ = (
        ("x", _pointer),
        ("x_stride", _index),
        ("rows", _index),
        ("packed", _pointer),
        ("bias", _pointer),
        ("words", _index),
        ("columns", _index),
        ("gated", _index),
        ("out", _pointer),
        ("out_stride", _index),
        ("scales", _pointer),
        ("offsets", _pointer),
        ("residual", _pointer),
    )


class CacheArgument(ctypes.Structure):
    _fields_ = (
        ("base", _pointer),
        ("block_stride", _index),
        ("position_stride", _index),
        ("head_stride", _index),
        ("dim", _index),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("query", _pointer),
        ("query_token_stride", _index),
        ("query_head_stride", _index),
        ("out", _pointer),
        ("key", CacheArgument),
        ("value", CacheArgument),
        ("tables", _pointer),
        ("table_stride", _index),
        ("starts", _pointer),
        ("lens", _pointer),
        ("seqs", _index),
        ("heads", _index),
        ("kv_heads", _index),
        ("block_shift", _index),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", _index),
        ("chunked", _index),
        ("sinks", _pointer),
    )


class Native:
    """The loaded library. Tensors are on the CPU, of float32 or bfloat16 as `supports` says, and their last dimension
    is contiguous."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._supported: int = library.baton_supported()
        self._pack, self._linear = library.baton_pack, library.baton_linear
        self._write, self._attention = library.baton_write, library.baton_attention
        self._pack.argtypes = (_pointer, _index, _index, _pointer)
        self._linear.argtypes = (_int, ctypes.POINTER(_Linear))
        self._write.argtypes = (_pointer, *(_index,) * 5, _pointer, *(_index,) * 3, _pointer, _pointer)
        self._rms_norm = library.baton_rms_norm
        self._rms_norm.argtypes = (
            _int,
            *(_pointer, _index, _index, _index),
            _pointer,
            ctypes.c_float,
            _int,
            _pointer,
        )
        self._attention.argtypes = (_int, ctypes.POINTER(_Attention))
        self._rotate = library.baton_rotate
        self._rotate.argtypes = (_int, _pointer, *(_index,) * 5, _pointer, _pointer)
        self._layer_write, self._layer_finish = library.baton_layer_write, library.baton_layer_finish
        self._layer_write.argtypes = self._layer_finish.argtypes = (_int, *(_pointer,) * 3)
        for function in (
            self._pack, self._linear, self._write, self._attention, self._rms_norm, self._rotate,
            self._layer_write, self._layer_finish,
        ):  # fmt: skip
            function.restype = None

    def supports(self, dtype: torch.dtype) -> bool:
        return bool(self._supported & _BITS.get(dtype, 0))

    def pack(self, weight: Tensor, memory: Tensor) -> PackedWeight:
        """weight [N, K] contiguous, where K floats are whole 32-bit words; memory [packed_bytes(weight)] uint8."""
        num_words = weight.shape[1] * weight.element_size() // 4
        data = memory.view(torch.int32).view(-1, num_words, _PANEL)
        self._pack(weight.data_ptr(), weight.shape[0], num_words, data.data_ptr())
        return PackedWeight(data, weight.shape[0], weight.dtype)

    def pack_int8(self, weight: Tensor, memory: Tensor) -> PackedWeight:
        """weight [N, K] of floats, each row rounded to 255 steps of its own; memory [packed_bytes of int8]. The inputs
        of such a layer are rounded likewise when it is called, each row to steps of its own."""
        scales = weight.float().abs().amax(1).clamp_(min=1e-30) / 127
        rounded = (weight.float() / scales[:, None]).round_().to(torch.int8)
        padding = (0, -len(weight) % _PANEL)
        packed = self.pack(rounded, memory)
        return packed._replace(
            scales=functional.pad(scales, padding),
            offsets=functional.pad(128 * rounded.sum(1, dtype=torch.int32), padding).int(),
        )

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """x @ weight^T + bias: [..., K] -> [..., N]."""
        return self._run_linear(x, weight, bias, weight.out_features, gated=False)

    def gated_linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """silu(x @ g^T) * (x @ u^T): [..., K] -> [..., N / 2]. `weight` has 32 rows of g and 32 of u in turns, the last
        ones padded, and its out_features are those of both without the padding."""
        return self._run_linear(x, weight, None, weight.out_features // 2, gated=True)

    def _run_linear(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None, num_columns: int, *, gated: bool
    ) -> Tensor:
        rows = _rows(x)
        out = torch.empty((*x.shape[:-1], num_columns), dtype=x.dtype)
        call = _Linear(
            rows.data_ptr(),
            rows.stride(0),
            len(rows),
            weight.data.data_ptr(),
            None if bias is None else bias.data_ptr(),
            weight.data.shape[1],
            weight.out_features,
            gated,
            out.data_ptr(),
            num_columns,
            None if weight.scales is None else weight.scales.data_ptr(),
            None if weight.offsets is None else weight.offsets.data_ptr(),
            None,
        )
        self._linear(x.dtype is torch.bfloat16, ctypes.byref(call))
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, shifted: bool = False) -> Tensor:
        """x [..., D] / sqrt(mean(x^2) + eps), rounded to its dtype, times weight [D]; `shifted`: in float32 times
        1 + weight."""
        rows = _rows(x)
        out = torch.empty(x.shape, dtype=x.dtype)
        self._rms_norm(
            x.dtype is torch.bfloat16,
            rows.data_ptr(),
            rows.stride(0),
            *rows.shape,
            weight.data_ptr(),
            eps,
            shifted,
            out.data_ptr(),
        )
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """x [T, H, D] in place, with cos and sin [T, R] of its dtype: of each head's first R elements the halves a, b
        become a cos - b sin, b cos + a sin. To the last bit what torch makes of it."""
        self._rotate(
            x.dtype is torch.bfloat16,
            x.data_ptr(),
            *x.stride()[:2],
            *x.shape[:2],
            cos.shape[-1] // 2,
            _dense(cos).data_ptr(),
            _dense(sin).data_ptr(),
        )

    def write_kv(self, rows: Tensor, cache: Tensor, blocks: Tensor, offsets: Tensor) -> None:
        """rows [T, Hkv, D] into the cache; blocks and offsets [T] int64, see naive.write_kv."""
        rows, size = _dense(rows), rows.element_size()
        self._write(
            rows.data_ptr(),
            rows.stride(0) * size,
            rows.stride(1) * size,
            rows.shape[0],
            rows.shape[1],
            rows.shape[2] * size,
            cache.data_ptr(),
            *(stride * size for stride in cache.stride()[:3]),
            blocks.data_ptr(),
            offsets.data_ptr(),
        )

    def paged_attention(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        steps: Steps,
        scale: float,
        *,
        window: Window | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """query [T, H, Dk] -> [T, H, Dv], see naive.paged_attention. The block size is a power of two."""
        query, num_heads, v_dim = _dense(query), query.shape[1], v_cache.shape[3]
        out = torch.empty((query.shape[0], num_heads, v_dim), dtype=query.dtype)
        of_sinks = None if sinks is None else sinks.float().contiguous()
        call = _Attention(
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            out.data_ptr(),
            cache_argument(k_cache),
            cache_argument(v_cache),
            steps.tables.data_ptr(),
            steps.tables.stride(0),
            steps.starts.data_ptr(),
            steps.lens.data_ptr(),
            len(steps.lens),
            num_heads,
            k_cache.shape[2],
            k_cache.shape[1].bit_length() - 1,
            scale,
            softcap or 0.0,
            window.size if window else 0,
            bool(window and window.chunked),
            None if of_sinks is None else of_sinks.data_ptr(),
        )
        self._attention(query.dtype is torch.bfloat16, ctypes.byref(call))
        return out

    def layer_write(self, dtype: torch.dtype, *call: ctypes.Structure) -> None:
        """For `native_layer.NativeLayer`, as the next one."""
        self._layer_write(dtype is torch.bfloat16, *map(ctypes.byref, call))

    def layer_finish(self, dtype: torch.dtype, *call: ctypes.Structure) -> None:
        self._layer_finish(dtype is torch.bfloat16, *map(ctypes.byref, call))


def packed_bytes(weight: Tensor, element_size: int | None = None) -> int:
    """Whole panels: the last one is padded."""
    size = weight.element_size() if element_size is None else element_size
    return -(-weight.shape[0] // _PANEL) * _PANEL * weight.shape[1] * size


def cache_argument(cache: Tensor) -> CacheArgument:
    """cache [blocks, block size, heads, dim]."""
    return CacheArgument(cache.data_ptr(), *cache.stride()[:3], cache.shape[3])


def _dense(x: Tensor) -> Tensor:
    """With a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [R, D]."""
    return _dense(x.reshape(-1, x.shape[-1]))


def load() -> Native:
    """Raises Unavailable."""
    path = find_library()
    try:
        native = Native(path)
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded: {error}") from error
    if not native.supports(torch.float32):
        raise Unavailable("the CPU has no AVX-512")
    return native
