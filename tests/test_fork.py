"""Several answers to one prompt share its blocks, whatever happens to any of them."""

import asyncio
import random
from pathlib import Path

import pytest
from fake_model import (
    VOCAB_SIZE,
    Collected,
    expected_tokens,
    make_engine,
    make_request,
    run_until_idle,
)
from reference import make_model

from baton.clock import SystemClock
from baton.config import EngineConfig, ModelConfig
from baton.engine.engine import Engine
from baton.engine.model_runner import load_runner
from baton.errors import InvalidRequest
from baton.request import FinishReason, Request, RequestId, SamplingParams

PARENT, CHILD = RequestId("parent"), RequestId("child")
NUM_TOKENS = 9


pytestmark = pytest.mark.usefixtures("quiet")


def _family(prompt: range, num_children: int, max_tokens: int = NUM_TOKENS) -> list[Request]:
    names = ["parent", *(f"child{i}" for i in range(num_children))]
    return [make_request(name, prompt, max_tokens, seed=i) for i, name in enumerate(names)]


def _assert_right(collected: Collected, family: list[Request]) -> None:
    for request in family:
        seed, max_tokens = request.sampling.seed or 0, request.sampling.max_tokens
        expected = expected_tokens(request.prompt_token_ids, max_tokens, seed)
        assert collected.tokens[request.request_id] == expected


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 3, 4, 5, 7, 8, 9, 40])
async def test_siblings_share_the_prompt_and_differ_from_the_first_token_on(
    num_prompt_tokens: int, enable_prefix_caching: bool
) -> None:
    engine, runner = make_engine(
        block_size=4, max_num_batched_tokens=16, enable_prefix_caching=enable_prefix_caching
    )
    family = _family(range(num_prompt_tokens), 3)
    engine.add(family[0])
    for child in family[1:]:
        engine.fork(PARENT, child)
    collected = await run_until_idle(engine)
    _assert_right(collected, family)
    assert len({tuple(tokens) for tokens in collected.tokens.values()}) == 4
    assert engine.num_used_blocks == 0
    # Each child computes one prompt token, and copies at most one block.
    computed = sum(batch.num_tokens for batch in runner.batches)
    assert computed == num_prompt_tokens + 3 + 4 * (NUM_TOKENS - 1)
    assert sum(len(batch.copies) for batch in runner.batches) == (3 if num_prompt_tokens % 4 != 1 else 0)


async def test_shared_blocks_are_counted_once() -> None:
    engine, _ = make_engine(block_size=4)
    family = _family(range(42), 3)
    engine.add(family[0])
    await engine.step()
    for child in family[1:]:
        engine.fork(PARENT, child)
    await engine.step()
    assert engine.num_used_blocks == 10 + 4  # ten full ones, and each its own last one
    engine.check_integrity()


async def test_a_prompt_that_is_handed_over_is_forked_when_it_has_arrived() -> None:
    engine, runner = make_engine(block_size=4, enable_prefix_caching=False)
    family = _family(range(10), 2)
    engine.reserve(family[0])
    for child in family[1:]:
        engine.fork(PARENT, child)
    collected = await run_until_idle(engine)
    assert runner.batches == [] and collected.admitted == [PARENT]
    engine.add(
        make_request("other", range(50, 60))
    )  # children that wait for their parent are in nobody's way
    await run_until_idle(engine, collected)
    assert collected.finished == {"other": "length"}
    sequence = engine.sequence(PARENT)
    assert sequence is not None
    runner.storage.write(sequence.block_table, 0, range(10))
    first = expected_tokens(range(10), 1, seed=0)
    assert engine.activate(PARENT, first[0]) is None
    runner.batches.clear()
    await run_until_idle(engine, collected)
    collected.tokens[PARENT][:0] = first
    _assert_right(collected, family)
    assert runner.batches[0].num_tokens == 3 and len(runner.batches[0].copies) == 2


