"""Twelve ways to set up a pair wrongly, with the demo model: each is refused or repaired, with a reason that a person
understands, and the answers are right all the same."""

import json
import random
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.clock import Clock, SystemClock
from baton.config import EngineConfig, ModelConfig, RouterConfig, TransferConfig
from baton.demo_task import recall_prompt
from baton.engine.model_runner import load_runner
from baton.events import EventLines
from baton.messages import Role
from baton.model_files import resolve_model
from baton.request import Request, RequestId, SamplingParams, WorkerId
from baton.rpc import InprocRpcNetwork
from baton.tokenizer import Tokenizer, load_tokenizer
from baton.transfer.inproc import Faults, InprocNetwork, InprocTransport, _Message
from baton.transfer.wire import PieceHeader
from baton_loadtest.local_fleet import LocalFleet
from baton_router.fleet_view import readiness

DEMO = resolve_model("demo")
P, D = WorkerId("prefill-1"), WorkerId("decode-2")
TIMEOUT_S = 60.0


class ReorderingNetwork(InprocNetwork):
    """Two pieces arrive the other way round, whenever another one is sure to follow."""

    held: _Message | None = None
    num_reordered = 0

    def disturb(self, message: _Message) -> list[_Message]:
        held, self.held = self.held, None
        if held is not None:
            self.num_reordered += 1
            return [message, held]
        if PieceHeader.decode(message.header).is_last:
            return [message]
        self.held = message
        return []


class SkewedClock(SystemClock):
    """Of a machine that is an hour ahead, and was started on another day."""

    def now(self) -> float:
        return super().now() + 90_000.0

    def wall(self) -> float:
        return super().wall() + 3600.0


@dataclass
class Side:
    directory: Path = DEMO
    dtype: Any = "float32"
    engine: EngineConfig = field(
        default_factory=lambda: EngineConfig(num_blocks=256, max_num_batched_tokens=64)
    )
    clock: Clock = field(default_factory=SystemClock)


@dataclass
class Setup:
    prefill: Side = field(default_factory=Side)
    decode: Side = field(default_factory=Side)
    network: type[InprocNetwork] = InprocNetwork
    faults: Faults = field(default_factory=Faults)


@asynccontextmanager
async def running(setup: Setup) -> AsyncIterator[LocalFleet]:
    clock = SystemClock()
    network = setup.network(clock)
    network.faults = setup.faults
    fleet = LocalFleet(
        clock, InprocRpcNetwork(clock), EventLines(clock), router=RouterConfig(), engine=EngineConfig(),
        transfer=TransferConfig(push_timeout_s=0.5, lease_s=3.0, min_piece_bytes=1), index_lease_s=5.0, seed=0,
    )  # fmt: skip
    async with fleet.routing():
        for role, side in ((Role.PREFILL, setup.prefill), (Role.DECODE, setup.decode)):
            loaded = load_runner(
                ModelConfig(str(side.directory), dtype=side.dtype), side.engine, fill_nan=True
            )
            name = fleet.next_name(role)
            transport = InprocTransport(network, clock, f"kv://{name}")
            fleet.clock = side.clock
            await fleet.start_worker(
                name, (role,), loaded.runner, transport, loaded.fingerprint, loaded.compatibility
            )
            fleet.clock = clock
        async with clock.timeout(TIMEOUT_S):
            while len(fleet.fleet.ready()) < 2 or "" in fleet.fleet.unproven_pairs().values():
                await clock.sleep(0.02)
        yield fleet


def demo_copy(directory: Path, name: str = "copy") -> Path:
    return Path(shutil.copytree(DEMO, directory / name))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


# --- the twelve ---


def other_weights(tmp: Path) -> Setup:
    directory = demo_copy(tmp)
    edit_weights(directory, lambda weights: weights["model.norm.weight"].mul_(1.01))
    return Setup(Side(directory))


def other_revision(tmp: Path) -> Setup:
    one, other = demo_copy(tmp / "snapshots", "0f3a"), demo_copy(tmp / "snapshots", "77b1")
    return Setup(Side(one), Side(other))


def other_rope_base(tmp: Path) -> Setup:
    directory = demo_copy(tmp)
    edit_config(
        directory, rope_theta=10000.0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )
    return Setup(Side(directory))


