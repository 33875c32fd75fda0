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
    PrefillCall,
    PrefillResult,
    PrefillTicket,
    PrefillUp,
    Pushed,
    Role,
    Ticket,
)
from baton.request import Request, RequestId, SamplingParams, WorkerId
from baton.rpc import PREFILL_AHEAD
from baton.rpc.inproc import InprocRpc, InprocRpcNetwork
from baton_loadtest.local_fleet import HEARTBEAT_S, LocalWorker
from baton_loadtest.simulate import VOCAB_SIZE, FleetConfig, SimulatedFleet, expected_tokens, running_fleet
from baton_router.prefill_stream import PrefillStream, PrefillStreams

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
    """Those to prefill workers that were taken and are not closed."""
    found: set[PrefillStream] = set()
    take, close = PrefillStreams.take, PrefillStream.aclose

    async def taken(streams: PrefillStreams, timeout_s: float, ahead: Request | None) -> PrefillStream:
        stream = await take(streams, timeout_s, ahead)
        found.add(stream)
        return stream

    async def closed(stream: PrefillStream) -> None:
        await close(stream)
        found.discard(stream)

    monkeypatch.setattr(PrefillStreams, "take", taken)
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


# --- the spare stream ---


TICKET = Ticket(1, WAITING.request_id, 1, WorkerId("decode-0"), "shm", "", "", 16, 0, 2.0)


class EchoWorker:
    """Says the request's id as the reason of a push, and counts the calls that were opened."""

    def __init__(self) -> None:
        self.num_opened = 0
        self.num_open = 0

    async def prefill_ahead(self, messages: AsyncIterator[PrefillUp]) -> AsyncGenerator[Pushed, None]:
        self.num_opened += 1
        self.num_open += 1
        try:
            begin = await anext(messages)
            assert isinstance(begin, PrefillBegin)
            yield Pushed(begin.request.request_id)
        finally:
            self.num_open -= 1


async def asked(streams: PrefillStreams, name: str) -> str:
    stream = await streams.take(1.0, make_request(name))
    try:
        async for answer in stream.ask(PrefillCall(make_request(name), TICKET, 1.0)):
            assert isinstance(answer, Pushed)
            return answer.reason
        raise AssertionError("no answer")
    finally:
        await stream.aclose()


def test_a_call_is_open_before_its_request_and_one_that_broke_meanwhile_is_not_used() -> None:
    async def main(clock: VirtualClock) -> None:
        network, worker = InprocRpcNetwork(clock, latency_s=0.01), EchoWorker()
        rpc = InprocRpc(network, clock, "router")
        server = await rpc.serve("worker:1", {PREFILL_AHEAD: worker.prefill_ahead})
        streams = PrefillStreams(rpc.connect("worker:1"))
        assert await asked(streams, "first") == "first"  # opened for it: there was no spare one
        await streams.refill()
        await clock.sleep(1.0)
        await streams.refill()
        assert (worker.num_opened, worker.num_open) == (2, 1)
        assert await asked(streams, "second") == "second"
        assert worker.num_opened == 2

        await streams.refill()
        await clock.sleep(1.0)
        network.kill("worker:1")
        await server.aclose(0.0)
        await clock.sleep(1.0)
        await rpc.serve("worker:1", {PREFILL_AHEAD: worker.prefill_ahead})
        assert await asked(streams, "third") == "third"
        assert worker.num_opened == 4

        await streams.refill()
        await clock.sleep(1.0)
        assert worker.num_open == 1
        await streams.aclose()
        await streams.refill()  # a request that ends after the worker left
        await clock.sleep(1.0)
        assert (worker.num_opened, worker.num_open) == (5, 0)

    clock = VirtualClock()
    clock.run(main(clock))


def test_of_the_requests_of_one_instant_one_gets_the_spare_call_and_each_its_answer(
    open_streams: set[PrefillStream],
) -> None:
    async def main(clock: VirtualClock) -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            requests = [make_request(f"r{i}", num_prompt=40) for i in range(4)]
            answers = await asyncio.gather(*map(fleet.ask, requests))
            assert answers == [expected_tokens(r.prompt_token_ids, 4, CONFIG.layout) for r in requests]
            await assert_all_given_back(fleet, open_streams)

    clock = VirtualClock()
    clock.run(main(clock))
