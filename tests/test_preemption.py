"""A sequence that has to give way comes back with the same KV: from host memory, or computed again."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from fake_model import (
    VOCAB_SIZE,
    Collected,
    FakeStorage,
    expected_tokens,
    make_engine,
    make_request,
    run_until_idle,
)
from prometheus_client import CollectorRegistry
from reference import make_model

from baton.clock import SystemClock, VirtualClock
from baton.config import EngineConfig, ModelConfig
from baton.engine.batch import StepOutput
from baton.engine.budget import StepBudget
from baton.engine.engine import Engine
from baton.engine.model_runner import load_runner
from baton.engine.preemption import Preemption
from baton.engine.rates import StepRates
from baton.engine.sequence import Sequence
from baton.engine.worker import Worker
from baton.errors import ConfigError
from baton.kv.cache_manager import KVCacheManager
from baton.kv.offload import HostBlocks
from baton.messages import Load, Purpose
from baton.request import BlockId, Request, RequestId, SamplingParams
from baton.worker_metrics import WorkerMetrics
from baton_cli.compose import count_steps

BLOCK_BYTES = 16  # of the fake storage with blocks of four tokens


pytestmark = pytest.mark.usefixtures("quiet")


def _prompts(seed: int, number: int = 8) -> dict[str, list[int]]:
    rng = random.Random(seed)
    return {str(i): [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 20))] for i in range(number)}


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("swap_blocks", [0, 3, 100])
async def test_tokens_are_the_same_with_swap_space_and_without(
    swap_blocks: int, enable_prefix_caching: bool
) -> None:
    engine, runner = make_engine(
        num_blocks=14,
        max_num_batched_tokens=16,
        swap_space_bytes=swap_blocks * BLOCK_BYTES,
        enable_prefix_caching=enable_prefix_caching,
    )
    prompts = _prompts(1)
    for name, prompt in prompts.items():
        engine.add(make_request(name, prompt, 25))
    collected = await run_until_idle(engine)
    assert collected.tokens == {name: expected_tokens(prompt, 25) for name, prompt in prompts.items()}
    assert engine.pressure.num_preemptions > 0
    if swap_blocks == 100:
        # Each token's KV is computed once: nothing was lost.
        assert engine.pressure.num_swapped == engine.pressure.num_preemptions
        computed = sum(batch.num_tokens for batch in runner.batches)
        assert computed == sum(len(prompt) + 24 for prompt in prompts.values())
    elif swap_blocks == 0:
        assert engine.pressure.num_swapped == 0


async def test_what_was_handed_over_survives_being_swapped() -> None:
    """Its prompt was never computed here."""
    engine, runner = make_engine(
        num_blocks=6, swap_space_bytes=100 * BLOCK_BYTES, enable_prefix_caching=False
    )
    engine.add(make_request("a", range(7), 16))
    collected = Collected()
    collected.add(await engine.step())
    remote = make_request("b", range(30, 36), 16)
    engine.reserve(remote)
    assert engine.admit() == ("b",)
    sequence = engine.sequence(RequestId("b"))
    assert sequence is not None
    runner.storage.write(sequence.block_table, 0, remote.prompt_token_ids)
    engine.activate(RequestId("b"), expected_tokens(range(30, 36), 1)[0])
    await run_until_idle(engine, collected)
    assert engine.pressure.num_swapped > 0
    assert collected.tokens["b"] == expected_tokens(range(30, 36), 16)[1:]
    rows = [row for batch in runner.batches for row in batch.rows if row.request_id == "b"]
    assert all(len(row.token_ids) == 1 for row in rows)


async def test_abort_while_swapped_gives_everything_back() -> None:
    engine, _ = make_engine(num_blocks=6, swap_space_bytes=100 * BLOCK_BYTES)
    engine.add(make_request("a", range(7), 16))
    engine.add(make_request("b", range(30, 37), 16))
    while not engine.pressure.num_swapped:
        await engine.step()
    sequence = engine.sequence(RequestId("b"))
    assert sequence is not None and sequence.host_blocks and not sequence.block_table
    engine.abort(RequestId("b"))
    engine.check_integrity()
    assert sequence.host_blocks == []
    collected = await run_until_idle(engine)
    assert collected.finished == {"a": "length"}


class _EvenClock(SystemClock):
    """Everything takes equally long, so that what is measured depends on nothing but the engine."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now(self) -> float:
        self._now_s += 1e-3
        return self._now_s


