"""Leases on a virtual clock: renewed while a sender is there, and ended within a heartbeat of the cause."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from baton.clock import VirtualClock
from baton.config import TransferConfig
from baton.errors import BatonError, DeadlineExceeded
from baton.messages import Purpose, Role
from baton.request import Request, RequestId, SamplingParams
from baton_loadtest.local_fleet import HEARTBEAT_S, LocalWorker
from baton_loadtest.simulate import (
    VOCAB_SIZE,
    FleetConfig,
    SimulatedFleet,
    Speed,
    expected_tokens,
    running_fleet,
)

CONFIG = FleetConfig(seed=3, num_prefill=1, num_decode=1, link_bytes_per_s=2e4)  # the transfer takes 0.4 s
HANDED_OVER = (Purpose.RECEIVING, Purpose.LEASED, Purpose.DRAINING)
LATEST_S = CONFIG.transfer.lease_s + HEARTBEAT_S


def make_request(name: str, num_prompt: int, num_output: int) -> Request:
    rng = random.Random(name)
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(num_prompt))
    return Request(RequestId(name), prompt, SamplingParams(max_tokens=num_output, temperature=0.0))


def right_answer(config: FleetConfig, request: Request) -> list[int]:
    return expected_tokens(request.prompt_token_ids, request.sampling.max_tokens, config.layout)


def worker_of(fleet: SimulatedFleet, role: Role) -> LocalWorker:
    return next(worker for worker in fleet.workers.values() if role in worker.record.roles)


def num_handed_over(worker: LocalWorker) -> int:
    blocks = worker.worker.blocks_by_purpose()
    return sum(blocks[purpose] for purpose in HANDED_OVER)


async def kill(fleet: SimulatedFleet, victim: LocalWorker) -> None:
    await fleet.kill(victim.record.worker_id)


async def stop(fleet: SimulatedFleet, victim: LocalWorker) -> None:
    """As by SIGSTOP: its connections stay open and nothing comes."""
    fleet.rpc_network.partition("caller", victim.record.address)
    for worker in fleet.workers.values():
        if worker is not victim:
            fleet.kv_network.partition(worker.kv_address, victim.kv_address)


@pytest.mark.parametrize("end", [kill, stop])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_the_survivor_has_everything_back_within_lease_and_heartbeat(
    end: Callable[[SimulatedFleet, LocalWorker], Awaitable[None]], role: Role, after_s: float
) -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            request = make_request("r", 280, 20)
            client = asyncio.create_task(fleet.ask(request))
            await clock.sleep(after_s)
            victim = worker_of(fleet, role)
            survivor = worker_of(fleet, Role.DECODE if role is Role.PREFILL else Role.PREFILL)
            await end(fleet, victim)
            await clock.sleep(LATEST_S)
            assert num_handed_over(survivor) == 0
            assert survivor.receiver.num_expected == 0
            if role is Role.DECODE:
                assert survivor.engine.num_used_blocks == 0
                with pytest.raises(BatonError):
                    await client
            else:  # the decode worker computes what did not come
                assert await client == right_answer(CONFIG, request)
                await clock.sleep(HEARTBEAT_S)
                assert survivor.engine.num_used_blocks == 0
            survivor.engine.check_integrity()

    clock.run(main())


def test_a_prompt_that_takes_longer_than_the_lease_is_not_given_up() -> None:
    clock = VirtualClock()
    transfer = TransferConfig(lease_s=2.0, push_timeout_s=1.0, min_piece_bytes=1, num_layer_groups=1)
    config = replace(CONFIG, transfer=transfer, speed=Speed(prefill_token_s=0.04))  # 5 s for each chunk

    async def main() -> None:
        async with running_fleet(config, clock) as fleet:
            requests = [make_request(f"r{number}", 200, 5) for number in range(2)]
            answers = await asyncio.gather(*(fleet.ask(request) for request in requests))
            assert answers == [right_answer(config, request) for request in requests]
            assert [report.outcome for report in fleet.transfers] == ["ok"] * 4
            assert not any(" handover.repaired " in line for line in fleet.events.lines)

    clock.run(main())


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_an_expiry_before_the_first_piece_is_counted(role: Role) -> None:
    """KV alone does not get through; the router hears of both workers."""
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            prefill, decode = worker_of(fleet, Role.PREFILL), worker_of(fleet, Role.DECODE)
            fleet.kv_network.partition(prefill.kv_address, decode.kv_address)
            request = make_request("r", 100, 5)
            assert await fleet.ask(request) == right_answer(CONFIG, request)
            await clock.sleep(LATEST_S)
            outcomes = {report.direction: (report.outcome, report.peer) for report in fleet.transfers}
            names = prefill.record.worker_id, decode.record.worker_id
            assert outcomes["sent"] == ("failed", names[1])
            assert outcomes["received"] in (("failed", names[0]), ("expired", names[0]))

    clock.run(main())


async def leave(fleet: SimulatedFleet, request: Request, after_s: float) -> None:
    client = asyncio.create_task(fleet.ask(request))
    await fleet.clock.sleep(after_s)
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)


async def run_out_of_time(fleet: SimulatedFleet, request: Request, after_s: float) -> None:
    with pytest.raises(DeadlineExceeded):
        await fleet.ask(request, timeout_s=after_s)


@pytest.mark.parametrize("end", [leave, run_out_of_time])
@pytest.mark.parametrize("after_s", [0.001, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_both_sides_have_everything_back_within_a_heartbeat_of_a_client_s_end(
    end: Callable[[SimulatedFleet, Request, float], Awaitable[None]], after_s: float
) -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            await end(fleet, make_request("r", 280, 60), after_s)
            await clock.sleep(HEARTBEAT_S)
            assert set(fleet.num_used_blocks().values()) == {0}
            assert all(worker.receiver.num_expected == 0 for worker in fleet.workers.values())
            fleet.check_conservation()

    clock.run(main())
