"""The engine on a model without weights whose answer depends on every token the blocks hold."""

import asyncio
import random

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

from baton.clock import VirtualClock
from baton.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.sequence import SequenceStatus
from baton.errors import BatonError, ConfigError, InvalidRequest, Overloaded, RequestTooLarge
from baton.request import FinishReason, Request, RequestId, SamplingParams

A, B, C = RequestId("a"), RequestId("b"), RequestId("c")


pytestmark = pytest.mark.usefixtures("quiet")


def _assert_idle(engine: Engine) -> None:
    engine.check_integrity()
    assert engine.num_used_blocks == 0 and engine.load().num_running == engine.load().num_waiting == 0


async def _hand_over(engine: Engine, runner: FakeRunner, request: Request) -> FinishReason | None:
    """What a prefill worker and the transfer do to a reservation."""
    sequence = engine.sequence(request.request_id)
    assert sequence is not None and sequence.status is SequenceStatus.RESERVED
    cached, prompt = sequence.num_cached_tokens, request.prompt_token_ids
    assert cached % runner.storage.layout.block_size == 0 and cached < len(prompt)
    runner.storage.write(sequence.block_table, cached, prompt[cached:])
    return engine.activate(request.request_id, expected_tokens(prompt, 1)[0])


@pytest.mark.parametrize("with_first_token", [False, True])
async def test_a_prompt_whose_kv_never_came_is_computed_in_its_reserved_blocks(
    with_first_token: bool,
) -> None:
    engine, runner = make_engine(num_blocks=40, block_size=4, max_num_batched_tokens=16)
    prompt = list(range(50))
    await _begin_cached(engine, prompt[:20])
    engine.reserve(make_request("a", prompt, 8))
    engine.admit()
    sequence = engine.sequence(A)
    assert sequence is not None
    reserved = list(sequence.block_table)
    half = prompt[20:30]
    runner.storage.write(
        sequence.block_table, 20, [token + 1 for token in half]
    )  # wrong: nobody may believe it
    first = expected_tokens(prompt, 1)[0] if with_first_token else None
    assert engine.recompute(A, first) is None
    collected = await run_until_idle(engine)
    assert collected.tokens["a"] == expected_tokens(prompt, 8)[int(with_first_token) :]
    assert sequence.block_table[: len(reserved)] in (reserved, [])
    _assert_idle(engine)


async def test_a_recomputed_prompt_may_end_with_the_token_that_is_known() -> None:
    engine, _ = make_engine(num_blocks=20)
    engine.reserve(make_request("a", range(5), 1))
    engine.admit()
    assert engine.recompute(A, 3) is FinishReason.LENGTH
    _assert_idle(engine)
    with pytest.raises(InvalidRequest, match="holds no reservation"):
        engine.recompute(A, None)


async def _begin_cached(engine: Engine, prompt: list[int]) -> None:
    """Blocks of this prompt are in the prefix cache from here on."""
    engine.add(make_request("before", prompt, 1))
    await run_until_idle(engine)


async def test_tokens_are_those_of_each_request_alone() -> None:
    rng = random.Random(0)
    engine, _ = make_engine(num_blocks=200, max_num_batched_tokens=32)
    prompts = {str(i): [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 90))] for i in range(20)}
    for name, prompt in prompts.items():
        engine.add(make_request(name, prompt, 12))
    collected = await run_until_idle(engine)
    assert collected.tokens == {name: expected_tokens(prompt, 12) for name, prompt in prompts.items()}
    assert set(collected.finished.values()) == {"length"}
    _assert_idle(engine)


async def test_preemption_changes_no_token() -> None:
    rng = random.Random(1)
    engine, _ = make_engine(num_blocks=14, max_num_batched_tokens=16)
    prompts = {str(i): [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 20))] for i in range(8)}
    for name, prompt in prompts.items():
        engine.add(make_request(name, prompt, 25))
    collected = await run_until_idle(engine)
    assert engine.pressure.num_preemptions > 0
    assert collected.tokens == {name: expected_tokens(prompt, 25) for name, prompt in prompts.items()}
    _assert_idle(engine)


async def test_a_prefix_hit_changes_no_token_and_saves_work() -> None:
    engine, runner = make_engine()
    prompt = list(range(50))
    engine.add(make_request("a", prompt, 4))
    await run_until_idle(engine)
    runner.batches.clear()
    engine.add(make_request("b", prompt, 4))
    engine.add(make_request("c", [*prompt[:30], 7, 8], 4))
    collected = await run_until_idle(engine)
    assert collected.tokens == {
        "b": expected_tokens(prompt, 4),
        "c": expected_tokens([*prompt[:30], 7, 8], 4),
    }
    assert sorted(len(row.token_ids) for row in runner.batches[0].rows) == [2, 4]


