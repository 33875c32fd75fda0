"""The OpenAI API: what is honoured, what is refused by name, and how every end of a request looks to its client."""

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families
from router_parts import (
    EOS,
    LENGTH,
    MAX_MODEL_LEN,
    MODEL,
    STOP,
    VOCAB_SIZE,
    ScriptedFleet,
    ScriptedGenerator,
    Step,
    byte_tokenizer,
    scripted_door,
    worker,
)

import baton
from baton.errors import ConfigError, DeadlineExceeded, Overloaded, Unavailable, WorkerLost
from baton.messages import Role
from baton.request import Grammar, GrammarKind, TokenBias, TokenSequence
from baton_router.app import App, HttpServer, create_app, serve_http
from baton_router.fleet_view import IndexHealth
from baton_router.openai import schema
from baton_router.openai.structured import ANY_OBJECT

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": MODEL, "prompt": "hi"}
PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


@asynccontextmanager
async def client_of(app: App) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://router", timeout=30) as client:
        yield client


async def post(
    *script: Step, path: str = PATHS["chat"], fleet: ScriptedFleet | None = None, **body: Any
) -> Any:
    """(response, generator) of one request to a router that answers with `script`."""
    door, generator = scripted_door(*(script or ("ok", STOP)))
    async with client_of(create_app(door, fleet or ScriptedFleet())) as client:
        response = await client.post(path, json=body)
    return response, generator


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


# --- answers in one piece ---


async def test_a_chat_is_rendered_generated_and_answered() -> None:
    response, generator = await post("he", "llo", (EOS,), STOP, **CHAT)
    assert response.status_code == 200
    body = response.json()
    schema.ChatCompletion.model_validate(body)
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    num_prompt = len("user: hi\nassistant: ")
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 6,
        "total_tokens": num_prompt + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert body["created"] == 1767225600
    assert body["id"] == "chatcmpl-" + response.headers["x-request-id"]
    [request] = generator.requests
    assert bytes(request.prompt_token_ids) == b"user: hi\nassistant: "
    assert request.sampling.max_tokens == MAX_MODEL_LEN - num_prompt
    assert request.eos_token_ids == (EOS,)


async def test_a_completion_begins_with_bos_and_gets_16_tokens() -> None:
    response, generator = await post("x", LENGTH, path=PATHS["completion"], **COMPLETION)
    body = response.json()
    schema.Completion.model_validate(body)
    assert body["choices"] == [{"index": 0, "text": "x", "logprobs": None, "finish_reason": "length"}]
    [request] = generator.requests
    assert request.prompt_token_ids == (257, *b"hi")
    assert request.sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hi", (257, *b"hi")),
        (["hi"], (257, *b"hi")),
        ([1, 2, 3], (1, 2, 3)),
        ([[1, 2, 3]], (1, 2, 3)),
        ([0, VOCAB_SIZE - 1], (0, VOCAB_SIZE - 1)),
        ("", (257,)),
    ],
)
async def test_forms_of_a_prompt(prompt: Any, ids: tuple[int, ...]) -> None:
    _, generator = await post(path=PATHS["completion"], model=MODEL, prompt=prompt)
    assert generator.requests[0].prompt_token_ids == ids


async def test_special_tokens_of_a_prompt_can_be_left_out() -> None:
    _, generator = await post(path=PATHS["completion"], **COMPLETION, add_special_tokens=False)
    assert generator.requests[0].prompt_token_ids == tuple(b"hi")


async def test_every_sampling_field_reaches_the_generator() -> None:
    fields = {
        "max_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "seed": 42,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "ignore_eos": True,
        "min_p": 0.25,
        "presence_penalty": -1.5,
        "frequency_penalty": 2.0,
        "repetition_penalty": 1.25,
        "min_tokens": 3,
        "allowed_token_ids": [7, 5],
    }
    _, generator = await post(**CHAT, **fields, cache_salt="tenant", user="u", priority=-3)
    [request] = generator.requests
    for name, value in fields.items():
        assert getattr(request.sampling, name) == (tuple(value) if isinstance(value, list) else value)
    assert request.cache_salt == "tenant" and request.priority == -3
    assert generator.timeouts_s == [60.0]