@pytest.mark.parametrize("is_remote", [True, False])
@pytest.mark.parametrize("num_prompt_tokens", [1, 4, 5, 10])
async def test_the_prompt_of_a_sample_that_ends_with_its_first_token_is_forked_all_the_same(
    num_prompt_tokens: int, is_remote: bool
) -> None:
    engine, runner = make_engine(block_size=4, enable_prefix_caching=False)
    family = _family(range(num_prompt_tokens), 3)
    first = expected_tokens(range(num_prompt_tokens), 1)
    parent = make_request("parent", range(num_prompt_tokens), NUM_TOKENS, seed=0, stop=(first[0],))
    (engine.reserve if is_remote else engine.add)(parent)
    for child in family[1:]:
        engine.fork(PARENT, child)
    if is_remote:
        engine.admit()
        sequence = engine.sequence(PARENT)
        assert sequence is not None
        runner.storage.write(sequence.block_table, 0, range(num_prompt_tokens))
        assert engine.activate(PARENT, first[0]) is FinishReason.STOP
    collected = await run_until_idle(engine)
    assert is_remote or collected.tokens[PARENT] == first
    _assert_right(collected, family[1:])
    assert engine.num_used_blocks == 0
    # What is computed of the prompt is its last token, once for each child.
    computed = sum(row.start < num_prompt_tokens for batch in runner.batches for row in batch.rows)
    assert computed == 3 + (not is_remote)


async def test_the_prompt_of_a_sample_that_failed_is_not_forked() -> None:
    engine, runner = make_engine(block_size=4)
    family = _family(range(10), 2)
    runner.nan_requests = {PARENT}
    engine.add(family[0])
    for child in family[1:]:
        engine.fork(PARENT, child)
    collected = await run_until_idle(engine)
    assert collected.finished[PARENT] == "error"
    _assert_right(collected, family[1:])
    assert [row.start for batch in runner.batches for row in batch.rows if len(row.token_ids) == 10][:2] == [
        0,
        0,
    ]


async def test_a_fork_can_come_late() -> None:
    engine, _ = make_engine(block_size=4)
    family = _family(range(10), 1)
    engine.add(family[0])
    collected = Collected()
    for _ in range(4):
        collected.add(await engine.step())
    engine.fork(PARENT, family[1])
    await run_until_idle(engine, collected)
    _assert_right(collected, family)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
async def test_a_parent_that_goes_early_takes_nothing_with_it(num_steps: int) -> None:
    engine, _ = make_engine(block_size=4, max_num_batched_tokens=16, enable_prefix_caching=False)
    family = _family(range(20), 2)
    engine.add(family[0])
    for child in family[1:]:
        engine.fork(PARENT, child)
    collected = Collected()
    for _ in range(num_steps):
        collected.add(await engine.step())
    engine.abort(PARENT)
    await run_until_idle(engine, collected)
    _assert_right(collected, family[1:])
    assert engine.num_used_blocks == 0


async def test_without_a_parent_a_fork_is_a_request_like_any_other() -> None:
    engine, _ = make_engine()
    child = make_request("child", range(10), NUM_TOKENS, seed=1)
    engine.fork(PARENT, child)
    _assert_right(await run_until_idle(engine), [child])


async def test_the_source_of_a_copy_is_kept_until_the_step_that_makes_it_has_ended() -> None:
    """The parent, which is not part of that step, leaves while it runs; a reservation for which KV may arrive before
    the copy was made must not get its block."""
    family = _family(range(6), 1, max_tokens=2)
    engine, runner = make_engine(num_blocks=5, block_size=4, enable_prefix_caching=False)
    engine.add(family[0], prefill_only=True)
    await engine.step()
    engine.fork(PARENT, family[1])
    runner.gate = asyncio.Event()
    runner.started.clear()
    step = asyncio.create_task(engine.step())
    await runner.started.wait()
    engine.release(PARENT)
    late = make_request("late", range(500, 507), 1)
    engine.reserve(late)
    assert engine.admit() == (), "it would take the source and leave one free"
    runner.gate.set()
    collected = Collected()
    collected.add(await step)
    assert collected.admitted == ["late"]
    await run_until_idle(engine, collected)
    _assert_right(collected, family[1:])