async def test_salts_separate_tenants() -> None:
    engine, runner = make_engine()
    engine.add(make_request("a", range(20), 1, cache_salt="x"))
    await run_until_idle(engine)
    runner.batches.clear()
    engine.add(make_request("b", range(20), 1, cache_salt="y"))
    await run_until_idle(engine)
    assert len(runner.batches[0].rows[0].token_ids) == 20


async def test_stop_tokens_end_a_request() -> None:
    engine, _ = make_engine()
    third = expected_tokens([1, 2, 3], 3)[2]
    engine.add(make_request("a", [1, 2, 3], 8, stop=(third,)))
    engine.add(Request(B, (1, 2, 3), SamplingParams(max_tokens=4, ignore_eos=True), eos_token_ids=(third,)))
    engine.add(Request(C, (1, 2, 3), SamplingParams(max_tokens=8), eos_token_ids=(5, third)))
    collected = await run_until_idle(engine)
    assert collected.finished == {"a": "stop", "b": "length", "c": "stop"}
    assert [len(collected.tokens[name]) for name in "abc"] == [3, 4, 3]


async def test_the_model_length_ends_a_request() -> None:
    engine, _ = make_engine(max_model_len=10)
    engine.add(make_request("a", range(7), 100))
    collected = await run_until_idle(engine)
    assert collected.finished == {"a": "length"} and len(collected.tokens["a"]) == 3


async def test_the_whole_pool_ends_a_request_before_it_waits_for_ever() -> None:
    engine, _ = make_engine(num_blocks=3, block_size=4)
    engine.add(make_request("a", range(7), 100))
    collected = await run_until_idle(engine)
    assert collected.finished == {"a": "length"} and len(collected.tokens["a"]) == 5
    _assert_idle(engine)


# --- hand-over -------------------------------------------------------------------------------------------


async def test_prefill_only_stops_after_one_token_and_holds_its_blocks() -> None:
    engine, runner = make_engine(max_num_batched_tokens=16)
    prompt = list(range(30))
    engine.add(make_request("a", prompt, 8), prefill_only=True)
    computed = []
    while engine.has_work:
        computed += [(row.num_computed_tokens, row.token_ids) for row in (await engine.step()).outputs]
    first = expected_tokens(prompt, 1)[0]
    assert computed == [(16, ()), (30, (first,))]
    sequence = engine.sequence(A)
    assert sequence is not None and sequence.status is SequenceStatus.HELD
    assert runner.storage.read(sequence.block_table, 30) == b"".join(t.to_bytes(4, "little") for t in prompt)
    engine.release(A)
    _assert_idle(engine)
    assert len(list(engine.cached_hashes())) == 7


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
async def test_prefill_only_says_when_the_first_token_is_the_last(reason: FinishReason) -> None:
    engine, _ = make_engine()
    stop = (expected_tokens([1, 2], 1)[0],) if reason is FinishReason.STOP else ()
    engine.add(make_request("a", [1, 2], 8 if stop else 1, stop=stop), prefill_only=True)
    collected = await run_until_idle(engine)
    assert collected.finished == {"a": reason.value}
    assert engine.num_used_blocks == 1
    engine.release(A)
    _assert_idle(engine)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 21])
async def test_a_reserved_sequence_goes_on_from_what_arrived(num_tokens: int) -> None:
    engine, runner = make_engine()
    request = make_request("a", range(num_tokens), 6)
    engine.reserve(request)
    assert engine.admit() == (A,)
    assert await _hand_over(engine, runner, request) is None
    collected = await run_until_idle(engine)
    expected = expected_tokens(range(num_tokens), 6)
    sequence_tokens = collected.tokens["a"]
    assert sequence_tokens == expected[1:] and collected.finished == {"a": "length"}
    _assert_idle(engine)


async def test_a_second_reservation_finds_the_prefix() -> None:
    engine, runner = make_engine()
    for name in ("a", "b"):
        request = make_request(name, range(20), 3)
        engine.reserve(request)
        engine.admit()
        sequence = engine.sequence(request.request_id)
        assert sequence is not None and sequence.num_cached_tokens == (0 if name == "a" else 16)
        await _hand_over(engine, runner, request)
        collected = await run_until_idle(engine)
        assert collected.tokens[name] == expected_tokens(range(20), 3)[1:]


