"""The host prepares a step while the device runs the one before: the same tokens, and nothing leaks when the step
ahead turns out to be for nothing."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest
from fake_model import (
    VOCAB_SIZE,
    Collected,
    FakeRunner,
    expected_tokens,
    make_engine,
    make_request,
    run_until_idle,
)
from reference import make_model

from baton.clock import SystemClock, VirtualClock
from baton.config import EngineConfig, ModelConfig
from baton.engine.batch import Batch, LayerProgress
from baton.engine.engine import Engine
from baton.engine.model_runner import TorchModelRunner, load_runner
from baton.engine.sequence import SequenceStatus
from baton.request import Request, RequestId, SamplingParams, TokenBias

A, B, C = RequestId("a"), RequestId("b"), RequestId("c")


pytestmark = pytest.mark.usefixtures("quiet")


def _gated(**settings: int | bool) -> tuple[Engine, FakeRunner]:
    engine, runner = make_engine(**settings)
    runner.gate = asyncio.Event()
    return engine, runner


async def _two_under_way(engine: Engine, runner: FakeRunner) -> "asyncio.Task[object]":
    """A step waits at the gate, and the next one is prepared."""
    num_batches = len(runner.batches)
    step = asyncio.create_task(engine.step())
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(runner.batches) == num_batches + 2 and not step.done()
    return step


async def _drain(engine: Engine, runner: FakeRunner, collected: Collected | None = None) -> Collected:
    assert runner.gate is not None
    runner.gate.set()
    collected = await run_until_idle(engine, collected)
    assert engine.num_used_blocks == 0
    return collected


async def test_a_step_is_given_to_the_device_before_the_one_before_it_has_ended() -> None:
    engine, runner = make_engine()
    engine.add(make_request("a", range(6), 10))
    collected = await run_until_idle(engine)
    assert collected.tokens["a"] == expected_tokens(range(6), 10)
    # Ten steps, none for nothing: the host knows which token is the last one allowed.
    assert len(runner.batches) == 10 and runner.num_ahead == 9
    assert [batch.rows[0].token_ids for batch in runner.batches[1:]] == [(-1,)] * 9


async def test_a_stop_is_noticed_one_step_late_and_the_step_thrown_away() -> None:
    engine, runner = make_engine()
    third = expected_tokens([1, 2, 3], 3)[2]
    engine.add(make_request("a", [1, 2, 3], 8, stop=(third,)))
    collected = await run_until_idle(engine)
    assert collected.finished == {"a": "stop"} and len(collected.tokens["a"]) == 3
    assert len(runner.batches) == 4
    assert engine.num_used_blocks == 0


async def test_blocks_of_a_row_that_is_for_nothing_go_to_nobody_before_its_step_has_ended() -> None:
    engine, runner = _gated(num_blocks=4, block_size=4)
    first = expected_tokens(range(8), 1)[0]
    engine.add(make_request("a", range(8), 4, stop=(first,)))
    step = await _two_under_way(engine, runner)
    engine.reserve(make_request("b", range(50, 60), 4))
    runner.gate.set()
    runner.gate = gate = asyncio.Event()  # lets the first step go, and stops the second
    output = await step
    assert output.admitted == (), "the second step still writes to the third block of a"
    assert engine.num_used_blocks == 3 and engine.sequence(A) is None
    engine.check_integrity()
    gate.set()
    assert (await engine.step()).admitted == (B,)
    engine.abort(B)
    assert engine.num_used_blocks == 0


@pytest.mark.parametrize("in_second_step", [True, False])
async def test_abort_with_two_steps_under_way(in_second_step: bool) -> None:
    engine, runner = _gated(block_size=4)
    engine.add(make_request("a", range(6), 1 if not in_second_step else 9))
    engine.add(make_request("b", range(30, 36), 9))
    step = await _two_under_way(engine, runner)
    assert len(runner.batches[1].rows) == 1 + in_second_step
    engine.abort(A)
    engine.add(make_request("a", range(60, 69), 9))  # the name is free at once
    runner.gate.set()
    collected = Collected()
    collected.add(await step)
    await _drain(engine, runner, collected)
    assert collected.tokens == {
        "a": expected_tokens(range(60, 69), 9),
        "b": expected_tokens(range(30, 36), 9),
    }


async def test_a_failing_step_takes_its_own_requests_and_leaves_those_of_the_next() -> None:
    engine, runner = _gated(max_num_batched_tokens=16)
    engine.add(make_request("a", range(6), 9))
    engine.add(make_request("b", range(30, 55), 9), prefill_only=True)  # in both steps
    engine.add(make_request("c", range(60, 63), 9))  # in the second one only
    runner.failure = RuntimeError("out of luck")
    step = await _two_under_way(engine, runner)
    runner.gate.set()
    collected = Collected()
    collected.add(await step)
    engine.check_integrity()
    assert collected.finished == {"a": "error", "b": "error"}
    held = engine.sequence(B)
    assert held is not None and held.status is SequenceStatus.HELD
    engine.release(B)
    await _drain(engine, runner, collected)
    assert collected.tokens["c"] == expected_tokens(range(60, 63), 9)


async def test_no_numbers_in_the_first_step_of_two() -> None:
    engine, runner = _gated()
    engine.add(make_request("a", range(6), 9))
    engine.add(make_request("b", range(30, 36), 9))
    runner.nan_requests.add(A)
    step = await _two_under_way(engine, runner)
    runner.gate.set()
    collected = Collected()
    collected.add(await step)
    assert collected.finished == {"a": "error"}
    await _drain(engine, runner, collected)
    assert collected.tokens["b"] == expected_tokens(range(30, 36), 9)


async def test_cancelling_takes_both_steps_back() -> None:
    engine, runner = _gated()
    engine.add(make_request("a", range(6), 9))
    engine.add(make_request("b", range(9), 9))
    collected = Collected()
    step = await _two_under_way(engine, runner)
    engine.abort(B)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    engine.check_integrity()
    sequence = engine.sequence(A)
    assert sequence is not None and sequence.next_start == 0 and engine.num_used_blocks == 2
    await _drain(engine, runner, collected)
    assert collected.tokens == {"a": expected_tokens(range(6), 9)}


async def test_nobody_is_preempted_for_a_step_ahead() -> None:
    engine, runner = make_engine(num_blocks=6, block_size=4)
    engine.add(make_request("a", range(7), 16))
    engine.add(make_request("b", range(30, 37), 16))
    collected = await run_until_idle(engine)
    assert engine.pressure.num_preemptions > 0 and runner.num_ahead > 0
    assert collected.tokens == {
        "a": expected_tokens(range(7), 16),
        "b": expected_tokens(range(30, 37), 16),
    }


async def test_a_chunk_is_announced_with_its_own_positions() -> None:
    """Layers of the second step may be written before the host has seen the end of the first."""

    class TellingRunner(FakeRunner):
        async def execute(self, batch: Batch) -> tuple[int, ...]:
            tokens = await super().execute(batch)
            if batch.listener is not None:
                batch.listener.written(1)
            return tokens

    engine = Engine(EngineConfig(max_num_batched_tokens=64), TellingRunner(64, 4), SystemClock(), "fake")
    told: list[LayerProgress] = []
    engine.listen_to_layers((1,), told.append)
    engine.add(make_request("a", range(150), 9), prefill_only=True)
    await run_until_idle(engine)
    assert [progress.num_tokens for progress in told] == [64, 128, 150]


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
async def test_everything_at_once_gives_the_tokens_of_each_alone(enable_prefix_caching: bool) -> None:
    """Stops, lengths, forks, reservations, prefill-only prompts, aborts, failures, under pressure."""
    rng = random.Random(11)
    engine, runner = make_engine(
        num_blocks=40, block_size=4, max_num_batched_tokens=20, enable_prefix_caching=enable_prefix_caching
    )
    wanted: dict[str, list[int]] = {}
    lost: set[str] = set()
    collected = Collected()
    numbers = iter(range(150))
    arriving = True
    while arriving or engine.has_work or engine.num_sequences:
        for _ in range(rng.randrange(3)):
            arriving = (number := next(numbers, -1)) >= 0
            if arriving:
                wanted |= _arrive(engine, rng, f"r{number}")
        if rng.random() < 0.05 and engine.num_sequences:
            victim = rng.choice([name for name in wanted if engine.sequence(RequestId(name))])
            lost.add(victim)
            engine.abort(RequestId(victim))
        if rng.random() < 0.02:
            runner.failure = RuntimeError("out of luck")
        collected.add(await engine.step())
        engine.check_integrity()
        for name in collected.admitted:
            sequence = engine.sequence(RequestId(name))
            if sequence is not None and sequence.status is SequenceStatus.RESERVED and rng.random() < 0.5:
                prompt = sequence.request.prompt_token_ids
                runner.storage.write(sequence.block_table, 0, prompt)
                first = expected_tokens(prompt, 1, sequence.request.sampling.seed or 0)
                collected.tokens[name] = first
                collected._first_index[name] = 0
                if (reason := engine.activate(RequestId(name), first[0])) is not None:
                    collected.finished[name] = reason.value
        for name in wanted:
            sequence = engine.sequence(RequestId(name))
            if sequence is not None and sequence.status is SequenceStatus.HELD:
                engine.release(RequestId(name))
    lost |= {name for name, reason in collected.finished.items() if reason == "error"}
    assert runner.num_ahead > 50 and engine.pressure.num_preemptions and lost
    right = {name: tokens for name, tokens in wanted.items() if name not in lost}
    assert {name: tokens for name, tokens in collected.tokens.items() if name not in lost} == right
    assert engine.num_used_blocks == 0


def _arrive(engine: Engine, rng: random.Random, name: str) -> dict[str, list[int]]:
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 50))]
    num_tokens = rng.randrange(1, 25)
    kind = rng.choice(["local", "local", "stop", "remote", "prefill_only", "family"])
    seed = rng.randrange(1000)
    tokens = expected_tokens(prompt, num_tokens, seed)
    if kind == "stop":
        end = tokens.index(tokens[num_tokens // 2]) + 1
        engine.add(make_request(name, prompt, num_tokens, seed=seed, stop=(tokens[end - 1],)))
        return {name: tokens[:end]}
    request = make_request(name, prompt, num_tokens, seed=seed)
    if kind == "remote":
        engine.reserve(request)
    elif kind == "prefill_only":
        engine.add(request, prefill_only=True)
        tokens = tokens[:1]
    else:
        engine.add(request)
    if kind != "family":
        return {name: tokens}
    engine.fork(RequestId(name), make_request(f"{name}.1", prompt, num_tokens, seed=seed + 1))
    return {name: tokens, f"{name}.1": expected_tokens(prompt, num_tokens, seed + 1)}


def test_steps_follow_each_other_without_a_gap_and_are_timed_one_by_one() -> None:
    clock = VirtualClock()

    class TimedRunner(FakeRunner):
        async def execute(self, batch: Batch) -> tuple[int, ...]:
            async with lock:
                await clock.sleep(0.006)
                batch.prepare_next()
                await clock.sleep(0.004)
                return await super().execute(batch)

    lock = asyncio.Lock()

    async def main() -> None:
        engine = Engine(EngineConfig(), TimedRunner(64, 4, ahead=False), clock, "fake")
        engine.add(make_request("a", range(6), 20))
        seconds = []
        while engine.has_work:
            seconds.append((await engine.step()).seconds)
            if engine.has_work:
                await clock.sleep(0.003)  # the host is busy with what the step gave
        assert clock.now() == pytest.approx(20 * 0.010, abs=0.0031)
        assert seconds[:-1] == pytest.approx([0.010] * 20, abs=0.0031)
        assert engine.load().decode_step_s == pytest.approx(0.010, rel=0.1)

    clock.run(main())


# --- a real model ----------------------------------------------------------------------------------------


class _SlowDevice:
    """The real runner, whose steps take long enough for the host to be ahead of it, if that is allowed."""

    def __init__(self, runner: TorchModelRunner, ahead: bool) -> None:
        self.storage, self.vocab_size = runner.storage, runner.vocab_size
        self.max_model_len, self.grammars = runner.max_model_len, runner.grammars
        self.num_ahead = 0
        self._runner = runner
        self._ahead = ahead
        self._num_running = 0

    async def execute(self, batch: Batch) -> tuple[int, ...]:
        self.num_ahead += self._num_running
        self._num_running += 1
        try:
            if self._ahead:
                batch.prepare_next()
            await asyncio.sleep(0.002)
            return await self._runner.execute(replace(batch, prepare_next=lambda: None))
        finally:
            self._num_running -= 1

    async def aclose(self) -> None:
        await self._runner.aclose()


def _mixed_requests(stateful: bool) -> list[Request]:
    rng = random.Random(0)
    requests = []
    for number, num_tokens in enumerate((3, 40, 17, 16, 1, 60)):
        special = stateful and number % 2 == 0
        sampling = SamplingParams(
            max_tokens=15,
            temperature=0.0 if number % 3 == 0 else 1.0,
            seed=number,
            repetition_penalty=1.3 if special else 1.0,
            logprobs=2 if special else None,
            logit_bias=(TokenBias(5, 3.0),) if special else (),
        )
        prompt = tuple(rng.randrange(100) for _ in range(num_tokens))
        requests.append(Request(RequestId(str(number)), prompt, sampling))
    return requests


@pytest.mark.parametrize("stateful", [False, True])
async def test_a_real_model_draws_the_same_tokens(tmp_path: Path, stateful: bool) -> None:
    """Sequences whose next mask depends on the token before are not run ahead, nor are those beside them."""
    directory = make_model("gqa", tmp_path)
    config = EngineConfig(num_blocks=64, block_size=8, max_num_batched_tokens=64, max_num_seqs=8)
    answers, num_ahead = [], []
    for ahead in (False, True):
        model = load_runner(ModelConfig(str(directory)), config, fill_nan=True)
        runner = _SlowDevice(model.runner, ahead)
        engine = Engine(config, runner, SystemClock(), model.fingerprint)
        for request in _mixed_requests(stateful):
            engine.add(request)
        answers.append((await run_until_idle(engine)).tokens)
        num_ahead.append(runner.num_ahead)
        await runner.aclose()
    assert answers[0] == answers[1]
    assert num_ahead[0] == 0
    assert num_ahead[1] == 0 if stateful else num_ahead[1] > 10
