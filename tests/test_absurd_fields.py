"""Whatever a field holds, at every edge: it is honoured, or refused by its name before anything is computed, and
nothing is left over."""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from reference import make_model
from router_parts import MAX_MODEL_LEN, MODEL, VOCAB_SIZE, Of, ScriptedFleet, scripted_door

from baton import codec
from baton.engine.sampling_state import check_sampling
from baton.errors import InvalidRequest, RequestTooLarge
from baton.llm import LLM
from baton.messages import RouterGenerateCall
from baton.request import FinishReason, SamplingParams, TokenBias, TokenSequence
from baton.v1 import request_pb2, router_pb2
from baton_router.app import create_app
from baton_router.grpc_api import RouterService
from baton_router.openai.schema import ChatCompletionRequest, CompletionRequest, SamplingFields

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": MODEL, "prompt": "hi"}
ABSURD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 20, 21, 100, 129, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30,
    0.0, -0.0, 0.5, -0.5, 1e-320, 1e308, -1e308, 2.0000001, "", "0", "1", "nan", "x", "x" * 2000, "\u0000", "é",
    [], [0], [-1], [1.5], ["x"], [""], [None], [[]], [[1]], [True], [2**40], [VOCAB_SIZE], ["x"] * 17, [0] * 100_000,
    {}, {"a": 1}, {"0": 1}, {"0": 1e308}, {"-1": 1}, {"0": None}, {str(VOCAB_SIZE): 1}, {"9" * 30: 1},
    {str(i): 1 for i in range(2000)},
]  # fmt: skip
NOT_ABOUT_SAMPLING = {"model", "messages", "prompt", "stream"}


def http_fields(request_type: Any) -> Iterator[tuple[str, Any]]:
    for field in sorted({*request_type.model_fields, *request_type.neutral} - NOT_ABOUT_SAMPLING):
        for value in ABSURD if field in request_type.model_fields else ABSURD[::9]:
            yield field, value


@pytest.mark.parametrize(
    ("path", "body", "request_type"),
    [
        ("/v1/chat/completions", CHAT, ChatCompletionRequest),
        ("/v1/completions", COMPLETION, CompletionRequest),
    ],
    ids=["chat", "completions"],
)
async def test_over_http(path: str, body: dict[str, Any], request_type: Any) -> None:
    door, generator = scripted_door("ok", FinishReason.STOP)
    generator.script = lambda request: ["ok", *_ends(request.sampling.n)]
    transport = httpx.ASGITransport(app=create_app(door, ScriptedFleet()))
    num_refused = 0
    async with httpx.AsyncClient(transport=transport, base_url="http://router", timeout=30) as client:
        for field, value in http_fields(request_type):
            what = f"{field} = {value!r:.60}"
            num_before = len(generator.requests)
            response = await client.post(path, json=body | {field: value})
            if response.status_code == 200:
                [request] = generator.requests[num_before:]
                check_sampling(request.sampling, VOCAB_SIZE)
                assert request.num_prompt_tokens + request.sampling.max_tokens <= MAX_MODEL_LEN, what
                continue
            num_refused += 1
            error = response.json()["error"]
            assert response.status_code == 400, what
            assert len(generator.requests) == num_before, what
            assert error["param"], what
            assert _is_named(field, error), what
    assert num_refused > 500
    assert len(generator.ended) == len(generator.requests)
    running = door.metrics.registry.get_sample_value("baton_router_num_requests_running")
    assert running == 0


def _is_named(field: str, error: dict[str, Any]) -> bool:
    """A limit that the model sets is that of both names."""
    said = f"{error['param']} {error['message']}"
    return field in said or field.replace("completion_", "") in said


def _ends(num_samples: int) -> Iterator[Any]:
    return (Of(sample, FinishReason.LENGTH) for sample in range(num_samples))


_NUMBERS = [0.0, -1.0, 1e-320, 0.5, 1.5, 3.0, 101.0, 1e308, -1e308, float("nan"), float("inf"), float("-inf")]
_COUNTS = [0, 1, 20, 21, 100, 129, 2**31 - 1, 2**32 - 1]
OVER_GRPC: dict[str, list[Any]] = {
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"), _NUMBERS
    ),
    **dict.fromkeys(("max_tokens", "top_k", "min_tokens", "logprobs", "prompt_logprobs", "n"), _COUNTS),
    "seed": [0, 2**64 - 1],
    "stop": [[""], ["x" * 2000], ["x"] * 17, ["\u0000"]],
    "stop_token_ids": [[VOCAB_SIZE], [0] * 100_000, [2**32 - 1]],
    "allowed_token_ids": [[VOCAB_SIZE], [0] * 100_000],
    "ignore_eos": [True],
    "logit_bias": [
        [{"token_id": VOCAB_SIZE}], [{"token_id": 1, "bias": float("nan")}], [{"token_id": 1, "bias": 1e9}],
        [{"token_id": 1}] * 2, [{"token_id": i} for i in range(1025)],
    ],
    "bad_words": [[{}], [{"token_ids": [VOCAB_SIZE]}], [{"token_ids": [1] * 5000}], [{"token_ids": [1]}] * 5000],
    "grammar": [{}, {"kind": 77, "source": "a"}],
}  # fmt: skip