async def test_a_first_token_that_ends_the_request_frees_the_reservation() -> None:
    engine, runner = make_engine()
    request = make_request("a", range(9), 1)
    engine.reserve(request)
    engine.admit()
    assert await _hand_over(engine, runner, request) is FinishReason.LENGTH
    assert engine.sequence(A) is None
    _assert_idle(engine)


async def test_a_preempted_reservation_computes_its_prompt_here() -> None:
    engine, runner = make_engine(num_blocks=9)
    engine.add(make_request("a", range(9), 20))
    await engine.step()
    request = make_request("b", range(100, 110), 20)
    engine.reserve(request)
    assert engine.admit() == (B,)
    await _hand_over(engine, runner, request)
    collected = await run_until_idle(engine)
    assert engine.pressure.num_preemptions > 0
    assert collected.tokens["a"][-19:] == expected_tokens(range(9), 20)[1:]
    assert collected.finished == {"a": "length", "b": "length"}
    _assert_idle(engine)


async def test_blocks_that_come_back_grant_the_next_reservation() -> None:
    engine, _ = make_engine(num_blocks=8)
    engine.add(make_request("a", range(20), 3))
    await engine.step()
    engine.reserve(make_request("b", range(100, 120), 3))
    assert engine.admit() == ()
    collected = await run_until_idle(engine)
    assert collected.finished == {"a": "length"} and collected.admitted == ["b"]
    engine.abort(B)
    _assert_idle(engine)


async def test_activate_without_a_reservation_is_refused() -> None:
    engine, _ = make_engine()
    engine.add(make_request("a", [1], 3))
    for request_id in (A, B):
        with pytest.raises(InvalidRequest, match="no reservation"):
            engine.activate(request_id, 1)
    engine.reserve(make_request("b", [1], 3))
    await engine.step()
    with pytest.raises(InvalidRequest, match="not in the vocabulary"):
        engine.activate(B, -1)
    sequence = engine.sequence(B)
    assert sequence is not None and sequence.status is SequenceStatus.RESERVED


# --- abort -----------------------------------------------------------------------------------------------


async def test_abort_at_every_state_gives_all_blocks_back() -> None:
    engine, _ = make_engine(num_blocks=16, max_num_batched_tokens=16, ahead=False)
    reserved = make_request("reserved", range(5), 4)
    engine.reserve(reserved)
    engine.admit()
    engine.add(make_request("held", range(100, 105), 4), prefill_only=True)
    engine.add(make_request("running", range(200, 205), 50))
    engine.add(make_request("chunked", range(300, 320), 4))
    engine.add(make_request("waiting", range(400, 450), 4))
    await engine.step()
    for name in ("waiting", "chunked", "running", "held", "reserved", "reserved", "unknown"):
        engine.abort(RequestId(name))
        engine.check_integrity()
        assert engine.sequence(RequestId(name)) is None
    _assert_idle(engine)
    assert (await engine.step()).outputs == () and not engine.has_work


async def test_blocks_of_a_running_step_do_not_go_to_others_before_it_ends() -> None:
    """The race: a request is aborted while its step runs, and its blocks are reserved for another one, into
    which KV arrives at once. The running step's late writes must not land there."""
    engine, runner = make_engine(num_blocks=4, block_size=4)
    engine.add(make_request("a", range(12), 4))
    runner.gate = asyncio.Event()
    step = asyncio.create_task(engine.step())
    await runner.started.wait()

    engine.abort(A)
    assert engine.sequence(A) is None
    request = make_request("b", range(500, 512), 4)
    engine.reserve(request)
    assert engine.admit() == (), "blocks of the running step were given away"
    assert engine.num_used_blocks == 4

    runner.gate.set()
    output = await step
    assert output.outputs == () and output.admitted == (B,)
    await _hand_over(engine, runner, request)
    collected = await run_until_idle(engine)
    assert collected.tokens["b"] == expected_tokens(range(500, 512), 4)[1:]
    _assert_idle(engine)


async def test_a_request_id_is_free_again_as_soon_as_it_is_aborted() -> None:
    engine, runner = make_engine()
    engine.add(make_request("a", range(6), 4))
    runner.gate = asyncio.Event()
    step = asyncio.create_task(engine.step())
    await runner.started.wait()
    engine.abort(A)
    engine.abort(A)
    engine.add(make_request("a", range(50, 59), 4))
    runner.gate.set()
    assert (await step).outputs == ()
    collected = await run_until_idle(engine)
    assert collected.tokens["a"] == expected_tokens(range(50, 59), 4)
    _assert_idle(engine)


