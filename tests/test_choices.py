"""Several choices in one answer, and the prompt as a part of it: in one piece, streamed and over gRPC alike."""

import asyncio
import json
from collections import defaultdict
from typing import Any

import httpx
import pytest
from router_parts import (
    BOS,
    LENGTH,
    MODEL,
    STOP,
    Of,
    ScriptedFleet,
    ScriptedGenerator,
    Step,
    logprobs_of,
    prompt_logprobs_of,
    scripted_door,
)

from baton.engine.prompt_scores import MAX_VALUES
from baton.errors import InternalError, WorkerLost
from baton.messages import GenerateChunk, RouterGenerateCall
from baton.request import Request, RequestId, SamplingParams
from baton_router.app import create_app
from baton_router.grpc_api import RouterService
from baton_router.openai import schema

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": MODEL, "prompt": "hi"}
PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
THREE: tuple[Step, ...] = (
    "a", Of(1, "b"), Of(2, b"\xc3"), "aE", Of(2, b"\xb6"), Of(1, LENGTH), Of(2, "xEND and more"), Of(2, "y"),
    "NX", STOP,
)  # fmt: skip
TEXTS, REASONS = ["aaENX", "b", "öx"], ["stop", "length", "stop"]
NUM_TOKENS = len("aaENX" + "b") + len("öxEND".encode())


async def post(kind: str, *script: Step, **fields: Any) -> tuple[httpx.Response, ScriptedGenerator]:
    door, generator = scripted_door(*script)
    transport = httpx.ASGITransport(app=create_app(door, ScriptedFleet()))
    async with httpx.AsyncClient(transport=transport, base_url="http://router", timeout=30) as client:
        body = (CHAT if kind == "chat" else COMPLETION) | fields
        return await client.post(PATHS[kind], json=body), generator


def events(response: httpx.Response) -> list[dict[str, Any]]:
    *chunks, done = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def text_of(choice: dict[str, Any]) -> str:
    said: str = choice["text"] if "text" in choice else choice.get("message", choice.get("delta"))["content"]
    return said


