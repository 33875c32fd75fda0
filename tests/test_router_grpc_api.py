"""The Router service: the same requests as over HTTP, as messages; in process and over gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from router_parts import (
    EOS,
    LENGTH,
    MODEL,
    STOP,
    VOCAB_SIZE,
    ScriptedFleet,
    Step,
    logprobs_of,
    raises,
    scripted_door,
)

from baton.clock import SystemClock
from baton.errors import Cancelled, InvalidRequest, ModelNotFound, Overloaded, RequestTooLarge
from baton.messages import CancelCall, CancelResult, GenerateChunk, ListWorkersCall, RouterGenerateCall
from baton.request import Grammar, GrammarKind, RequestId, SamplingParams, TokenBias, TokenSequence
from baton.rpc import ROUTER_CANCEL, ROUTER_GENERATE, ROUTER_LIST_WORKERS, Channel, GrpcRpc
from baton_router.grpc_api import RouterService

CALL = RouterGenerateCall(MODEL, "hi", (), SamplingParams(max_tokens=8), deadline_s=30.0)


def _service(*script: Step) -> Any:
    door, generator = scripted_door(*script)
    return RouterService(door, ScriptedFleet()), generator, door


async def _chunks(service: RouterService, call: RouterGenerateCall) -> list[GenerateChunk]:
    return [chunk async for chunk in service.generate(call)]


async def test_chunks_carry_tokens_and_their_text() -> None:
    service, generator, _ = _service("h", b"\xc3", b"\xb6", (EOS,), STOP)
    assert await _chunks(service, CALL) == [
        GenerateChunk(0, (ord("h"),), None, "h"),
        GenerateChunk(1, (0xC3,), None, ""),
        GenerateChunk(2, (0xB6,), None, "ö"),
        GenerateChunk(3, (EOS,), None, ""),
        GenerateChunk(4, (), STOP, ""),
    ]
    [request] = generator.requests
    assert request.prompt_token_ids == (257, *b"hi")
    assert request.eos_token_ids == (EOS,)
    assert generator.timeouts_s == [30.0]


async def test_token_ids_go_as_they_are() -> None:
    service, generator, _ = _service("x", LENGTH)
    await _chunks(
        service,
        replace(CALL, prompt=None, prompt_token_ids=(1, 2), cache_salt="s", request_id="r", priority=7),
    )
    [request] = generator.requests
    assert (request.prompt_token_ids, request.cache_salt, request.request_id) == ((1, 2), "s", "r")
    assert request.priority == 7


async def test_a_stop_string_ends_the_stream() -> None:
    service, generator, _ = _service("abE", "NDx", asyncio.Event())
    chunks = await _chunks(service, replace(CALL, sampling=SamplingParams(max_tokens=8, stop=("END",))))
    assert "".join(chunk.text for chunk in chunks) == "ab"
    assert chunks[-1] == GenerateChunk(3, tuple(b"ND"), STOP, "")
    assert len(generator.ended) == 1


async def test_a_seed_is_kept_or_drawn() -> None:
    service, generator, _ = _service("x", STOP)
    for seed in (5, None, None, 0):
        await _chunks(service, replace(CALL, sampling=SamplingParams(seed=seed)))
    seeds = [request.sampling.seed for request in generator.requests]
    assert (seeds[0], seeds[3]) == (5, 0)
    assert len(set(seeds)) == 4


async def test_every_sampling_field_arrives_and_logprobs_come_back() -> None:
    service, generator, _ = _service("hi", STOP)
    sampling = SamplingParams(
        max_tokens=8,
        temperature=0.5,
        top_p=0.5,
        top_k=7,
        seed=2**64 - 1,
        stop=("x",),
        stop_token_ids=(3,),
        ignore_eos=True,
        min_p=0.5,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        logit_bias=(TokenBias(3, 1.5),),
        allowed_token_ids=(),
        bad_words=(),
        logprobs=3,
        grammar=Grammar(GrammarKind.REGEX, "a+"),
    )
    chunks = await _chunks(service, replace(CALL, sampling=sampling))
    assert generator.requests[0].sampling == sampling
    assert chunks[0].logprobs == tuple(map(logprobs_of, b"hi"))
    more = replace(
        sampling, grammar=None, allowed_token_ids=(5,), bad_words=(TokenSequence((1, 2)),), min_tokens=2
    )
    await _chunks(service, replace(CALL, sampling=more))
    assert generator.requests[1].sampling == more


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": "nothing"}, ModelNotFound, "model"),
        ({"prompt": None}, InvalidRequest, "prompt"),
        ({"prompt_token_ids": (1,)}, InvalidRequest, "prompt"),
        ({"prompt": None, "prompt_token_ids": (VOCAB_SIZE,)}, InvalidRequest, "prompt_token_ids"),
        ({"prompt": "x" * 200}, RequestTooLarge, "prompt"),
        ({"deadline_s": 0.0}, InvalidRequest, "deadline_s"),
        ({"deadline_s": float("nan")}, InvalidRequest, "deadline_s"),
        ({"deadline_s": float("inf")}, InvalidRequest, "deadline_s"),
        ({"request_id": "a b"}, InvalidRequest, "request_id"),
        ({"sampling": SamplingParams(temperature=-1)}, InvalidRequest, "temperature"),
        ({"sampling": SamplingParams(temperature=float("nan"))}, InvalidRequest, "temperature"),
        ({"sampling": SamplingParams(top_p=0)}, InvalidRequest, "top_p"),
        ({"sampling": SamplingParams(max_tokens=0)}, InvalidRequest, "max_tokens"),
        ({"sampling": SamplingParams(max_tokens=1000)}, RequestTooLarge, "prompt"),
        ({"sampling": SamplingParams(min_p=1.5)}, InvalidRequest, "min_p"),
        ({"sampling": SamplingParams(logprobs=21)}, InvalidRequest, "logprobs"),
        ({"sampling": SamplingParams(bad_words=(TokenSequence(()),))}, InvalidRequest, "bad_words"),
        (
            {"sampling": SamplingParams(logit_bias=(TokenBias(VOCAB_SIZE, 1.0),))},
            InvalidRequest,
            "logit_bias",
        ),
        ({"sampling": SamplingParams(stop=("",))}, InvalidRequest, "stop"),
        ({"sampling": SamplingParams(stop_token_ids=(VOCAB_SIZE,))}, InvalidRequest, "stop_token_ids"),
    ],
    ids=str,
)
async def test_refused_by_name(change: dict[str, Any], error: type[InvalidRequest], param: str) -> None:
    service, generator, _ = _service("x", STOP)
    with raises(error, param=param):
        await _chunks(service, replace(CALL, **change))
    assert not generator.requests


async def test_leaving_early_cancels_the_request() -> None:
    service, generator, door = _service("a", "b", asyncio.Event())
    stream = service.generate(CALL)
    assert (await anext(stream)).text == "a"
    await stream.aclose()
    assert len(generator.ended) == 1
    assert (
        door.metrics.registry.get_sample_value(
            "baton_router_requests_total", {"endpoint": "baton.v1.Router/Generate", "status": "499"}
        )
        == 1
    )


async def test_workers_are_listed() -> None:
    service, _, _ = _service()
    listed = await service.list_workers(ListWorkersCall())
    assert [worker.worker_id for worker in listed.workers] == ["prefill-0", "decode-0"]


@asynccontextmanager
async def over_grpc(service: RouterService) -> AsyncIterator[Channel]:
    rpc = GrpcRpc(SystemClock())
    server = await rpc.serve("127.0.0.1:0", service.handlers())
    server.set_serving(True)
    channel = rpc.connect(server.address)
    try:
        yield channel
    finally:
        await channel.aclose()
        await server.aclose(0.0)


async def test_generate_over_grpc() -> None:
    service, generator, _ = _service("hel", b"l\xc3", b"\xb6", STOP)
    async with over_grpc(service) as channel:
        stream = channel.server_stream(ROUTER_GENERATE, replace(CALL, request_id="mine"), timeout_s=30.0)
        chunks = [chunk async for chunk in stream]
        workers = await channel.unary(ROUTER_LIST_WORKERS, ListWorkersCall(), timeout_s=30.0)
    assert "".join(chunk.text for chunk in chunks) == "hellö"
    assert [i for chunk in chunks for i in chunk.token_ids] == [*"hellö".encode()]
    assert chunks[-1].finish_reason is STOP
    assert generator.requests[0].request_id == "mine"
    assert len(workers.workers) == 2


async def test_errors_over_grpc() -> None:
    service, _, _ = _service("half", Overloaded("full", retry_after_s=2.0))
    async with over_grpc(service) as channel:
        stream = channel.server_stream(ROUTER_GENERATE, CALL, timeout_s=30.0)
        assert (await anext(stream)).text == "half"
        with pytest.raises(Overloaded, match="full") as caught:
            await anext(stream)
        assert caught.value.retry_after_s == 2.0
        with raises(ModelNotFound, param="model"):
            await anext(channel.server_stream(ROUTER_GENERATE, replace(CALL, model="x"), timeout_s=30.0))


async def test_cancel_over_grpc() -> None:
    service, generator, _ = _service("half", asyncio.Event())
    async with over_grpc(service) as channel:
        stream = channel.server_stream(ROUTER_GENERATE, replace(CALL, request_id="mine"), timeout_s=30.0)
        await anext(stream)
        cancel = CancelCall(RequestId("mine"))
        assert await channel.unary(ROUTER_CANCEL, cancel, timeout_s=30.0) == CancelResult(True)
        with pytest.raises(Cancelled):
            await anext(stream)
        assert await channel.unary(ROUTER_CANCEL, cancel, timeout_s=30.0) == CancelResult(False)
    assert generator.ended == ["mine"]
