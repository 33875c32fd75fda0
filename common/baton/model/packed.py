"""Linear layers over weights that were packed at load, the one place that knows how.

A plain linear layer arranges its weight for the CPU anew in every call. Here that is done once: by the native ops,
or, where they are not, by oneDNN, whose entry points in torch are private and are tried before they are used. The
unpacked weight is given up: there is never a second copy, not of an embedding that shares it either.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baton.errors import ConfigError
from baton_kernels.native import Native, PackedWeight, packed_bytes
from baton_kernels.pages import Arena

_SAMPLE_ROWS = 4
# Of the largest output.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_INT8_TOLERANCE = 0.1
_MOST_INPUTS_PER_OUTPUT = 16
_MKLDNN_ROWS = 32  # the batch that oneDNN arranges for; others run nearly as fast (benchmarks/bench_cpu.py)


class Packer(Protocol):
    name: str

    def takes(self, weight: Tensor) -> bool: ...

    def pack(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A module that computes F.linear(x, weight, bias), for a weight that it takes."""
        ...

    def agrees(self, packed: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether it does, on a sample of inputs."""
        ...

    def exact(self) -> "Packer":
        """One that rounds no weights."""
        ...


class NativeLinear(nn.Module):
    def __init__(self, native: Native, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self._native = native
        self.packed = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return self._native.linear(x, self.packed, self.bias)

    @property
    def weight(self) -> Tensor:
        """Unpacked anew, for code that looks at it."""
        return self.packed.rows(torch.arange(self.packed.out_features))


class NativePacker:
    """Implements Packer. `int8`: weights are rounded to 8 bits, see Native.pack_int8."""

    def __init__(self, native: Native, arena: Arena, *, int8: bool = False) -> None:
        self.native = native
        self.name = "native ops, int8" if int8 else "native ops"
        self._arena = arena
        self._int8 = int8

    def takes(self, weight: Tensor) -> bool:
        """Rows of whole 32-bit words."""
        size = 1 if self._rounds(weight) else weight.element_size()
        return weight.shape[1] * size % 4 == 0

    def pack(self, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        return NativeLinear(self.native, self.arrange(weight), bias)

    def arrange(self, weight: Tensor) -> PackedWeight:
        if self._rounds(weight):
            return self.native.pack_int8(weight, self._arena.take(packed_bytes(weight, 1)))
        return self.native.pack(weight.contiguous(), self._arena.take(packed_bytes(weight)))

    def agrees(self, packed: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
        return agrees(packed, weight, bias, self.tolerance(weight))

    def tolerance(self, weight: Tensor) -> float:
        return _INT8_TOLERANCE if self._rounds(weight) else _TOLERANCES[weight.dtype]

    def exact(self) -> "NativePacker":
        return NativePacker(self.native, self._arena)

    def _rounds(self, weight: Tensor) -> bool:
        """Not the few outputs that choose between experts."""
        return self._int8 and weight.shape[0] * _MOST_INPUTS_PER_OUTPUT >= weight.shape[1]


class MkldnnLinear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _MKLDNN_ROWS)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out

    @property
    def weight(self) -> Tensor:
        """Unpacked anew, for code that looks at it."""
        unpacked: Tensor = self._packed.to_dense()
        return unpacked


class MkldnnPacker:
    """Implements Packer."""

    name = "oneDNN"

    def takes(self, weight: Tensor) -> bool:
        return True

    def pack(self, weight: Tensor, bias: Tensor | None) -> MkldnnLinear:
        return MkldnnLinear(weight, bias)

    def agrees(self, packed: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
        return agrees(packed, weight, bias)

    def exact(self) -> "MkldnnPacker":
        return self


def packer_for(native: Native | None, dtype: torch.dtype, *, int8: bool = False) -> Packer | None:
    """oneDNN alone knows the matrix units that some CPUs have for bfloat16. Raises ConfigError."""
    if int8:
        if native is None or not (native.supports(dtype) and native.supports(torch.int8)):
            raise ConfigError(
                f"--quantization int8 needs native ops for {dtype} and AVX512-VNNI: leave it out"
            )
        return NativePacker(native, Arena(), int8=True)
    has_matrix_unit = dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    if native is not None and native.supports(dtype) and not has_matrix_unit:
        return NativePacker(native, Arena())
    return MkldnnPacker() if _mkldnn_works(dtype) else None


def agrees(module: nn.Module, weight: Tensor, bias: Tensor | None, tolerance: float | None = None) -> bool:
    """Whether it computes the linear layer, on a sample of inputs."""
    x = sample_input(weight.shape[1], weight.dtype)
    return close(module(x), F.linear(x, weight, bias), tolerance)


def sample_input(size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """[1, 4, size], the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, _SAMPLE_ROWS, size, generator=generator, device="cpu") * scale).to(dtype)


def close(out: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Equal but for the order of sums and the last rounding."""
    limit = _TOLERANCES.get(expected.dtype, 0.0) if tolerance is None else tolerance
    error = (out.float() - expected.float()).abs().max()
    return out.shape == expected.shape and bool(error <= limit * expected.float().abs().max())


def _mkldnn_works(dtype: torch.dtype) -> bool:
    weight = sample_input(64, dtype)[0]
    try:
        return agrees(MkldnnLinear(weight, None), weight, None)
    except (AttributeError, RuntimeError):
        return False


class PackedEmbedding(nn.Module):
    """Shares the weight of a packed linear layer."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self._packed = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self._packed.rows(ids)


class _Merged:
    """Several linear layers of the same input as one, computed when the first of them is asked for."""

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        self._linear = linear
        self._sizes = list(sizes)
        self._input: Tensor | None = None
        self._outs: tuple[Tensor, ...] = ()

    def part(self, index: int, x: Tensor) -> Tensor:
        if x is not self._input:
            self._input, self._outs = x, self._linear(x).split(self._sizes, -1)
        out = self._outs[index]
        if index == len(self._sizes) - 1:
            self._input, self._outs = None, ()
        return out


class MergedPart(nn.Module):
    """One of the layers that `merge` makes one of. The last one is the last to be asked for."""

    def __init__(self, merged: _Merged, index: int) -> None:
        super().__init__()
        self._merged, self._index = merged, index

    def forward(self, x: Tensor) -> Tensor:
        return self._merged.part(self._index, x)


def merge(packer: Packer, linears: Sequence[nn.Linear]) -> list[nn.Module] | None:
    """Instead of `linears`, which have the same input and all or none a bias; None where they cannot be merged."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    packed = packer.pack(weight, bias) if packer.takes(weight) else None
    if packed is None or not packer.agrees(packed, weight, bias):
        return None
    merged = _Merged(packed, [linear.out_features for linear in linears])
    return [MergedPart(merged, index) for index in range(len(linears))]
