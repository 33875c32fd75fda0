"""The runner's promises to the engine, and the ops against a plain float64 reference."""

import asyncio
import os
import threading
from pathlib import Path

import pytest
import torch
from reference import make_model
from torch import Tensor, nn

from baton.config import EngineConfig, ModelConfig
from baton.engine.batch import Batch, BatchRow
from baton.engine.model_runner import TorchModelRunner, load_runner
from baton.errors import ConfigError, InternalError
from baton.kv.layout import KVLayout, LayerLayout
from baton.kv.storage import KVStorage
from baton.request import BlockId, RequestId, SamplingParams
from baton_kernels import naive, planned

GREEDY = SamplingParams(temperature=0)


def _row(
    tokens: tuple[int, ...], *, start: int = 0, table: tuple[int, ...] = (0,), sample: bool = True
) -> BatchRow:
    return BatchRow(RequestId("r"), start, tokens, tuple(map(BlockId, table)), sample, GREEDY)


@pytest.fixture
def runner(tmp_path: Path) -> TorchModelRunner:
    directory = make_model("gqa", tmp_path)
    return load_runner(ModelConfig(str(directory)), EngineConfig(num_blocks=32), fill_nan=True).runner


async def test_tokens_come_in_the_order_of_the_rows_that_sample(runner: TorchModelRunner) -> None:
    prompts = [tuple(range(i, i + length)) for i, length in enumerate((20, 1, 5, 1, 33))]
    tables = [(0, 1), (2,), (3,), (4,), (5, 6, 7)]
    alone = [
        (await runner.execute(Batch((_row(p, table=t),))))[0] for p, t in zip(prompts, tables, strict=True)
    ]
    assert len(set(alone)) > 3
    rows = [_row(p, table=t, sample=i != 2) for i, (p, t) in enumerate(zip(prompts, tables, strict=True))]
    assert await runner.execute(Batch(tuple(rows))) == (alone[0], alone[1], alone[3], alone[4])
    assert await runner.execute(Batch((_row((1, 2, 3), sample=False),))) == ()
    await runner.aclose()


async def test_an_unwritten_position_gives_no_token(runner: TorchModelRunner) -> None:
    """The pool is NaN where nothing was written: a hole in the context must not become an answer."""
    assert await runner.execute(Batch((_row((5,), start=7), _row((1, 2), table=(1,))))) == (
        -1,
        (await runner.execute(Batch((_row((1, 2), table=(2,)),))))[0],
    )
    await runner.aclose()


