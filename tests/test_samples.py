"""Several answers to one prompt in a whole fleet on the virtual clock: one placement, one hand-over, and ends of their
own."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from fake_model import FakeRunner
from fake_model import expected_tokens as seeded_tokens

from baton.clock import VirtualClock
from baton.config import EngineConfig, RouterConfig, TransferConfig
from baton.errors import DeadlineExceeded, InternalError, InvalidRequest, WorkerLost
from baton.events import EventLines
from baton.kv.block import num_blocks_for
from baton.messages import Role
from baton.request import Request, RequestId, SamplingParams, WorkerId
from baton.rpc import InprocRpcNetwork
from baton.transfer.inproc import InprocNetwork, InprocTransport
from baton_loadtest.local_fleet import LocalFleet
from baton_loadtest.simulate import VOCAB_SIZE, FleetConfig, SimulatedFleet, expected_tokens, running_fleet

ONE_PAIR = FleetConfig(num_prefill=1, num_decode=1)
ALONE = FleetConfig(num_prefill=0, num_decode=1)
UNCACHED = replace(ONE_PAIR, engine=replace(ONE_PAIR.engine, enable_prefix_caching=False))
SLOW = replace(ONE_PAIR, link_bytes_per_s=2e4)  # the first token is there long before the KV
NUM_SAMPLES = 5
ENGINE = EngineConfig(block_size=4, max_num_seqs=8, max_num_batched_tokens=64)


def make_request(
    num_prompt: int = 100, max_tokens: int = 30, n: int = NUM_SAMPLES, **sampling: Any
) -> Request:
    prompt = tuple(random.Random(num_prompt).choices(range(VOCAB_SIZE), k=num_prompt))
    return Request(RequestId("r"), prompt, SamplingParams(max_tokens=max_tokens, n=n, **sampling))


def right(config: FleetConfig, request: Request, num_tokens: int | None = None) -> list[int]:
    num_tokens = request.sampling.max_tokens if num_tokens is None else num_tokens
    return expected_tokens(request.prompt_token_ids, num_tokens, config.layout)


def in_a_fleet(config: FleetConfig, story: Callable[[SimulatedFleet], Coroutine[Any, Any, None]]) -> None:
    """Everything has been given back when the story has ended."""
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(config, clock) as fleet:
            await story(fleet)
            await clock.sleep(5.0)
            fleet.check_conservation()
            assert set(fleet.num_used_blocks().values()) <= {0}
            assert all(worker.engine.num_sequences == 0 for worker in fleet.workers.values())
            assert all(worker.receiver.num_expected == 0 for worker in fleet.workers.values())

    clock.run(main())


@pytest.mark.parametrize(
    "config", [ONE_PAIR, ALONE, SLOW, UNCACHED], ids=["pair", "alone", "slow", "uncached"]
)
@pytest.mark.parametrize("num_prompt", [1, 16, 17, 100])
@pytest.mark.parametrize("max_tokens", [1, 2, 20])
def test_all_are_right_and_the_prompt_is_placed_computed_and_sent_once(
    config: FleetConfig, num_prompt: int, max_tokens: int
) -> None:
    async def story(fleet: SimulatedFleet) -> None:
        request = make_request(num_prompt, max_tokens)
        samples = await fleet.ask_samples(request)
        assert samples == [right(config, request)] * NUM_SAMPLES
        await fleet.clock.sleep(5.0)
        assert sum(" request.placed " in line for line in fleet.events.lines) == 1
        assert [report.outcome for report in fleet.transfers] == ["ok"] * (2 * config.num_prefill)

    in_a_fleet(config, story)


def test_the_prompts_blocks_are_there_once() -> None:
    async def story(fleet: SimulatedFleet) -> None:
        request = make_request(num_prompt=160, max_tokens=16)
        decode = next(w for w in fleet.workers.values() if Role.DECODE in w.record.roles)
        most = 0
        async for _ in fleet.pipeline.generate(request, timeout_s=60):
            most = max(most, decode.engine.num_used_blocks)
        num_prompt_blocks = num_blocks_for(160, ONE_PAIR.engine.block_size)
        assert num_prompt_blocks < most <= num_prompt_blocks + 2 * NUM_SAMPLES

    in_a_fleet(ONE_PAIR, story)


@pytest.mark.parametrize("config", [ONE_PAIR, ALONE, SLOW], ids=["pair", "alone", "slow"])
@pytest.mark.parametrize(
    "dropped", [(0,), (1,), (0, 3), (1, 2, 3, 4), (0, 1, 2, 3), (0, 1, 2, 3, 4)], ids=str
)
def test_samples_that_nobody_wants_more_of_end_and_the_others_go_on(
    config: FleetConfig, dropped: tuple[int, ...]
) -> None:
    """Dropped at the very first token, when the others may still wait for the prompt's KV."""

    async def story(fleet: SimulatedFleet) -> None:
        request = make_request(max_tokens=20)
        samples: list[list[int]] = [[] for _ in range(NUM_SAMPLES)]
        waiting = set(dropped)
        async for items in fleet.pipeline.generate(request, timeout_s=60):
            for item in items:
                samples[item.sample] += item.token_ids
            for sample in tuple(waiting):
                fleet.pipeline.drop(request.request_id, sample)
            waiting.clear()
        for sample, tokens in enumerate(samples):
            assert tokens == right(config, request, None if sample not in dropped else len(tokens))
            assert sample not in dropped or len(tokens) <= 2

    in_a_fleet(config, story)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("after_s", [0.005, 0.05, 0.3])
