"""Runs the Triton kernels on the GPU where there is one, else in Triton's interpreter, on the CPU.

    python -m pytest tests/kernels        on a GPU machine; needs torch, Triton, transformers and Baton's base install

Triton decides at import whether it compiles or interprets, so it is imported here, first, with TRITON_INTERPRET set
only meanwhile: other tests and the processes they start see nothing of it. If something else has imported Triton
before, the kernels cannot be interpreted in this process and the tests fail saying so.

The interpreter multiplies the raw bits of bfloat16 in `tl.dot`, truncates where it should round, and widens sums of
integers that wrap around on a GPU. All three are put right here, in the tests, as a GPU needs no such thing.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_GPU = torch.cuda.is_available()
TRITON_CAME_FIRST = "triton" in sys.modules


def _import_interpreted() -> None:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.experimental.gluon  # noqa: F401  Triton would import it later, and choose again

        from baton_kernels import (  # noqa: F401
            cache_write,
            copy_blocks,
            decode_attention,
            prefill_attention,
            rms_norm,
            sample_tokens,
            silu_mul,
            wire_blocks,
        )
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _teach_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def round_to_nearest_even(x: Any) -> Any:
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)

    def widen(bits: Any) -> Any:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def convert_float(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return round_to_nearest_even(data)
        if source == tl.bfloat16 and target == tl.float32:
            return widen(data)
        return convert(data, source, target, mode)

    def widen_handle(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(widen(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        return dot(self, widen_handle(a), widen_handle(b), acc, *rest)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def _teach_wrapping_sums() -> None:
    from triton.runtime import interpreter

    def sum_in_type(self: Any, x: Any) -> Any:
        data = x.handle.data
        total = np.sum(data, axis=self.axis, keepdims=self.keep_dims, dtype=data.dtype)
        return self.to_tensor(total, x.dtype)

    interpreter.ReduceOps.sum = sum_in_type


if HAS_TRITON and not TRITON_CAME_FIRST and not ON_GPU:
    _import_interpreted()
    _teach_bfloat16()
    _teach_wrapping_sums()


@pytest.fixture
def kernels() -> Iterator[None]:
    """The kernels can be called: tensors that do not say where they belong are where the kernels run."""
    if ON_GPU:
        with torch.device("cuda"):
            yield
    elif TRITON_CAME_FIRST:
        pytest.fail("Triton was imported before these tests were collected: run tests/kernels first or alone")
    else:
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What `torch.empty` returns is full of NaN: an element that no program wrote is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(
        True, warn_only=ON_GPU
    )  # not all that tests use is deterministic there
    yield
    torch.use_deterministic_algorithms(False)