@pytest.mark.parametrize("kind", PATHS)
async def test_each_choice_has_its_own_text_stop_string_and_end(kind: str) -> None:
    response, generator = await post(kind, *THREE, n=3, stop=["END"])
    body = response.json()
    (schema.ChatCompletion if kind == "chat" else schema.Completion).model_validate(body)
    choices = body["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert [text_of(choice) for choice in choices] == TEXTS
    assert [choice["finish_reason"] for choice in choices] == REASONS
    [request] = generator.requests
    assert request.sampling.n == 3
    assert body["usage"]["prompt_tokens"] == request.num_prompt_tokens
    assert body["usage"]["completion_tokens"] == NUM_TOKENS
    assert generator.dropped == [(request.request_id, 2)]  # the worker need not go on with it


@pytest.mark.parametrize("kind", PATHS)
async def test_a_stream_interleaves_choices_and_has_one_usage(kind: str) -> None:
    fields = {"n": 3, "stop": ["END"], "stream": True, "stream_options": {"include_usage": True}}
    response, _ = await post(kind, *THREE, **fields)
    *chunks, usage = events(response)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == NUM_TOKENS
    texts, reasons = defaultdict(str), {}
    order = []
    for chunk in chunks:
        [choice] = chunk["choices"]
        index = choice["index"]
        assert index not in reasons, "a chunk after the end"
        texts[index] += text_of(choice) or ""
        if choice["finish_reason"]:
            reasons[index] = choice["finish_reason"]
        order.append(index)
    assert [texts[index] for index in range(3)] == TEXTS
    assert [reasons[index] for index in range(3)] == REASONS
    assert order[:2] != sorted(order)[:2] or order != sorted(order)
    if kind == "chat":
        turns = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
        assert sorted(turns) == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", PATHS)
async def test_log_probabilities_of_each_choice(kind: str, stream: bool) -> None:
    asked = {"logprobs": True, "top_logprobs": 1} if kind == "chat" else {"logprobs": 1}
    response, _ = await post(kind, *THREE, n=3, stop=["END"], stream=stream, **asked)
    found: dict[int, list[float]] = defaultdict(list)
    parts = events(response) if stream else [response.json()]
    for choice in [choice for part in parts for choice in part["choices"] if choice["logprobs"]]:
        said = choice["logprobs"]
        own = [e["logprob"] for e in said["content"]] if kind == "chat" else said["token_logprobs"]
        found[choice["index"]] += own
    assert found[0] == [logprobs_of(token).logprob for token in b"aaENX"]
    assert found[1] == [logprobs_of(token).logprob for token in b"b"]
    assert found[2] == [logprobs_of(token).logprob for token in "öxEND".encode()]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_failure_of_one_choice_is_that_of_the_request(stream: bool) -> None:
    response, generator = await post(
        "chat", "a", Of(1, "b"), WorkerLost("worker decode-0 was lost"), n=2, stream=stream
    )
    error = json.loads(response.text.split("data: ")[-2]) if stream else response.json()
    assert error["error"]["code"] == WorkerLost.code
    assert len(generator.ended) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_that_end_before_all_choices_have_are_an_error(stream: bool) -> None:
    response, _ = await post("chat", "a", STOP, Of(1, "b"), n=2, stream=stream)
    assert InternalError.code in response.text


async def test_the_request_ends_when_the_last_choice_has_found_its_stop_string() -> None:
    forever = asyncio.Event()
    response, generator = await post("chat", "aX", Of(1, "b"), Of(1, "X"), forever, n=2, stop=["X"])
    assert [text_of(choice) for choice in response.json()["choices"]] == ["a", "b"]
    assert len(generator.ended) == 1


async def test_chunks_over_grpc_say_which_sample_they_are_of() -> None:
    door, _ = scripted_door(*THREE)
    call = RouterGenerateCall(
        MODEL, "hi", (), SamplingParams(max_tokens=8, n=3, stop=("END",), prompt_logprobs=1), deadline_s=30.0
    )
    chunks = [chunk async for chunk in RouterService(door, ScriptedFleet()).generate(call)]
    texts: dict[int, str] = defaultdict(str)
    tokens: dict[int, int] = defaultdict(int)
    for chunk in chunks:
        assert chunk.first_index == tokens[chunk.sample]
        tokens[chunk.sample] += len(chunk.token_ids)
        texts[chunk.sample] += chunk.text
    assert [texts[sample] for sample in range(3)] == TEXTS
    assert [[c.finish_reason for c in chunks if c.sample == s and c.finish_reason] for s in range(3)] == [
        [STOP], [LENGTH], [STOP],
    ]  # fmt: skip
    said = [chunk.prompt_logprobs for chunk in chunks]
    assert said[0] is not None and said[0].ranks == tuple(b"hi") and not any(said[1:])
    assert isinstance(chunks[0], GenerateChunk)


def test_each_sample_is_a_request_that_can_be_asked_for_alone() -> None:
    sampling = SamplingParams(n=3, seed=2**64 - 1, prompt_logprobs=1, logprobs=2)
    request = Request(RequestId("r"), (1, 2), sampling, (5,), "salt")
    samples = request.samples()
    assert [each.request_id for each in samples] == ["r", "r#1", "r#2"]
    assert [each.sampling.seed for each in samples] == [2**64 - 1, 0, 1]
    assert [each.sampling.prompt_logprobs for each in samples] == [1, None, None]
    for each in samples:
        assert (each.prompt_token_ids, each.eos_token_ids, each.cache_salt) == ((1, 2), (5,), "salt")
        assert (each.sampling.n, each.sampling.logprobs) == (1, 2)


# --- the prompt ---


@pytest.mark.parametrize("stream", [False, True])
async def test_a_worker_that_says_nothing_of_the_prompt_is_an_error(stream: bool) -> None:
    door, generator = scripted_door("x", STOP)
    ask = generator.generate

    async def forgetful(request: Request, *, timeout_s: float) -> Any:
        async for items in ask(request, timeout_s=timeout_s):
            yield [item._replace(prompt_logprobs=None) for item in items]

    generator.generate = forgetful  # type: ignore[method-assign]
    transport = httpx.ASGITransport(app=create_app(door, ScriptedFleet()))
    async with httpx.AsyncClient(transport=transport, base_url="http://router", timeout=30) as client:
        body = CHAT | {"prompt_logprobs": 0, "stream": stream}
        response = await client.post(PATHS["chat"], json=body)
    assert response.status_code == 500 and response.json()["error"]["code"] == InternalError.code


async def test_what_the_model_says_of_the_prompt_in_vllms_shape() -> None:
    expected = [
        None,
        {
            "104": {"logprob": -26.0, "rank": 104, "decoded_token": "h"},
            "0": {"logprob": -0.5, "rank": 1, "decoded_token": "\x00"},
            "1": {"logprob": -1.0, "rank": 2, "decoded_token": "\x01"},
        },
        {
            "1": {"logprob": -0.25, "rank": 1, "decoded_token": "\x01"},
            "0": {"logprob": -0.5, "rank": 1, "decoded_token": "\x00"},
        },
    ]
    for stream in (False, True):
        fields = {"prompt": [BOS, 104, 1], "prompt_logprobs": 2, "stream": stream}
        response, generator = await post("completion", "ok", LENGTH, **fields)
        parts = events(response) if stream else [response.json()]
        found = [choice.get("prompt_logprobs") for part in parts for choice in part["choices"]]
        assert found[0] == expected and not any(found[1:])
        assert generator.requests[0].sampling.prompt_logprobs == 2
        if not stream:
            schema.Completion.model_validate(response.json())
    for stream in (False, True):
        response, generator = await post("chat", "ok", LENGTH, prompt_logprobs=0, stream=stream)
        first, *others = events(response) if stream else [response.json()]
        num_tokens = generator.requests[0].num_prompt_tokens
        assert [entry and len(entry) for entry in first["prompt_logprobs"]] == [None] + [1] * (num_tokens - 1)
        assert not any("prompt_logprobs" in part for part in others)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("prompt", "text"), [("hé", "hé"), ([BOS, *b"hi"], "hi")])
