"""The prefill worker's answer with the first token comes after the KV did, or never. On a virtual clock."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from baton.clock import VirtualClock
from baton.errors import WorkerLost
from baton.messages import PrefillAnswer, PrefillResult, Received, Role
from baton.request import FinishReason, Request, RequestId, SamplingParams
from baton_loadtest.local_fleet import HEARTBEAT_S
from baton_loadtest.simulate import VOCAB_SIZE, FleetConfig, SimulatedFleet, expected_tokens, running_fleet
from baton_prefill.service import PrefillService
from baton_router.generation import Tokens, TokenStream
from baton_router.session import Attempt

CONFIG = FleetConfig(seed=5, num_prefill=1, num_decode=1)
Prefill = Callable[[PrefillService, Any], AsyncGenerator[PrefillAnswer, None]]

LATE_S = 0.5  # the KV is there and short answers are made long before


def make_request(num_prompt: int, num_output: int, num_samples: int = 1) -> Request:
    rng = random.Random(num_prompt)
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(num_prompt))
    return Request(
        RequestId("r"), prompt, SamplingParams(max_tokens=num_output, temperature=0.0, n=num_samples)
    )


def right_answer(request: Request) -> list[int]:
    return expected_tokens(request.prompt_token_ids, request.sampling.max_tokens, CONFIG.layout)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    """On it every first token is late."""
    clock = VirtualClock()
    for name in ("prefill", "prefill_ahead"):
        monkeypatch.setattr(PrefillService, name, late(getattr(PrefillService, name), clock))
    return clock


def late(prefill: Prefill, clock: VirtualClock) -> Prefill:
    async def prefill_late(service: PrefillService, asked: Any) -> AsyncGenerator[PrefillAnswer, None]:
        async with aclosing(prefill(service, asked)) as answers:
            async for answer in answers:
                if isinstance(answer, PrefillResult):
                    await clock.sleep(LATE_S)
                yield answer

    return prefill_late


async def assert_all_given_back(fleet: SimulatedFleet) -> None:
    await fleet.clock.sleep(CONFIG.transfer.lease_s + HEARTBEAT_S)
    fleet.check_conservation()
    assert set(fleet.num_used_blocks().values()) == {0}


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("num_output", [1, 2, 3, 40])
def test_an_answer_that_is_made_before_its_first_token_is_known_is_whole(
    clock: VirtualClock, num_output: int, num_samples: int
) -> None:
    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            request = make_request(100, num_output, num_samples)
            answers: dict[int, list[int]] = {}
            async with aclosing(fleet.pipeline.generate(request, timeout_s=30.0)) as tokens:
                async for batch in tokens:
                    for item in batch:
                        answers.setdefault(item.sample, []).extend(item.token_ids)
            assert answers == dict.fromkeys(range(num_samples), right_answer(request))
            await assert_all_given_back(fleet)

    clock.run(main())


@pytest.mark.parametrize("num_output", [1, 2, 40])
def test_a_prefill_worker_that_is_lost_between_its_kv_and_its_answer_costs_nothing(
    clock: VirtualClock, num_output: int
) -> None:
    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            request = make_request(100, num_output)
            fleet.transfers.clear()
            asking = asyncio.create_task(fleet.ask(request))
            await clock.sleep(LATE_S / 2)
            assert [(r.direction, r.outcome) for r in fleet.transfers] == [("received", "ok"), ("sent", "ok")]
            victim = next(w for w, worker in fleet.workers.items() if Role.PREFILL in worker.record.roles)
            await fleet.kill(victim)
            assert await asking == right_answer(request)
            await assert_all_given_back(fleet)

    clock.run(main())


def test_a_prefill_worker_may_be_lost_at_any_millisecond() -> None:
    """Among them those at which the KV arrives while the router asks for the prompt to be computed."""
    request = make_request(100, 3)

    async def one(clock: VirtualClock, after_s: float) -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            asking = asyncio.create_task(fleet.ask(request))
            await clock.sleep(after_s)
            victim = next(w for w, worker in fleet.workers.items() if Role.PREFILL in worker.record.roles)
            await fleet.kill(victim)
            assert await asking == right_answer(request), after_s
            await assert_all_given_back(fleet)

    for millisecond in range(60):
        clock = VirtualClock()
        clock.run(one(clock, millisecond / 1000))


# --- one attempt ---


async def taken(stream: TokenStream) -> list[Tokens]:
    stream.end()
    return await stream.take()


def received(first_token: int | None) -> Received:
    return Received(7, 1, 100, 0.1, first_token)


async def test_kv_that_came_before_the_worker_was_asked_to_compute_the_prompt_brings_its_first_token() -> (
    None
):
    stream = TokenStream()
    attempt = Attempt(7, make_request(8, 2), stream, first_index=1)
    attempt.recomputed()
    attempt.got_kv(received(41))
    attempt.tokens(0, 1, (42,), FinishReason.LENGTH)
    await attempt.finished
    assert await taken(stream) == [Tokens(0, (41,), None), Tokens(1, (42,), FinishReason.LENGTH)]


@pytest.mark.parametrize("asked", [{"logprobs": 0}, {"prompt_logprobs": 0}, {}])
async def test_a_lost_answer_that_would_have_said_more_than_the_token_fails_the_request(
    asked: dict[str, int],
) -> None:
    request = make_request(8, 2)
    request = replace(request, sampling=replace(request.sampling, **asked))
    attempt = Attempt(7, request, TokenStream(), first_index=1)
    attempt.got_kv(received(41 if asked else None))  # a worker of the release before does not say it
    attempt.answer_lost(WorkerLost("prefill-0 was lost"))
    with pytest.raises(WorkerLost):
        await attempt.finished


async def test_an_end_that_both_workers_saw_is_told_once() -> None:
    stream = TokenStream()
    attempt = Attempt(7, make_request(8, 2), stream, first_index=1)
    attempt.got_kv(received(3))
    attempt.finish(0, FinishReason.STOP)
    assert not attempt.finished.done()
    attempt.start_stream(Tokens(0, (3,), FinishReason.STOP))
    await attempt.finished
    assert await taken(stream) == [Tokens(0, (3,), FinishReason.STOP)]