def test_a_worker_that_dies_takes_all_samples_with_it_and_nothing_else(role: Role, after_s: float) -> None:
    async def story(fleet: SimulatedFleet) -> None:
        request = make_request(num_prompt=280, max_tokens=60)
        asking = asyncio.create_task(fleet.ask_samples(request))
        await fleet.clock.sleep(after_s)
        await fleet.kill(next(name for name, w in fleet.workers.items() if role in w.record.roles))
        try:
            assert await asking == [right(SLOW, request)] * NUM_SAMPLES
            assert role is Role.PREFILL
        except WorkerLost:
            pass

    in_a_fleet(SLOW, story)


@pytest.mark.parametrize("max_tokens", [1, 20])
@pytest.mark.parametrize("after_s", [0.005, 0.02, 0.05])
def test_where_the_kv_does_not_arrive_the_prompt_is_computed_again_and_all_are_right(
    after_s: float, max_tokens: int
) -> None:
    async def story(fleet: SimulatedFleet) -> None:
        request = make_request(num_prompt=280, max_tokens=max_tokens)
        asking = asyncio.create_task(fleet.ask_samples(request))
        await fleet.clock.sleep(after_s)
        decode = next(w for w in fleet.workers.values() if Role.DECODE in w.record.roles)
        fleet.kv_network.kill(decode.kv_address)
        assert await asking == [right(SLOW, request)] * NUM_SAMPLES
        assert sum(" kv.recomputed " in line for line in fleet.events.lines) == 1

    in_a_fleet(SLOW, story)


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.03, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("config", [ONE_PAIR, ALONE, SLOW], ids=["pair", "alone", "slow"])
def test_a_client_that_leaves_ends_all_samples(config: FleetConfig, after_s: float) -> None:
    async def story(fleet: SimulatedFleet) -> None:
        asking = asyncio.create_task(fleet.ask_samples(make_request(max_tokens=200)))
        await fleet.clock.sleep(after_s)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await fleet.clock.sleep(1.0)
        assert set(fleet.num_used_blocks().values()) <= {0}

    in_a_fleet(config, story)


@pytest.mark.parametrize("timeout_s", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("config", [ONE_PAIR, ALONE, SLOW], ids=["pair", "alone", "slow"])
def test_a_deadline_ends_all_samples(config: FleetConfig, timeout_s: float) -> None:
    async def story(fleet: SimulatedFleet) -> None:
        with pytest.raises(DeadlineExceeded):
            await fleet.ask_samples(make_request(max_tokens=300), timeout_s)
        await fleet.clock.sleep(1.0)
        assert set(fleet.num_used_blocks().values()) <= {0}

    in_a_fleet(config, story)


@pytest.mark.parametrize("wrong", ["r", "r#1", "r#2"])
def test_a_sample_that_fails_is_the_failure_of_the_request(wrong: str) -> None:
    """And until then each is the answer to its own seed."""
    clock = VirtualClock()

    async def main() -> None:
        fleet = LocalFleet(
            clock, InprocRpcNetwork(clock), EventLines(clock), router=RouterConfig(), engine=ENGINE,
            transfer=TransferConfig(min_piece_bytes=1), index_lease_s=3.0, seed=0,
        )  # fmt: skip
        runner = FakeRunner(64, ENGINE.block_size)
        async with fleet.routing():
            transport = InprocTransport(InprocNetwork(clock), clock, "kv://d")
            worker = await fleet.start_worker(WorkerId("d"), (Role.DECODE,), runner, transport, "f")
            await fleet.ready()
            request = make_request(max_tokens=12, n=3, seed=9)
            samples = await fleet.ask_samples(request)
            assert samples == [
                seeded_tokens(request.prompt_token_ids, 12, seed=9 + sample) for sample in range(3)
            ]
            runner.nan_requests.add(RequestId(wrong))
            with pytest.raises(InternalError, match=wrong):
                await fleet.ask_samples(request)
            await clock.sleep(0.1)
            fleet.check_conservation()
            assert (worker.engine.num_sequences, worker.engine.num_used_blocks) == (0, 0)

    clock.run(main())


@pytest.mark.parametrize("config", [ONE_PAIR, ALONE], ids=["pair", "alone"])
def test_more_than_a_worker_runs_is_refused_by_name(config: FleetConfig) -> None:
    async def story(fleet: SimulatedFleet) -> None:
        with pytest.raises(InvalidRequest, match="n must be 1 to 64, the worker's max_num_seqs; 65"):
            await fleet.ask_samples(make_request(n=65))
        request = replace(make_request(n=64, max_tokens=3), request_id=RequestId("another"))
        assert await fleet.ask_samples(request) == [right(config, request)] * 64

    in_a_fleet(config, story)


def test_samples_make_way_for_each_other_where_the_pool_is_small() -> None:
    """Preempted, recomputed, and right."""
    engine = EngineConfig(num_blocks=16, max_num_batched_tokens=128)
    config = replace(ALONE, engine=engine)

    async def story(fleet: SimulatedFleet) -> None:
        request = make_request(num_prompt=60, max_tokens=60)
        assert await fleet.ask_samples(request) == [right(config, request)] * NUM_SAMPLES
        assert sum(worker.engine.pressure.num_preemptions for worker in fleet.workers.values()) > 0

    in_a_fleet(config, story)