def other_dtype(tmp: Path) -> Setup:
    return Setup(Side(dtype="bfloat16"))


def other_block_size(tmp: Path) -> Setup:
    return Setup(Side(engine=EngineConfig(block_size=64, num_blocks=64, max_num_batched_tokens=64)))


def other_tokenizer(tmp: Path) -> Setup:
    directory = demo_copy(tmp)
    path = directory / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    return Setup(Side(directory))


def wrong_layer_count(tmp: Path) -> Setup:
    directory = demo_copy(tmp)
    edit_config(directory, num_hidden_layers=1)

    def drop(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if ".layers.1." in name]:
            del weights[name]

    edit_weights(directory, drop)
    return Setup(Side(directory))


def truncated_pool(tmp: Path) -> Setup:
    """Long prompts do not fit into what the prefill worker has; short ones do."""
    return Setup(Side(engine=EngineConfig(num_blocks=5, max_num_batched_tokens=64)))


def transport_that_drops(tmp: Path) -> Setup:
    return Setup(faults=Faults(drop=1.0))


def transport_that_flips_a_bit(tmp: Path) -> Setup:
    return Setup(faults=Faults(flip=1.0))


def transport_that_reorders(tmp: Path) -> Setup:
    return Setup(network=ReorderingNetwork)


def clock_skew(tmp: Path) -> Setup:
    return Setup(decode=Side(clock=SkewedClock()))


REFUSED = {
    other_weights: "prefill-1 and decode-2 have different weights",
    other_revision: "prefill-1 has revision 0f3a of the model, decode-2 77b1",
    other_rope_base: "prefill-1 has RoPE base 10000, decode-2 base 1e+06",
    other_tokenizer: "prefill-1 and decode-2 have different tokenizer",
    wrong_layer_count: "prefill-1 has 1 layers of 2 KV heads of 24, decode-2 2 layers of 2 KV heads of 24",
    transport_that_drops: "did not acknowledge a piece within 0.5 s",
    transport_that_flips_a_bit: "did not match its digest",
}
REPAIRED = (other_dtype, other_block_size, truncated_pool, transport_that_reorders, clock_skew)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO)


def question(tokenizer: Tokenizer, seed: int, num_pairs: int) -> tuple[Request, str]:
    text, expected = recall_prompt(random.Random(seed), num_pairs)
    prompt = tuple(tokenizer.encode_chat([{"role": "user", "content": text}]))
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    return Request(RequestId(f"q{seed}"), prompt, sampling, tokenizer.eos_token_ids), expected


async def answers_are_right(fleet: LocalFleet, tokenizer: Tokenizer) -> list[str | None]:
    """The prefill worker that served each of some prompts, short and long."""
    served_by = []
    for seed, num_pairs in enumerate((6, 20, 40)):
        request, expected = question(tokenizer, seed, num_pairs)
        assert tokenizer.decode(await fleet.ask(request)).strip() == expected
        record = fleet.pipeline.record(request.request_id)
        assert record is not None
        served_by.append(record.prefill_worker)
    return served_by


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
async def test_what_cannot_be_right_is_refused_with_a_reason(
    case: Callable[[Path], Setup], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    async with running(case(tmp_path)) as fleet:
        assert fleet.fleet.pairs() == []
        [why] = [
            reason
            for reason in readiness(fleet.fleet).reasons
            if reason.startswith(f"{P} -> {D} carries nothing")
        ]
        assert REFUSED[case] in why
        assert await answers_are_right(fleet, tokenizer) == [None] * 3


@pytest.mark.parametrize("case", REPAIRED, ids=lambda case: case.__name__)
async def test_what_can_be_made_right_is(
    case: Callable[[Path], Setup], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    async with running(case(tmp_path)) as fleet:
        assert [(p.worker_id, d.worker_id) for p, d in fleet.fleet.pairs()] == [(P, D)]
        served_by = await answers_are_right(fleet, tokenizer)
        assert served_by == ([P, P, None] if case is truncated_pool else [P] * 3)
        sent = [report for report in fleet.transfers if report.direction == "sent" and report.num_bytes]
        assert sent and {report.outcome for report in sent} == {"ok"}
        network = fleet.workers[P].transport._network  # type: ignore[attr-defined]
        assert not isinstance(network, ReorderingNetwork) or network.num_reordered > 3
