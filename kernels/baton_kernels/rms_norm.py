"""RMSNorm, with the addition to the residual stream before it in the same pass.

    r = x + residual                                   written over residual, rounded to its dtype
    y = r / sqrt(mean(r^2) + eps) * (offset + weight)  in fp32, rounded once

    x, residual, y [T, D]; weight [D]; offset is 1 for the models that store weight - 1 (Gemma), else 0

Grid: (T,), one row for each program. The definition is `naive.add_rms_norm`.

Floor: x, residual, residual, y, each [T, D] once, over memory bandwidth; without a residual half of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_rms_norm_kernel(
    y_ptr,  # [T, D]
    x_ptr,  # [T, D]
    residual_ptr,  # [T, D]
    weight_ptr,  # [D]
    stride_x,
    stride_residual,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, D_PAD)
    mask = i < D
    x = tl.load(x_ptr + row * stride_x + i, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptr += row * stride_residual
        x += tl.load(residual_ptr + i, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + i, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    y = x * scale * (offset + weight)
    tl.store(y_ptr + row * D + i, y.to(y_ptr.dtype.element_ty), mask=mask)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, offset: float = 0.0
) -> Tensor:
    """y; `residual` becomes x + residual. See the module."""
    num_rows, dim = x.shape
    assert x.stride(1) == 1 and weight.shape == (dim,) and weight.is_contiguous()
    assert residual is None or (residual.shape == x.shape and residual.stride(1) == 1)
    y = torch.empty(num_rows, dim, dtype=x.dtype, device=x.device)
    stream = x if residual is None else residual
    dim_pad = triton.next_power_of_2(dim)
    _add_rms_norm_kernel[(num_rows,)](
        y,
        x,
        stream,
        weight,
        x.stride(0),
        stream.stride(0),
        eps,
        offset,
        HAS_RESIDUAL=residual is not None,
        D=dim,
        D_PAD=dim_pad,
        num_warps=min(max(dim_pad // 1024, 1), 16),  # up to 1024 elements for each warp: 4 loads of 16 bytes
    )
    return y
