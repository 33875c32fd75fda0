"""Logits that are no numbers: that request fails and is told why, the others and the workers go on, it is counted."""

import asyncio
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from reference import make_model, random_prompts
from safetensors.torch import load_file, save_file

from baton.clock import SystemClock
from baton.config import EngineConfig, ModelConfig, RouterConfig, TransferConfig
from baton.engine.model_runner import load_runner
from baton.errors import InternalError
from baton.events import EventLines
from baton.llm import LLM
from baton.messages import Role
from baton.request import Request, RequestId, SamplingParams
from baton.rpc import InprocRpcNetwork
from baton.transfer.choose import make_transport
from baton.worker_metrics import WorkerMetrics
from baton_cli.compose import count_steps
from baton_loadtest.local_fleet import LocalFleet

POISON = 200  # a token whose embedding is no number
ENGINE = EngineConfig(num_blocks=64, max_num_batched_tokens=32, max_num_seqs=8)
GREEDY = SamplingParams(max_tokens=6, temperature=0, allowed_token_ids=tuple(range(POISON)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_model("gqa", tmp_path_factory.mktemp("poisoned"))
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    "roles", [((Role.PREFILL,), (Role.DECODE,)), ((Role.DECODE,),)], ids=["pair", "decode worker alone"]
)
async def test_through_a_fleet(directory: Path, roles: tuple[tuple[Role, ...], ...]) -> None:
    clock, registry = SystemClock(), CollectorRegistry()
    metrics = WorkerMetrics(registry)
    prompts = random_prompts([20, 33, 50, 7], vocab_size=POISON)
    fleet = LocalFleet(
        clock, InprocRpcNetwork(clock), EventLines(clock),
        router=RouterConfig(), engine=ENGINE, transfer=TransferConfig(transport="tcp", min_piece_bytes=1),
        index_lease_s=5.0, seed=0,
    )  # fmt: skip
    async with fleet.routing():
        for role in roles:
            loaded = load_runner(ModelConfig(model=str(directory), dtype="float32"), ENGINE, fill_nan=True)
            wire = make_transport("tcp", clock, "127.0.0.1")
            name = fleet.next_name(role[0])
            await fleet.start_worker(name, role, loaded.runner, wire, loaded.fingerprint)
            count_steps(fleet.workers[name].worker, metrics, clock)
        await fleet.ready()
        prompts[1] = (*prompts[1][:30], POISON, *prompts[1][30:])
        asked = [fleet.ask(Request(RequestId(str(i)), prompt, GREEDY)) for i, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(answers[1], InternalError) and "logits are not numbers" in answers[1].message
        fleet.check_conservation()
    assert registry.get_sample_value("baton_corrupted_requests_total") == 1
    expected = await asyncio.to_thread(_alone, directory, [prompts[i] for i in (0, 2, 3)])
    assert [answers[i] for i in (0, 2, 3)] == expected


def _alone(directory: Path, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    with LLM(str(directory), dtype="float32", num_blocks=64) as llm:
        return [output.token_ids for output in llm.generate(prompts, GREEDY)]