@pytest.mark.parametrize(
    ("field", "value", "attribute", "expected"),
    [
        ("max_completion_tokens", 5, "max_tokens", 5),
        ("stop", "x", "stop", ("x",)),
        ("stop", None, "stop", ()),
        ("top_k", -1, "top_k", 0),
        ("temperature", None, "temperature", 1.0),
        ("seed", 0, "seed", 0),
        ("seed", -1, "seed", 2**64 - 1),
        ("seed", 2**63, "seed", 2**63),
        ("seed", -(2**70), "seed", 0),
        ("logit_bias", {"5": 2, "7": -100}, "logit_bias", (TokenBias(5, 2.0), TokenBias(7, -100.0))),
        ("bad_words", ["ab"], "bad_words", (TokenSequence((97, 98)), TokenSequence((32, 97, 98)))),
        ("logprobs", True, "logprobs", 0),
        ("response_format", {"type": "json_object"}, "grammar", ANY_OBJECT),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}, "strict": True}},
            "grammar",
            Grammar(GrammarKind.JSON_SCHEMA, '{"type":"null"}'),
        ),
        ("structured_outputs", {"json": {"a": 1}}, "grammar", Grammar(GrammarKind.JSON_SCHEMA, '{"a":1}')),
        ("structured_outputs", {"regex": "a+"}, "grammar", Grammar(GrammarKind.REGEX, "a+")),
        ("structured_outputs", {"json_object": True}, "grammar", ANY_OBJECT),
        ("guided_json", "{}", "grammar", Grammar(GrammarKind.JSON_SCHEMA, "{}")),
        ("guided_regex", "a+", "grammar", Grammar(GrammarKind.REGEX, "a+")),
        ("guided_choice", ["a", 'b"'], "grammar", Grammar(GrammarKind.CHOICE, '["a","b\\""]')),
        ("guided_grammar", "start: /a/", "grammar", Grammar(GrammarKind.LARK, "start: /a/")),
    ],
)
async def test_other_ways_to_say_it(field: str, value: Any, attribute: str, expected: Any) -> None:
    _, generator = await post(**CHAT, **{field: value})
    assert getattr(generator.requests[0].sampling, attribute) == expected


async def test_seeds_are_drawn_one_for_each_request() -> None:
    door, generator = scripted_door("ok", STOP)
    async with client_of(create_app(door, ScriptedFleet())) as client:
        for _ in range(20):
            await client.post(PATHS["chat"], json=CHAT)
    seeds = [request.sampling.seed for request in generator.requests]
    assert len(set(seeds)) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_roles_and_parts() -> None:
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
    ]
    _, generator = await post(model=MODEL, messages=messages)
    text = bytes(generator.requests[0].prompt_token_ids).decode()
    assert text == "system: d\nuser: a\nb\nassistant: c\ntool: t\nassistant: "


async def test_token_ids_are_returned_on_request() -> None:
    script: tuple[Step, ...] = ("he", b"\xc3", b"\xb6", (EOS,), STOP)
    response, _ = await post(*script, path=PATHS["completion"], **COMPLETION, return_token_ids=True)
    [choice] = response.json()["choices"]
    assert choice["text"] == "heö"
    assert choice["token_ids"] == [*"heö".encode(), EOS]
    assert choice["prompt_token_ids"] == [257, *b"hi"]
    response, _ = await post(*script, **CHAT, return_token_ids=True)
    assert response.json()["choices"][0]["token_ids"] == [*"heö".encode(), EOS]
    assert bytes(response.json()["prompt_token_ids"]) == b"user: hi\nassistant: "