async def test_swap_under_random_aborts() -> None:
    rng = random.Random(2)
    engine, _ = make_engine(
        num_blocks=20, max_num_batched_tokens=16, swap_space_bytes=12 * BLOCK_BYTES, clock=_EvenClock()
    )
    prompts = _prompts(3, 60)
    todo, aborted, collected = list(prompts), set[str](), Collected()
    while todo or engine.has_work:
        for name in todo[:1]:
            engine.add(make_request(name, prompts[name], 20))
        del todo[:1]
        alive = [name for name in prompts if engine.sequence(RequestId(name))]
        if rng.random() < 0.05 and alive:
            aborted.add(victim := rng.choice(alive))
            engine.abort(RequestId(victim))
        collected.add(await engine.step())
        engine.check_integrity()
    assert (
        engine.pressure.num_swapped
        and engine.pressure.num_swapped < engine.pressure.num_preemptions
        and aborted
    )
    for name in prompts.keys() - aborted:
        assert collected.tokens[name] == expected_tokens(prompts[name], 20)


def test_the_cheaper_way_is_taken_by_measured_rates() -> None:
    def preempted(prefill_tokens_per_s: float, swap_bytes_per_s: float) -> str:
        rates = StepRates()
        host = HostBlocks(
            FakeStorage(8, 4), 100 * BLOCK_BYTES, SystemClock(), lambda num_bytes, seconds: None
        )
        kv = KVCacheManager(8, 4, "model", host_blocks=host)
        sequence = Sequence(Request(RequestId("a"), tuple(range(16))), token_ids=list(range(16)))
        assert kv.allocate(sequence, 16)
        kv.commit(sequence, 16)
        if prefill_tokens_per_s:
            rates.note(0, 100, 100 / prefill_tokens_per_s)
        if swap_bytes_per_s:
            rates.note_swap(1000, 1000 / swap_bytes_per_s)
        preemption = Preemption(kv, rates)
        preemption.give_up(sequence)
        kv.check_integrity()
        return "swapped" if preemption.num_swapped else "recomputed"

    # 16 tokens, 4 blocks of 16 bytes there and back: 128 bytes.
    assert preempted(1000, 128 / 0.016 * 1.1) == "swapped"
    assert preempted(1000, 128 / 0.016 * 0.9) == "recomputed"
    assert preempted(0, 0) == preempted(1000, 0) == "swapped", "to learn what it costs"


def test_the_swap_rate_is_measured_on_the_clock() -> None:
    clock = VirtualClock()

    async def main() -> None:
        rates = StepRates()

        class SlowStorage(FakeStorage):
            def region(self, block_id: BlockId, layer_start: int, layer_end: int) -> memoryview:
                clock._selector.now_s += 0.001
                return super().region(block_id, layer_start, layer_end)

        host = HostBlocks(SlowStorage(8, 4), 100 * BLOCK_BYTES, clock, rates.note_swap)
        host_ids = host.store([BlockId(1), BlockId(2)])
        assert rates.swap_s(BLOCK_BYTES) == pytest.approx(0.001)
        host.load(host_ids, [BlockId(3), BlockId(4)])
        assert rates.swap_s(10 * BLOCK_BYTES) == pytest.approx(0.010)

    clock.run(main())


def test_swap_space_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="no room for one block"):
        make_engine(swap_space_bytes=BLOCK_BYTES - 1)


