"""Real processes that die, hang and come back: the client hears of it, nobody leaks, and it goes on."""

import asyncio
import json
import random
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from stack import Stack, running_stack, until

from baton.config import EngineConfig
from baton.demo_task import recall_prompt
from baton.transfer.choose import available

CLEAR_S = 2.0  # the client has heard by then


async def ask(stack: Stack, num_pairs: int = 20, seed: int = 0) -> bool:
    """One recall question; True when the answer is right. Raises what went wrong."""
    text, expected = recall_prompt(random.Random(seed), num_pairs)
    body = {
        "model": "test",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 16,
    }
    async with httpx.AsyncClient(base_url=stack.base_url, timeout=30) as client:
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"].strip() == expected


async def stream_events(stack: Stack, prompt: list[int], max_tokens: int) -> AsyncIterator[dict[str, Any]]:
    body = {
        "model": "test", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "return_token_ids": True,
    }  # fmt: skip
    async with (
        httpx.AsyncClient(base_url=stack.base_url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        if response.status_code != 200:
            await response.aread()
            yield json.loads(response.text)
            return
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[6:])


async def collect(
    stack: Stack, num_prompt: int, max_tokens: int, started: asyncio.Event
) -> tuple[list[dict[str, Any]], float]:
    rng = random.Random(num_prompt)
    prompt = [rng.randrange(5, 500) for _ in range(num_prompt)]
    events = []
    async for event in stream_events(stack, prompt, max_tokens):
        events.append(event)
        if "choices" in event:
            started.set()
    return events, time.monotonic()


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with running_stack() as stack:
        assert await ask(stack)
        yield stack


async def test_decode_worker_killed_mid_stream(stack: Stack) -> None:
    started = asyncio.Event()
    client = asyncio.create_task(collect(stack, 300, 3000, started))
    await asyncio.wait_for(started.wait(), 30)
    killed_s = time.monotonic()
    await stack.kill("decode-0")
    events, heard_s = await client
    assert heard_s - killed_s < CLEAR_S
    error = events[-1]["error"]
    assert error["code"] == "worker_lost"
    assert "decode" in error["message"]
    await stack.until_nothing_is_used("prefill-0")
    await stack.start("decode-0")
    await stack.until_ready(2)
    assert await ask(stack)
    await stack.until_nothing_is_used("prefill-0", "decode-0")


def is_whole(events: list[dict[str, Any]]) -> bool:
    """The answer went on to its end."""
    reasons = [choice["finish_reason"] for event in events for choice in event.get("choices", ())]
    return "length" in reasons and not any("error" in event for event in events)


async def test_prefill_worker_killed_in_prefill_and_the_decode_worker_computes_the_prompt(
    stack: Stack,
) -> None:
    await stack.signal("prefill-0", signal.SIGSTOP)  # it accepts the call and never computes
    client = asyncio.create_task(collect(stack, 2000, 10, asyncio.Event()))
    await until(lambda: _num_used(stack, "decode-0"), True, "blocks reserved on decode-0")
    await stack.kill("prefill-0")
    events, _ = await client
    assert is_whole(events)
    await stack.until_nothing_is_used("decode-0")
    await stack.start("prefill-0")
    await stack.until_ready(2)
    assert await ask(stack)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("transport", available())
async def test_a_worker_killed_while_kv_is_on_the_wire(transport: str, victim: str) -> None:
    """Many long prompts in chunks: pieces of some are under way at any moment."""
    survivor = "decode-0" if victim == "prefill-0" else "prefill-0"
    engine = EngineConfig(max_num_batched_tokens=64)
    async with running_stack(transport=transport, engine=engine) as stack:
        clients = [
            asyncio.create_task(collect(stack, 1500 + number, 200, asyncio.Event())) for number in range(8)
        ]
        await until(lambda: _num_used(stack, "decode-0"), True, "blocks reserved on decode-0")
        await asyncio.sleep(0.5)
        killed_s = time.monotonic()
        await stack.kill(victim)
        outcomes = await asyncio.gather(*clients)
        errors = [events[-1]["error"] for events, _ in outcomes if "error" in events[-1]]
        if victim == "prefill-0":  # what it did not send is computed by the decode worker
            assert all(is_whole(events) for events, _ in outcomes)
        else:
            assert errors, "it was killed too late to matter"
        assert {error["code"] for error in errors} <= {"worker_lost", "unavailable", "transfer_failed"}
        assert all(heard_s - killed_s < CLEAR_S for events, heard_s in outcomes if "error" in events[-1])
        await stack.until_nothing_is_used(survivor)
        await stack.start(victim)
        await stack.until_ready(2)
        assert await ask(stack)
        await stack.until_nothing_is_used("prefill-0", "decode-0")


async def test_a_prefill_worker_that_hangs_while_kv_is_on_the_wire(stack: Stack) -> None:
    """Its connections stay open. The decode worker computes what did not come, and keeps nothing for it."""
    clients = [asyncio.create_task(collect(stack, 1500 + n, 20, asyncio.Event())) for n in range(12)]
    await until(lambda: _num_used(stack, "decode-0"), True, "blocks reserved on decode-0")
    await asyncio.sleep(0.1)
    await stack.signal("prefill-0", signal.SIGSTOP)
    outcomes = await asyncio.gather(*clients)
    assert all(is_whole(events) for events, _ in outcomes)
    assert "handover.repaired" in stack.log(), "it was stopped too late to matter"
    await stack.until_nothing_is_used("decode-0")
    await stack.signal("prefill-0", signal.SIGCONT)
    await stack.until_nothing_is_used("prefill-0")
    await stack.until_ready(2)
    assert await ask(stack)


async def test_a_decode_worker_that_hangs_while_kv_is_on_the_wire(stack: Stack) -> None:
    """Its clients hear of it, the prefill worker has its blocks back, and once it goes on it gives up its own."""
    clients = [asyncio.create_task(collect(stack, 1500 + n, 200, asyncio.Event())) for n in range(6)]
    await until(lambda: _num_used(stack, "decode-0"), True, "blocks reserved on decode-0")
    await stack.signal("decode-0", signal.SIGSTOP)
    outcomes = await asyncio.gather(*clients)
    codes = {events[-1]["error"]["code"] for events, _ in outcomes}
    assert codes <= {"worker_lost", "unavailable"}
    await stack.until_nothing_is_used("prefill-0")
    await stack.signal("decode-0", signal.SIGCONT)
    await stack.until_nothing_is_used("decode-0")
    await stack.until_ready(2)
    assert await ask(stack)


async def _num_used(stack: Stack, name: str) -> bool:
    return (await stack.status(name)).num_used_blocks > 0


async def test_a_client_that_leaves_while_tokens_stream_cancels_on_both_workers(stack: Stack) -> None:
    started = asyncio.Event()
    client = asyncio.create_task(collect(stack, 200, 3000, started))
    await asyncio.wait_for(started.wait(), 30)
    assert await _num_used(stack, "decode-0")
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)
    await stack.until_nothing_is_used("prefill-0", "decode-0")
    assert await ask(stack)


async def test_a_client_that_leaves_during_prefill_cancels_on_both_workers(stack: Stack) -> None:
    await stack.signal("prefill-0", signal.SIGSTOP)  # so that it leaves before the first token for sure
    client = asyncio.create_task(collect(stack, 2000, 1000, asyncio.Event()))
    await until(lambda: _num_used(stack, "decode-0"), True, "blocks reserved on decode-0")
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)
    await stack.until_nothing_is_used("decode-0")
    await stack.signal("prefill-0", signal.SIGCONT)
    await stack.until_nothing_is_used("prefill-0")
    await stack.until_ready(2)
    assert await ask(stack)


async def test_redis_stops_and_comes_back(stack: Stack) -> None:
    assert stack.redis is not None
    stack.redis.kill()
    for seed in range(5):
        assert await ask(stack, seed=seed)
    stack.redis.start()
    async with httpx.AsyncClient(base_url=stack.base_url) as client:

        async def index_is_back() -> bool:
            return (await client.get("/health")).json()["index"]["healthy"]

        await until(index_is_back, True, "the index is healthy")
    assert await ask(stack, seed=9)
    await stack.until_nothing_is_used("prefill-0", "decode-0")
