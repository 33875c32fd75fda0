"""KV that leaves while later layers of the same chunk are computed: what may go when, what it saves, and that neither
clients who leave, workers who die nor bits that flip can make an answer wrong. On a virtual clock but for the model."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fake_model import FakeRunner
from fake_model import make_request as engine_request
from reference import make_model

from baton.clock import SystemClock, VirtualClock
from baton.config import EngineConfig, ModelConfig, TransferConfig
from baton.engine.batch import Batch, BatchRow, LayerListener, LayerProgress
from baton.engine.engine import Engine
from baton.engine.model_runner import load_runner
from baton.errors import BatonError
from baton.messages import Role
from baton.request import BlockId, Request, RequestId, SamplingParams
from baton.transfer.inproc import Faults
from baton.transfer.report import TransferReport
from baton.transfer.wire import PieceHeader
from baton_loadtest.simulate import (
    KV_BYTES_PER_TOKEN,
    VOCAB_SIZE,
    FleetConfig,
    SimulatedFleet,
    expected_tokens,
    running_fleet,
)
from baton_router.canary import QUARANTINE_S, RETRY_S

NUM_LAYERS = 6


def config_of(num_groups: int, *, seed: int = 0, bytes_per_s: float = 1e6, **other: object) -> FleetConfig:
    transfer = TransferConfig(lease_s=2.0, push_timeout_s=1.0, min_piece_bytes=1, num_layer_groups=num_groups)
    base = FleetConfig(seed=seed, num_layers=NUM_LAYERS, transfer=transfer, link_bytes_per_s=bytes_per_s)
    return replace(base, **other)  # type: ignore[arg-type]


def make_request(name: str, num_prompt: int, num_output: int, num_samples: int = 1) -> Request:
    rng = random.Random(name)
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(num_prompt))
    return Request(
        RequestId(name), prompt, SamplingParams(max_tokens=num_output, temperature=0.0, n=num_samples)
    )


def right_answer(config: FleetConfig, request: Request) -> list[int]:
    return expected_tokens(request.prompt_token_ids, request.sampling.max_tokens, config.layout)


async def assert_all_given_back(fleet: SimulatedFleet) -> None:
    await fleet.clock.sleep(5.0)  # leases and heartbeats of the simulated fleet are shorter
    fleet.check_conservation()
    assert set(fleet.num_used_blocks().values()) == {0}
    assert all(worker.receiver.num_expected == 0 for worker in fleet.workers.values())


# --- who tells what ---


async def test_the_runner_tells_a_group_when_its_kv_is_there_for_good(tmp_path: Path) -> None:
    directory = make_model("gqa", tmp_path)
    runner = load_runner(ModelConfig(str(directory)), EngineConfig(num_blocks=8), fill_nan=True).runner
    storage, num_layers = runner.storage, runner.storage.layout.num_layers
    assert num_layers >= 2
    seen: list[tuple[int, bytes]] = []

    def written(end: int) -> None:
        seen.append((end, bytes(storage.region(BlockId(3), 0, end))))

    ends = tuple(range(1, num_layers + 1))
    row = BatchRow(RequestId("r"), 0, tuple(range(16)), (BlockId(3),), True, SamplingParams(temperature=0))
    await runner.execute(Batch((row,), LayerListener(ends, written)))
    assert [end for end, _ in seen] == list(ends)
    for end, kv in seen:
        assert kv == bytes(storage.region(BlockId(3), 0, end))
    await runner.aclose()


class _TellingRunner(FakeRunner):
    async def execute(self, batch: Batch) -> tuple[int, ...]:
        tokens = await super().execute(batch)
        if batch.listener is not None:
            batch.listener.written(1)
        return tokens


def telling_engine() -> tuple[Engine, _TellingRunner]:
    runner = _TellingRunner(num_blocks=64, block_size=4, ahead=False)
    config = EngineConfig(max_num_seqs=16, max_num_batched_tokens=64)
    return Engine(config, runner, SystemClock(), "fake"), runner


async def test_the_engine_tells_of_prompts_that_are_handed_over_and_of_no_other() -> None:
    engine, _ = telling_engine()
    told: list[LayerProgress] = []
    engine.listen_to_layers((1,), told.append)
    engine.add(engine_request("mine", range(6)))
    await engine.step()
    assert told == []
    engine.add(engine_request("theirs", range(50, 150)), prefill_only=True)
    for end in (63, 100):  # one token of the step is the other request's
        await engine.step()
        assert [(p.request_id, p.num_tokens, p.num_layers) for p in told] == [("theirs", end, 1)]
        sequence = engine.sequence(RequestId("theirs"))
        assert sequence is not None and told.pop().block_table == tuple(sequence.block_table)


async def test_the_engine_does_not_tell_of_a_request_aborted_in_its_step_even_if_its_name_is_back() -> None:
    engine, runner = telling_engine()
    told: list[LayerProgress] = []
    engine.listen_to_layers((1,), told.append)
    runner.gate = asyncio.Event()
    engine.add(engine_request("again", range(6)), prefill_only=True)
    stepping = asyncio.create_task(engine.step())
    await runner.started.wait()
    engine.abort(RequestId("again"))
    engine.add(engine_request("again", range(50, 60)), prefill_only=True)
    runner.gate.set()
    await stepping
    assert told == []
    await engine.step()
    assert [p.num_tokens for p in told] == [10]


# --- what it saves ---


def sent(fleet: SimulatedFleet) -> TransferReport:
    (report,) = [r for r in fleet.transfers if r.direction == "sent"]
    return report


def hand_over(config: FleetConfig, num_tokens: int) -> tuple[TransferReport, list[tuple[float, PieceHeader]]]:
    """One prompt, nothing else: what became of it, and when its pieces were opened."""
    clock = VirtualClock()
    pieces: list[tuple[float, PieceHeader]] = []

    async def main() -> TransferReport:
        async with running_fleet(config, clock) as fleet:
            decode = next(w for w in fleet.workers.values() if Role.DECODE in w.record.roles)
            open_piece = decode.receiver.open

            def open_and_note(header: PieceHeader, transport: str) -> Sequence[memoryview]:
                pieces.append((clock.now(), header))
                return open_piece(header, transport)

            decode.receiver.open = open_and_note  # type: ignore[method-assign]
            warm = make_request("warm", 20, 2)  # connects
            await fleet.ask(warm)
            await clock.sleep(1.0)
            pieces.clear()
            fleet.transfers.clear()
            request = make_request("r", num_tokens, 5)
            assert await fleet.ask(request) == right_answer(config, request)
            await assert_all_given_back(fleet)
            return sent(fleet)

    return clock.run(main()), pieces


PAIR = {"num_prefill": 1, "num_decode": 1}
ONE_CHUNK = EngineConfig(num_blocks=256, max_num_batched_tokens=512)


@pytest.mark.parametrize("num_tokens", [256, 250, 500])
@pytest.mark.parametrize("num_groups", [2, 3, 6])
def test_no_more_than_the_last_group_is_exposed_on_a_link_that_keeps_up(
    num_tokens: int, num_groups: int
) -> None:
    config = config_of(num_groups, bytes_per_s=1e6, engine=ONE_CHUNK, **PAIR)
    num_bytes = num_tokens * config.layout.block_bytes // config.layout.block_size
    all_s = num_bytes / config.link_bytes_per_s
    report, pieces = hand_over(config, num_tokens)
    assert report.exposed_s is not None
    assert report.exposed_s <= 1.1 * all_s / num_groups + 4 * config.link_latency_s
    assert len(pieces) >= num_groups
    assert report.num_bytes == num_bytes

    off, whole = hand_over(config_of(1, bytes_per_s=1e6, engine=ONE_CHUNK, **PAIR), num_tokens)
    assert off.exposed_s is not None
    assert off.exposed_s >= all_s
    assert all((h.layer_start, h.layer_end) == (0, NUM_LAYERS) for _, h in whole)


def test_a_slow_link_gets_few_large_pieces_instead_of_many_small_ones() -> None:
    small_chunks = EngineConfig(num_blocks=256, max_num_batched_tokens=64)
    _, fast = hand_over(config_of(6, bytes_per_s=1e9, engine=small_chunks, **PAIR), 480)
    _, slow = hand_over(config_of(6, bytes_per_s=2e4, engine=small_chunks, **PAIR), 480)
    assert len(fast) >= 6 * 8
    assert len(slow) < len(fast) / 3


def test_a_block_that_the_next_chunk_goes_on_with_does_not_leave_early() -> None:
    chunks_of_40 = EngineConfig(num_blocks=256, max_num_batched_tokens=40, max_num_seqs=16)
    _, pieces = hand_over(config_of(3, engine=chunks_of_40, **PAIR), 100)
    ends = [header.token_end for _, header in pieces]
    assert ends == sorted(ends)
    assert set(ends) == {32, 80, 100}  # 40 tokens fill 2 blocks of 16, 80 fill 5


# --- that it stays right ---


@pytest.mark.parametrize("seed", range(3))
def test_clients_that_leave_at_any_moment_get_everything_given_back(seed: int) -> None:
    clock = VirtualClock()
    config = config_of(3, seed=seed, bytes_per_s=3e5)

    async def main() -> None:
        rng = random.Random(seed)
        async with running_fleet(config, clock) as fleet:
            async with asyncio.TaskGroup() as clients:
                for number in range(50):
                    client = clients.create_task(
                        fleet.ask(make_request(f"r{number}", rng.randint(1, 300), 20))
                    )
                    await clock.sleep(rng.uniform(0, 0.35))
                    client.cancel()
            await assert_all_given_back(fleet)
            request = make_request("after", 100, 20)
            assert await fleet.ask(request) == right_answer(config, request)
            outcomes = {(report.direction, report.outcome) for report in fleet.transfers}
            assert {("sent", "cancelled"), ("sent", "ok"), ("received", "cancelled")} <= outcomes

    clock.run(main())


@pytest.mark.parametrize("seed", range(2))
def test_kills_under_load_never_give_a_wrong_token(seed: int) -> None:
    clock = VirtualClock()
    config = config_of(3, seed=seed, bytes_per_s=1e6)
    outcomes: list[str] = []

    async def client(fleet: SimulatedFleet, request: Request) -> None:
        try:
            tokens = await fleet.ask(request, timeout_s=30.0)
        except BatonError as error:
            outcomes.append(error.code)
        else:
            outcomes.append("right" if tokens == right_answer(config, request) else "wrong")

    async def main() -> None:
        rng = random.Random(seed)
        async with running_fleet(config, clock) as fleet:
            async with asyncio.TaskGroup() as clients:
                for number in range(150):
                    await clock.sleep(rng.expovariate(10.0))
                    request = make_request(f"r{number}", rng.randint(1, 200), rng.randint(1, 20))
                    clients.create_task(client(fleet, request))
                    if number % 30 == 15:
                        victim = rng.choice(sorted(fleet.workers))
                        role = fleet.workers[victim].record.roles[0]
                        await fleet.kill(victim)
                        await fleet.start(role)
            await assert_all_given_back(fleet)

    clock.run(main())
    assert set(outcomes) <= {"right", "worker_lost", "unavailable"}
    assert outcomes.count("right") > 100


# --- repair ---


@pytest.mark.parametrize("seed", range(2))
def test_flipped_bits_are_repaired_counted_on_both_ends_and_never_become_a_token(seed: int) -> None:
    clock = VirtualClock()
    config = config_of(3, seed=seed)
    outcomes: list[str] = []

    async def client(fleet: SimulatedFleet, request: Request) -> None:
        tokens = await fleet.ask(request)
        outcomes.append("right" if tokens == right_answer(config, request) else "wrong")

    async def main() -> None:
        rng = random.Random(seed)
        async with running_fleet(config, clock) as fleet:
            fleet.kv_network.faults = Faults(flip=0.1)
            async with asyncio.TaskGroup() as clients:
                for number in range(100):
                    await clock.sleep(rng.expovariate(10.0))
                    clients.create_task(client(fleet, make_request(f"r{number}", rng.randint(1, 200), 5)))
            await assert_all_given_back(fleet)
            sums = {
                direction: sum(r.num_mismatches for r in fleet.transfers if r.direction == direction)
                for direction in ("sent", "received")
            }
            assert sums["sent"] == sums["received"] > 5  # a pair with three of them is not used for a while
            assert sums["sent"] == sum(w.receiver.num_digest_mismatches for w in fleet.workers.values())
            lines = [line for line in fleet.events.lines if " piece.mismatch " in line]
            assert len(lines) == sums["sent"]
            assert all('"transport": "inproc"' in line and '"to": "decode-' in line for line in lines)
            assert any(" pair.quarantined " in line for line in fleet.events.lines)

    clock.run(main())
    assert outcomes == ["right"] * 100


def test_a_path_that_never_carries_a_piece_intact_is_quarantined_and_the_decode_worker_computes() -> None:
    clock = VirtualClock()
    config = config_of(3, **PAIR)

    async def main() -> None:
        async with running_fleet(config, clock) as fleet:
            fleet.kv_network.faults = Faults(flip=1.0)
            asked_s = clock.now()
            request = make_request("r", 100, 5)
            assert await fleet.ask(request) == right_answer(config, request)
            assert clock.now() - asked_s < 1.0  # not by the end of a lease
            await assert_all_given_back(fleet)
            [why] = fleet.fleet.unproven_pairs().values()
            assert "quarantined" in why and "did not match" in why
            assert {(r.direction, r.outcome) for r in fleet.transfers} == {
                ("sent", "failed"),
                ("received", "failed"),
            }
            [counts] = fleet.fleet.pair_counts().values()
            assert (counts.num_mismatches, counts.num_repairs, counts.num_quarantines) == (3, 1, 1)
            fleet.transfers.clear()
            await clock.sleep(QUARANTINE_S)  # the canary tries, and finds it as bad as before
            [why] = fleet.fleet.unproven_pairs().values()
            assert "did not match" in why
            fleet.kv_network.faults = Faults()
            await clock.sleep(2 * RETRY_S)
            assert fleet.fleet.unproven_pairs() == {}
            request = make_request("after", 100, 5)
            assert await fleet.ask(request) == right_answer(config, request)
            assert fleet.transfers[-1].outcome == "ok"

    clock.run(main())


@pytest.mark.parametrize("faults", [Faults(flip=1.0), Faults(drop=1.0)], ids=["flip", "drop"])
@pytest.mark.parametrize("num_prompt", [20, 400], ids=["before-or-after", "before"])
@pytest.mark.parametrize("num_output", [1, 6])
def test_every_answer_to_a_prompt_whose_kv_never_comes_is_right(
    faults: Faults, num_prompt: int, num_output: int
) -> None:
    """The push fails before the first token where the prompt takes many chunks; three answers share the prompt."""
    clock = VirtualClock()
    small_chunks = EngineConfig(num_blocks=256, max_num_batched_tokens=64)
    config = config_of(3, engine=small_chunks, **PAIR)

    async def main() -> None:
        async with running_fleet(config, clock) as fleet:
            fleet.kv_network.faults = faults
            requests = [make_request(f"r{n}", num_prompt, num_output, num_samples=n) for n in (1, 3)]
            answers = await asyncio.gather(*(fleet.ask_samples(request) for request in requests))
            for request, samples in zip(requests, answers, strict=True):
                assert samples == [right_answer(config, request)] * request.sampling.n
            await assert_all_given_back(fleet)
            assert any(" handover.repaired " in line for line in fleet.events.lines)

    clock.run(main())


def test_a_prefill_worker_that_hangs_is_done_without() -> None:
    clock = VirtualClock()
    config = config_of(3, bytes_per_s=1e5, **PAIR)

    async def main() -> None:
        async with running_fleet(config, clock) as fleet:
            request = make_request("r", 400, 5)
            asking = asyncio.create_task(fleet.ask(request))
            await clock.sleep(0.1)
            prefill = next(w for w in fleet.workers.values() if Role.PREFILL in w.record.roles)
            fleet.rpc_network.partition("caller", prefill.record.address)
            fleet.kv_network.partition(prefill.kv_address, "kv://decode-2")
            assert await asking == right_answer(config, request)
            await assert_all_given_back(fleet)
            [repair] = [line for line in fleet.events.lines if " handover.repaired " in line]
            assert "the sender stalled" in repair  # in the middle of a piece: noticed before its silence is

    clock.run(main())


def test_a_link_that_falls_silent_after_the_first_token_is_repaired_before_the_lease_ends() -> None:
    clock = VirtualClock()
    config = config_of(3, bytes_per_s=1e5, **PAIR)

    async def main() -> None:
        async with running_fleet(config, clock) as fleet:
            asked_s = clock.now()
            asking = asyncio.create_task(fleet.ask(make_request("r", 400, 5)))
            await clock.sleep(0.1)
            fleet.kv_network.faults = Faults(drop=1.0)
            assert await asking == right_answer(config, make_request("r", 400, 5))
            # The prefill worker's time for a piece ended, and it told the router: nobody waited for the lease.
            assert clock.now() - asked_s < config.transfer.push_timeout_s + 0.6
            await assert_all_given_back(fleet)
            ended = {r.direction: r for r in fleet.transfers}
            assert len(fleet.transfers) == 2
            assert ended["sent"].outcome == "failed"
            assert ended["received"].outcome == "failed"
            assert 0 < ended["received"].num_bytes < 400 * NUM_LAYERS * KV_BYTES_PER_TOKEN

    clock.run(main())
