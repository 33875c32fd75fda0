"""A prefix that only another worker holds is fetched instead of computed: right tokens, nothing leaked, and nothing
lost when the owner dies, hangs or has evicted it. The whole fleet on a virtual clock."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from baton.clock import VirtualClock
from baton.config import EngineConfig
from baton.errors import InvalidRequest
from baton.kv.block import block_hashes, root_hash
from baton.messages import FetchOutcome, PrefillCall, Purpose, Role
from baton.request import Request, RequestId, SamplingParams
from baton.transfer.inproc import Faults, _Message
from baton.transfer.wire import PieceHeader
from baton_loadtest.local_fleet import LocalWorker
from baton_loadtest.simulate import (
    VOCAB_SIZE,
    FleetConfig,
    SimulatedFleet,
    Speed,
    expected_tokens,
    running_fleet,
)
from baton_router.prefix_paths import REST_S

# A slow prefill and a fast wire: fetching pays.
CONFIG = FleetConfig(
    seed=5, num_prefill=1, num_decode=1, link_bytes_per_s=1e6, speed=Speed(prefill_token_s=0.004)
)
TURN_1, ANSWER, QUESTION = 96, 65, 30
NO_FAULTS = Faults()
NUM_HELD = 160  # by the decode worker: full blocks of the prompt and its answer but for the last token
NUM_FETCHED = NUM_HELD - TURN_1  # the prefill worker has the first prompt itself


def request_of(name: str, prompt: tuple[int, ...], num_output: int, salt: str = "") -> Request:
    sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
    return Request(RequestId(name), prompt, sampling, cache_salt=salt)


def random_tokens(name: str, number: int) -> tuple[int, ...]:
    rng = random.Random(name)
    return tuple(rng.randrange(VOCAB_SIZE) for _ in range(number))


def right_answer(config: FleetConfig, request: Request) -> list[int]:
    return expected_tokens(request.prompt_token_ids, request.sampling.max_tokens, config.layout)


def worker_of(fleet: SimulatedFleet, role: Role) -> LocalWorker:
    return next(worker for worker in fleet.workers.values() if role in worker.record.roles)


async def first_turn(fleet: SimulatedFleet, name: str = "chat", salt: str = "") -> tuple[int, ...]:
    """Returns the conversation so far, with a question that follows."""
    request = request_of(f"{name}-1", random_tokens(name, TURN_1), ANSWER, salt)
    tokens = await fleet.ask(request)
    assert tokens == right_answer(fleet.config, request)
    await fleet.clock.sleep(1.0)  # the router hears of the blocks
    return (*request.prompt_token_ids, *tokens, *random_tokens(f"{name}?", QUESTION))


async def assert_all_given_back(fleet: SimulatedFleet) -> None:
    await fleet.clock.sleep(5.0)
    fleet.check_conservation()
    assert set(fleet.num_used_blocks().values()) == {0}
    assert all(worker.receiver.num_expected == 0 for worker in fleet.workers.values())


async def ask_one_after_another(fleet: SimulatedFleet, requests: list[Request]) -> None:
    """Without waiting for answers; all of them are right."""
    asked = []
    for request in requests:
        asked.append(asyncio.create_task(fleet.ask(request)))
        await fleet.clock.sleep(0.01)  # the router counts what it has sent to a worker
    answers = await asyncio.gather(*asked)
    assert answers == [right_answer(fleet.config, request) for request in requests]


def outcomes(fleet: SimulatedFleet) -> list[FetchOutcome]:
    return [fetched.outcome for fetched in fleet.fetches]


def test_the_second_turn_of_a_chat_is_fetched_from_the_decode_worker() -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            second = request_of("chat-2", await first_turn(fleet), 20)
            asked_s = clock.now()
            assert await fleet.ask(second) == right_answer(CONFIG, second)
            [fetched] = fleet.fetches
            assert (fetched.outcome, fetched.source_id, fetched.num_tokens) == ("ok", "decode-2", NUM_FETCHED)
            record = fleet.pipeline.record("chat-2")
            assert record is not None
            assert (record.num_fetched_tokens, record.num_cached_tokens_prefill) == (NUM_FETCHED, NUM_HELD)
            assert record.fetched_from == "decode-2"
            assert (
                record.ttft_s is not None and record.ttft_s < 0.2 < NUM_FETCHED * CONFIG.speed.prefill_token_s
            )
            assert clock.now() > asked_s
            assert worker_of(fleet, Role.DECODE).worker.load().transfer_bytes_per_s > 0
            await assert_all_given_back(fleet)

    clock.run(main())


def test_a_second_prefill_worker_fetches_what_the_busy_one_computed_and_sends_it_on() -> None:
    """It asks whoever holds the prefix; a decode worker that has none of it gets all."""
    clock = VirtualClock()
    config = replace(CONFIG, num_prefill=2, num_decode=2)

    async def main() -> None:
        async with running_fleet(config, clock) as fleet:
            prompts = [random_tokens("shared", 200) + random_tokens(f"q{n}", 20) for n in range(9)]
            requests = [request_of(f"r{n}", prompt, 10) for n, prompt in enumerate(prompts)]
            assert await fleet.ask(requests[0]) == right_answer(config, requests[0])
            await clock.sleep(1.0)
            await ask_one_after_another(fleet, requests[1:])
            assert FetchOutcome.OK in outcomes(fleet)
            await assert_all_given_back(fleet)

    clock.run(main())


def test_a_chain_of_another_tenant_is_never_fetched() -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            prompt = await first_turn(fleet, salt="alice")
            other = request_of("bob", prompt, 20, salt="bob")
            assert await fleet.ask(other) == right_answer(CONFIG, other)
            assert not fleet.fetches
            await assert_all_given_back(fleet)

    clock.run(main())


def test_where_computing_is_faster_nothing_is_fetched() -> None:
    clock = VirtualClock()
    config = replace(CONFIG, speed=Speed(), link_bytes_per_s=2e4)

    async def main() -> None:
        async with running_fleet(config, clock) as fleet:
            second = request_of("chat-2", await first_turn(fleet), 20)
            assert await fleet.ask(second) == right_answer(config, second)
            assert not fleet.fetches
            await assert_all_given_back(fleet)

    clock.run(main())


@pytest.mark.parametrize(("num_left", "num_fetched"), [(0, 0), (8, 32)])
def test_what_the_owner_has_evicted_is_computed_and_what_is_left_fetched(
    num_left: int, num_fetched: int
) -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            second = request_of("chat-2", await first_turn(fleet), 20)
            owner, prefill = worker_of(fleet, Role.DECODE), worker_of(fleet, Role.PREFILL)
            fetch = prefill.fetcher._attempt

            async def evict_first(*args: object) -> int:
                prefill.fetcher._attempt = fetch  # type: ignore[method-assign]
                evict_chain(owner, second, num_left)
                return await fetch(*args)  # type: ignore[arg-type]

            prefill.fetcher._attempt = evict_first  # type: ignore[method-assign]
            assert await fleet.ask(second) == right_answer(CONFIG, second)
            [fetched] = fleet.fetches
            assert (fetched.num_tokens, fetched.num_held_tokens) == (num_fetched, num_left * 16)
            assert fetched.outcome is (FetchOutcome.OK if num_fetched else FetchOutcome.EVICTED)
            await assert_all_given_back(fleet)

    clock.run(main())


def evict_chain(worker: LocalWorker, request: Request, num_left: int) -> None:
    root = root_hash(worker.record.fingerprint, 16, request.cache_salt)
    pool = worker.engine._kv._pool
    for block_hash in block_hashes(root, request.prompt_token_ids, 16)[num_left:]:
        if (block_id := pool.lookup(block_hash)) is not None:
            pool.touch(block_id)
            pool.forget(block_id)
            pool.release(block_id)


async def kill(fleet: SimulatedFleet, victim: LocalWorker) -> None:
    await fleet.kill(victim.record.worker_id)


async def hang(fleet: SimulatedFleet, victim: LocalWorker) -> None:
    """As by SIGSTOP: its connections stay open and nothing comes."""
    fleet.rpc_network.partition("caller", victim.record.address)
    for worker in fleet.workers.values():
        if worker is not victim:
            fleet.kv_network.partition(worker.kv_address, victim.kv_address)


SLOW_WIRE = replace(CONFIG, link_bytes_per_s=2e4, speed=Speed(prefill_token_s=0.01))  # a fetch takes 0.104 s


def answer_elsewhere(fleet: SimulatedFleet, decode: LocalWorker) -> None:
    place = fleet.pipeline._choice._place
    fleet.pipeline._choice._place = lambda chains: replace(  # type: ignore[method-assign]
        place(chains), decode=decode.record.worker_id
    )


async def assert_others_have_all_back(fleet: SimulatedFleet, victim: LocalWorker) -> None:
    await fleet.clock.sleep(5.0)
    fleet.check_conservation()
    for worker in fleet.workers.values():
        if worker is not victim:
            assert worker.engine.num_used_blocks == 0
            assert worker.receiver.num_expected == 0


@pytest.mark.parametrize("end", [kill, hang])
@pytest.mark.parametrize("after_s", [0.002, 0.02, 0.05, 0.1, 0.2])
def test_when_the_owner_dies_or_hangs_the_prefix_is_computed(
    end: Callable[[SimulatedFleet, LocalWorker], Awaitable[None]], after_s: float
) -> None:
    """The owner is another decode worker than the one that is to answer."""
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(SLOW_WIRE, clock) as fleet:
            second = request_of("chat-2", await first_turn(fleet), 20)
            owner = worker_of(fleet, Role.DECODE)
            answer_elsewhere(fleet, await fleet.start(Role.DECODE))
            await fleet.ready()
            client = asyncio.create_task(fleet.ask(second))
            await clock.sleep(after_s)
            await end(fleet, owner)
            assert await client == right_answer(SLOW_WIRE, second)
            [fetched] = fleet.fetches
            if after_s < 0.104:
                assert fetched.outcome in (FetchOutcome.FAILED, FetchOutcome.LATE)
                assert fetched.num_tokens == 0
            else:  # it has given what it held before
                assert (fetched.outcome, fetched.num_tokens) == (FetchOutcome.OK, NUM_FETCHED)
            await assert_others_have_all_back(fleet, owner)

    clock.run(main())


def test_the_lease_of_a_hung_owner_ends_before_computing_would_have() -> None:
    clock = VirtualClock()
    config = replace(SLOW_WIRE, speed=Speed(prefill_token_s=0.05))  # 3.2 s for what a fetch brings

    async def main() -> None:
        async with running_fleet(config, clock) as fleet:
            second = request_of("chat-2", await first_turn(fleet), 20)
            owner = worker_of(fleet, Role.DECODE)
            answer_elsewhere(fleet, await fleet.start(Role.DECODE))
            await fleet.ready()
            client = asyncio.create_task(fleet.ask(second))
            await clock.sleep(0.002)  # before the first piece: no transport can tell
            await hang(fleet, owner)
            assert await client == right_answer(config, second)
            [fetched] = fleet.fetches
            assert (fetched.outcome, fetched.num_tokens) == (FetchOutcome.FAILED, 0)
            assert "no progress for 2 s" in fetched.reason
            await assert_others_have_all_back(fleet, owner)

    clock.run(main())


@pytest.mark.parametrize("end", [kill, hang])
@pytest.mark.parametrize("after_s", [0.002, 0.02, 0.05, 0.1])
def test_when_the_one_who_fetches_dies_or_hangs_the_owner_has_its_blocks_back(
    end: Callable[[SimulatedFleet, LocalWorker], Awaitable[None]], after_s: float
) -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(SLOW_WIRE, clock) as fleet:
            second = request_of("chat-2", await first_turn(fleet), 20)
            fetching = worker_of(fleet, Role.PREFILL)
            client = asyncio.create_task(fleet.ask(second))
            await clock.sleep(after_s)
            await end(fleet, fetching)
            assert await client == right_answer(SLOW_WIRE, second)  # by the decode worker alone
            await assert_others_have_all_back(fleet, fetching)

    clock.run(main())


@pytest.mark.parametrize(("num_damaged", "outcome"), [(2, FetchOutcome.OK), (3, FetchOutcome.FAILED)])
def test_a_damaged_piece_is_sent_again_twice_and_then_the_prefix_is_computed(
    num_damaged: int, outcome: FetchOutcome
) -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            prompt = await first_turn(fleet)
            damage_first_piece(fleet, num_damaged)
            second = request_of("chat-2", prompt, 20)
            assert await fleet.ask(second) == right_answer(CONFIG, second)
            [fetched] = fleet.fetches
            assert (fetched.outcome, fetched.num_mismatches) == (outcome, num_damaged)
            assert fetched.num_tokens == (NUM_FETCHED if outcome is FetchOutcome.OK else 0)
            owner, prefill = (worker_of(fleet, role).record for role in (Role.DECODE, Role.PREFILL))
            assert not fleet.fleet.prefix_paths.can_fetch(owner, prefill, owner)  # for a while
            await clock.sleep(REST_S)
            assert fleet.fleet.prefix_paths.can_fetch(owner, prefill, owner)
            await assert_all_given_back(fleet)

    clock.run(main())


def damage_first_piece(fleet: SimulatedFleet, num_times: int) -> None:
    """Of a prefix: a bit of its payload, so many times."""
    disturb, num_left = fleet.kv_network.disturb, num_times

    def damage(message: _Message) -> list[_Message]:
        nonlocal num_left
        header = PieceHeader.decode(message.header)
        if not (header.request_id.endswith("#prefix") and header.sequence == 0 and num_left):
            return disturb(message)
        num_left -= 1
        return [_Message(message.header, bytes([message.payload[0] ^ 1]) + message.payload[1:])]

    fleet.kv_network.disturb = damage  # type: ignore[method-assign]


def test_what_only_another_prefill_worker_holds_is_fetched_from_there() -> None:
    """One token was the whole answer: no decode worker has anything of that prompt."""
    clock = VirtualClock()
    config = replace(CONFIG, num_prefill=2)

    async def main() -> None:
        async with running_fleet(config, clock) as fleet:
            shared = random_tokens("shared", 200)
            requests = [request_of(f"r{n}", shared + random_tokens(f"q{n}", 20), 10) for n in range(3)]
            first = replace(requests[0], sampling=replace(requests[0].sampling, max_tokens=1))
            assert await fleet.ask(first) == right_answer(config, first)
            record = fleet.pipeline.record("r0")
            await clock.sleep(1.0)
            await ask_one_after_another(fleet, requests[1:])
            [fetched] = fleet.fetches
            assert record is not None and fetched.source_id == record.prefill_worker
            assert (fetched.outcome, fetched.num_tokens) == (FetchOutcome.OK, 192)
            await assert_all_given_back(fleet)

    clock.run(main())


def test_a_prompt_that_the_engine_refuses_is_never_pushed() -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            prefill, decode = worker_of(fleet, Role.PREFILL), worker_of(fleet, Role.DECODE)
            bad = request_of("bad", (VOCAB_SIZE,), 5)
            ticket = prefill.fetcher._ticket(bad, 0, 1)
            ticket = replace(ticket, worker_id=decode.record.worker_id, address=decode.kv_address)
            assert prefill.prefill is not None
            with pytest.raises(InvalidRequest, match="vocabulary"):
                await anext(prefill.prefill.prefill(PrefillCall(bad, ticket, 5.0)))
            await assert_all_given_back(fleet)
            assert fleet.transfers == []

    clock.run(main())


@pytest.mark.parametrize("after_s", [0.001, 0.003, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_a_client_that_leaves_in_the_middle_of_a_fetch_gets_everything_given_back(after_s: float) -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(SLOW_WIRE, clock) as fleet:
            prompt = await first_turn(fleet)
            client = asyncio.create_task(fleet.ask(request_of("chat-2", prompt, 20)))
            await clock.sleep(after_s)
            client.cancel()
            await assert_all_given_back(fleet)
            again = request_of("chat-3", prompt, 20)
            assert await fleet.ask(again) == right_answer(SLOW_WIRE, again)
            await assert_all_given_back(fleet)

    clock.run(main())


def test_the_ledger_says_who_holds_what_during_a_fetch() -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(SLOW_WIRE, clock) as fleet:
            second = request_of("chat-2", await first_turn(fleet), 20)
            client = asyncio.create_task(fleet.ask(second))
            await clock.sleep(0.1)
            ledgers = await fleet.fleet.blocks()
            holders = {
                (worker_id, holder.purpose, holder.note[:8])
                for worker_id, ledger in ledgers.items()
                for holder in getattr(ledger, "holders", ())
                if holder.request_id == "chat-2#prefix"
            }
            assert {(worker_id, purpose) for worker_id, purpose, _ in holders} == {
                ("decode-2", Purpose.LEASED),
                ("prefill-1", Purpose.RECEIVING),
            }
            assert await client == right_answer(SLOW_WIRE, second)
            await assert_all_given_back(fleet)

    clock.run(main())


def test_chats_of_many_turns_under_load_are_right_and_the_same_seed_gives_the_same_events() -> None:
    def run(seed: int, faults: Faults = NO_FAULTS) -> list[str]:
        clock = VirtualClock()
        engine = EngineConfig(num_blocks=96, max_num_batched_tokens=128)
        config = replace(CONFIG, seed=seed, num_prefill=2, num_decode=2, engine=engine)

        async def chat(fleet: SimulatedFleet, number: int) -> None:
            tokens = random_tokens(f"{seed}/{number}", 50)
            for turn in range(4):
                request = request_of(f"c{number}.{turn}", tokens, 30)
                answer = await fleet.ask(request)
                assert answer == right_answer(config, request)
                tokens = (*tokens, *answer, *random_tokens(f"{seed}/{number}/{turn}", 17))
                await clock.sleep(random.Random(f"{number}{turn}").uniform(0.0, 1.0))

        async def main() -> list[str]:
            async with running_fleet(config, clock) as fleet:
                fleet.kv_network.faults = faults
                await asyncio.gather(*(chat(fleet, number) for number in range(6)))
                assert FetchOutcome.OK in outcomes(fleet)
                await assert_all_given_back(fleet)
                return list(fleet.events.lines)

        return clock.run(main())

    assert run(1) == run(1)
    assert run(2) != run(1)
    run(3, Faults(drop=0.02, duplicate=0.05, flip=0.05))
