"""The hand-over with a real model and real transports, in one process so that both pools can be looked at: the bytes
are equal on both sides, the tokens equal those of one engine, and a bad byte is noticed."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from baton.clock import SystemClock
from baton.config import EngineConfig, ModelConfig, RouterConfig, TransferConfig
from baton.demo_task import recall_prompt
from baton.engine.model_runner import load_runner
from baton.errors import TransferError
from baton.events import EventLines
from baton.handover.push import Connections
from baton.kv.block import num_blocks_for
from baton.messages import Role
from baton.model_files import resolve_model
from baton.request import Request, RequestId, SamplingParams
from baton.rpc import InprocRpcNetwork
from baton.tokenizer import Tokenizer, load_tokenizer
from baton.transfer.base import Connection
from baton.transfer.choose import available, make_transport
from baton.transfer.wire import PieceHeader
from baton_loadtest.local_fleet import LocalFleet, LocalWorker

ENGINE = EngineConfig(num_blocks=256, max_num_batched_tokens=64)


@asynccontextmanager
async def fleet_of(
    transport: str, *roles: tuple[Role, ...], wire_versions: dict[Role, tuple[int, ...]] | None = None
) -> AsyncIterator[LocalFleet]:
    clock = SystemClock()
    fleet = LocalFleet(
        clock,
        InprocRpcNetwork(clock),
        EventLines(clock),
        router=RouterConfig(),
        engine=ENGINE,
        # Small prompts in many pieces.
        transfer=TransferConfig(transport=transport, lease_s=3.0, min_piece_bytes=1),  # type: ignore[arg-type]
        index_lease_s=5.0,
        seed=0,
    )
    async with fleet.routing():
        for role in roles:
            loaded = load_runner(ModelConfig(model="demo", dtype="float32"), ENGINE, fill_nan=True)
            wire = make_transport(transport, clock, "127.0.0.1")
            versions = (wire_versions or {}).get(role[0], loaded.compatibility.wire_versions)
            compatibility = replace(loaded.compatibility, wire_versions=versions)
            name = fleet.next_name(role[0])
            await fleet.start_worker(name, role, loaded.runner, wire, loaded.fingerprint, compatibility)
        await fleet.ready()
        yield fleet


PAIR = ((Role.PREFILL,), (Role.DECODE,))


def workers(fleet: LocalFleet) -> tuple[LocalWorker, LocalWorker]:
    prefill = next(w for w in fleet.workers.values() if Role.PREFILL in w.record.roles)
    decode = next(w for w in fleet.workers.values() if Role.DECODE in w.record.roles)
    return prefill, decode


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    yield load_tokenizer(Path(resolve_model("demo", None)))


def question(tokenizer: Tokenizer, seed: int, num_pairs: int = 40) -> tuple[Request, str]:
    text, expected = recall_prompt(random.Random(seed), num_pairs)
    prompt = tuple(tokenizer.encode_chat([{"role": "user", "content": text}]))
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    return Request(RequestId(f"q{seed}"), prompt, sampling, tokenizer.eos_token_ids), expected


def answer(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens).strip()


@pytest.mark.parametrize("transport", available())
async def test_kv_bytes_are_equal_on_both_sides_and_the_answers_right(
    transport: str, tokenizer: Tokenizer
) -> None:
    async with fleet_of(transport, *PAIR) as fleet:
        prefill, decode = workers(fleet)
        compared: list[int] = []

        def compare(request: Request) -> None:
            source, target = (w.engine.sequence(request.request_id) for w in (prefill, decode))
            assert source is not None and target is not None
            num_blocks = num_blocks_for(request.num_prompt_tokens, ENGINE.block_size)
            compared.append(num_blocks)
            layout = prefill.runner.storage.layout
            for index in range(num_blocks):
                left, right = (
                    bytes(w.runner.storage.region(s.block_table[index], 0, layout.num_layers))
                    for w, s in ((prefill, source), (decode, target))
                )
                assert left == right, f"block {index} of {request.request_id}"

        accept = decode.receiver.go_live

        def accept_after_comparison(request_id: RequestId) -> None:
            compare(requests[request_id])
            accept(request_id)

        decode.receiver.go_live = accept_after_comparison  # type: ignore[method-assign]
        asked = [question(tokenizer, seed, num_pairs=1 + seed * 4) for seed in range(10)]
        requests = {request.request_id: request for request, _ in asked}
        answers = await asyncio.gather(*(fleet.ask(request) for request, _ in asked))
        assert [answer(tokenizer, tokens) for tokens in answers] == [expected for _, expected in asked]
        assert len(compared) == len(asked)
        assert set(fleet.num_used_blocks().values()) == {0} or await given_back(fleet)


@pytest.mark.parametrize("transport", available())
async def test_pieces_that_only_renew_the_lease_go_over_every_transport(
    transport: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet_of(transport, *PAIR) as fleet:
        _, decode = workers(fleet)
        monkeypatch.setattr("baton.handover.push.HEARTBEAT", 1e-4)
        # The push waits for all of the prompt.
        monkeypatch.setattr("baton_router.attempts._begins_ahead", lambda *_: False)
        opened: list[PieceHeader] = []
        open_piece = decode.receiver.open

        def open_and_note(header: PieceHeader, transport: str) -> Sequence[memoryview]:
            opened.append(header)
            return open_piece(header, transport)

        decode.receiver.open = open_and_note  # type: ignore[method-assign]
        fleet.transfers.clear()
        request, expected = question(tokenizer, 1)
        assert answer(tokenizer, await fleet.ask(request)) == expected
        await given_back(fleet)
        assert any(not header.num_tokens and not header.is_last for header in opened)
        assert {report.direction: (report.outcome, report.num_pieces) for report in fleet.transfers} == {
            "sent": ("ok", len(opened)),
            "received": ("ok", len(opened)),
        }


async def test_a_transport_that_connects_after_the_first_token_is_known_too(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = Connections.get

    async def get_late(connections: Connections, address: str) -> Connection:
        await asyncio.sleep(0.5)  # the golden prompt takes some 10 ms
        return await get(connections, address)

    monkeypatch.setattr(Connections, "get", get_late)
    async with fleet_of("tcp", *PAIR) as fleet:  # has sent one prompt through the pair
        prefill, decode = workers(fleet)
        assert fleet.fleet.transport(prefill.record.worker_id, decode.record.worker_id) == "tcp"


@pytest.mark.parametrize(("receiver_reads", "spoken"), [((2,), 2), ((3, 2), 3)])
async def test_a_new_release_speaks_the_old_wire_version_to_an_old_receiver(
    receiver_reads: tuple[int, ...], spoken: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.transfer.wire.VERSIONS", (2, 3))
    versions = {Role.PREFILL: (2, 3), Role.DECODE: receiver_reads}
    async with fleet_of("tcp", *PAIR, wire_versions=versions) as fleet:
        _, decode = workers(fleet)
        seen: set[int] = set()
        open_piece = decode.receiver.open

        def open_and_note(header: PieceHeader, transport: str) -> Sequence[memoryview]:
            seen.add(header.version)
            return open_piece(header, transport)

        decode.receiver.open = open_and_note  # type: ignore[method-assign]
        request, expected = question(tokenizer, 1)
        assert answer(tokenizer, await fleet.ask(request)) == expected
        assert seen == {spoken}
        await given_back(fleet)


async def given_back(fleet: LocalFleet) -> bool:
    async with asyncio.timeout(5):
        while set(fleet.num_used_blocks().values()) != {0}:
            await asyncio.sleep(0.02)
    fleet.check_conservation()
    return True


async def test_a_pair_and_one_worker_alone_give_the_same_tokens_greedy_and_sampled(
    tokenizer: Tokenizer,
) -> None:
    greedy = [question(tokenizer, seed)[0] for seed in range(4)]
    sampled = [
        replace(
            request,
            request_id=RequestId(f"sampled-{seed}"),
            sampling=SamplingParams(
                max_tokens=20,
                temperature=2.0,
                top_k=(0, 50)[seed % 2],
                top_p=0.98,
                seed=seed,
                ignore_eos=True,
            ),
        )
        for seed, request in enumerate(greedy)
    ]
    async with fleet_of("tcp", *PAIR) as fleet:
        through_a_pair = [await fleet.ask(request) for request in greedy + sampled]
    async with fleet_of("tcp", (Role.DECODE,)) as fleet:
        alone = [await fleet.ask(request) for request in greedy + sampled]
    async with fleet_of("tcp", (Role.PREFILL, Role.DECODE)) as fleet:
        with_itself = await asyncio.gather(*(fleet.ask(request) for request in greedy + sampled))
    assert through_a_pair == alone == with_itself
    assert len({tuple(tokens) for tokens in through_a_pair[4:]}) == 4


async def test_one_corrupted_block_makes_the_answer_wrong(tokenizer: Tokenizer) -> None:
    """What every other test of right answers rests on: this model sees a single bad block."""
    async with fleet_of("tcp", *PAIR) as fleet:
        _, decode = workers(fleet)
        storage = decode.runner.storage
        accept = decode.receiver.go_live
        layers = storage.layout.num_layers
        asked_block = 0

        def accept_corrupted(request_id: RequestId) -> None:
            sequence = decode.engine.sequence(request_id)
            assert sequence is not None
            block_id, other = sequence.block_table[asked_block], sequence.block_table[asked_block + 1]
            storage.region(block_id, 0, layers)[:] = storage.region(other, 0, layers)
            accept(request_id)

        decode.receiver.go_live = accept_corrupted  # type: ignore[method-assign]
        num_wrong = 0
        for seed in range(12):
            request, expected = question(tokenizer, seed, num_pairs=10)  # both blocks are full of pairs
            num_wrong += answer(tokenizer, await fleet.ask(request)) != expected
        assert num_wrong >= 2


async def test_a_bit_flipped_once_is_sent_again_and_the_answer_is_right(tokenizer: Tokenizer) -> None:
    async with fleet_of("tcp", *PAIR) as fleet:
        _, decode = workers(fleet)
        close = decode.receiver.close
        flipped: set[int] = set()

        def close_flipped_once(header: PieceHeader, error: TransferError | None) -> None:
            buffers = (
                decode.receiver._expected[header.request_id].landings[header.shard, header.sequence].buffers
            )
            if buffers and header.sequence not in flipped:
                flipped.add(header.sequence)
                buffers[-1][-1] ^= 1
            close(header, error)

        decode.receiver.close = close_flipped_once  # type: ignore[method-assign]
        request, expected = question(tokenizer, 1)
        assert answer(tokenizer, await fleet.ask(request)) == expected
        assert decode.receiver.num_digest_mismatches == len(flipped) >= 2
        await given_back(fleet)
        assert {r.direction: (r.outcome, r.num_mismatches) for r in fleet.transfers} == {
            "sent": ("ok", len(flipped)),
            "received": ("ok", len(flipped)),
        }


async def test_a_bit_flipped_on_the_wire_never_becomes_a_token(tokenizer: Tokenizer) -> None:
    async with fleet_of("tcp", *PAIR) as fleet:
        _, decode = workers(fleet)
        close = decode.receiver.close

        def close_flipped(header: PieceHeader, error: TransferError | None) -> None:
            buffers = (
                decode.receiver._expected[header.request_id].landings[header.shard, header.sequence].buffers
            )
            if buffers:
                buffers[0][7] ^= 16
            close(header, error)

        decode.receiver.close = close_flipped  # type: ignore[method-assign]
        request, expected = question(tokenizer, 1)
        assert answer(tokenizer, await fleet.ask(request)) == expected  # computed on the decode worker
        assert decode.receiver.num_digest_mismatches >= 3
        await given_back(fleet)
        [(pair, why)] = fleet.fleet.unproven_pairs().items()
        assert pair == ("prefill-1", "decode-2")
        assert "quarantined" in why
