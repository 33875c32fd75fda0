"""The call to the prefill worker is open, and perhaps computed, before the decode worker has room: what may happen
meanwhile. On a virtual clock; the contract of such streams is in test_rpc.py."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

import pytest

from baton.clock import VirtualClock
from baton.config import EngineConfig, RouterConfig
from baton.errors import BatonError, Cancelled, DeadlineExceeded, InvalidRequest, Overloaded, WorkerLost
from baton.messages import (
    BlocksCall,
    PrefillBegin,
    PrefillResult,
    PrefillTicket,
    PrefillUp,
    Pushed,
    Role,
    Ticket,
)
from baton.request import Request, RequestId, SamplingParams
from baton_loadtest.local_fleet import HEARTBEAT_S, LocalWorker
from baton_loadtest.simulate import VOCAB_SIZE, FleetConfig, SimulatedFleet, expected_tokens, running_fleet
from baton_router.prefill_stream import PrefillStream

CONFIG = FleetConfig(
    num_prefill=1,
    num_decode=1,
    engine=EngineConfig(num_blocks=32, max_num_batched_tokens=128),
    router=RouterConfig(session_timeout_s=2.0, reserve_timeout_s=3.0),
)
COMPUTED_S = 0.5  # after so much time a prompt is


def make_request(name: str, num_prompt: int = 140) -> Request:
    rng = random.Random(name)
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(num_prompt))
    return Request(RequestId(name), prompt, SamplingParams(max_tokens=4, temperature=0.0))


WAITING = make_request("waiting")
FILLING = make_request("filling", num_prompt=490)
ANSWER = expected_tokens(WAITING.prompt_token_ids, 4, CONFIG.layout)


def worker_of(fleet: SimulatedFleet, role: Role) -> LocalWorker:
    return next(worker for worker in fleet.workers.values() if role in worker.record.roles)


async def fill(fleet: SimulatedFleet, *, is_known: bool) -> None:
    """The decode worker has no room any more. While the router does not know, it lets prompts begin."""
    worker_of(fleet, Role.DECODE).engine.reserve(FILLING)
    worker_of(fleet, Role.DECODE).worker.admit()
    if is_known:
        await fleet.clock.sleep(2 * HEARTBEAT_S)


def make_room(fleet: SimulatedFleet) -> None:
    worker_of(fleet, Role.DECODE).engine.abort(FILLING.request_id)
    worker_of(fleet, Role.DECODE).worker.admit()


def num_used(fleet: SimulatedFleet, role: Role) -> int:
    return worker_of(fleet, role).engine.num_used_blocks


both_ways = pytest.mark.parametrize("ahead", [False, True], ids=["open", "ahead"])


@pytest.fixture
def open_streams(monkeypatch: pytest.MonkeyPatch) -> set[PrefillStream]:
    """Those to prefill workers that are not closed."""
    found: set[PrefillStream] = set()
    make, close = PrefillStream.__init__, PrefillStream.aclose

    def made(stream: PrefillStream, *about: object) -> None:
        make(stream, *about)  # type: ignore[arg-type]
        found.add(stream)

    async def closed(stream: PrefillStream) -> None:
        await close(stream)
        found.discard(stream)

    monkeypatch.setattr(PrefillStream, "__init__", made)
    monkeypatch.setattr(PrefillStream, "aclose", closed)
    return found


async def assert_all_given_back(fleet: SimulatedFleet, open_streams: set[PrefillStream]) -> None:
    await fleet.clock.sleep(CONFIG.transfer.lease_s + HEARTBEAT_S)
    fleet.check_conservation()
    assert set(fleet.num_used_blocks().values()) <= {0} and not open_streams


@both_ways
@pytest.mark.parametrize(
    "error", [Cancelled, DeadlineExceeded, Overloaded], ids=["cancelled", "its deadline", "no room"]
)
def test_a_request_that_ends_before_its_ticket_ends_the_call(
    open_streams: set[PrefillStream], error: type[BatonError], ahead: bool
) -> None:
    async def main(clock: VirtualClock) -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            await fill(fleet, is_known=not ahead)
            asking = asyncio.create_task(
                fleet.ask(WAITING, timeout_s=1.0 if error is DeadlineExceeded else 60.0)
            )
            await clock.sleep(COMPUTED_S)
            assert len(open_streams) == 1 and bool(num_used(fleet, Role.PREFILL)) is ahead
            if error is Cancelled:
                fleet.pipeline.cancel(WAITING.request_id)
            with pytest.raises(error):
                await asking
            assert not open_streams
            await clock.sleep(HEARTBEAT_S)
            assert not num_used(fleet, Role.PREFILL)
            make_room(fleet)
            assert await fleet.ask(WAITING) == ANSWER
            await assert_all_given_back(fleet, open_streams)

    clock = VirtualClock()
    clock.run(main(clock))


@both_ways
@pytest.mark.parametrize("when_s", [0.0, 0.0005, 0.001, 0.01, 0.03, COMPUTED_S])
def test_a_prefill_worker_that_is_lost_before_the_ticket_costs_no_more_than_its_work(
    open_streams: set[PrefillStream], when_s: float, ahead: bool
) -> None:
    """The decode worker computes the prompt as soon as it has room, and waits for no lease."""

    async def main(clock: VirtualClock) -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            await fill(fleet, is_known=not ahead)
            asking = asyncio.create_task(fleet.ask(WAITING))
            await clock.sleep(when_s)
            await fleet.kill(worker_of(fleet, Role.PREFILL).record.worker_id)
            await clock.sleep(1.0)
            assert not asking.done()
            make_room(fleet)
            started_s = clock.now()
            assert await asking == ANSWER
            assert clock.now() - started_s < CONFIG.transfer.lease_s / 2
            await assert_all_given_back(fleet, open_streams)

    clock = VirtualClock()
    clock.run(main(clock))


@both_ways
@pytest.mark.parametrize("when_s", [0.0, 0.0005, 0.001, 0.01, 0.03, COMPUTED_S])
def test_a_decode_worker_that_is_lost_before_its_ticket_ends_the_call(
    open_streams: set[PrefillStream], when_s: float, ahead: bool
) -> None:
    async def main(clock: VirtualClock) -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            await fill(fleet, is_known=not ahead)
            asking = asyncio.create_task(fleet.ask(WAITING))
            await clock.sleep(when_s)
            await fleet.kill(worker_of(fleet, Role.DECODE).record.worker_id)
            with pytest.raises(WorkerLost):
                await asking
            await assert_all_given_back(fleet, open_streams)

    clock = VirtualClock()
    clock.run(main(clock))


def test_nothing_leaves_before_the_ticket_and_then_all_is_there_to_leave(
    open_streams: set[PrefillStream],
) -> None:
    async def main(clock: VirtualClock) -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            await fill(fleet, is_known=False)
            asking = asyncio.create_task(fleet.ask(WAITING))
            await clock.sleep(COMPUTED_S)
            holders = (await worker_of(fleet, Role.PREFILL).worker._blocks(BlocksCall())).holders
            assert [holder.note for holder in holders] == ["a prompt whose ticket has not come"]
            assert not fleet.transfers and not asking.done()
            make_room(fleet)
            started_s = clock.now()
            assert await asking == ANSWER
            record = fleet.pipeline.record(WAITING.request_id)
            assert record is not None and record.first_token_s is not None
            assert record.first_token_s - started_s < 0.01 < 140 * CONFIG.speed.prefill_token_s
            await clock.sleep(HEARTBEAT_S)
            assert {(r.direction, r.outcome, r.num_bytes) for r in fleet.transfers} == {
                (direction, "ok", record.num_bytes_transferred) for direction in ("sent", "received")
            }
            sent = next(r for r in fleet.transfers if r.direction == "sent")
            assert sent.exposed_s is not None and sent.exposed_s > COMPUTED_S / 2  # since it was computed
            await assert_all_given_back(fleet, open_streams)

    clock = VirtualClock()
    clock.run(main(clock))


def test_blocks_are_kept_for_a_ticket_no_longer_than_a_lease(open_streams: set[PrefillStream]) -> None:
    async def main(clock: VirtualClock) -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            await fill(fleet, is_known=False)
            asking = asyncio.create_task(fleet.ask(WAITING))
            await clock.sleep(CONFIG.transfer.lease_s - 0.1)
            assert num_used(fleet, Role.PREFILL)
            await clock.sleep(0.2)
            assert not num_used(fleet, Role.PREFILL) and not asking.done()
            make_room(fleet)
            assert await asking == ANSWER
            await assert_all_given_back(fleet, open_streams)

    clock = VirtualClock()
    clock.run(main(clock))


def test_what_the_decode_worker_holds_is_not_sent_although_the_prompt_began_before_it_said_so(
    open_streams: set[PrefillStream],
) -> None:
    async def main(clock: VirtualClock) -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            assert await fleet.ask(WAITING) == ANSWER
            longer = make_request("waiting", num_prompt=180)
            longer = replace(longer, request_id=RequestId("longer"))
            assert longer.prompt_token_ids[:140] == WAITING.prompt_token_ids
            assert await fleet.ask(longer) == expected_tokens(longer.prompt_token_ids, 4, CONFIG.layout)
            record = fleet.pipeline.record(longer.request_id)
            assert record is not None and record.num_cached_tokens_decode == 128
            assert record.num_bytes_transferred == (180 - 128) * CONFIG.layout.block_bytes // 16
            await assert_all_given_back(fleet, open_streams)

    clock = VirtualClock()
    clock.run(main(clock))


def test_workers_of_the_release_before_get_the_ticket_with_the_prompt(
    open_streams: set[PrefillStream],
) -> None:
    async def main(clock: VirtualClock) -> None:
        async with running_fleet(replace(CONFIG, prefills_ahead=False), clock) as fleet:
            await fill(fleet, is_known=False)
            asking = asyncio.create_task(fleet.ask(WAITING))
            await clock.sleep(COMPUTED_S)
            assert not num_used(fleet, Role.PREFILL)
            make_room(fleet)
            assert await asking == ANSWER
            assert [r.outcome for r in fleet.transfers] == ["ok", "ok"]
            await assert_all_given_back(fleet, open_streams)

    clock = VirtualClock()
    clock.run(main(clock))


# --- the worker's side of it ---


async def told(*messages: PrefillUp) -> AsyncGenerator[PrefillUp, None]:
    for message in messages:
        yield message


async def answers_of(worker: LocalWorker, messages: AsyncIterator[PrefillUp]) -> list[PrefillResult | Pushed]:
    assert worker.prefill is not None
    return [answer async for answer in worker.prefill.prefill_ahead(messages)]


def test_a_ticket_that_is_missing_or_does_not_fit_is_a_push_that_failed() -> None:
    async def main(clock: VirtualClock) -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            prefill, decode = worker_of(fleet, Role.PREFILL), worker_of(fleet, Role.DECODE)
            ticket = Ticket.of(
                decode.record, "carrier pigeon", "", 2.0,
                handle=1, request_id=WAITING.request_id, epoch=1, num_cached_tokens=0,
            )  # fmt: skip
            for messages, reason in (
                (told(PrefillBegin(WAITING)), "no ticket came"),
                (told(PrefillBegin(WAITING), PrefillBegin(WAITING)), "no ticket came"),
                (told(PrefillBegin(WAITING), PrefillTicket(ticket)), "receives over carrier pigeon"),
            ):
                *_, last = await answers_of(prefill, messages)
                assert isinstance(last, Pushed) and reason in last.reason
                await clock.sleep(HEARTBEAT_S)
                assert not prefill.engine.num_used_blocks
            with pytest.raises(InvalidRequest, match="what to compute"):
                await answers_of(prefill, told(PrefillTicket(ticket)))

    clock = VirtualClock()
    clock.run(main(clock))