async def test_a_step_is_launched_while_the_one_before_runs(
    runner: TorchModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device, where the end of a step is waited for beside the launches: the second step takes the first one's
    token from there."""
    prompt, first, second = (5, 6, 7), _row((5, 6, 7), table=(0,)), _row((-1,), start=3, table=(0,))
    token = (await runner.execute(Batch((first,))))[0]
    expected = (await runner.execute(Batch((_row((token,), start=3, table=(0,)),))))[0]
    monkeypatch.setattr(runner, "_is_on_host", False)
    may_end, prepared = threading.Event(), asyncio.Event()
    collect = runner._collect
    monkeypatch.setattr(runner, "_collect", lambda launched: may_end.wait(10) and collect(launched))
    ahead = Batch((first._replace(token_ids=prompt),), prepare_next=prepared.set)
    steps = [asyncio.create_task(runner.execute(ahead))]
    await asyncio.wait_for(prepared.wait(), 10)
    launched = asyncio.Event()
    steps.append(asyncio.create_task(runner.execute(Batch((second,), prepare_next=launched.set))))
    await asyncio.wait_for(launched.wait(), 10)
    assert not any(step.done() for step in steps)
    steps[1].cancel()
    await asyncio.sleep(0)
    assert not steps[1].done()  # it still writes
    may_end.set()
    assert await steps[0] == (token,)
    with pytest.raises(asyncio.CancelledError):
        await steps[1]
    steps = [asyncio.create_task(runner.execute(Batch((row,)))) for row in (first, second)]
    assert [await step for step in steps] == [(token,), (expected,)]
    await runner.aclose()


class _BlockingModel(nn.Module):
    """Stands in for transformers' model: stops in the middle of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on, self.left = threading.Event(), threading.Event(), threading.Event()

    def forward(self, **_: object) -> None:
        self.entered.set()
        self.go_on.wait(30)
        self.left.set()
        raise RuntimeError("a step that nobody waits for any more")


async def test_a_cancelled_step_is_waited_for() -> None:
    model = _BlockingModel()
    storage = KVStorage(KVLayout(4, (LayerLayout(1, 2, 2),), "float32", 4), 2)
    runner = TorchModelRunner(model, storage, vocab_size=10, max_model_len=8)
    step = asyncio.create_task(runner.execute(Batch((_row((1, 2)),))))
    await asyncio.to_thread(model.entered.wait, 30)
    for _ in range(3):
        step.cancel()
        await asyncio.sleep(0.01)
        assert not step.done(), "abandoned while the device still writes"
    model.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert model.left.is_set()
    await runner.aclose()


async def test_a_model_that_does_not_call_our_attention_is_noticed(tmp_path: Path) -> None:
    directory = make_model("gqa", tmp_path)
    # With native ops the modules that call it are ours.
    runner = load_runner(ModelConfig(str(directory)), EngineConfig(num_blocks=4, native_ops=False)).runner
    runner._model.config._attn_implementation = "sdpa"  # type: ignore[union-attr]
    with pytest.raises(InternalError, match="0 of 2 layers"):
        await runner.execute(Batch((_row((1, 2)),)))
    await runner.aclose()


# --- ops -------------------------------------------------------------------------------------------------


def _caches(block_size: int, num_kv_heads: int, k_dim: int, v_dim: int) -> tuple[Tensor, Tensor]:
    """The middle one of three layers, so that neither blocks nor K and V lie next to each other."""
    layer = LayerLayout(num_kv_heads, k_dim, v_dim)
    layout = KVLayout(block_size, (LayerLayout(1, 3, 5), layer, LayerLayout(2, 1, 1)), "float32", 4)
    return KVStorage(layout, 40, fill_nan=True).layer_views(1)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One query token, query [H, Dk], over key [C, Hkv, Dk] and value [C, Hkv, Dv], in float64."""
    group = query.shape[0] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    weights = (torch.einsum("hd,chd->hc", query.double(), key) * scale).softmax(-1)
    return torch.einsum("hc,chd->hd", weights, value)


@pytest.mark.parametrize(
    ("block_size", "num_kv_heads", "group", "k_dim", "v_dim"),
    [(16, 2, 2, 8, 8), (4, 1, 3, 5, 7), (1, 3, 1, 2, 2), (8, 2, 1, 6, 4)],
    ids=["usual", "odd", "blocks-of-one", "k-wider-than-v"],
)
def test_attention_over_pages_equals_attention_in_a_row(
    block_size: int, num_kv_heads: int, group: int, k_dim: int, v_dim: int
) -> None:
    torch.manual_seed(0)
    k_cache, v_cache = _caches(block_size, num_kv_heads, k_dim, v_dim)
    lengths = [1, 2, block_size, block_size + 1, 9]
    num_blocks = [-(-length // block_size) for length in lengths]
    free = torch.randperm(40)
    tables = torch.zeros(len(lengths), max(num_blocks), dtype=torch.int64)
    keys = [torch.randn(length, num_kv_heads, k_dim) for length in lengths]
    values = [torch.randn(length, num_kv_heads, v_dim) for length in lengths]
    for row, (length, count) in enumerate(zip(lengths, num_blocks, strict=True)):
        tables[row, :count] = free[:count]
        free = free[count:]
        index = torch.arange(length)
        where = naive.Positions(tables[row][index // block_size], index % block_size)
        naive.write_kv(keys[row], values[row], k_cache, v_cache, where)
        assert torch.equal(naive.read_kv(k_cache, where), keys[row])
        assert torch.equal(naive.read_kv(v_cache, where), values[row])

    query = torch.randn(len(lengths), num_kv_heads * group, k_dim)
    plan = planned.plan_decode(tables, torch.tensor(lengths), max(lengths), block_size, torch.float32)
    decoded = planned.paged_decode_attention(query, k_cache, v_cache, plan, 0.3)
    for row in range(len(lengths)):
        expected = _attend(query[row], keys[row], values[row], 0.3)
        torch.testing.assert_close(decoded[row].double(), expected, rtol=1e-4, atol=1e-5)

    for row, length in enumerate(lengths):
        for start in {0, length // 2, length - 1}:
            query = torch.randn(length - start, num_kv_heads * group, k_dim)
            chunk = planned.plan_prefill(tables[row], start, length - start, block_size)
            out = planned.paged_prefill_attention(query, k_cache, v_cache, chunk, 0.3)
            for i in range(length - start):
                seen = start + i + 1
                expected = _attend(query[i], keys[row][:seen], values[row][:seen], 0.3)
                torch.testing.assert_close(out[i].double(), expected, rtol=1e-4, atol=1e-5)


async def test_the_models_threads_stay_on_their_cores() -> None:
    core = min(os.sched_getaffinity(0))
    loaded = load_runner(ModelConfig(), EngineConfig(num_blocks=8, cpus=(core,)))
    try:
        there = await asyncio.get_running_loop().run_in_executor(
            loaded.runner._thread, os.sched_getaffinity, 0
        )
        assert there == {core} != os.sched_getaffinity(0) or len(os.sched_getaffinity(0)) == 1
    finally:
        await loaded.runner.aclose()


def test_a_core_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="core 4096"):
        load_runner(ModelConfig(), EngineConfig(num_blocks=8, cpus=(4096,)))
