"""Everything that a request may ask of the sampler gives the same tokens and log probabilities in process, alone, in a
batch, after preemption, and handed from a prefill worker to a decode worker."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from reference import make_model, random_prompts
from router_parts import byte_tokenizer

from baton.clock import SystemClock
from baton.config import EngineConfig, ModelConfig, RouterConfig, TransferConfig
from baton.engine.model_runner import load_runner
from baton.errors import InvalidRequest
from baton.events import EventLines
from baton.llm import LLM
from baton.messages import Role
from baton.request import (
    Grammar,
    GrammarKind,
    Request,
    RequestId,
    SamplingParams,
    TokenBias,
    TokenLogprobs,
    TokenSequence,
)
from baton.rpc import InprocRpcNetwork
from baton.transfer.choose import make_transport
from baton_loadtest.local_fleet import LocalFleet

VOCAB_SIZE, EOS = 260, 256
ENGINE = EngineConfig(num_blocks=256, max_num_batched_tokens=64)
SCHEMA = '{"type":"array","items":{"enum":["a","b",17]},"minItems":2,"maxItems":4}'
BASE = SamplingParams(max_tokens=24, seed=5)
KINDS = {
    "plain": BASE,
    "min_p": replace(BASE, min_p=0.02),
    "penalties": replace(BASE, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2),
    "greedy penalties": replace(BASE, temperature=0.0, frequency_penalty=1.0),
    "bias": replace(BASE, logit_bias=(TokenBias(65, 6.0), TokenBias(66, -6.0))),
    "allowed": replace(BASE, allowed_token_ids=tuple(range(60, 90))),
    "bad words": replace(
        BASE,
        allowed_token_ids=(70, 71, 72),
        bad_words=(TokenSequence((70, 71, 70)), TokenSequence((71, 71))),
    ),
    "min_tokens": replace(BASE, allowed_token_ids=(70, 71, 72, EOS), min_tokens=6),
    "logprobs": replace(BASE, logprobs=3, temperature=1.5),
    "json": replace(BASE, grammar=Grammar(GrammarKind.JSON_SCHEMA, SCHEMA), max_tokens=60, logprobs=0),
    "regex": replace(BASE, grammar=Grammar(GrammarKind.REGEX, "[a-d]{3,6}!")),
}
Answer = tuple[list[int], list[TokenLogprobs]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_model("gqa", tmp_path_factory.mktemp("bytes"), vocab_size=VOCAB_SIZE)
    byte_tokenizer().backend.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return directory


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    return random_prompts([7 + 9 * i for i in range(len(KINDS))], vocab_size=VOCAB_SIZE)


def _in_process(directory: Path, prompts: list[tuple[int, ...]], **settings: int) -> dict[str, Answer]:
    with LLM(str(directory), dtype="float32", **{"num_blocks": 256, **settings}) as llm:
        outputs = llm.generate(prompts, list(KINDS.values()))
        llm.engine.check_integrity()
        if settings.get("num_blocks"):
            assert llm.engine.pressure.num_preemptions > 0
    assert not any(output.error for output in outputs)
    return {name: (output.token_ids, output.logprobs) for name, output in zip(KINDS, outputs, strict=True)}


@pytest.fixture(scope="module")
def expected(directory: Path, prompts: list[tuple[int, ...]]) -> dict[str, Answer]:
    return _in_process(directory, prompts)


def _tokens(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: token_ids for name, (token_ids, _) in answers.items()}


def _assert_close(answers: dict[str, Answer], expected: dict[str, Answer]) -> None:
    """Tokens are equal; log probabilities up to the rounding of other batch shapes."""
    assert _tokens(answers) == _tokens(expected)
    for name, (_, logprobs) in answers.items():
        assert [each.top_token_ids for each in logprobs] == [each.top_token_ids for each in expected[name][1]]
        said = [each.logprob for each in logprobs]
        assert said == pytest.approx([each.logprob for each in expected[name][1]], abs=1e-3)


def test_the_answers_are_what_was_asked_for(expected: dict[str, Answer]) -> None:
    tokens = _tokens(expected)
    assert set(tokens["allowed"]) <= set(range(60, 90))
    text = bytes(token for token in tokens["bad words"] if token < 256)
    assert b"FGF" not in text and b"GG" not in text and len(text) > 3
    assert EOS not in tokens["min_tokens"][:6]
    assert json.loads(bytes(token for token in tokens["json"] if token < 256))
    assert len(expected["logprobs"][1]) == len(tokens["logprobs"])
    assert all(len(each.top_token_ids) == 3 for each in expected["logprobs"][1])
    assert not expected["plain"][1]
    assert len({tuple(each) for each in tokens.values()}) == len(KINDS)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 20, "max_num_seqs": 8},
        {"num_blocks": 14, "max_num_seqs": 16},
    ],
    ids=["one by one", "chunked", "preempted"],
)
def test_in_any_batch(
    directory: Path,
    prompts: list[tuple[int, ...]],
    expected: dict[str, Answer],
    settings: dict[str, int],
) -> None:
    _assert_close(_in_process(directory, prompts, **settings), expected)


@asynccontextmanager
async def _fleet_of(directory: Path, *roles: tuple[Role, ...]) -> AsyncIterator[LocalFleet]:
    clock = SystemClock()
    fleet = LocalFleet(
        clock, InprocRpcNetwork(clock), EventLines(clock),
        router=RouterConfig(), engine=ENGINE, transfer=TransferConfig(transport="tcp", min_piece_bytes=1),
        index_lease_s=5.0, seed=0,
    )  # fmt: skip
    async with fleet.routing():
        for role in roles:
            loaded = load_runner(ModelConfig(model=str(directory), dtype="float32"), ENGINE, fill_nan=True)
            wire = make_transport("tcp", clock, "127.0.0.1")
            await fleet.start_worker(fleet.next_name(role[0]), role, loaded.runner, wire, loaded.fingerprint)
        await fleet.ready()
        yield fleet


async def _ask(fleet: LocalFleet, request: Request) -> Answer:
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    async for batch in fleet.pipeline.generate(request, timeout_s=60):
        for item in batch:
            tokens += item.token_ids
            logprobs += item.logprobs
    return tokens, logprobs


@pytest.mark.parametrize(
    "roles",
    [((Role.PREFILL,), (Role.DECODE,)), ((Role.DECODE,),)],
    ids=["handed over", "decode worker alone"],
)
async def test_through_a_fleet(
    directory: Path,
    prompts: list[tuple[int, ...]],
    expected: dict[str, Answer],
    roles: tuple[tuple[Role, ...], ...],
) -> None:
    async with _fleet_of(directory, *roles) as fleet:
        requests = [
            Request(RequestId(name), prompt, params, (EOS,))
            for prompt, (name, params) in zip(prompts, KINDS.items(), strict=True)
        ]
        answers = await asyncio.gather(*(_ask(fleet, request) for request in requests))
        _assert_close(dict(zip(KINDS, answers, strict=True)), expected)
        bad = replace(requests[0], sampling=replace(BASE, grammar=Grammar(GrammarKind.REGEX, "(")))
        with pytest.raises(InvalidRequest, match="cannot be compiled"):
            await _ask(fleet, bad)
        fleet.check_conservation()


async def test_a_request_cancelled_while_its_grammar_is_compiled(
    directory: Path, prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others go on meanwhile, and nothing of it is left."""
    async with _fleet_of(directory, (Role.DECODE,)) as fleet:
        [worker] = fleet.workers.values()
        started, go_on, grammars = asyncio.Event(), asyncio.Event(), worker.runner.grammars
        assert grammars is not None
        prepare = grammars.prepare

        async def slow(grammar: Grammar) -> None:
            started.set()
            await go_on.wait()
            await prepare(grammar)

        monkeypatch.setattr(grammars, "prepare", slow)
        constrained = Request(RequestId("regex"), prompts[0], KINDS["regex"], (EOS,))
        asking = asyncio.create_task(_ask(fleet, constrained))
        await asyncio.wait_for(started.wait(), 30)
        assert len((await _ask(fleet, Request(RequestId("plain"), prompts[1], BASE, (EOS,))))[0]) == 24
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        go_on.set()
        tokens, _ = await _ask(fleet, replace(constrained, request_id=RequestId("again")))
        assert 4 <= len(tokens) <= 8
        async with asyncio.timeout(30):
            while worker.engine.num_sequences:
                await asyncio.sleep(0.01)
        fleet.check_conservation()
        worker.engine.check_integrity()
