"""Several answers to one prompt, and what the model says of the prompt itself, through real processes: over HTTP, in
one piece and streamed, and over gRPC."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio
import torch
from reference import load_reference, make_model
from router_parts import byte_tokenizer
from stack import Stack, running_stack

from baton.v1 import decode_pb2, decode_pb2_grpc, request_pb2, router_pb2, router_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEED = 77
PROMPT = "Forty-seven bytes and a few more, so that it is more than one chunk and ends in a block. " * 7
FIELDS: dict[str, Any] = {"model": "test", "max_tokens": 24, "seed": SEED, "ignore_eos": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; one token per byte."""
    directory = make_model("gqa", tmp_path_factory.mktemp("bytes"), vocab_size=260)
    byte_tokenizer().backend.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(directory: Path) -> AsyncIterator[Stack]:
    async with running_stack(model=str(directory), index="memory") as stack:
        yield stack


@pytest_asyncio.fixture(loop_scope="module")
async def http(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    """Every test leaves the fleet as it found it."""
    async with httpx.AsyncClient(base_url=f"{stack.base_url}/v1", timeout=60) as client:
        yield client
        await stack.until_nothing_is_used("prefill-0", "decode-0")
        ledgers = (await client.get(f"{stack.base_url}/debug/blocks")).json()["workers"]
        assert [ledger["holders"] for ledger in ledgers.values()] == [[], []]


async def ask(http: httpx.AsyncClient, path: str = "/completions", **fields: Any) -> dict[str, Any]:
    response = await http.post(path, json=FIELDS | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(http: httpx.AsyncClient, path: str, **fields: Any) -> AsyncIterator[dict[str, Any]]:
    async with http.stream("POST", path, json=FIELDS | fields | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


async def test_each_sample_is_the_answer_to_its_own_seed(http: httpx.AsyncClient, stack: Stack) -> None:
    asked = {"prompt": PROMPT, "n": 3, "return_token_ids": True, "logprobs": 1, "temperature": 0.9}
    together = await ask(http, **asked)
    alone = [(await ask(http, **asked | {"n": 1, "seed": SEED + k}))["choices"][0] for k in range(3)]
    assert [c["token_ids"] for c in together["choices"]] == [c["token_ids"] for c in alone]
    assert [c["text"] for c in together["choices"]] == [c["text"] for c in alone]
    assert len({tuple(choice["token_ids"]) for choice in alone}) == 3
    for ours, theirs in zip(together["choices"], alone, strict=True):
        assert ours["logprobs"]["token_logprobs"] == pytest.approx(
            theirs["logprobs"]["token_logprobs"], abs=1e-3
        )
    assert together["usage"]["completion_tokens"] == 3 * 24
    assert together["usage"]["prompt_tokens"] == len(PROMPT) + 1

    tokens: dict[int, list[int]] = defaultdict(list)
    async for chunk in stream(http, "/completions", **asked):
        for choice in chunk["choices"]:
            tokens[choice["index"]] += choice["token_ids"]
    assert [tokens[index] for index in range(3)] == [choice["token_ids"] for choice in alone]

    async with grpc.aio.insecure_channel(stack.router_grpc) as channel:
        sampling = request_pb2.SamplingParams(max_tokens=24, seed=SEED, ignore_eos=True, temperature=0.9, n=3)
        call = router_pb2.RouterGenerateRequest(model="test", prompt=PROMPT, sampling=sampling, deadline_s=30)
        by_sample: dict[int, list[int]] = defaultdict(list)
        async for answer in router_pb2_grpc.RouterStub(channel).Generate(call):
            by_sample[answer.chunk.sample] += answer.chunk.token_ids
    assert by_sample == tokens


async def test_a_chat_has_choices_with_penalties_stop_strings_and_grammars_of_their_own(
    http: httpx.AsyncClient,
) -> None:
    chat = {"messages": [{"role": "user", "content": "who?"}], "return_token_ids": True, "ignore_eos": False}
    for more in (
        {"stop": ["a", "e", "o"], "frequency_penalty": 0.5},
        {"guided_regex": "[a-z]{3,9}"},
        {"temperature": 0},
    ):
        together = (await ask(http, "/chat/completions", **chat | more | {"n": 4}))["choices"]
        for k, choice in enumerate(together):
            own = (await ask(http, "/chat/completions", **chat | more | {"seed": SEED + k}))["choices"][0]
            assert choice == own | {"index": k}
        if "temperature" in more:  # the most likely tokens are the same for all
            assert len({tuple(choice["token_ids"]) for choice in together}) == 1


async def test_a_prompt_is_scored_as_a_plain_forward_pass_scores_it(
    http: httpx.AsyncClient, stack: Stack, directory: Path
) -> None:
    prompt = [257, *PROMPT.encode()]
    with torch.inference_mode():
        log_probs = load_reference(directory)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    own = log_probs[range(len(prompt) - 1), prompt[1:]].tolist()
    top = log_probs.topk(2).values.numpy()

    completion = (await ask(http, prompt=PROMPT, prompt_logprobs=2))["choices"][0]["prompt_logprobs"]
    [first] = [c async for c in stream(http, "/completions", prompt=PROMPT, prompt_logprobs=2, max_tokens=1)]
    for said in (completion, first["choices"][0]["prompt_logprobs"]):
        assert said[0] is None and len(said) == len(prompt)
        entries = [entry[str(token)] for entry, token in zip(said[1:], prompt[1:], strict=True)]
        assert [entry["logprob"] for entry in entries] == pytest.approx(own, rel=1e-3)
        assert bytes(ord(entry["decoded_token"]) for entry in entries).decode() == PROMPT
        for position, entry in enumerate(said[1:]):
            best = sorted((each["logprob"] for each in entry.values() if each["rank"] <= 2), reverse=True)
            assert best == pytest.approx(top[position], rel=1e-3)

    echoed = (await ask(http, prompt=prompt, echo=True, logprobs=1, max_tokens=5))["choices"][0]
    assert echoed["text"].startswith(PROMPT)
    assert echoed["logprobs"]["token_logprobs"][1 : len(prompt)] == pytest.approx(own, rel=1e-3)
    assert len(echoed["logprobs"]["tokens"]) == len(prompt) + 5

    chat = await ask(
        http, "/chat/completions", messages=[{"role": "user", "content": "hi"}], prompt_logprobs=0
    )
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]

    async with grpc.aio.insecure_channel(stack.router_grpc) as channel:
        sampling = request_pb2.SamplingParams(max_tokens=2, prompt_logprobs=2)
        call = router_pb2.RouterGenerateRequest(
            model="test", prompt_token_ids=prompt, sampling=sampling, deadline_s=30
        )
        chunks = [answer.chunk async for answer in router_pb2_grpc.RouterStub(channel).Generate(call)]
    assert list(chunks[0].prompt_logprobs.logprobs) == pytest.approx(own, rel=1e-3)
    tops = np.array(chunks[0].prompt_logprobs.top_logprobs).reshape(-1, 2)
    np.testing.assert_allclose(tops, top[:-1], rtol=1e-3)
    assert not any(chunk.HasField("prompt_logprobs") for chunk in chunks[1:])  # two tokens may be one chunk


@pytest.mark.parametrize("path", ["/completions", "/chat/completions"])
async def test_a_client_that_leaves_in_the_middle_of_its_choices(http: httpx.AsyncClient, path: str) -> None:
    prompt = (
        {"prompt": PROMPT} if path == "/completions" else {"messages": [{"role": "user", "content": "a"}]}
    )
    events = stream(http, path, n=8, max_tokens=1000, **prompt)
    seen = set()
    async for chunk in events:
        seen |= {choice["index"] for choice in chunk["choices"]}
        if len(seen) == 8:
            break
    await events.aclose()  # type: ignore[attr-defined]
    task = asyncio.ensure_future(ask(http, path, n=8, max_tokens=1000, **prompt))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_more_choices_than_a_worker_runs_are_refused_by_name(http: httpx.AsyncClient) -> None:
    response = await http.post("/completions", json=FIELDS | {"prompt": "a", "n": 100})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "n" and "n must be 1 to 64, the worker's max_num_seqs" in error["message"]


async def test_a_decode_worker_alone_has_samples_too(http: httpx.AsyncClient, stack: Stack) -> None:
    sampling = request_pb2.SamplingParams(max_tokens=6, seed=SEED, ignore_eos=True, n=2, prompt_logprobs=0)
    request = request_pb2.Request(request_id="plain", prompt_token_ids=[257, 5, 6], sampling=sampling)
    tokens: dict[int, list[int]] = defaultdict(list)
    async with grpc.aio.insecure_channel(stack.addresses["decode-0"]) as channel:
        call = decode_pb2.DecodeGenerateRequest(request=request, deadline_s=30)
        chunks = [answer.chunk async for answer in decode_pb2_grpc.DecodeStub(channel).Generate(call)]
    for chunk in chunks:
        tokens[chunk.sample] += chunk.token_ids
    assert len(chunks[0].prompt_logprobs.logprobs) == 2
    answer = await ask(http, prompt=[257, 5, 6], max_tokens=6, n=2, return_token_ids=True)
    assert [tokens[sample] for sample in range(2)] == [choice["token_ids"] for choice in answer["choices"]]


async def test_a_fleet_without_prefill_workers_says_what_its_prefix_cache_had(directory: Path) -> None:
    async with (
        running_stack(model=str(directory), index="memory", num_prefill=0) as stack,
        httpx.AsyncClient(base_url=f"{stack.base_url}/v1", timeout=60) as client,
    ):
        asked = {"prompt": PROMPT, "max_tokens": 2}
        held = (len(PROMPT) - 1) // 16 * 16  # whole blocks, and one token is always computed
        assert [await _cached(client, **asked) for _ in range(2)] == [0, held]
        assert await _cached(client, **asked, n=2) == held
        assert await _cached(client, **asked, cache_salt="of another tenant") == 0
        streamed = stream(client, "/completions", **asked, stream_options={"include_usage": True})
        *_, last = [event async for event in streamed]
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": held}


async def _cached(http: httpx.AsyncClient, **fields: Any) -> int:
    usage: dict[str, Any] = (await ask(http, **fields))["usage"]
    cached: int = usage["prompt_tokens_details"]["cached_tokens"]
    return cached