async def test_a_cancelled_step_makes_its_copies_again() -> None:
    engine, runner = make_engine(block_size=4, ahead=False)
    family = _family(range(6), 2)
    engine.add(family[0])
    collected = Collected()
    collected.add(await engine.step())
    for child in family[1:]:
        engine.fork(PARENT, child)
    runner.gate = asyncio.Event()
    runner.started.clear()
    step = asyncio.create_task(engine.step())
    await runner.started.wait()
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    engine.check_integrity()
    runner.gate = None
    engine.abort(PARENT)
    await run_until_idle(engine, collected)
    _assert_right(collected, family[1:])


async def test_a_failed_step_gives_the_source_back() -> None:
    engine, runner = make_engine(block_size=4, ahead=False)
    family = _family(range(6), 1)
    engine.add(family[0])
    await engine.step()
    engine.fork(PARENT, family[1])
    runner.failure = RuntimeError("out of luck")
    collected = await run_until_idle(engine)
    assert set(collected.finished.values()) == {"error"}
    assert engine.num_used_blocks == 0


async def test_without_room_a_fork_waits_in_line() -> None:
    engine, _ = make_engine(num_blocks=8, block_size=4)
    family = _family(range(15), 3, max_tokens=12)
    engine.add(family[0])
    for child in family[1:]:
        engine.fork(PARENT, child)
    engine.add(last := make_request("last", range(90, 95), 5))
    _assert_right(await run_until_idle(engine), [*family, last])


async def test_another_prompt_is_no_fork() -> None:
    engine, _ = make_engine()
    engine.add(make_request("parent", range(10)))
    for other in (make_request("child", range(11)), make_request("child", range(10), cache_salt="x")):
        with pytest.raises(InvalidRequest, match="no fork of parent"):
            engine.fork(PARENT, other)
    assert engine.num_sequences == 1


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
async def test_families_under_pressure_with_random_aborts(enable_prefix_caching: bool) -> None:
    rng = random.Random(5)
    engine, _ = make_engine(
        num_blocks=24, block_size=4, max_num_batched_tokens=20, enable_prefix_caching=enable_prefix_caching
    )
    todo: list[tuple[str, Request]] = []
    for number in range(25):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 30))]
        for i in range(rng.randrange(1, 4)):
            request = make_request(f"{number}.{i}", prompt, rng.randrange(1, 25), seed=10 * number + i)
            todo.append((f"{number}.0", request))
    all_requests = [request for _, request in todo]
    aborted: set[str] = set()
    collected = Collected()
    while todo or engine.has_work:
        if todo:
            parent, request = todo.pop(0)
            if parent == request.request_id:
                engine.add(request)
            else:
                engine.fork(RequestId(parent), request)
        if rng.random() < 0.1 and engine.num_sequences:
            victim = rng.choice([r.request_id for r in all_requests if engine.sequence(r.request_id)])
            aborted.add(victim)
            engine.abort(victim)
        collected.add(await engine.step())
        engine.check_integrity()
    assert engine.pressure.num_preemptions and aborted
    _assert_right(collected, [r for r in all_requests if r.request_id not in aborted])
    assert engine.num_used_blocks == 0


# --- a real model ----------------------------------------------------------------------------------------


async def test_a_real_model_answers_forks_like_requests_alone(tmp_path: Path) -> None:
    config = EngineConfig(num_blocks=32, block_size=8)
    directory = make_model("gqa", tmp_path)
    rng = random.Random(0)
    prompt = tuple(rng.randrange(100) for _ in range(21))

    def requests() -> list[Request]:
        sampling = [SamplingParams(max_tokens=12, temperature=1.0, seed=seed) for seed in range(4)]
        return [Request(RequestId(str(i)), prompt, each) for i, each in enumerate(sampling)]

    answers = []
    for fork in (False, True):
        model = load_runner(ModelConfig(str(directory)), config, fill_nan=True)
        engine = Engine(config, model.runner, SystemClock(), model.fingerprint)
        first, *others = requests()
        engine.add(first)
        for request in others:
            if fork:
                engine.fork(first.request_id, request)
            else:
                engine.add(request)
        collected = await run_until_idle(engine)
        assert set(collected.finished.values()) == {"length"}
        answers.append(collected.tokens)
        await model.runner.aclose()
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0].values()}) == 4
