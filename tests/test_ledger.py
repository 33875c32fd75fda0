"""The block ledger: at every moment each used block has a holder with a purpose, and the doctor reads it right."""

import asyncio
import random
import re
from typing import Any

from baton.clock import VirtualClock
from baton.messages import BlockLedger, Purpose, Role
from baton.request import Request, RequestId, SamplingParams, WorkerId
from baton_cli.doctor import diagnose
from baton_loadtest.simulate import VOCAB_SIZE, FleetConfig, SimulatedFleet, running_fleet


def make_request(name: str, num_prompt: int, num_output: int) -> Request:
    rng = random.Random(name)
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(num_prompt))
    return Request(RequestId(name), prompt, SamplingParams(max_tokens=num_output, temperature=0.0))


async def ledgers(fleet: SimulatedFleet) -> dict[WorkerId, BlockLedger]:
    found = await fleet.fleet.blocks()
    assert all(isinstance(ledger, BlockLedger) for ledger in found.values())
    return found  # type: ignore[return-value]


def assert_adds_up(ledger: BlockLedger) -> None:
    assert ledger.num_used + ledger.num_free == ledger.num_blocks
    held = {block_id for holder in ledger.holders for block_id in holder.block_ids}
    assert len(held) == ledger.num_used


def test_a_hand_over_is_seen_on_both_sides_while_it_lasts() -> None:
    clock = VirtualClock()
    config = FleetConfig(num_prefill=1, num_decode=1, link_bytes_per_s=2e4)

    async def main() -> None:
        async with running_fleet(config, clock) as fleet:
            client = asyncio.create_task(fleet.ask(make_request("r", 200, 5)))
            await clock.sleep(0.2)
            seen = await ledgers(fleet)
            [source] = seen[WorkerId("prefill-1")].holders
            [target] = seen[WorkerId("decode-2")].holders
            assert (source.purpose, target.purpose) == (Purpose.LEASED, Purpose.RECEIVING)
            assert "decode-2" in source.note
            assert source.lease_left_s is not None and 0 < source.lease_left_s <= config.transfer.lease_s
            assert target.lease_left_s is not None and 0 < target.lease_left_s <= config.transfer.lease_s
            assert re.fullmatch(r"\d+% of the KV from prefill-1 has arrived over inproc", target.note)
            client.cancel()
            await asyncio.gather(client, return_exceptions=True)
            await clock.sleep(3.0)
            for ledger in (await ledgers(fleet)).values():
                assert ledger.holders == () and ledger.num_used == 0

    clock.run(main())


def test_it_adds_up_at_every_moment_under_load_with_cancels_and_deaths() -> None:
    clock = VirtualClock()

    async def client(fleet: SimulatedFleet, request: Request, patience_s: float) -> None:
        task = asyncio.create_task(fleet.ask(request))
        await asyncio.wait([task], timeout=patience_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def main() -> None:
        rng = random.Random(1)
        purposes = set()
        config = FleetConfig(seed=1, link_bytes_per_s=1e5)
        async with running_fleet(config, clock) as fleet, asyncio.TaskGroup() as clients:
            for number in range(150):
                await clock.sleep(rng.expovariate(40.0))
                request = make_request(f"r{number}", rng.randint(1, 300), rng.randint(1, 40))
                clients.create_task(client(fleet, request, rng.uniform(0.01, 2.0)))
                for worker in fleet.workers.values():
                    ledger = await worker.worker._blocks(None)  # type: ignore[arg-type]
                    assert_adds_up(ledger)
                    purposes |= {holder.purpose for holder in ledger.holders}
                if number == 75:
                    await fleet.kill(next(w for w in fleet.workers if w.startswith("decode")))
                    await fleet.start(Role.DECODE)
        assert purposes >= {Purpose.RUNNING, Purpose.RECEIVING, Purpose.LEASED}

    clock.run(main())


def health(**changes: Any) -> dict[str, Any]:
    worker = {"id": "decode-0", "ready": True}
    pair = {
        "prefill": "prefill-0",
        "decode": "decode-0",
        "transport": "tcp",
        "bytes_per_s": 1.234e9,
        "troubles": {},
    }
    return {"reasons": [], "workers": [worker], "pairs": [pair], **changes}


def blocks(**changes: Any) -> dict[str, Any]:
    holder = {
        "request_id": "r", "purpose": "receiving", "block_ids": [1, 2], "held_s": 1.0, "lease_left_s": 9.0, "note": "",
    }  # fmt: skip
    ledger = {"num_blocks": 10, "num_used": 2, "num_free": 8, "num_cached": 0, "holders": [holder]}
    return {"workers": {"decode-0": ledger | changes}}


def problems(health: dict[str, Any], blocks: dict[str, Any]) -> list[str]:
    return [finding.text for finding in diagnose(health, blocks) if finding.is_problem]


def test_the_doctor_finds_nothing_where_nothing_is() -> None:
    assert problems(health(), blocks()) == []
    assert [finding.text for finding in diagnose(health(), blocks())] == [
        "prefill-0 -> decode-0 over tcp, 1.23 GB/s"
    ]


def test_the_doctor_tells_what_a_pair_has_been_through() -> None:
    seen = health()
    seen["pairs"][0]["troubles"] = {"mismatches": 2, "repairs": 1}
    [finding] = diagnose(seen, blocks())
    assert finding.text.endswith("1.23 GB/s (2 mismatches, 1 repairs since the router started)")
    assert not finding.is_problem


def test_the_doctor_names_what_is_wrong() -> None:
    assert problems(health(reasons=["no prefill worker is ready"]), blocks()) == [
        "no prefill worker is ready"
    ]
    down = {"id": "decode-0", "ready": False}
    assert problems(health(workers=[down]), blocks()) == ["decode-0 does not answer"]
    assert "do not add up" in problems(health(), blocks(num_free=7))[0]
    assert "4 blocks are used, 2 have a holder" in problems(health(), blocks(num_used=4, num_free=6))[0]
    stuck = blocks()
    stuck["workers"]["decode-0"]["holders"][0] |= {
        "held_s": 300.0,
        "lease_left_s": -4.0,
        "note": "0 of 2 blocks have begun to arrive",
    }
    assert problems(health(), stuck) == [
        "decode-0: r is stuck: receiving 2 blocks for 300 s, its lease ended 4 s ago. "
        "0 of 2 blocks have begun to arrive"
    ]
    stuck["workers"]["decode-0"]["holders"][0] |= {"lease_left_s": 3.0}
    assert problems(health(), stuck) == []
    stuck["workers"]["decode-0"]["holders"][0] |= {"purpose": "draining", "lease_left_s": None}
    assert "nobody renews it" in problems(health(), stuck)[0]
    gone = {"workers": {"decode-0": {"error": "gone"}}}
    assert "prefill-0 -> decode-0 over tcp, 1.23 GB/s: decode-0 does not answer" in problems(health(), gone)
    assert "no block ledger" in problems(health(), {"workers": {"decode-0": {"error": "gone"}}})[0]