async def test_arrivals_and_activations_during_a_step() -> None:
    engine, runner = make_engine()
    engine.add(make_request("a", range(6), 4))
    remote = make_request("b", range(30, 39), 4)
    engine.reserve(remote)
    runner.gate = asyncio.Event()
    step = asyncio.create_task(engine.step())
    await runner.started.wait()
    engine.add(make_request("c", range(60, 64), 4))
    await _hand_over(engine, runner, remote)
    runner.gate.set()
    collected = Collected()
    collected.add(await step)
    await run_until_idle(engine, collected)
    assert collected.tokens["a"] == expected_tokens(range(6), 4)
    assert collected.tokens["b"] == expected_tokens(range(30, 39), 4)[1:]
    assert collected.tokens["c"] == expected_tokens(range(60, 64), 4)


async def test_a_cancelled_step_has_no_effect() -> None:
    engine, runner = make_engine()
    engine.add(make_request("a", range(6), 4))
    engine.add(make_request("b", range(9), 4))
    runner.gate = asyncio.Event()
    step = asyncio.create_task(engine.step())
    await runner.started.wait()
    engine.abort(B)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    engine.check_integrity()
    runner.gate = None
    collected = await run_until_idle(engine)
    assert collected.tokens == {"a": expected_tokens(range(6), 4)}
    _assert_idle(engine)


async def test_random_aborts_leak_nothing_and_change_no_other_answer() -> None:
    rng = random.Random(3)
    engine, runner = make_engine(num_blocks=30, max_num_batched_tokens=20)
    prompts = {str(i): [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 30))] for i in range(60)}
    todo, aborted, collected = list(prompts), set[str](), Collected()
    while todo or engine.has_work:
        for name in todo[:2]:
            engine.add(make_request(name, prompts[name], 10))
        del todo[:2]
        runner.started.clear()
        runner.gate = asyncio.Event()
        step = asyncio.create_task(engine.step())
        await asyncio.sleep(0)
        if rng.random() < 0.3:
            victim = rng.choice(list(prompts))
            if engine.sequence(RequestId(victim)) is not None:
                aborted.add(victim)
            engine.abort(RequestId(victim))
        runner.gate.set()
        collected.add(await step)
        engine.check_integrity()
    assert aborted
    for name in prompts.keys() - aborted:
        assert collected.tokens[name] == expected_tokens(prompts[name], 10)
    assert set(collected.finished) == prompts.keys() - aborted
    _assert_idle(engine)


# --- failures --------------------------------------------------------------------------------------------


async def test_a_failing_step_ends_its_requests_and_not_the_engine() -> None:
    engine, runner = make_engine(ahead=False)
    engine.add(make_request("a", range(6), 4))
    engine.add(make_request("b", range(9), 4), prefill_only=True)
    engine.add(make_request("c", range(9), 4))
    runner.failure = RuntimeError("out of luck")
    runner.gate = asyncio.Event()
    step = asyncio.create_task(engine.step())
    await runner.started.wait()
    engine.abort(C)
    runner.gate.set()
    collected = Collected()
    collected.add(await step)
    assert collected.finished == {"a": "error", "b": "error"}
    assert collected.errors["a"] == "RuntimeError: out of luck"
    # What a prefill-only sequence computed before may be on the wire: only its owner gives it back.
    assert engine.num_used_blocks == 3
    engine.abort(B)
    _assert_idle(engine)
    runner.gate = None
    engine.add(make_request("a", range(6), 4))
    assert (await run_until_idle(engine)).tokens["a"] == expected_tokens(range(6), 4)


async def test_a_request_without_numbers_fails_alone() -> None:
    engine, runner = make_engine()
    engine.add(make_request("a", range(6), 4))
    engine.add(make_request("b", range(9), 4))
    runner.nan_requests.add(A)
    collected = await run_until_idle(engine)
    assert collected.finished == {"a": "error", "b": "length"}
    assert "not numbers" in collected.errors["a"] and collected.corrupted == {"a"}
    assert collected.tokens["b"] == expected_tokens(range(9), 4)
    _assert_idle(engine)


async def test_what_led_to_no_numbers_is_nobodys_prefix() -> None:
    engine, runner = make_engine(max_num_seqs=2, max_num_batched_tokens=8)
    engine.add(make_request("a", range(30), 4))
    runner.nan_requests.add(A)
    assert (await run_until_idle(engine)).finished == {"a": "error"}
    assert not list(engine.cached_hashes())
    added, removed = engine.block_events()
    assert not set(added) - set(removed)
    engine.add(make_request("b", range(30), 4))
    assert (await run_until_idle(engine)).tokens["b"] == expected_tokens(range(30), 4)
    _assert_idle(engine)