async def test_the_prompt_comes_before_each_choice(prompt: Any, text: str, stream: bool) -> None:
    fields = {"prompt": prompt, "echo": True, "n": 2, "stream": stream}
    response, generator = await post("completion", " yo", Of(1, "u"), Of(1, LENGTH), LENGTH, **fields)
    said: dict[int, str] = defaultdict(str)
    for part in events(response) if stream else [response.json()]:
        for choice in part["choices"]:
            said[choice["index"]] += choice["text"]
    assert said == {0: text + " yo", 1: text + "u"}
    assert generator.requests[0].sampling.prompt_logprobs is None


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echoed_prompt_has_log_probabilities_in_the_same_columns(stream: bool) -> None:
    fields = {"echo": True, "logprobs": 2, "prompt_logprobs": 0, "stream": stream}
    response, generator = await post("completion", "o", "k", LENGTH, **fields)
    assert generator.requests[0].sampling.prompt_logprobs == 2
    columns: dict[str, list[Any]] = defaultdict(list)
    for part in events(response) if stream else [response.json()]:
        for name, values in (part["choices"][0]["logprobs"] or {}).items():
            columns[name] += values
    assert columns["tokens"] == ["<bos>", "h", "i", "o", "k"]
    assert columns["token_logprobs"] == [None, *(-token / 4 for token in b"hiok")]
    assert columns["text_offset"] == [0, 0, 1, 2, 3]  # the special token has no text
    assert columns["top_logprobs"][0] is None
    assert columns["top_logprobs"][1] == {"\x00": -0.5, "\x01": -1.0, "h": -26.0}
    first = (events(response) if stream else [response.json()])[0]["choices"][0]
    assert [entry and len(entry) for entry in first["prompt_logprobs"]] == [None, 1, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_prompt_alone(stream: bool) -> None:
    """As evaluations ask: nothing is generated that anybody sees."""
    fields = {"echo": True, "logprobs": 0, "max_tokens": 0, "stream": stream}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    response, generator = await post("completion", "x", LENGTH, **fields)
    assert generator.requests[0].sampling.max_tokens == 1
    parts = events(response) if stream else [response.json()]
    choices = [choice for part in parts for choice in part["choices"]]
    assert "".join(choice["text"] for choice in choices) == "hi"
    assert choices[-1]["finish_reason"] == "length"
    assert [t for c in choices for t in (c["logprobs"] or {"tokens": []})["tokens"]] == ["<bos>", "h", "i"]
    assert parts[-1]["usage"]["completion_tokens"] == 0


async def test_more_than_an_answer_should_hold_is_refused_by_name() -> None:
    num_tokens = MAX_VALUES // 21 + 1
    for prompt, fields in (
        ([1] * num_tokens, {"prompt_logprobs": 20}),
        ([1] * num_tokens, {"echo": True, "logprobs": 20}),
        ([1] * (num_tokens // 2 + 1), {"prompt_logprobs": 20, "n": 2}),
    ):
        door, generator = scripted_door("x", STOP, max_model_len=MAX_VALUES)
        transport = httpx.ASGITransport(app=create_app(door, ScriptedFleet()))
        async with httpx.AsyncClient(transport=transport, base_url="http://router", timeout=30) as client:
            body = COMPLETION | {"prompt": prompt} | fields
            response = await client.post(PATHS["completion"], json=body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == "prompt_logprobs"
        assert generator.requests == []


def test_the_scripted_log_probabilities_are_the_prompts() -> None:
    request = Request(RequestId("r"), (1, 2, 3), SamplingParams(prompt_logprobs=1))
    said = prompt_logprobs_of(request)
    assert said is not None and (said.ranks, said.top_token_ids) == ((2, 3), (0, 0))
