"""Priorities order the queue and starve nobody; no prompt holds up those who decode; a role is what is admitted."""

import asyncio
import random
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from fake_model import FakeRunner, expected_tokens, make_engine, make_request, run_until_idle
from hypothesis import given, settings

from baton.clock import VirtualClock
from baton.config import EngineConfig
from baton.engine import turn
from baton.engine.batch import Batch
from baton.engine.engine import Engine
from baton.engine.policy import DECODE, MIXED, PREFILL, AdmissionPolicy, policy_for
from baton.errors import InvalidRequest
from baton.messages import Role
from baton.request import Request, RequestId

STEP_S = 0.25
SPAN_S = 2 * turn.MAX_PRIORITY_S


class _TimedRunner(FakeRunner):
    def __init__(self, clock: VirtualClock, num_blocks: int) -> None:
        super().__init__(num_blocks, 4, ahead=False)
        self._clock = clock

    async def execute(self, batch: Batch) -> tuple[int, ...]:
        await self._clock.sleep(STEP_S)
        return await super().execute(batch)


def _finish_times(
    arrivals: list[tuple[float, Request]], config: EngineConfig, num_blocks: int
) -> dict[RequestId, float]:
    clock = VirtualClock()
    finished: dict[RequestId, float] = {}

    async def arrive(engine: Engine) -> None:
        for arrival_s, request in sorted(arrivals, key=lambda arrival: arrival[0]):
            await clock.sleep(arrival_s - clock.now())
            engine.add(request)

    async def main() -> None:
        engine = Engine(config, _TimedRunner(clock, num_blocks), clock, "fake")
        arriving = asyncio.create_task(arrive(engine))
        while len(finished) < len(arrivals):
            await engine.work.wait()
            for output in (await engine.step()).outputs:
                if output.finish_reason is not None:
                    finished[output.request_id] = clock.now()
            engine.check_integrity()
        await arriving

    clock.run(main())
    return finished


def _bound_s(arrival_s: float, request: Request, arrivals: list[tuple[float, Request]], budget: int) -> float:
    """Nobody who arrives SPAN_S and its own prefill later goes before it. All others may, and each of them may have to
    be computed twice, for those whose turn is earlier than its own; one after the other, without any batching."""
    own_s = STEP_S * _num_steps(request, budget)
    last_s = arrival_s + SPAN_S + own_s
    before = [other for other_s, other in arrivals if other_s <= last_s]
    return last_s + 2 * STEP_S * sum(_num_steps(other, budget) for other in before)


def _num_steps(request: Request, budget: int) -> int:
    """Alone, with half of the budget taken by others."""
    return -(-2 * request.num_prompt_tokens // budget) + request.sampling.max_tokens


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_every_request_finishes_within_its_bound_whatever_comes(seed: int) -> None:
    rng = random.Random(seed)
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=16, swap_space_bytes=rng.choice([0, 320]))
    arrivals = []
    for number in range(60):
        request = make_request(str(number), [rng.randrange(900) for _ in range(rng.randrange(1, 60))], 12)
        arrivals.append((rng.uniform(0, 60), replace(request, priority=rng.randrange(-9, 10))))
    finished = _finish_times(arrivals, config, num_blocks=24)
    for arrival_s, request in arrivals:
        assert finished[request.request_id] <= _bound_s(arrival_s, request, arrivals, 16)


def _flood() -> list[tuple[float, Request]]:
    """More urgent work than the engine can do, for a quarter of an hour, and one request that is not urgent."""
    flood = [
        (i * 1.5, replace(make_request(f"urgent{i}", range(i, i + 8), 11), priority=-9)) for i in range(600)
    ]
    return [*flood, (1.0, replace(make_request("patient", range(20), 4), priority=9))]


def test_a_flood_of_urgent_requests_does_not_starve_a_patient_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=16, max_num_waiting=5000)
    arrivals = _flood()
    bound_s = _bound_s(1.0, arrivals[-1][1], arrivals, 16)
    assert bound_s < arrivals[-2][0], "the flood lasts longer"
    finished_s = _finish_times(arrivals, config, num_blocks=24)[RequestId("patient")]
    assert SPAN_S < finished_s <= bound_s
    # Strict priorities would not do.
    monkeypatch.setattr(turn, "MAX_PRIORITY_S", 1e9)
    monkeypatch.setattr(turn, "SECONDS_PER_LEVEL", 1e6)
    assert _finish_times(arrivals, config, num_blocks=24)[RequestId("patient")] > bound_s


