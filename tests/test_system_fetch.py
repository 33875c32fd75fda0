"""Real processes: what a chat's next prompt has in common with a decode worker's blocks is fetched from there, and the
tokens are those of a worker that computed everything."""

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from stack import Stack, running_stack

NUM_PROMPT, NUM_ANSWER = 400, 600  # an answer that takes far longer to compute than to fetch
INDEXED_S = 1.5  # until the router has heard of the blocks


@dataclass
class Answer:
    tokens: list[int]
    record: dict[str, Any]


async def ask(stack: Stack, prompt: list[int], num_tokens: int, **fields: Any) -> Answer:
    """Raises httpx.HTTPStatusError."""
    body = {
        "model": "test", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, **fields,
    }  # fmt: skip
    async with httpx.AsyncClient(base_url=stack.base_url, timeout=60) as client:
        answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
        record = (await client.get(f"/debug/requests/{answer['id']}")).raise_for_status().json()
    return Answer(answer["choices"][0]["token_ids"], record)


def random_tokens(name: str, number: int) -> list[int]:
    rng = random.Random(name)
    return [rng.randrange(10, 500) for _ in range(number)]


async def first_turn(stack: Stack, name: str) -> tuple[list[int], str]:
    """The conversation so far with a question that follows, and the decode worker that holds it."""
    prompt = random_tokens(name, NUM_PROMPT)
    answer = await ask(stack, prompt, NUM_ANSWER)
    assert len(answer.tokens) == NUM_ANSWER
    return [*prompt, *answer.tokens, *random_tokens(f"{name}?", 30)], answer.record["decode_worker"]


async def computed(stack: Stack, prompt: list[int]) -> list[int]:
    """The answer to the same prompt of a tenant whose blocks nobody holds."""
    answer = await ask(stack, prompt, 20, cache_salt="somebody else")
    assert answer.record["fetched_from"] is None
    assert answer.record["num_cached_tokens_prefill"] == answer.record["num_cached_tokens_decode"] == 0
    return answer.tokens


@pytest.mark.parametrize("transport", ["tcp", "shm"])
async def test_the_second_turn_of_a_chat_is_fetched_and_right(transport: str) -> None:
    async with running_stack(transport=transport) as stack:
        second, _ = await first_turn(stack, transport)
        await asyncio.sleep(INDEXED_S)
        # What the model says of a prompt is known of computed tokens only.
        scored = await ask(stack, second, 1, prompt_logprobs=1)
        assert scored.record["fetched_from"] is None
        other, owner = await first_turn(stack, f"{transport}, again")
        await asyncio.sleep(INDEXED_S)
        fetched = await ask(stack, other, 20)
        assert fetched.record["fetched_from"] == owner
        assert owner.startswith("decode")
        assert NUM_ANSWER - 32 < fetched.record["num_fetched_tokens"] <= NUM_ANSWER
        assert "prefix.fetched" in stack.log()
        assert fetched.tokens == await computed(stack, other)
        await stack.until_nothing_is_used("prefill-0", "decode-0")


async def test_an_owner_that_is_killed_while_prefixes_are_fetched_costs_no_wrong_token() -> None:
    async with running_stack(num_decode=2) as stack:
        chats = await asyncio.gather(*(first_turn(stack, f"chat {number}") for number in range(8)))
        await asyncio.sleep(INDEXED_S)
        expected = [await computed(stack, prompt) for prompt, _ in chats]
        victim = next(n for n, child in stack.children.items() if chats[0][1].endswith(f"-{child.pid}"))
        asked = [asyncio.create_task(ask(stack, prompt, 20)) for prompt, _ in chats]
        await asyncio.sleep(0.02)
        await stack.kill(victim)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer, tokens in zip(answers, expected, strict=True):
            if isinstance(answer, httpx.HTTPStatusError):  # the owner was to decode it, too
                assert answer.response.json()["error"]["code"] == "worker_lost"
            else:
                assert isinstance(answer, Answer)
                assert answer.tokens == tokens
        [survivor] = {"decode-0", "decode-1"} - {victim}
        await stack.until_nothing_is_used("prefill-0", survivor)
        again = [await ask(stack, prompt, 20) for prompt, _ in chats]
        assert [answer.tokens for answer in again] == expected
