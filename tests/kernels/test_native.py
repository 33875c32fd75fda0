"""The native CPU ops against their definitions in float64, and their promise that a row does not depend on others."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from baton_kernels import naive, native, native_build
from baton_kernels.native import Native, PackedWeight, Steps
from baton_kernels.pages import Arena

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _need(ops: Native, dtype: torch.dtype) -> None:
    if not ops.supports(dtype):
        pytest.skip(f"this CPU has no instructions for {dtype}")


def _assert_near(out: Tensor, expected: Tensor) -> None:
    error = (out.double() - expected).abs().max()
    assert error <= TOLERANCE[out.dtype] * expected.abs().max(), f"{error:.1e}"


def _pack(ops: Native, weight: Tensor) -> PackedWeight:
    return ops.pack(weight, Arena().take(native.packed_bytes(weight)))


@DTYPES
@pytest.mark.parametrize(("num_out", "num_in"), [(64, 32), (1, 2), (200, 70), (130, 898)])
def test_linear(ops: Native, num_threads: int, dtype: torch.dtype, num_out: int, num_in: int) -> None:
    _need(ops, dtype)
    torch.manual_seed(0)
    weight, bias = torch.randn(num_out, num_in, dtype=dtype), torch.randn(num_out, dtype=dtype)
    packed = _pack(ops, weight)
    assert torch.equal(packed.rows(torch.arange(num_out)), weight)
    for num_rows in (1, 2, 5, 6, 7, 13, 30, 100, 193):
        wide = torch.randn(num_rows, num_in + 8, dtype=dtype)
        x = wide[:, :num_in]  # rows that do not lie next to each other
        _assert_near(ops.linear(x, packed), F.linear(x.double(), weight.double()))
        _assert_near(ops.linear(x[None], packed, bias)[0], F.linear(*map(Tensor.double, (x, weight, bias))))


@DTYPES
def test_int8_linear(ops: Native, num_threads: int, dtype: torch.dtype) -> None:
    """Weights and inputs rounded to 255 steps per row; the sums are exact."""
    _need(ops, dtype)
    _need(ops, torch.int8)
    torch.manual_seed(0)
    weight, x, bias = (
        torch.randn(200, 68, dtype=dtype),
        torch.randn(100, 68, dtype=dtype),
        torch.randn(200, dtype=dtype),
    )
    x[3] = 0
    packed = ops.pack_int8(weight, Arena().take(native.packed_bytes(weight, 1)))
    rounded = packed.rows(torch.arange(200)).double()
    steps = weight.double().abs().amax(1, keepdim=True) / 127
    assert ((rounded - weight.double()).abs() <= steps * 0.501).all()
    steps = x.float().abs().amax(1, keepdim=True) / 127
    inputs = ((x.float() / steps).nan_to_num().round() * steps).double()
    _assert_near(ops.linear(x, packed, bias), F.linear(inputs, rounded, bias.double()))
    assert torch.equal(ops.linear(x[7:8], packed, bias), ops.linear(x, packed, bias)[7:8])


@DTYPES
def test_gated_linear(ops: Native, dtype: torch.dtype) -> None:
    _need(ops, dtype)
    torch.manual_seed(0)
    gate, up = torch.randn(2, 90, 48, dtype=dtype)
    padded = F.pad(torch.stack((gate, up)), (0, 0, 0, 6)).unflatten(1, (-1, 32))  # [2, turns, 32, 48]
    turns = padded.transpose(0, 1).flatten(0, 2)
    x = torch.randn(9, 48, dtype=dtype)
    x[0] *= 40  # where exp overflows
    expected = F.silu(F.linear(x.double(), gate.double())) * F.linear(x.double(), up.double())
    _assert_near(ops.gated_linear(x, _pack(ops, turns)._replace(out_features=180)), expected)


@DTYPES
@pytest.mark.parametrize("shifted", [False, True])
def test_rms_norm(ops: Native, dtype: torch.dtype, shifted: bool) -> None:
    _need(ops, dtype)
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 70, dtype=dtype), torch.randn(70, dtype=dtype)
    x[0] = 0
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    out = ops.rms_norm(x, weight, 1e-6, shifted=shifted)
    _assert_near(out, normed * (weight.double() + shifted))
    assert torch.equal(ops.rms_norm(x[:, 1], weight, 1e-6, shifted=shifted), out[:, 1])


@DTYPES
@pytest.mark.parametrize("num_rotated", [64, 40])
def test_rotate(ops: Native, dtype: torch.dtype, num_rotated: int) -> None:
    _need(ops, dtype)
    torch.manual_seed(0)
    states = torch.randn(7, 9, 64, dtype=dtype)
    before, x = states.clone(), states[:, 2:7]
    angles = torch.rand(7, num_rotated) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    rotated, rest = x.split((num_rotated, 64 - num_rotated), -1)
    turned = torch.cat((-rotated[..., num_rotated // 2 :], rotated[..., : num_rotated // 2]), -1)
    expected = torch.cat((rotated * cos[:, None] + turned * sin[:, None], rest), -1)
    ops.rotate(x, cos, sin)
    assert torch.equal(x, expected)
    others = [0, 1, 7, 8]
    assert torch.equal(states[:, others], before[:, others])


class Shape(NamedTuple):
    num_kv_heads: int
    group: int
    k_dim: int
    v_dim: int
    block_size: int


class Kind(NamedTuple):
    window: naive.Window | None = None
    softcap: float | None = None
    has_sinks: bool = False


LENS = [1, 65, 320, 200, 64, 17]  # with the step's own tokens:
CHUNKS = [1, 1, 1, 150, 64, 5]

SHAPES = {
    "usual": Shape(2, 7, 64, 64, 16),
    "odd": Shape(1, 3, 26, 41, 4),
    "blocks-of-one": Shape(2, 1, 8, 72, 1),
    "long-blocks": Shape(1, 2, 128, 64, 128),
    "one-kv-head": Shape(1, 128, 96, 80, 16),
}
KINDS = {
    "full": Kind(),
    "sliding": Kind(naive.Window(70)),
    "chunked": Kind(naive.Window(70, chunked=True)),
    "softcap": Kind(softcap=2.0),
    "sinks": Kind(naive.Window(33), has_sinks=True),
}


class Paged(NamedTuple):
    """A pool that is NaN wherever nothing was written."""

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    steps: Steps


def _paged(ops: Native, shape: Shape, dtype: torch.dtype) -> Paged:
    torch.manual_seed(0)
    heads, group, k_dim, v_dim, size = shape
    counts = [-(-length // size) for length in LENS]
    middle = size * heads * k_dim
    pool = torch.full((sum(counts) + 3, middle + size * heads * v_dim + 6), torch.nan, dtype=dtype)
    k_cache = pool[:, :middle].view(-1, size, heads, k_dim)
    v_cache = pool[:, middle : middle + size * heads * v_dim].view(-1, size, heads, v_dim)
    free, tables = torch.randperm(len(pool)), torch.zeros(len(LENS), max(counts), dtype=torch.int32)
    for row, (length, count) in enumerate(zip(LENS, counts, strict=True)):
        tables[row, :count], free = free[:count], free[count:]
        index = torch.arange(length)
        where = naive.Positions(tables[row, index // size].long(), index % size)
        for cache, dim in ((k_cache, k_dim), (v_cache, v_dim)):
            new = torch.randn(heads, length, dim, dtype=dtype).transpose(0, 1)
            ops.write_kv(new, cache, where.blocks, where.offsets)
            assert torch.equal(naive.read_kv(cache, where), new)
    starts = torch.tensor([0, *torch.tensor(CHUNKS).cumsum(0)], dtype=torch.int32)
    query = torch.randn(heads * group, sum(CHUNKS), k_dim, dtype=dtype).transpose(0, 1)
    return Paged(query, k_cache, v_cache, Steps(tables, starts, torch.tensor(LENS, dtype=torch.int32)))


@DTYPES
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention(ops: Native, dtype: torch.dtype, shape: Shape, kind: Kind) -> None:
    _need(ops, dtype)
    query, k_cache, v_cache, steps = _paged(ops, shape, dtype)
    sinks = torch.randn(query.shape[1]) if kind.has_sinks else None
    window, softcap, scale = kind.window, kind.softcap, shape.k_dim**-0.5
    out = ops.paged_attention(
        query, k_cache, v_cache, steps, scale, window=window, softcap=softcap, sinks=sinks
    )
    expected = naive.paged_attention(
        *(x.double() for x in (query, k_cache, v_cache)),
        *(steps.tables, steps.starts, steps.lens, scale),
        window=window.size if window else None,
        chunked=window is not None and window.chunked,
        softcap=softcap,
        sinks=None if sinks is None else sinks.double(),
    )
    _assert_near(out, expected)


def test_a_position_that_nobody_wrote_shows(ops: Native) -> None:
    query, k_cache, v_cache, steps = _paged(ops, SHAPES["usual"], torch.float32)
    k_cache[steps.tables[2, 3], 5] = torch.nan
    out = ops.paged_attention(query, k_cache, v_cache, steps, 0.1)
    assert out[2].isnan().all()
    assert not out[:2].isnan().any() and not out[3:].isnan().any()


@DTYPES
def test_a_row_is_the_same_in_any_batch(ops: Native, num_threads: int, dtype: torch.dtype) -> None:
    """To the last bit: alone, with others, as part of a prompt or decoded, on one thread or two."""
    _need(ops, dtype)
    torch.manual_seed(0)
    x, weight = torch.randn(50, 96, dtype=dtype), torch.randn(150, 96, dtype=dtype)
    packed = _pack(ops, weight)
    torch.set_num_threads(1)
    alone = torch.cat([ops.linear(row[None], packed) for row in x])
    torch.set_num_threads(num_threads)
    assert torch.equal(ops.linear(x, packed), alone)

    query, k_cache, v_cache, steps = _paged(ops, SHAPES["usual"], dtype)
    window = naive.Window(70)
    for kind in ({}, {"window": window}):
        together = ops.paged_attention(query, k_cache, v_cache, steps, 0.1, **kind)
        for row, (length, count) in enumerate(zip(LENS, CHUNKS, strict=True)):
            for i in range(0, count, 7):
                lens = torch.tensor([length - count + i + 1], dtype=torch.int32)
                one = Steps(steps.tables[row : row + 1], torch.tensor([0, 1], dtype=torch.int32), lens)
                token = int(steps.starts[row]) + i
                out = ops.paged_attention(query[token : token + 1], k_cache, v_cache, one, 0.1, **kind)
                assert torch.equal(out[0], together[token])


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(native_build.Unavailable, match="no C\\+\\+ compiler"):
        native_build.build(native_build.cache_folder())


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'unknown flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(native_build.Unavailable, match="unknown flag"):
        native_build.build(tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())
