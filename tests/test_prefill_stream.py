"""The call to the prefill worker is open before the decode worker has room: what may happen meanwhile. On a virtual
clock, but for the contract of such streams in test_rpc.py."""

import asyncio
import random
from collections.abc import AsyncGenerator

import pytest

from baton.clock import VirtualClock
from baton.config import EngineConfig, RouterConfig
from baton.errors import BatonError, Cancelled, DeadlineExceeded, Overloaded
from baton.messages import PrefillAnswer, PrefillCall, Role
from baton.request import Request, RequestId, SamplingParams
from baton_loadtest.local_fleet import HEARTBEAT_S, LocalWorker
from baton_loadtest.simulate import VOCAB_SIZE, FleetConfig, SimulatedFleet, expected_tokens, running_fleet
from baton_prefill.service import PrefillService
from baton_router.prefill_stream import PrefillStream

CONFIG = FleetConfig(
    num_prefill=1,
    num_decode=1,
    engine=EngineConfig(num_blocks=32, max_num_batched_tokens=128),
    router=RouterConfig(session_timeout_s=2.0, reserve_timeout_s=3.0),
)


def make_request(name: str, num_prompt: int = 140) -> Request:
    rng = random.Random(name)
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(num_prompt))
    return Request(RequestId(name), prompt, SamplingParams(max_tokens=4, temperature=0.0))


WAITING = make_request("waiting")
FILLING = make_request("filling", num_prompt=490)
ANSWER = expected_tokens(WAITING.prompt_token_ids, 4, CONFIG.layout)


def worker_of(fleet: SimulatedFleet, role: Role) -> LocalWorker:
    return next(worker for worker in fleet.workers.values() if role in worker.record.roles)


def fill(fleet: SimulatedFleet) -> None:
    """No decode worker has room any more."""
    worker_of(fleet, Role.DECODE).engine.reserve(FILLING)
    worker_of(fleet, Role.DECODE).worker.admit()


def make_room(fleet: SimulatedFleet) -> None:
    worker_of(fleet, Role.DECODE).engine.abort(FILLING.request_id)
    worker_of(fleet, Role.DECODE).worker.admit()


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


@pytest.mark.parametrize(
    "error", [Cancelled, DeadlineExceeded, Overloaded], ids=["cancelled", "its deadline", "no room"]
)
def test_a_request_that_ends_before_its_ticket_closes_the_call(
    open_streams: set[PrefillStream], error: type[BatonError]
) -> None:
    async def main(clock: VirtualClock) -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            fill(fleet)
            asking = asyncio.create_task(
                fleet.ask(WAITING, timeout_s=1.0 if error is DeadlineExceeded else 60.0)
            )
            await clock.sleep(0.2)
            assert len(open_streams) == 1
            if error is Cancelled:
                fleet.pipeline.cancel(WAITING.request_id)
            with pytest.raises(error):
                await asking
            assert not open_streams
            await clock.sleep(HEARTBEAT_S)
            make_room(fleet)
            assert await fleet.ask(WAITING) == ANSWER
            await assert_all_given_back(fleet, open_streams)

    clock = VirtualClock()
    clock.run(main(clock))


@pytest.mark.parametrize("when_s", [0.0, 0.0005, 0.2], ids=["at once", "while it opens", "when it is open"])
def test_a_prefill_worker_that_is_lost_before_the_ticket_costs_no_more_than_its_work(
    open_streams: set[PrefillStream], when_s: float
) -> None:
    """The decode worker computes the prompt as soon as it has room, and waits for no lease."""

    async def main(clock: VirtualClock) -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            fill(fleet)
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


def test_a_prefill_worker_computes_nothing_before_there_is_a_ticket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[RequestId] = []
    prefill = PrefillService.prefill

    def noted(service: PrefillService, call: PrefillCall) -> AsyncGenerator[PrefillAnswer, None]:
        calls.append(call.request.request_id)
        return prefill(service, call)

    monkeypatch.setattr(PrefillService, "prefill", noted)

    async def main(clock: VirtualClock) -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            calls.clear()  # the canary's
            fill(fleet)
            asking = asyncio.create_task(fleet.ask(WAITING))
            await clock.sleep(0.5)
            assert not calls
            make_room(fleet)
            assert await asking == ANSWER
            assert calls == [WAITING.request_id]

    clock = VirtualClock()
    clock.run(main(clock))
