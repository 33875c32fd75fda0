"""The kernels that go token by token: cache write with rotary embedding, RMSNorm, SiLU-mul."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from baton_kernels import naive
from baton_kernels.cache_write import rope_write_kv
from baton_kernels.rms_norm import add_rms_norm
from baton_kernels.silu_mul import silu_mul

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    # numpy's remarks on overflows and wrap-arounds that the kernels mean, and on lanes that are masked later
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
HEADS = [(4, 2, 64, 64, 64, 16), (9, 3, 40, 40, 40, 12), (12, 10, 48, 24, 12, 16), (2, 2, 20, 36, 0, 64)]
HEAD_IDS = ["H{}/{}-D{}/{}-R{}-P{}".format(*heads) for heads in HEADS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Half a unit in the last place, of values up to 8: the kernels compute in fp32 and round once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dk", "dv", "rotary", "block_size"),
    HEADS,
    ids=HEAD_IDS,
)
def test_rope_write(
    heads: int, kv_heads: int, dk: int, dv: int, rotary: int, block_size: int, dtype: torch.dtype
) -> None:
    num_tokens, num_blocks = 5, 4
    query = torch.randn(heads, num_tokens, dk).to(dtype).transpose(0, 1)
    key, value = (torch.randn(num_tokens, kv_heads, dim).to(dtype) for dim in (dk, dv))
    angles = torch.rand(num_tokens, rotary // 2) * 6
    turn = (angles.cos(), angles.sin()) if rotary else (None, None)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[2] = -1  # padding
    wide_pool = torch.full((num_blocks, 2, block_size, kv_heads, dk + dv), torch.nan, dtype=dtype)
    pool = wide_pool[:, 1].reshape(num_blocks, -1).repeat(1, 2)  # the blocks of a layer do not touch
    k_cache = pool[:, : block_size * kv_heads * dk].view(num_blocks, block_size, kv_heads, dk)
    v_cache = pool[:, -block_size * kv_heads * dv :].view(num_blocks, block_size, kv_heads, dv)
    wanted = [x.double() for x in (query, key, value, k_cache, v_cache)]
    naive.rope_write_kv(*wanted, slots, *(x if x is None else x.double() for x in turn))

    rope_write_kv(query, key, value, k_cache, v_cache, slots, *turn)

    torch.testing.assert_close(query.double(), wanted[0], rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(k_cache.double(), wanted[3], rtol=0, atol=TOLERANCE[dtype], equal_nan=True)
    torch.testing.assert_close(v_cache.double(), wanted[4], rtol=0, atol=0, equal_nan=True)
    untouched = slice(block_size * kv_heads * dk, -block_size * kv_heads * dv)
    assert pool[:, untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("offset", [0.0, 1.0], ids="offset{:g}".format)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("dim", [1, 96, 577, 2048], ids="D{}".format)
def test_add_rms_norm(dim: int, with_residual: bool, offset: float, dtype: torch.dtype) -> None:
    x = torch.randn(3, dim + 5).to(dtype)[:, :dim]
    residual = torch.randn(3, dim).to(dtype) if with_residual else None
    weight = torch.rand(dim).to(dtype)
    total = x if residual is None else x + residual
    wanted = naive.add_rms_norm(total.double(), None, weight.double(), 1e-5, offset=offset)

    actual = add_rms_norm(x, residual, weight, 1e-5, offset=offset)

    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=TOLERANCE[dtype])
    assert residual is None or torch.equal(residual, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("width", [1, 100, 1500], ids="F{}".format)
def test_silu_mul(width: int, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(3, 2 * width + 8)).to(dtype)[:, : 2 * width]
    x[0, 0] = -100.0  # exp of the other sign overflows
    wanted = naive.silu_mul(x.double())
    actual = silu_mul(x)
    assert not actual.isnan().any()
    torch.testing.assert_close(
        actual.double(), wanted, rtol=8e-3 if dtype != torch.float32 else 1e-5, atol=1e-6
    )
