"""Both attention kernels against the definition in float64: ragged lengths, page edges, odd heads, masks."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from baton_kernels import naive, planned
from baton_kernels.decode_attention import choose_num_splits, paged_decode_attention
from baton_kernels.prefill_attention import paged_prefill_attention

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    # numpy's remarks on overflows and wrap-arounds that the kernels mean, and on lanes that are masked later
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    chunks: tuple[tuple[int, int], ...]  # of each sequence: positions before the chunk, tokens of the chunk
    heads: int = 4
    kv_heads: int = 2
    dk: int = 32
    dv: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    sinks: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        chunks = ",".join(f"{start}+{count}" for start, count in self.chunks)
        options = "".join(f"-{key}{value:g}" for key, value in self.options.items())
        shape = f"H{self.heads}/{self.kv_heads}-D{self.dk}/{self.dv}-P{self.block_size}-{NAMES[self.dtype]}"
        return f"{chunks}-{shape}{options}" + "-sinks" * self.sinks


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    starts: Tensor
    lens: Tensor
    sinks: Tensor | None


def make(case: Case) -> Inputs:
    """A pool of three layers whose middle one is used: NaN wherever no position of a sequence lies."""
    lengths = [start + count for start, count in case.chunks]
    blocks = [-(-length // case.block_size) for length in lengths]
    num_blocks = sum(blocks) + 3
    k_size = case.block_size * case.kv_heads * case.dk
    v_size = case.block_size * case.kv_heads * case.dv
    pool = torch.full((num_blocks, 3 * (k_size + v_size)), torch.nan, dtype=case.dtype)
    layer = pool[:, k_size + v_size : 2 * (k_size + v_size)]
    k_cache = layer[:, :k_size].view(num_blocks, case.block_size, case.kv_heads, case.dk)
    v_cache = layer[:, k_size:].view(num_blocks, case.block_size, case.kv_heads, case.dv)
    tables = torch.full((len(lengths), max(blocks) + 1), -1, dtype=torch.int32)
    free = torch.randperm(num_blocks)
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        mine, free = free[:count], free[count:]
        tables[row, :count] = mine.int()
        index = torch.arange(length)
        where = naive.Positions(mine[index // case.block_size], index % case.block_size)
        keys = torch.randn(length, case.kv_heads, case.dk).to(case.dtype)
        naive.write_kv(
            keys, torch.randn(length, case.kv_heads, case.dv).to(case.dtype), k_cache, v_cache, where
        )
    starts = torch.tensor([0] + [count for _, count in case.chunks]).cumsum(0).int()
    # Heads before tokens in memory, as a model's transposed view has them.
    query = torch.randn(case.heads, int(starts[-1]), case.dk).to(case.dtype).transpose(0, 1)
    sinks = torch.randn(case.heads).to(case.dtype) if case.sinks else None
    lens = torch.tensor(lengths, dtype=torch.int32)
    return Inputs(query, k_cache, v_cache, tables, starts, lens, sinks)


def expected(case: Case, x: Inputs) -> Tensor:
    query, k_cache, v_cache = x.query.double(), x.k_cache.double(), x.v_cache.double()
    sinks = None if x.sinks is None else x.sinks.double()
    return naive.paged_attention(
        query, k_cache, v_cache, x.tables, x.starts, x.lens, case.dk**-0.5, sinks=sinks, **case.options
    )


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    assert not actual.isnan().any()
    assert (actual.double() - wanted).abs().max() <= TOLERANCE[actual.dtype] * max(
        1.0, float(wanted.abs().max())
    )


ONE = partial(Case, ((0, 1), (36, 1), (63, 1), (129, 1)))
DECODES = [
    ONE(),
    ONE(dtype=torch.float16),
    ONE(dtype=torch.bfloat16),
    ONE(dtype=torch.bfloat16, block_size=64),
    ONE(heads=14, kv_heads=2, dk=40, dv=24, block_size=12),
    ONE(heads=3, kv_heads=3, dk=24, dv=48),
    ONE(heads=20, kv_heads=1),
    ONE(options={"window": 33}),
    ONE(options={"window": 1}, block_size=64, dtype=torch.bfloat16),
    ONE(options={"softcap": 1.5}),
    ONE(options={"window": 32, "chunked": True}),
    ONE(sinks=True, dtype=torch.bfloat16),
    ONE(options={"softcap": 5.0, "window": 70}, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("num_splits", [1, 4], ids="splits{}".format)
@pytest.mark.parametrize("case", DECODES, ids=str)
def test_decode_equals_the_definition(case: Case, num_splits: int) -> None:
    x = make(case)
    scale = case.dk**-0.5
    actual = paged_decode_attention(
        x.query,
        x.k_cache,
        x.v_cache,
        x.tables,
        x.lens,
        scale,
        num_splits=num_splits,
        sinks=x.sinks,
        **case.options,
    )
    assert_close(actual, expected(case, x))


@pytest.mark.parametrize("num_splits", [1, 2], ids="splits{}".format)
def test_padding_of_a_captured_batch_gives_zeros(num_splits: int) -> None:
    x = make(ONE())
    x.lens[1] = 0
    actual = paged_decode_attention(
        x.query, x.k_cache, x.v_cache, x.tables, x.lens, 1.0, num_splits=num_splits
    )
    assert torch.equal(actual[1], torch.zeros_like(actual[1]))
    assert not actual.isnan().any()


def test_a_split_needs_enough_context_and_idle_processors() -> None:
    assert choose_num_splits(1, 8, 131072, num_sms=132) == 32
    assert choose_num_splits(32, 8, 131072, num_sms=132) == 1
    assert choose_num_splits(64, 8, 131072, num_sms=132) == 2  # 512 programs, 396 at a time
    assert choose_num_splits(64, 8, 300, num_sms=132) == 1
    assert choose_num_splits(256, 8, 131072, num_sms=132) == 1
    assert choose_num_splits(4, 8, 131072, num_sms=132) == 8
    assert choose_num_splits(1, 8, 1024, num_sms=132) == 4
    assert choose_num_splits(1, 8, 16, num_sms=132) == 1


RAGGED = partial(Case, ((0, 5), (16, 17), (15, 1), (47, 70), (1, 33)))
PREFILLS = [
    RAGGED(),
    RAGGED(dtype=torch.float16),
    RAGGED(dtype=torch.bfloat16),
    RAGGED(dtype=torch.bfloat16, block_size=64),
    RAGGED(heads=14, kv_heads=2, dk=40, dv=24, block_size=12, dtype=torch.bfloat16),
    RAGGED(heads=3, kv_heads=3, dk=24, dv=48, dtype=torch.float16),
    RAGGED(options={"window": 9}, dtype=torch.float16),
    RAGGED(options={"window": 40}, dtype=torch.bfloat16),
    RAGGED(options={"softcap": 1.5}, dtype=torch.bfloat16),
    RAGGED(options={"window": 32, "chunked": True}, sinks=True, dtype=torch.float16),
    RAGGED(sinks=True, block_size=64, dtype=torch.bfloat16),
    Case(((0, 200),), heads=8, kv_heads=1, dtype=torch.float16),
    Case(((130, 3),), dtype=torch.float16, block_size=128),
    Case(((0, 1), (70, 1), (200, 1)), dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", PREFILLS, ids=str)
def test_prefill_equals_the_definition(case: Case) -> None:
    x = make(case)
    actual = paged_prefill_attention(
        x.query,
        x.k_cache,
        x.v_cache,
        x.tables,
        x.starts,
        x.lens,
        case.dk**-0.5,
        sinks=x.sinks,
        **case.options,
    )
    assert_close(actual, expected(case, x))


def test_the_definition_agrees_with_what_the_engine_runs_on_the_cpu() -> None:
    case = RAGGED()
    x = make(case)
    outs = []
    for row, (start, count) in enumerate(case.chunks):
        plan = planned.plan_prefill(x.tables[row].long(), start, count, case.block_size)
        chunk = x.query[x.starts[row] : x.starts[row + 1]]
        outs.append(planned.paged_prefill_attention(chunk, x.k_cache, x.v_cache, plan, case.dk**-0.5))
    assert_close(torch.cat(outs), expected(case, x))
