"""Equal workers get equal shares, slower ones less: the production router on the virtual clock, and what it counts."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.clock import VirtualClock
from baton.config import EngineConfig, RouterConfig
from baton.messages import Role
from baton.request import Request, RequestId, SamplingParams, WorkerId
from baton.rpc import InprocRpc
from baton_loadtest.simulate import VOCAB_SIZE, FleetConfig, SimulatedFleet, Speed, running_fleet
from baton_router.fleet import Fleet
from baton_router.mirror import PrefixMirror
from baton_router.pipeline import Pipeline
from baton_router.prompt_queue import PromptQueue

CONFIG = FleetConfig(engine=EngineConfig(num_blocks=1024, max_num_batched_tokens=128))
Test = Callable[[SimulatedFleet], Coroutine[None, None, None]]


def simulated(test: Test, config: FleetConfig = CONFIG, **numbers: int) -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(replace(config, **numbers), clock) as fleet:  # type: ignore[arg-type]
            await test(fleet)
            await clock.sleep(2.0)
            for link in fleet.fleet.ready():
                seen = link.candidate(0)
                assert (seen.num_seqs, seen.num_queued_tokens, seen.num_unseen_tokens) == (0, 0, 0)

    clock.run(main())


def a_request(
    name: str, num_tokens: int = 40, num_output: int = 60, n: int = 1, prefix: tuple[int, ...] = ()
) -> Request:
    rng = random.Random(name)
    prompt = prefix + tuple(rng.randrange(VOCAB_SIZE) for _ in range(num_tokens))
    sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True, n=n)
    return Request(RequestId(name), prompt, sampling)


@asynccontextmanager
async def asked(pipeline: Pipeline, *requests: Request) -> AsyncGenerator[list[asyncio.Task[None]], None]:
    """All in the same instant; inside they have just been placed, outside they have ended."""

    async def answer(request: Request) -> None:
        async for _ in pipeline.generate(request, timeout_s=60.0):
            pass

    tasks = [asyncio.create_task(answer(request)) for request in requests]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    try:
        yield tasks
    finally:
        await asyncio.gather(*tasks, return_exceptions=True)


def shares(pipeline: Pipeline, *requests: Request) -> tuple[Counter[WorkerId], Counter[WorkerId]]:
    """(prefill, decode) workers, by how many of the requests were placed there."""
    records = [pipeline.record(request.request_id) for request in requests]
    assert all(record is not None and record.decode_worker is not None for record in records)
    prefills = Counter(record.prefill_worker for record in records if record and record.prefill_worker)
    return prefills, Counter(record.decode_worker for record in records if record and record.decode_worker)


def is_even(share: Counter[WorkerId], num_workers: int) -> bool:
    return len(share) == num_workers and max(share.values()) - min(share.values()) <= 1


@pytest.mark.parametrize("num_workers", [2, 4])
def test_what_is_asked_in_the_same_instant_is_spread_evenly_on_both_sides(num_workers: int) -> None:
    async def test(fleet: SimulatedFleet) -> None:
        for burst, number in enumerate((8, 14)):
            requests = [a_request(f"{burst} {i}") for i in range(number)]
            async with asked(fleet.pipeline, *requests):
                prefills, decodes = shares(fleet.pipeline, *requests)
                assert is_even(prefills, num_workers) and is_even(decodes, num_workers)

    simulated(test, num_prefill=num_workers, num_decode=num_workers)


def test_those_who_come_while_others_are_served_are_spread_evenly() -> None:
    """Reports of load come in between, and show some of what was sent before."""

    async def test(fleet: SimulatedFleet) -> None:
        requests = [a_request(f"{i}", num_output=100) for i in range(25)]
        async with asyncio.TaskGroup() as tasks:
            for number, request in enumerate(requests, 1):
                tasks.create_task(fleet.ask(request))
                await fleet.clock.sleep(0.0037)
                _, decodes = shares(fleet.pipeline, *requests[:number])
                assert max(decodes.values()) - min(decodes.values()) <= 1 or number == 1

    simulated(test, num_prefill=1, num_decode=2)


def test_measurements_that_differ_by_noise_make_no_difference() -> None:
    async def test(fleet: SimulatedFleet) -> None:
        await fleet.start(Role.DECODE, Speed(step_s=0.0088))  # 0.008 elsewhere
        await fleet.ready()
        requests = [a_request(f"{i}") for i in range(21)]
        async with asked(fleet.pipeline, *requests):
            assert is_even(shares(fleet.pipeline, *requests)[1], 3)

    simulated(test, num_prefill=1, num_decode=2)


def test_a_worker_that_is_half_as_fast_gets_half_the_share() -> None:
    async def test(fleet: SimulatedFleet) -> None:
        fast = CONFIG.speed
        slow = await fleet.start(
            Role.DECODE, Speed(2 * fast.step_s, fast.prefill_token_s, 2 * fast.decode_row_s)
        )
        await fleet.ready()
        for burst in ("first", "second", "third"):
            requests = [a_request(f"{burst} {i}") for i in range(24)]
            async with asked(fleet.pipeline, *requests):
                _, decodes = shares(fleet.pipeline, *requests)
        assert 7 <= decodes[slow.record.worker_id] <= 9  # now that its measurements are believed

    simulated(test, num_prefill=1, num_decode=1)


def test_each_sample_of_a_request_counts() -> None:
    async def test(fleet: SimulatedFleet) -> None:
        many, *others = [a_request("many", n=6), *(a_request(f"{i}") for i in range(6))]
        async with asked(fleet.pipeline, many, *others):
            assert shares(fleet.pipeline, many)[1].keys().isdisjoint(shares(fleet.pipeline, *others)[1])
            assert unseen(fleet) == [40 + 6, 6 * (40 + 1)]  # samples share their prompt
            await fleet.clock.sleep(0.3)
            assert unseen(fleet) == [0, 0]

    def unseen(fleet: SimulatedFleet) -> list[int]:
        links = [link for link in fleet.fleet.ready() if Role.DECODE in link.record.roles]
        return sorted(link.candidate(0).num_unseen_tokens for link in links)

    simulated(test, num_prefill=2, num_decode=2)


@pytest.mark.parametrize("after_s", [0.0, 0.0004, 0.1])
def test_what_was_cancelled_counts_no_more(after_s: float) -> None:
    async def test(fleet: SimulatedFleet) -> None:
        requests = [a_request(f"{i}") for i in range(8)]
        async with asked(fleet.pipeline, *requests) as tasks:
            await fleet.clock.sleep(after_s)
            [gone, _] = shares(fleet.pipeline, *requests)[1]
            for request, task in zip(requests, tasks, strict=True):
                if shares(fleet.pipeline, request)[1][gone]:
                    task.cancel()
            await fleet.clock.sleep(0.1)  # the blocks on the way are drained
            more = [a_request(f"more {i}") for i in range(4)]
            async with asked(fleet.pipeline, *more):
                assert shares(fleet.pipeline, *more)[1] == {gone: 4}

    simulated(test, num_prefill=2, num_decode=2)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.2])
def test_a_death_leaves_nothing_counted(role: Role, after_s: float) -> None:
    async def test(fleet: SimulatedFleet) -> None:
        requests = [a_request(f"{i}", num_tokens=200) for i in range(12)]
        async with asked(fleet.pipeline, *requests):
            await fleet.clock.sleep(after_s)
            await fleet.kill(next(name for name in fleet.workers if name.startswith(role.value)))

    simulated(test, num_prefill=2, num_decode=2)


def test_nobody_computes_again_what_another_worker_holds() -> None:
    """The decode workers have equal shares; the owner of the prefix computes the ends, or gives it to the other one."""

    async def test(fleet: SimulatedFleet) -> None:
        prefix = a_request("prefix", 512, num_output=1)
        await fleet.ask(prefix)
        await fleet.clock.sleep(1.0)
        requests = [a_request(f"{i}", 20, prefix=prefix.prompt_token_ids) for i in range(12)]
        async with asked(fleet.pipeline, *requests):
            assert is_even(shares(fleet.pipeline, *requests)[1], 2)
        for request in requests:
            record = fleet.pipeline.record(request.request_id)
            assert record is not None and record.num_cached_tokens_prefill >= 512 - 16

    simulated(test, replace(CONFIG, max_model_len=1024), num_prefill=2, num_decode=2)


def test_what_another_router_sent_is_seen_in_the_reports() -> None:
    async def test(fleet: SimulatedFleet) -> None:
        clock, rpc = fleet.clock, InprocRpc(fleet.rpc_network, fleet.clock)
        other = Fleet(RouterConfig(), rpc, PrefixMirror(clock), fleet.index, clock, fleet.events)
        pipeline = Pipeline(RouterConfig(), other, clock, random.Random(1), fleet.events)
        running = asyncio.create_task(other.run(pipeline.trial))
        await clock.sleep(2.0)
        many, *few = [a_request("many", num_output=200, n=6), *(a_request(f"{i}") for i in range(6))]
        async with asked(fleet.pipeline, many):
            await clock.sleep(0.7)  # one heartbeat
            async with asked(pipeline, *few):
                assert shares(fleet.pipeline, many)[1].keys().isdisjoint(shares(pipeline, *few)[1])
                await clock.sleep(0.1)
                seen = {link.record.worker_id: link.candidate(0).num_seqs for link in other.ready()}
                assert sorted(seen.values()) == [0, 6, 6]  # a prefill worker, and nobody twice
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    simulated(test, num_prefill=1, num_decode=2)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_the_router_counts_what_its_workers_have(seed: int) -> None:
    """Requests come, are cancelled, end; workers die and others join. After each, once it is told, both agree."""

    async def test(fleet: SimulatedFleet) -> None:
        asked_for: dict[str, asyncio.Task[list[list[int]]]] = {}
        try:
            await live_through(fleet, random.Random(seed), asked_for)
        finally:
            await asyncio.gather(*asked_for.values(), return_exceptions=True)

    async def live_through(
        fleet: SimulatedFleet, rng: random.Random, asked_for: dict[str, asyncio.Task[list[list[int]]]]
    ) -> None:
        for number in range(40):
            match rng.choices(["ask", "cancel", "kill"], [8, 3, 1])[0]:
                case "ask":
                    name, n = f"{number}", rng.choice((1, 3))
                    request = a_request(name, rng.randint(1, 200), rng.randint(1, 200), n)
                    asked_for[name] = asyncio.create_task(fleet.ask_samples(request))
                case "cancel" if asked_for:
                    asked_for[rng.choice(sorted(asked_for))].cancel()
                case "kill":
                    role = rng.choice(tuple(Role))
                    await fleet.kill(rng.choice([w for w in fleet.workers if w.startswith(role.value)]))
                    await fleet.start(role)
            await fleet.clock.sleep(rng.choice((0.0, 0.0003, 0.01)))
            live = fleet.pipeline._streams.keys()
            assert all(link.prompts._prompts.keys() <= live for link in fleet.fleet.ready())
            if number % 8 == 7:
                async with fleet.clock.timeout(1.0):  # a heartbeat, and pieces on the way are drained
                    while not all_agree(fleet):
                        await fleet.clock.sleep(0.001)

    def all_agree(fleet: SimulatedFleet) -> bool:
        pairs = [
            (link.candidate(0), fleet.workers[link.record.worker_id].worker.load())
            for link in fleet.fleet.ready()
        ]
        return all(
            seen.num_seqs == load.num_running + load.num_waiting
            and (seen.num_unseen_tokens, seen.num_queued_tokens) == (0, load.num_waiting_tokens)
            for seen, load in pairs
            if Role.DECODE in seen.record.roles
        )

    simulated(test, num_prefill=2, num_decode=2)


# --- what a prefill worker has to compute ---


def test_a_prompt_counts_until_its_first_token_is_there() -> None:
    async def test(fleet: SimulatedFleet) -> None:
        request = a_request("r", num_tokens=100, num_output=10)
        async with asked(fleet.pipeline, request):
            [prefill] = shares(fleet.pipeline, request)[0]
            record = fleet.pipeline.record(request.request_id)
            assert fleet.fleet.link(prefill).candidate(0).num_queued_tokens == 100
            while record is not None and record.first_token_s is None:
                await fleet.clock.sleep(0.0001)
            assert fleet.fleet.link(prefill).candidate(0).num_queued_tokens == 0

    simulated(test, num_prefill=1, num_decode=1)


@given(
    st.lists(st.tuples(st.sampled_from(["place", "send", "end", "report"]), st.integers(0, 4)), max_size=60)
)
def test_whatever_happens_what_is_counted_is_what_is_there(events: list[tuple[str, int]]) -> None:
    """Reports that are made at once: sent prompts are never forgotten, and never counted twice."""
    queue, reported = PromptQueue(), 0
    placed: dict[RequestId, ExitStack] = {}
    sent: dict[RequestId, int] = {}
    for event, number in events:
        request_id = RequestId(str(number))
        match event:
            case "place" if request_id not in placed:
                placed[request_id] = ExitStack()
                placed[request_id].enter_context(queue.holding(request_id, 10 + number))
            case "send" if request_id in placed and request_id not in sent:
                queue.sent(request_id)
                sent[request_id] = 10 + number
            case "end" if request_id in placed:
                placed.pop(request_id).close()
                sent.pop(request_id, None)
            case "report":
                reported = sum(sent.values())
                queue.reported()
        live = sum(10 + int(request_id) for request_id in placed)
        assert live <= queue.num_tokens(reported) <= reported + live
        if event == "report":
            assert queue.num_tokens(reported) == live
    for entered in placed.values():
        entered.close()
    assert queue.num_tokens(0) == 0


def test_a_report_that_was_made_before_hides_nothing() -> None:
    queue = PromptQueue()
    with queue.holding(RequestId("a"), 100):
        queue.sent(RequestId("a"))
        queue.reported()
        assert queue.num_tokens(0) == 100  # it had not arrived
        assert queue.num_tokens(130) == 130  # it had
        queue.reported()
        assert queue.num_tokens(0) == 0
