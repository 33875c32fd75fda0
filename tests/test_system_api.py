"""A real fleet as its users meet it: the OpenAI client over HTTP, generated stubs over gRPC, curl for the rest."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import httpx
import openai
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stack import Stack, running_stack

from baton.demo_task import recall_prompt, repeat_prompt
from baton.v1 import decode_pb2, decode_pb2_grpc, request_pb2, router_pb2, router_pb2_grpc

DEADLINE_S = 20.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """Two of each, and no Redis: the router watches its workers."""
    async with running_stack(num_prefill=2, num_decode=2, index="memory") as stack:
        yield stack


def openai_client(stack: Stack) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{stack.base_url}/v1", api_key="none", max_retries=0)


async def test_chat_with_the_openai_client(stack: Stack) -> None:
    async with openai_client(stack) as client:
        assert [model.id async for model in client.models.list()] == ["test"]
        for seed in range(8):
            text, expected = recall_prompt(random.Random(seed), 40)
            answer = await client.chat.completions.create(
                model="test", messages=[{"role": "user", "content": text}], temperature=0
            )
            assert answer.choices[0].message.content == expected
            assert answer.choices[0].finish_reason == "stop"
            assert answer.usage is not None and answer.usage.prompt_tokens > 80


async def test_streaming_and_a_conversation_that_finds_its_prefix(stack: Stack) -> None:
    text, expected = recall_prompt(random.Random(3), 40)
    async with openai_client(stack) as client:
        messages = [{"role": "user", "content": text}]
        for turn in range(2):
            parts, usage = [], None
            stream = await client.chat.completions.create(
                model="test",
                messages=messages,  # type: ignore[arg-type]
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                usage = chunk.usage or usage
                parts += [choice.delta.content or "" for choice in chunk.choices]
            assert "".join(parts) == expected
            assert usage is not None and usage.prompt_tokens_details is not None
            if turn:
                assert (usage.prompt_tokens_details.cached_tokens or 0) > 0


async def test_completions_with_token_ids_both_ways(stack: Stack) -> None:
    async with openai_client(stack) as client:
        answer = await client.completions.create(
            model="test", prompt=[5, 6, 7, 8], max_tokens=5, temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        assert len(answer.choices[0].token_ids) == 5  # type: ignore[attr-defined]
        assert answer.choices[0].finish_reason == "length"


async def test_a_seed_repeats_and_another_differs(stack: Stack) -> None:
    async with openai_client(stack) as client:

        async def sample(seed: int) -> str:
            answer = await client.completions.create(
                model="test", prompt=[5, 6, 7], max_tokens=24, temperature=2, seed=seed,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            return answer.choices[0].text

        first = [await sample(seed) for seed in range(6)]
        assert first == [await sample(seed) for seed in range(6)]
        assert len(set(first)) > 1


async def test_errors_name_what_is_wrong(stack: Stack) -> None:
    async with openai_client(stack) as client:
        with pytest.raises(openai.NotFoundError, match="served: test"):
            await client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            await client.completions.create(model="test", prompt=[5] * 5000)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.completions.create(model="test", prompt=[5], temperature=-1)
        with pytest.raises(openai.BadRequestError, match="colour"):
            await client.completions.create(model="test", prompt=[5], extra_body={"colour": "red"})


async def test_health_metrics_and_the_record_of_a_request(stack: Stack) -> None:
    text, _ = repeat_prompt(random.Random(0), 30)
    async with httpx.AsyncClient(base_url=stack.base_url, timeout=DEADLINE_S) as client:
        body = {"model": "test", "messages": [{"role": "user", "content": text}], "cache_salt": "alone"}
        answer = await client.post("/v1/chat/completions", json=body)
        record = (await client.get(f"/debug/requests/{answer.headers['x-request-id']}")).json()
        assert record["prefill_worker"].startswith("prefill-")
        assert record["decode_worker"].startswith("decode-")
        assert record["transport"] == "tcp"
        assert record["num_blocks_transferred"] == -(-record["num_prompt_tokens"] // 16)
        assert record["ttft_s"] > 0 and record["mean_itl_s"] > 0
        health = (await client.get("/health")).json()
        assert (health["status"], health["transport"], health["index"]["kind"]) == ("ok", "tcp", "memory")
        assert len(health["pairs"]) == 4
        assert (await client.get("/ready")).status_code == 200
        ledgers = (await client.get("/debug/blocks")).json()["workers"]
        assert set(ledgers) == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
        for ledger in ledgers.values():
            assert ledger["num_used"] + ledger["num_free"] == ledger["num_blocks"]
        metrics = (await client.get("/metrics")).text
        assert 'baton_router_transport_info{transport="tcp"} 1.0' in metrics
        assert "baton_router_time_to_first_token_seconds_bucket" in metrics


async def test_what_is_asked_in_the_same_instant_is_shared_by_all_workers(stack: Stack) -> None:
    await stack.until_proven(num_pairs=4)
    async with httpx.AsyncClient(base_url=stack.base_url, timeout=DEADLINE_S) as client:

        async def placed(number: int) -> tuple[str, str]:
            prompt = [random.Random(number).randrange(10, 500) for _ in range(200)]
            body = {"model": "test", "prompt": prompt, "max_tokens": 60, "ignore_eos": True}
            answer = await client.post("/v1/completions", json=body)
            record = (await client.get(f"/debug/requests/{answer.headers['x-request-id']}")).json()
            return record["prefill_worker"], record["decode_worker"]

        for side in zip(*await asyncio.gather(*map(placed, range(12))), strict=True):
            share = Counter(side)
            assert len(share) == 2 and min(share.values()) >= 2, share  # by what they measured of themselves


async def test_generated_stubs_reach_router_and_worker(stack: Stack) -> None:
    text, expected = recall_prompt(random.Random(9), 20)
    async with grpc.aio.insecure_channel(stack.router_grpc) as channel:
        router = router_pb2_grpc.RouterStub(channel)
        call = router_pb2.RouterGenerateRequest(
            model="test", prompt=f"<bos><|user|>{text}<|assistant|>", deadline_s=DEADLINE_S,
            sampling=request_pb2.SamplingParams(max_tokens=8, temperature=0.0),
        )  # fmt: skip
        chunks = [r.chunk async for r in router.Generate(call, timeout=DEADLINE_S)]
        assert "".join(chunk.text for chunk in chunks).strip() == expected
        listed = await router.ListWorkers(router_pb2.ListWorkersRequest(), timeout=DEADLINE_S)
        assert len(listed.workers) == 4
        assert not (await router.Cancel(router_pb2.CancelRequest(request_id="nobody"), timeout=5)).found
    async with grpc.aio.insecure_channel(stack.addresses["decode-0"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        told = await health.Check(health_pb2.HealthCheckRequest(service="baton.v1.Decode"), timeout=5)
        assert told.status == health_pb2.HealthCheckResponse.SERVING
        request = request_pb2.Request(
            request_id="plain", prompt_token_ids=[5, 6, 7, 8],
            sampling=request_pb2.SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True),
        )  # fmt: skip
        generate = decode_pb2_grpc.DecodeStub(channel).Generate
        message = decode_pb2.DecodeGenerateRequest(request=request, deadline_s=DEADLINE_S)
        tokens = [t async for r in generate(message, timeout=DEADLINE_S) for t in r.chunk.token_ids]
        assert len(tokens) == 5
    await stack.until_nothing_is_used("decode-0", "decode-1", "prefill-0", "prefill-1")