def test_the_sweep_knows_every_field() -> None:
    assert set(OVER_GRPC) == {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(SamplingFields.model_fields) <= set(OVER_GRPC)


@pytest.mark.parametrize("field", OVER_GRPC)
async def test_over_grpc(field: str) -> None:
    door, generator = scripted_door()
    generator.script = lambda request: ["ok", *_ends(request.sampling.n)]
    service = RouterService(door, ScriptedFleet())
    for value in OVER_GRPC[field]:
        what = f"{field} = {value!r:.60}"
        sampling = request_pb2.SamplingParams(**({"max_tokens": 8} | {field: value}))
        wire = router_pb2.RouterGenerateRequest(model=MODEL, prompt="hi", sampling=sampling, deadline_s=30)
        num_before = len(generator.requests)
        try:
            call = codec.decode(RouterGenerateCall, wire.SerializeToString())
            chunks = [chunk async for chunk in service.generate(call)]
        except (InvalidRequest, RequestTooLarge) as error:
            assert field in f"{error.param} {error.message}", what
            assert len(generator.requests) == num_before, what
        else:
            [request] = generator.requests[num_before:]
            check_sampling(request.sampling, VOCAB_SIZE)
            assert {chunk.sample for chunk in chunks if chunk.finish_reason} == set(range(request.sampling.n))
    assert len(generator.ended) == len(generator.requests)


async def test_a_salt_is_as_long_as_over_http() -> None:
    door, generator = scripted_door("ok", FinishReason.STOP)
    call = RouterGenerateCall(MODEL, "hi", (), SamplingParams(max_tokens=1), 30.0, cache_salt="s" * 257)
    with pytest.raises(InvalidRequest, match="cache_salt"):
        _ = [chunk async for chunk in RouterService(door, ScriptedFleet()).generate(call)]
    assert not generator.requests


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    directory = make_model("gqa", tmp_path_factory.mktemp("gqa"))
    with LLM(str(directory), num_blocks=64, max_num_seqs=8, max_num_batched_tokens=32) as llm:
        yield llm


def test_the_engine_trusts_no_front_door(llm: LLM) -> None:
    """Hundreds of requests with fields at and beyond their limits, all at once: each is answered or says which field is
    wrong, and the engine is left clean."""
    rng = random.Random(0)
    numbers = [0.0, -1.0, 1e-320, 0.01, 0.5, 1.0, 2.0, 100.0, 1e308, float("nan"), float("inf")]
    counts = [-1, 0, 1, 2, 8, 9, 20, 21, 2**31, 2**63]
    choices: dict[str, list[Any]] = {
        **{name: numbers for name, values in OVER_GRPC.items() if values is _NUMBERS},
        **{name: counts for name, values in OVER_GRPC.items() if values is _COUNTS},
        "seed": [None, 0, 2**64 - 1, 2**200, -1],
        "stop_token_ids": [(), (-1,), (0,), (2**40,)],
        "allowed_token_ids": [(), (5,), (-1,), (2**40,)],
        "logit_bias": [(), (TokenBias(3, -100.0),), (TokenBias(3, float("nan")),), (TokenBias(-3, 1.0),)],
        "bad_words": [(), (TokenSequence((3,)),), (TokenSequence(()),), (TokenSequence((2**40,)),)],
    }
    params = []
    for _ in range(250):
        changed = {name: rng.choice(choices[name]) for name in rng.sample(sorted(choices), rng.randint(1, 3))}
        params.append(SamplingParams(**{"max_tokens": 3, **changed}))
    outputs = llm.generate([(1, 2, 3)] * len(params), params, use_tqdm=False)
    llm.engine.check_integrity()
    assert (llm.engine.num_sequences, llm.engine.num_used_blocks) == (0, 0)
    answered = 0
    for output, asked in zip(outputs, params, strict=True):
        if output.finish_reason is FinishReason.ERROR:
            assert any(name in output.error for name in choices) or "no further token" in output.error, (
                output.error
            )
        else:
            check_sampling(asked, llm.runner.vocab_size)
            answered += 1
    assert 50 < answered < 200