async def test_log_probabilities_in_both_shapes() -> None:
    script: tuple[Step, ...] = ("h", b"\xc3", b"\xb6", (EOS,), STOP)
    response, _ = await post(*script, **CHAT, logprobs=True, top_logprobs=2)
    content = response.json()["choices"][0]["logprobs"]["content"]
    half = "\N{REPLACEMENT CHARACTER}"
    assert [entry["token"] for entry in content] == ["h", half, half, "<eos>"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "hö<eos>".encode()
    assert content[0]["logprob"] == -ord("h") / 4
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["<eos>", "h"]
    response, _ = await post(*script, path=PATHS["completion"], **COMPLETION, logprobs=2)
    logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == "h" and logprobs["token_logprobs"][0] == -ord("h") / 4
    assert logprobs["top_logprobs"][0] == {"<eos>": -0.5, "h": -ord("h") / 4}
    assert logprobs["text_offset"] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", PATHS)
async def test_streamed_log_probabilities_are_those_of_the_answer_in_one_piece(kind: str) -> None:
    script: tuple[Step, ...] = ("abcE", b"\xc3", "NDxyz", STOP)
    asked = {"logprobs": True, "top_logprobs": 1} if kind == "chat" else {"logprobs": 1}
    body = {**(CHAT if kind == "chat" else COMPLETION), **asked, "stop": ["D"]}
    whole, _ = await post(*script, path=PATHS[kind], **body)
    streamed, _ = await post(*script, path=PATHS[kind], **body, stream=True)
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    parts = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    for name, value in whole.json()["choices"][0]["logprobs"].items():
        if value is not None:
            assert [each for part in parts for each in part[name]] == value
            assert len(value) == len("abcE.ND")


async def test_a_stop_string_ends_the_answer_and_the_request() -> None:
    forever = asyncio.Event()
    body = {**CHAT, "stop": ["END"], "return_token_ids": True}
    response, generator = await post("abcE", "N", "Dxyz", forever, **body)
    [choice] = response.json()["choices"]
    assert choice["message"]["content"] == "abc"
    assert choice["finish_reason"] == "stop"
    assert bytes(choice["token_ids"]) == b"abcEND"
    assert response.json()["usage"]["completion_tokens"] == 6
    assert len(generator.ended) == 1


async def test_cached_tokens_are_those_of_the_worker_that_held_more() -> None:
    door, generator = scripted_door("ok", STOP)
    async with client_of(create_app(door, ScriptedFleet())) as client:
        generator.script = lambda request: _with_cache(generator, request.request_id)
        body = (await client.post(PATHS["chat"], json=CHAT)).json()
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


def _with_cache(generator: ScriptedGenerator, request_id: str) -> list[Step]:
    generator.records[request_id].num_cached_tokens_prefill = 16
    return ["ok", STOP]


NEUTRAL_BODY = {
    "logprobs": False,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "best_of": 1,
    "n": 1,
    "prompt_logprobs": None,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "parallel_tool_calls": True,
    "store": False,
    "metadata": None,
    "stream": False,
    "stream_options": None,
    "user": "somebody",
    "service_tier": "auto",
    "modalities": ["text"],
}


async def test_values_that_ask_for_nothing_are_accepted() -> None:
    response, _ = await post(**CHAT, **NEUTRAL_BODY)
    assert response.status_code == 200, response.text
    nothing = dict.fromkeys((*schema.NEUTRAL_IN_CHAT, "temperature", "stop", "seed", "max_tokens"))
    response, _ = await post(**CHAT, **nothing)
    assert response.status_code == 200, response.text
    nothing = dict.fromkeys((*schema.NEUTRAL_IN_COMPLETIONS, "temperature", "stop", "seed"))
    response, _ = await post(path=PATHS["completion"], **COMPLETION, **nothing)
    assert response.status_code == 200, response.text


# --- what is refused ---

USER = {"role": "user", "content": "x"}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *[
        (kind, {field: value}, field)
        for kind in ("chat", "completion")
        for field, value in [
            ("max_tokens", 0),
            ("max_tokens", -1),
            ("max_tokens", "10"),
            ("max_tokens", 10.5),
            ("max_tokens", True),
            ("max_tokens", 2**40),
            ("temperature", -0.1),
            ("temperature", 2.1),
            ("temperature", "1"),
            ("temperature", True),
            ("temperature", []),
            ("top_p", 0),
            ("top_p", 1.1),
            ("top_p", -1),
            ("top_k", -2),
            ("top_k", 1.5),
            ("seed", 1.5),
            ("seed", "1"),
            ("stop", 5),
            ("stop", [5]),
            ("stop", ""),
            ("stop", ["a", ""]),
            ("stop", ["a"] * 17),
            ("stop", "a" * 1025),
            ("stop_token_ids", [VOCAB_SIZE]),
            ("stop_token_ids", 5),
            ("ignore_eos", 1),
            ("stream", "true"),
            ("stream", 1),
            ("stream_options", {"include_usage": True}),
            ("n", 0),
            ("n", -1),
            ("n", 129),
            ("n", 1.5),
            ("n", "2"),
            ("n", True),
            ("best_of", 2),
            ("metadata", {"a": "b"}),
            ("presence_penalty", 2.5),
            ("frequency_penalty", -3),
            ("repetition_penalty", 0),
            ("min_p", 1.5),
            ("min_p", "0.1"),
            ("min_tokens", -1),
            ("min_tokens", 99),
            ("logit_bias", {"five": 1}),
            ("logit_bias", {str(VOCAB_SIZE): 1}),
            ("logit_bias", [5]),
            ("allowed_token_ids", []),
            ("allowed_token_ids", [VOCAB_SIZE]),
            ("bad_words", [""]),
            ("bad_words", 5),
            ("prompt_logprobs", -1),
            ("prompt_logprobs", 21),
            ("prompt_logprobs", True),
            ("prompt_logprobs", 0.5),
            ("logprobs", "yes"),
            ("response_format", "json"),
            ("structured_outputs", {}),
            ("structured_outputs", {"regex": "a", "choice": ["b"]}),
            ("guided_choice", []),
            ("guided_regex", 5),
            ("echo", 1),
            ("echo", "yes"),
            ("user", 5),
            ("cache_salt", 5),
            ("priority", 2**31),
            ("priority", "high"),
            ("cache_salt", "s" * 257),
            ("return_token_ids", "yes"),
            ("nonsense", 1),
            ("model", 5),
            ("model", None),
        ]
    ],
    ("chat", {"echo": True}, "echo"),
    ("completion", {"max_tokens": 0, "echo": False}, "max_tokens"),
    ("chat", {"tools": [{"type": "function"}]}, "tools"),
    ("chat", {"tool_choice": "required"}, "tool_choice"),
    ("chat", {"functions": [{}]}, "functions"),
    ("chat", {"store": True}, "store"),
    ("chat", {"modalities": ["audio"]}, "modalities"),
    ("chat", {"top_logprobs": 5}, "top_logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat", {"logprobs": 1}, "logprobs"),
    ("completion", {"logprobs": True}, "logprobs"),
    ("completion", {"logprobs": 21}, "logprobs"),
    ("chat", {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        "chat",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        "response_format.json_schema.schema",
    ),
    ("chat", {"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
    ("chat", {"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ("chat", {"guided_regex": "a", "min_tokens": 1}, "min_tokens"),
    ("chat", {"logit_bias": {"5": 101}}, "logit_bias[5]"),
    ("chat", {"response_format": {"type": "xml"}}, "response_format.type"),
    ("chat", {"chat_template": "x"}, "chat_template"),
    ("chat", {"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ("chat", {"max_completion_tokens": 0}, "max_completion_tokens"),
    ("chat", {"stream": True, "stream_options": {"nonsense": 1}}, "stream_options.nonsense"),
    ("chat", {"stream": True, "stream_options": True}, "stream_options"),
    ("chat", {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": None}, "messages"),
    ("chat", {"messages": "hi"}, "messages"),
    ("chat", {"messages": ["hi"]}, "messages[0]"),
    ("chat", {"messages": [{"content": "x"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("chat", {"messages": [USER, {"role": "robot", "content": "x"}]}, "messages[1].role"),
    ("chat", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ("chat", {"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ("chat", {"messages": [{**USER, "extra": 1}]}, "messages[0].extra"),
    (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "messages[0].content[0].text",
    ),
    ("chat", {"messages": [{"role": "user", "content": "refuse"}]}, "messages"),
    ("completion", {"prompt": None}, "prompt"),
    ("completion", {"prompt": 5}, "prompt"),
    ("completion", {"prompt": []}, "prompt"),
    ("completion", {"prompt": ["a", "b"]}, "prompt"),
    ("completion", {"prompt": [[1], [2]]}, "prompt"),
    ("completion", {"prompt": [1, "a"]}, "prompt"),
    ("completion", {"prompt": [1, True]}, "prompt"),
    ("completion", {"prompt": [1, 2.0]}, "prompt"),
    ("completion", {"prompt": [-1]}, "prompt"),
    ("completion", {"prompt": [VOCAB_SIZE]}, "prompt"),
    ("completion", {"suffix": "x"}, "suffix"),
    ("completion", {"messages": [USER]}, "messages"),
]


@pytest.mark.parametrize(("kind", "change", "param"), REFUSED, ids=lambda value: str(value)[:60])
async def test_refused_by_name(kind: str, change: dict[str, Any], param: str) -> None:
    body = (CHAT if kind == "chat" else COMPLETION) | change
    response, generator = await post(path=PATHS[kind], **body)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert not generator.requests


@pytest.mark.parametrize("field", ["model", "messages"])
async def test_what_is_missing_is_named(field: str) -> None:
    response, _ = await post(**{name: value for name, value in CHAT.items() if name != field})
    assert response.status_code == 400
    assert error_of(response)["message"] == f"{field} is required"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"model": "m", "temperature": NaN}',
        b'{"model": "m", "temperature": Infinity}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda body: str(body[:40]),
)
async def test_malformed_json(body: bytes) -> None:
    door, _ = scripted_door("ok", STOP)
    async with client_of(create_app(door, ScriptedFleet())) as client:
        headers = {"content-type": "application/json; charset=utf-8"}
        response = await client.post(PATHS["chat"], content=body, headers=headers)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"
    assert "body" in error_of(response)["message"]


async def test_other_content_types_are_refused() -> None:
    door, _ = scripted_door("ok", STOP)
    async with client_of(create_app(door, ScriptedFleet())) as client:
        response = await client.post(PATHS["chat"], data={"model": MODEL})
        assert response.status_code == 415
        assert "application/json" in error_of(response)["message"]
        response = await client.post(PATHS["chat"], content=orjson.dumps(CHAT), headers={"content-type": ""})
        assert response.status_code == 415


async def _in_pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large_is_refused(chunked: bool) -> None:
    door, generator = scripted_door("ok", STOP)
    app = create_app(door, ScriptedFleet(), max_body_bytes=1000)
    body = orjson.dumps(CHAT | {"user": "x" * 1000})
    headers = {"content-type": "application/json"}
    async with await serve_http(app, "127.0.0.1", 0) as server, httpx.AsyncClient() as client:
        content: Any = _in_pieces(body, 100) if chunked else body
        url = f"http://{server.address}{PATHS['chat']}"
        response = await client.post(url, content=content, headers=headers)
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"
        assert (await client.post(url, json=CHAT)).status_code == 200
    assert len(generator.requests) == 1


async def test_an_unknown_model_is_404() -> None:
    response, _ = await post(**(CHAT | {"model": "gpt-4"}))
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"
    assert error_of(response)["param"] == "model"


@pytest.mark.parametrize(
    ("kind", "change", "param"),
    [
        ("chat", {"messages": [{"role": "user", "content": "x" * 200}]}, "messages"),
        ("chat", {"max_tokens": MAX_MODEL_LEN}, "messages"),
        ("completion", {"prompt": [1] * MAX_MODEL_LEN}, "prompt"),
        ("completion", {"prompt": [1] * 50, "max_tokens": 51}, "prompt"),
    ],
)
async def test_longer_than_the_model_takes(kind: str, change: dict[str, Any], param: str) -> None:
    response, _ = await post(path=PATHS[kind], **((CHAT if kind == "chat" else COMPLETION) | change))
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == param
    assert f"maximum context length is {MAX_MODEL_LEN} tokens" in error["message"]


async def test_what_fits_exactly_is_served_and_the_default_shrinks_to_what_is_left() -> None:
    long = {"model": MODEL, "prompt": [1] * (MAX_MODEL_LEN - 5)}
    response, _ = await post(path=PATHS["completion"], **long, max_tokens=5)
    assert response.status_code == 200
    _, generator = await post(path=PATHS["completion"], **long)
    assert generator.requests[0].sampling.max_tokens == 5


async def test_without_any_worker_nothing_is_known_to_fit() -> None:
    door, _ = scripted_door("ok", STOP, max_model_len=None)
    async with client_of(create_app(door, ScriptedFleet([]))) as client:
        response = await client.post(PATHS["chat"], json=CHAT)
    assert response.status_code == 503
    assert error_of(response)["code"] == "unavailable"


async def test_a_model_without_a_chat_template_points_to_completions() -> None:
    door, _ = scripted_door("ok", STOP, tokenizer=byte_tokenizer(None))
    async with client_of(create_app(door, ScriptedFleet())) as client:
        response = await client.post(PATHS["chat"], json=CHAT)
    assert response.status_code == 400
    assert "/v1/completions" in error_of(response)["message"]


# --- errors of the fleet ---


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("full", retry_after_s=2.3), 429, "3"),
        (Overloaded("full", retry_after_s=0.01), 429, "1"),
        (Unavailable("nobody"), 503, None),
        (WorkerLost("died"), 503, None),
        (DeadlineExceeded("late"), 504, None),
    ],
)
async def test_errors_before_the_first_token_have_their_status(
    error: Exception, status: int, retry_after: str | None, stream: bool
) -> None:
    response, generator = await post(error, **CHAT, stream=stream)
    assert response.status_code == status
    assert error_of(response)["code"] == error.code  # type: ignore[attr-defined]
    assert response.headers.get("retry-after") == retry_after
    assert len(generator.ended) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_is_500_without_its_details(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    response, _ = await post(RuntimeError("secret"), **CHAT, stream=stream)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["type"] == "server_error"
    assert "secret" in caplog.text


async def test_tokens_that_end_without_a_reason_are_an_error() -> None:
    response, _ = await post("half", **CHAT)
    assert response.status_code == 500


# --- routes, ids ---


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/nothing", 404, "model_not_found"),
        ("GET", "/debug/requests/nothing", 404, "not_found"),
        ("GET", "/health/", 404, "not_found"),
    ],
)
async def test_unknown_routes(method: str, path: str, status: int, code: str) -> None:
    door, _ = scripted_door()
    async with client_of(create_app(door, ScriptedFleet())) as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert (status == 405) == ("allow" in response.headers)


async def test_request_ids_are_taken_drawn_and_bounded() -> None:
    door, generator = scripted_door("ok", STOP)
    async with client_of(create_app(door, ScriptedFleet())) as client:
        mine = await client.post(PATHS["chat"], json=CHAT, headers={"x-request-id": "job-1.a"})
        assert mine.headers["x-request-id"] == "job-1.a"
        assert mine.json()["id"] == "chatcmpl-job-1.a"
        assert generator.requests[0].request_id == "job-1.a"
        drawn = [(await client.get("/version")).headers["x-request-id"] for _ in range(3)]
        assert len(set(drawn)) == 3
        for bad in ("", "x" * 129, "a b", "a\tb", 'a"b', "é"):
            headers = {"x-request-id": bad.encode()}
            refused = await client.post(PATHS["chat"], json=CHAT, headers=headers)
            assert refused.status_code == 400
            assert error_of(refused)["param"] == "x-request-id"
            assert refused.headers["x-request-id"].isalnum()


async def test_two_requests_under_one_id_are_two_requests() -> None:
    go = asyncio.Event()
    door, generator = scripted_door("ok", go, STOP)
    async with client_of(create_app(door, ScriptedFleet())) as client:
        sent = [
            asyncio.ensure_future(client.post(PATHS["chat"], json=CHAT, headers={"x-request-id": "same"}))
            for _ in range(2)
        ]
        while len(generator.requests) < 2:
            await asyncio.sleep(0.001)
        go.set()
        responses = await asyncio.gather(*sent)
    assert [response.status_code for response in responses] == [200, 200]
    assert len({request.request_id for request in generator.requests}) == 2
    assert {response.headers["x-request-id"] for response in responses} == {"same"}


async def test_models() -> None:
    door, _ = scripted_door()
    async with client_of(create_app(door, ScriptedFleet())) as client:
        body = (await client.get("/v1/models")).json()
        schema.ModelList.model_validate(body)
        assert [model["id"] for model in body["data"]] == [MODEL, "org/other"]
        assert body["data"][0]["max_model_len"] == MAX_MODEL_LEN
        assert (await client.get("/v1/models/org/other")).json()["id"] == "org/other"
        assert (await client.get("/version")).json() == {"version": baton.__version__}


# --- operations ---


async def _get(fleet: ScriptedFleet, path: str) -> httpx.Response:
    door, _ = scripted_door()
    async with client_of(create_app(door, fleet)) as client:
        return await client.get(path)


async def test_health_shows_workers_pairs_transport_and_index() -> None:
    response = await _get(ScriptedFleet(), "/health")
    assert response.status_code == 200
    body = response.json()
    assert body["status"] == "ok"
    assert body["transport"] == "tcp"
    assert body["index"] == {"kind": "memory", "healthy": True, "detail": ""}
    pair = {"prefill": "prefill-0", "decode": "decode-0", "transport": "tcp", "bytes_per_s": 1e9}
    pair["troubles"] = {}
    assert body["pairs"] == [pair]
    assert [w["id"] for w in body["workers"]] == ["prefill-0", "decode-0"]
    assert (
        body["workers"][1] | {"roles": ["decode"], "ready": True, "num_free_blocks": 60} == body["workers"][1]
    )


PREFILL, DECODE = worker("p", Role.PREFILL), worker("d", Role.DECODE)
NO_PREFILL = "no prefill worker is ready: prompts are computed on decode workers"


@pytest.mark.parametrize(
    ("fleet", "status", "state", "reason"),
    [
        (ScriptedFleet(), 200, "ok", None),
        (ScriptedFleet([worker("b", Role.PREFILL, Role.DECODE)]), 200, "ok", None),
        (ScriptedFleet([]), 503, "unavailable", "no decode worker is ready"),
        (ScriptedFleet([PREFILL]), 503, "unavailable", "no decode worker is ready"),
        (ScriptedFleet([PREFILL, DECODE], lost={"d"}), 503, "unavailable", "no decode worker is ready"),
        (ScriptedFleet([DECODE]), 200, "degraded", NO_PREFILL),
        (ScriptedFleet([worker("p", Role.PREFILL, draining=True), DECODE]), 200, "degraded", NO_PREFILL),
        (
            ScriptedFleet([worker("p", Role.PREFILL, fingerprint="g"), DECODE]),
            200,
            "degraded",
            "no prefill worker fits",
        ),
        (
            ScriptedFleet(index=IndexHealth("redis", False, "connection refused")),
            200,
            "degraded",
            "the prefix index (redis) does not answer: connection refused",
        ),
    ],
)
async def test_ready_says_why_not(fleet: ScriptedFleet, status: int, state: str, reason: str | None) -> None:
    response = await _get(fleet, "/ready")
    assert response.status_code == status
    body = response.json()
    assert body["status"] == state
    assert body["ready"] == (status == 200)
    assert [r.startswith(reason or "?") for r in body["reasons"]] == ([True] if reason else [])
    health = await _get(fleet, "/health")
    assert health.status_code == 200
    assert health.json()["status"] == state


async def test_how_a_request_was_served() -> None:
    door, generator = scripted_door("ok", STOP)
    async with client_of(create_app(door, ScriptedFleet())) as client:
        answer = (await client.post(PATHS["chat"], json=CHAT)).json()
        request_id = answer["id"].removeprefix("chatcmpl-")
        record = generator.records[request_id]
        record.arrival_s, record.first_token_s, record.finished_s = 1.0, 1.5, 2.5
        record.num_output_tokens = 3
        for name in (request_id, answer["id"]):
            body = (await client.get(f"/debug/requests/{name}")).json()
            assert body["request_id"] == request_id
            assert body["ttft_s"] == 0.5
            assert body["mean_itl_s"] == 0.5


async def test_metrics_count_requests_and_tokens() -> None:
    door, _ = scripted_door("abc", STOP)
    async with client_of(create_app(door, ScriptedFleet())) as client:
        await client.post(PATHS["chat"], json=CHAT)
        await client.post(PATHS["completion"], json=COMPLETION | {"stream": True})
        await client.post(PATHS["chat"], json=CHAT | {"best_of": 2})
        await client.get("/nothing/at/all")
        await client.get("/v1/models/org/other")
        response = await client.get("/metrics")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    counted = {key[1:]: value for key, value in samples.items() if key[0] == "baton_router_requests_total"}
    assert counted == {
        ("/v1/chat/completions", "200"): 1.0,
        ("/v1/chat/completions", "400"): 1.0,
        ("/v1/completions", "200"): 1.0,
        ("/v1/models/{name:path}", "200"): 1.0,
        ("404", "unknown"): 1.0,
    }
    assert samples["baton_router_generation_tokens_total",] == 6
    assert samples["baton_router_prompt_tokens_total",] == len("user: hi\nassistant: ") + 3
    assert samples["baton_router_num_requests_running",] == 0
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        assert samples[f"baton_router_{name}_seconds_count",] == 2
    assert samples["baton_router_workers", "decode", "ready"] == 1
    assert samples["baton_router_transport_info", "tcp"] == 1


async def test_the_documentation_shows_the_requests() -> None:
    door, _ = scripted_door()
    async with client_of(create_app(door, ScriptedFleet())) as client:
        document = (await client.get("/openapi.json")).json()
    body = document["paths"][PATHS["chat"]]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages", "stop", "n"} <= set(body["properties"])
    assert "$ref" not in json.dumps(body)
    assert set(document["paths"]) >= {*PATHS.values(), "/v1/models", "/health", "/ready", "/metrics"}


# --- with OpenAI's own client ---


@asynccontextmanager
async def openai_client(
    *script: Step,
) -> AsyncIterator[tuple[openai.AsyncOpenAI, ScriptedGenerator, HttpServer]]:
    door, generator = scripted_door(*script)
    async with await serve_http(create_app(door, ScriptedFleet()), "127.0.0.1", 0) as server:
        base_url = f"http://{server.address}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
            yield client, generator, server


HELLO: Any = [{"role": "user", "content": "hi"}]


async def test_openai_client_in_one_piece() -> None:
    async with openai_client("hel", "lo", STOP) as (client, _, _):
        chat = await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
        assert chat.choices[0].message.content == "hello"
        assert chat.choices[0].finish_reason == "stop"
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 5
        completion = await client.completions.create(model=MODEL, prompt="x", max_tokens=5)
        assert completion.choices[0].text == "hello"
        assert [model.id async for model in client.models.list()] == [MODEL, "org/other"]
        again = await client.chat.completions.create(
            model=MODEL, messages=[*HELLO, chat.choices[0].message.model_dump(), *HELLO]
        )
        assert again.choices[0].message.content == "hello"


async def test_openai_client_streams() -> None:
    async with openai_client("hel", b"l\xc3", b"\xb6", LENGTH) as (client, _, _):
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        ]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hellö"
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 6
        assert not chunks[-1].choices
        texts = [
            chunk.choices[0].text
            async for chunk in await client.completions.create(model=MODEL, prompt="x", stream=True)
        ]
        assert "".join(texts) == "hellö"


async def test_openai_client_raises_its_own_errors() -> None:
    async with openai_client(Overloaded("full", retry_after_s=1)) as (client, _, _):
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model=MODEL, messages=HELLO)
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="nothing", messages=HELLO)
        with pytest.raises(openai.BadRequestError, match="temperature") as caught:
            await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=9)
        assert caught.value.param == "temperature"


async def test_openai_client_hears_of_an_error_in_a_stream() -> None:
    async with openai_client("half", WorkerLost("worker decode-0 was lost")) as (client, _, _):
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        texts = []
        with pytest.raises(openai.APIError, match="decode-0 was lost"):
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content)
        assert "".join(text or "" for text in texts) == "half"


# --- clients that go away, servers that stop ---


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("has_begun", [False, True])
async def test_a_client_that_goes_away_cancels_its_request(stream: bool, has_begun: bool) -> None:
    forever = asyncio.Event()
    script: list[Step] = ["begun", forever] if has_begun else [forever]
    async with openai_client(*script) as (_, generator, server):
        reader, writer = await asyncio.open_connection(server.host, server.port)
        body = orjson.dumps({**CHAT, "stream": stream})
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        if stream and has_begun:
            await reader.readuntil(b"begun")
        while not generator.requests:
            await asyncio.sleep(0.001)
        assert not generator.ended
        writer.close()
        await writer.wait_closed()
        await generator.wait_until_ended(1)
        async with httpx.AsyncClient(base_url=f"http://{server.address}") as client:
            metrics = (await client.get("/metrics")).text
        assert 'baton_router_requests_total{endpoint="/v1/chat/completions",status="499"} 1.0' in metrics
        assert "baton_router_num_requests_running 0.0" in metrics


async def test_a_server_that_stops_lets_requests_end_within_its_grace() -> None:
    go = asyncio.Event()
    door, generator = scripted_door("ok", go, STOP)
    server = await serve_http(create_app(door, ScriptedFleet()), "127.0.0.1", 0)
    async with httpx.AsyncClient(timeout=30) as client:
        asking = asyncio.ensure_future(client.post(f"http://{server.address}{PATHS['chat']}", json=CHAT))
        while not generator.requests:
            await asyncio.sleep(0.001)
        closing = asyncio.ensure_future(server.aclose(30.0))
        await asyncio.sleep(0.05)
        go.set()
        assert (await asking).status_code == 200
        await closing
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://{server.address}/health")


async def test_a_server_that_stops_tells_the_clients_it_leaves(caplog: pytest.LogCaptureFixture) -> None:
    door, generator = scripted_door("half", asyncio.Event())
    server = await serve_http(create_app(door, ScriptedFleet()), "127.0.0.1", 0)
    caplog.set_level(logging.WARNING)
    async with httpx.AsyncClient(timeout=30) as client:
        url = f"http://{server.address}{PATHS['chat']}"
        async with client.stream("POST", url, json=CHAT | {"stream": True}) as response:
            lines = response.aiter_lines()
            assert "assistant" in await anext(lines)
            closing = asyncio.ensure_future(server.aclose(0.0))
            rest = [line async for line in lines if line]
        await closing
    assert "cancelled" in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert len(generator.ended) == 1
    assert not caplog.records


async def test_who_is_refused_for_want_of_workers_is_counted() -> None:
    door, _ = scripted_door(Unavailable("no decode worker is ready"))
    async with client_of(create_app(door, ScriptedFleet([]))) as client:
        for path, status in (("/ready", 503), ("/health", 200), ("/metrics", 200)):
            assert (await client.get(path)).status_code == status
        assert (await client.post(PATHS["chat"], json=CHAT)).status_code == 503
        assert "baton_router_unserved_requests_total 1.0" in (await client.get("/metrics")).text


async def test_a_port_in_use_is_one_clear_line() -> None:
    door, _ = scripted_door()
    app = create_app(door, ScriptedFleet())
    async with await serve_http(app, "127.0.0.1", 0) as server:
        with pytest.raises(ConfigError, match=rf"cannot serve HTTP on 127.0.0.1:{server.port}: .*in use"):
            await serve_http(app, "127.0.0.1", server.port)
    with pytest.raises(ConfigError, match=r"cannot serve HTTP on no\.such\.host\.invalid"):
        await serve_http(app, "no.such.host.invalid", 0)


async def test_many_at_once_get_their_own_answers() -> None:
    rng = random.Random(0)
    door, generator = scripted_door()
    generator.script = lambda request: [bytes(request.prompt_token_ids[1:]), STOP]
    texts = ["".join(rng.choices("abcdefghij", k=10)) for _ in range(50)]
    app = create_app(door, ScriptedFleet())
    async with await serve_http(app, "127.0.0.1", 0) as server, httpx.AsyncClient(timeout=30) as client:
        url = f"http://{server.address}{PATHS['completion']}"
        responses = await asyncio.gather(
            *(client.post(url, json={"model": MODEL, "prompt": text}) for text in texts)
        )
    assert [response.json()["choices"][0]["text"] for response in responses] == texts


async def test_the_block_ledgers_of_all_workers_and_of_those_that_do_not_answer() -> None:
    door, _ = scripted_door()
    async with client_of(create_app(door, ScriptedFleet())) as client:
        workers = (await client.get("/debug/blocks")).json()["workers"]
        assert workers["decode-0"]["holders"][0]["purpose"] == "running"
        assert workers["prefill-0"] == {"error": "gone"}


@pytest.mark.parametrize("log_prompts", [False, True])
async def test_prompts_are_logged_only_where_that_is_wanted(
    caplog: pytest.LogCaptureFixture, log_prompts: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    door, _ = scripted_door("ok", STOP, log_prompts=log_prompts)
    async with client_of(create_app(door, ScriptedFleet())) as client:
        answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "zanzibar"})
    assert answer.status_code == 200
    logged = [record.fields for record in caplog.records if record.message == "request ended"]
    assert [fields.get("prompt") for fields in logged] == ["zanzibar" if log_prompts else None]
    if not log_prompts:
        assert not any("zanzibar" in str(vars(record)) for record in caplog.records)