@pytest.mark.parametrize(
    ("request_", "error", "param"),
    [
        (make_request("x", []), InvalidRequest, "prompt"),
        (make_request("x", [1, VOCAB_SIZE]), InvalidRequest, "prompt"),
        (make_request("x", [-1]), InvalidRequest, "prompt"),
        (make_request("a", [1]), InvalidRequest, "request_id"),
        (make_request("x", [1] * 32), RequestTooLarge, "prompt"),
        (make_request("x", [1], 0), InvalidRequest, "max_tokens"),
        (Request(B, (1,), SamplingParams(temperature=-1)), InvalidRequest, "temperature"),
        (Request(B, (1,), SamplingParams(temperature=float("nan"))), InvalidRequest, "temperature"),
        (Request(B, (1,), SamplingParams(top_p=0)), InvalidRequest, "top_p"),
        (Request(B, (1,), SamplingParams(top_k=-1)), InvalidRequest, "top_k"),
    ],
)
async def test_bad_requests_are_refused_without_effect(
    request_: Request, error: type[BatonError], param: str
) -> None:
    engine, _ = make_engine(num_blocks=8, block_size=4)
    engine.add(make_request("a", [1, 2], 2))
    for call in (engine.add, engine.reserve):
        with pytest.raises(error) as caught:
            call(request_)
        assert caught.value.param == param
    assert engine.load().num_waiting == 1
    assert set((await run_until_idle(engine)).tokens) == {"a"}


async def test_the_longest_possible_prompt_is_served() -> None:
    engine, _ = make_engine(num_blocks=8, block_size=4)
    engine.add(make_request("a", range(31), 5))
    collected = await run_until_idle(engine)
    assert collected.tokens["a"] == expected_tokens(range(31), 1)


async def test_a_full_queue_says_when_to_come_back() -> None:
    engine, _ = make_engine(max_num_waiting=2)
    engine.add(make_request("a", [1], 2))
    engine.reserve(make_request("b", [1], 2))
    with pytest.raises(Overloaded) as caught:
        engine.add(make_request("c", [1], 2))
    assert caught.value.retry_after_s is not None and caught.value.retry_after_s >= 1


def test_a_budget_below_one_token_per_sequence_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        make_engine(max_num_seqs=32, max_num_batched_tokens=16)


# --- what it tells ---------------------------------------------------------------------------------------


async def test_work_is_an_event_to_wait_for() -> None:
    engine, _ = make_engine()
    assert not engine.has_work
    waiting = asyncio.create_task(engine.work.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    engine.add(make_request("a", [1], 1))
    await waiting
    await run_until_idle(engine)
    assert not engine.work.is_set()
    # Reservations that cannot be granted give a step nothing to do.
    engine.reserve(make_request("b", [1], 1))
    await engine.step()
    await engine.step()
    assert not engine.has_work
    engine.abort(B)
    assert engine.has_work


async def test_block_events_follow_the_cache() -> None:
    engine, _ = make_engine(num_blocks=8)
    known: set[bytes] = set()
    for i in range(6):
        engine.add(make_request("a", range(i * 10, i * 10 + 10), 4))
        while engine.has_work:
            await engine.step()
            added, removed = engine.block_events()
            known = known - set(removed) | set(added)
            assert known == set(engine.cached_hashes())
    assert known


def test_load_is_measured_on_the_clock() -> None:
    """A device that takes 10 ms per step and 1 ms per prompt token."""
    clock = VirtualClock()

    class TimedRunner(FakeRunner):
        async def execute(self, batch):  # type: ignore[no-untyped-def]
            num_prefill = sum(len(row.token_ids) for row in batch.rows if len(row.token_ids) > 1)
            await clock.sleep(0.010 + 0.001 * num_prefill)
            return await super().execute(batch)

    async def main() -> None:
        engine = Engine(
            EngineConfig(max_num_batched_tokens=64), TimedRunner(64, 4, ahead=False), clock, "fake"
        )
        assert engine.load().decode_step_s == engine.load().prefill_tokens_per_s == 0
        engine.add(make_request("a", range(100), 30))
        assert engine.load().num_waiting_tokens == 100
        await engine.step()
        assert engine.load().num_waiting_tokens == 35  # and one more, which makes the first token
        for _ in range(5):
            await engine.step()
        load = engine.load()
        assert load.decode_step_s == pytest.approx(0.010)
        assert load.num_running == 1 and load.num_waiting_tokens == 0
        assert load.num_free_blocks == 64 - 26
        for i in range(3):
            engine.add(make_request(f"b{i}", range(i, i + 60), 30))
            await engine.step()
        assert engine.load().prefill_tokens_per_s == pytest.approx(1000, rel=0.1)

    clock.run(main())