async def test_lower_priorities_go_first() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    for name, priority in (("first", 0), ("low", 5), ("middle", 1), ("high", -1)):
        engine.add(replace(make_request(name, range(5), 3), priority=priority))
        if name == "first":
            await engine.step()
    collected = await run_until_idle(engine)
    assert list(collected.finished) == ["first", "high", "middle", "low"]


async def test_the_lowest_gives_way_first_though_it_came_first() -> None:
    engine, _ = make_engine(num_blocks=6, block_size=4)
    engine.add(replace(make_request("low", range(7), 16), priority=1))
    engine.add(make_request("high", range(30, 37), 16))
    collected = await run_until_idle(engine)
    assert engine.pressure.num_preemptions > 0
    assert list(collected.finished) == ["high", "low"]
    assert collected.tokens["low"] == expected_tokens(range(7), 16)


def test_a_short_prompt_does_not_wait_for_a_long_one_that_came_just_before() -> None:
    requests = [
        (0.0, make_request("warm-up", range(60), 2)),  # so that the rate is known
        (10.0, make_request("long", range(100, 700), 2)),
        (10.1, make_request("short", range(900, 910), 2)),
        (13.0, make_request("late", range(800, 810), 2)),
    ]
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=8)
    finished = _finish_times(requests, config, num_blocks=400)
    long_s = 600 / 8 * STEP_S
    assert finished[RequestId("short")] < 10.1 + 8 * STEP_S
    assert 10 + long_s < finished[RequestId("long")] < 10 + long_s + 12 * STEP_S
    assert finished[RequestId("late")] < 13.0 + 8 * STEP_S, (
        "it came before the long one's own duration was over"
    )


# --- the budget ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_every_decode_is_in_every_step_and_no_step_is_larger_than_the_budget(seed: int, ahead: bool) -> None:
    """So a prompt, however long, delays a running sequence by no more than one chunk per token."""
    rng = random.Random(seed)

    async def main() -> None:
        engine, runner = make_engine(
            num_blocks=400, max_num_seqs=6, max_num_batched_tokens=rng.choice([6, 8, 32]), ahead=ahead
        )
        budget = engine._config.max_num_batched_tokens
        decoding: set[str] = set()
        for number in range(12):
            engine.add(make_request(str(number), range(number, number + rng.randrange(1, 100)), 15))
        while engine.has_work:
            for output in (await engine.step()).outputs:
                if output.token_ids:
                    decoding.add(output.request_id)
                if output.finish_reason is not None:
                    decoding.discard(output.request_id)
            rows = {row.request_id for row in runner.batches[-1].rows}
            # The last token of one that is about to end is on its way already.
            due = {name for name in decoding if (s := engine.sequence(RequestId(name))) and not _ends(s)}
            assert due <= rows or not engine.has_work
        assert all(batch.num_tokens <= budget for batch in runner.batches)

    asyncio.run(main())


def _ends(sequence) -> bool:  # type: ignore[no-untyped-def]
    return sequence.num_output_tokens + sequence.num_tokens_pending >= 15


# --- roles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "takes"),
    [
        (PREFILL, {"prefill_only"}),
        (DECODE, {"local", "remote"}),
        (MIXED, {"local", "remote", "prefill_only"}),
    ],
    ids=lambda value: value.name if isinstance(value, AdmissionPolicy) else "",
)
async def test_a_role_is_an_admission_policy(policy: AdmissionPolicy, takes: set[str]) -> None:
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=16)
    engine = Engine(config, FakeRunner(64, 4), VirtualClock(), "fake", policy)
    ways = {
        "local": lambda request: engine.add(request),
        "prefill_only": lambda request: engine.add(request, prefill_only=True),
        "remote": engine.reserve,
    }
    for way, enter in ways.items():
        if way in takes:
            enter(make_request(way, [1, 2, 3]))
            continue
        with pytest.raises(InvalidRequest, match=f"a {policy.name} worker takes no request"):
            enter(make_request(way, [1, 2, 3]))
    assert engine.num_sequences == len(takes)


def test_policies_of_roles() -> None:
    assert policy_for([Role.PREFILL]) is PREFILL
    assert policy_for([Role.DECODE]) is DECODE
    assert policy_for([Role.DECODE, Role.PREFILL]) is MIXED