# --- memory for the step itself --------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("room", [1, 5, 30])
async def test_a_step_that_does_not_fit_is_tried_again_with_less(room: int, ahead: bool) -> None:
    engine, runner = make_engine(num_blocks=100, ahead=ahead)
    runner.room = room
    prompts = _prompts(4)
    for name, prompt in prompts.items():
        engine.add(make_request(name, prompt, 10))
    engine.fork(RequestId("0"), make_request("fork", prompts["0"], 10, seed=1))
    collected = await run_until_idle(engine)
    assert collected.tokens.pop("fork") == expected_tokens(prompts["0"], 10, seed=1)
    assert collected.tokens == {name: expected_tokens(prompt, 10) for name, prompt in prompts.items()}
    assert engine.pressure.num_retries > 0 and engine.num_used_blocks == 0


async def test_requests_end_when_not_even_one_token_fits_and_the_engine_lives() -> None:
    engine, runner = make_engine()
    runner.room = 0
    engine.add(make_request("a", range(10), 10))
    collected = await run_until_idle(engine)
    assert collected.errors == {"a": "OutOfMemory: too much"}
    assert engine.num_used_blocks == 0
    runner.room = 100
    engine.add(make_request("b", range(10), 10))
    assert (await run_until_idle(engine)).tokens["b"] == expected_tokens(range(10), 10)


def test_the_budget_halves_and_comes_back() -> None:
    budget = StepBudget(512)
    assert budget.did_not_fit(512) and budget.num_tokens == 256
    assert budget.did_not_fit(200) and budget.num_tokens == 100
    for _ in range(60):
        budget.fitted()
    assert budget.num_tokens == 512
    retries = 0
    while budget.did_not_fit(2**20):
        retries += 1
    assert retries == 8
    assert not budget.did_not_fit(1)


async def test_pressure_is_told_as_metrics() -> None:
    class OneEngine:
        """What `count_steps` needs of a worker."""

        def __init__(self, engine: Engine) -> None:
            self.engine = engine

        def listen(self, listener: Callable[[StepOutput], None]) -> None:
            self.listener = listener

        def blocks_by_purpose(self) -> dict[Purpose, int]:
            return {}

        def load(self) -> Load:
            return self.engine.load()

    engine, runner = make_engine(num_blocks=6, swap_space_bytes=3 * BLOCK_BYTES)
    registry, worker = CollectorRegistry(), OneEngine(engine)
    count_steps(cast(Worker, worker), WorkerMetrics(registry), VirtualClock())
    engine.add(make_request("a", range(7), 16))
    engine.add(make_request("b", range(30, 37), 16))
    runner.room = 6
    while engine.has_work:
        worker.listener(await engine.step())

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    pressure = engine.pressure
    assert value("baton_preemptions_total", kind="swapped") == pressure.num_swapped
    assert value("baton_preemptions_total", kind="recomputed") == pressure.num_recomputed
    assert value("baton_step_retries_total") == pressure.num_retries > 0
    assert pressure.num_preemptions > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_real_model_answers_the_same_with_swap_space_and_without(
    tmp_path: Path, temperature: float
) -> None:
    directory = make_model("gqa", tmp_path)
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(100) for _ in range(rng.randrange(5, 30))) for _ in range(5)]
    answers = []
    for num_blocks, swap_space_bytes in ((64, 0), (9, 0), (9, 2**20)):
        config = EngineConfig(
            num_blocks=num_blocks,
            block_size=8,
            swap_space_bytes=swap_space_bytes,
            enable_prefix_caching=False,
        )
        model = load_runner(ModelConfig(str(directory)), config, fill_nan=True)
        engine = Engine(config, model.runner, SystemClock(), model.fingerprint)
        # Computing again is made to look dear, so that what can be swapped is.
        engine._rates.note(0, 1, 1000.0)
        for number, prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=25, temperature=temperature, seed=number)
            engine.add(Request(RequestId(str(number)), prompt, sampling))
        answers.append((await run_until_idle(engine)).tokens)
        assert bool(engine.pressure.num_preemptions) == (num_blocks == 9)
        assert bool(engine.pressure.num_swapped) == bool(swap_space_bytes)
        await model.runner.aclose()
    assert answers[0] == answers[1] == answers[2]
