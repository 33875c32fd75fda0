"""The gate of a gated MLP, from the merged projection.

    y[t, i] = silu(x[t, i]) * x[t, F + i],   silu(g) = g / (1 + exp(-g))        x [T, 2F], y [T, F]

Grid: (T, ceil(F / BLOCK)). The definition is `naive.silu_mul`. Floor: x and y once over memory bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _silu_mul_kernel(
    y_ptr,  # [T, F]
    x_ptr,  # [T, 2F]
    stride_x,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_ptr += row * stride_x
    gate = tl.load(x_ptr + i, mask=i < F, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + F + i, mask=i < F, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * F + i, y.to(y_ptr.dtype.element_ty), mask=i < F)


def silu_mul(x: Tensor) -> Tensor:
    """See the module."""
    num_rows, double = x.shape
    assert double % 2 == 0 and x.stride(1) == 1
    y = torch.empty(num_rows, double // 2, dtype=x.dtype, device=x.device)
    grid = num_rows, triton.cdiv(double // 2, BLOCK)
    _silu_mul_kernel[grid](y, x, x.stride(0), F=double // 2, BLOCK=BLOCK, num_warps=4)
    return y
