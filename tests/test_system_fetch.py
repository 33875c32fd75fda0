"""Real processes: what a chat's next prompt has in common with a decode worker's blocks is fetched from there, and the
tokens are those of a worker that computed everything."""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from stack import Stack, running_stack, until

from baton.clock import SystemClock
from baton.config import RouterConfig
from baton.messages import FetchOutcome, PrefixSource, Role, WorkerRecord
from baton.request import Request, RequestId, SamplingParams
from baton.rpc import GrpcRpc
from baton_router.fleet import Fleet
from baton_router.mirror import PrefixMirror
from baton_router.pipeline import Pipeline
from baton_router.placement import Placement

NUM_PROMPT, NUM_ANSWER = 400, 600  # an answer that takes far longer to compute than to fetch
NUM_FIRST = (NUM_PROMPT + NUM_ANSWER - 1) // 16 * 16  # in whole blocks, when it has been answered
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


@contextlib.asynccontextmanager
async def router_here(stack: Stack, num_pairs: int) -> AsyncIterator["RouterHere"]:
    """A second router, in this process: where its requests go is said by the test."""
    clock = SystemClock()
    addresses = tuple(address for name, address in stack.addresses.items() if name != "router")
    config = RouterConfig(workers=addresses)
    fleet = Fleet(config, GrpcRpc(clock), PrefixMirror(clock), None, clock, ignore)
    router = RouterHere(fleet, Pipeline(config, fleet, clock, random.Random(0), ignore))
    running = asyncio.create_task(fleet.run(router.pipeline.trial))
    try:
        await until(router.num_pairs, num_pairs, "proven pairs")
        yield router
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def ignore(kind: str, /, **fields: object) -> None:
    pass


@dataclass
class RouterHere:
    fleet: Fleet
    pipeline: Pipeline

    async def num_pairs(self) -> int:
        return len(self.fleet.pairs())

    def workers(self, role: Role) -> list[WorkerRecord]:
        return [link.record for link in self.fleet.ready() if role in link.record.roles]

    async def ask(
        self,
        name: str,
        prompt: list[int],
        num_tokens: int,
        decode: WorkerRecord,
        source: PrefixSource | None = None,
        **sampling: Any,
    ) -> list[int]:
        """What names have in common up to a blank may share blocks."""
        [prefill] = self.workers(Role.PREFILL)
        placed = Placement(prefill.worker_id, decode.worker_id, 0.0, 1, source)
        self.pipeline._choice._place = lambda chains: placed  # type: ignore[method-assign]
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, **sampling)
        request = Request(RequestId(name), tuple(prompt), params, cache_salt=name.partition(" ")[0])
        parts = [part async for parts in self.pipeline.generate(request, timeout_s=30) for part in parts]
        return [token for part in parts for token in part.token_ids]


def source_of(owner: WorkerRecord, timeout_s: float = 20.0) -> PrefixSource:
    """Of a first turn."""
    return PrefixSource(owner.worker_id, owner.address, NUM_FIRST, timeout_s)


async def measure_the_way_from_decode(stack: Stack) -> None:
    """Until it has sent something, an owner's rate is a guess, and whether it is asked as well."""
    async with router_here(stack, num_pairs=1) as router:
        [owner] = router.workers(Role.DECODE)
        prompt = random_tokens("measure", NUM_PROMPT)
        answer = await router.ask("measure", prompt, NUM_ANSWER, owner)
        await router.ask("measure again", [*prompt, *answer, 7, 8], 1, owner, source_of(owner))
    assert (await stack.status("decode-0")).record.load.transfer_bytes_per_s > 0


@pytest.mark.parametrize("transport", ["tcp", "shm"])
async def test_the_second_turn_of_a_chat_is_fetched_and_right(transport: str) -> None:
    async with running_stack(transport=transport) as stack:
        await measure_the_way_from_decode(stack)
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


# --- an owner that goes while it is asked ---


async def outcomes(stack: Stack) -> dict[str, float]:
    names = FetchOutcome.OK, FetchOutcome.LATE, FetchOutcome.FAILED
    lines = {name: f'baton_prefix_fetch_seconds_count{{outcome="{name}"}}' for name in names}
    return {name.value: await stack.metric("prefill-0", line) for name, line in lines.items()}


async def test_an_owner_that_hangs_or_is_killed_while_it_is_asked_costs_no_token_and_is_counted() -> None:
    """The owner decodes nothing meanwhile: every answer comes, and is right. What was not fetched was computed."""
    async with (
        running_stack(index="memory", num_decode=2) as stack,
        router_here(stack, num_pairs=2) as router,
    ):
        owner, decode = router.workers(Role.DECODE)
        prompts, expected = {}, {}
        for name in ("ok", "scored", "hangs", "killed", "gone"):
            prompt = random_tokens(name, NUM_PROMPT)
            prompts[name] = [*prompt, *await router.ask(name, prompt, NUM_ANSWER, owner), 7, 8, 9]
            expected[name] = await router.ask(f"nobody-{name}", prompts[name], 20, decode)

        async def fetched(name: str, timeout_s: float = 20.0, **sampling: Any) -> tuple[list[int], int]:
            """The answer, and how much of its prompt the prefill worker had or was given."""
            source, again = source_of(owner, timeout_s), f"{name} again"
            tokens = await router.ask(again, prompts[name], 20, decode, source, **sampling)
            record = router.pipeline.record(again)
            assert record is not None
            return tokens, record.num_cached_tokens_prefill

        assert await fetched("ok") == (expected["ok"], NUM_FIRST)
        assert await outcomes(stack) == {"ok": 1, "late": 0, "failed": 0}
        # Whatever a router asks for: what the model says of a prompt is known of computed tokens only.
        assert await fetched("scored", prompt_logprobs=1) == (expected["scored"], 0)
        assert await outcomes(stack) == {"ok": 1, "late": 0, "failed": 0}
        # A ticket for such a prompt counts nothing, which does not mean that the worker holds nothing.
        await asyncio.sleep(INDEXED_S)
        await router.ask("scored twice", prompts["scored"], 1, decode, prompt_logprobs=1)
        assert router.fleet.mirror.num_stale_claims == 0

        held = NUM_PROMPT // 16 * 16  # what the prefill worker computed itself for the first turn
        await stack.signal("decode-0", signal.SIGSTOP)
        assert await fetched("hangs", timeout_s=0.3) == (expected["hangs"], held)
        assert await outcomes(stack) == {"ok": 1, "late": 1, "failed": 0}

        asked = asyncio.create_task(fetched("killed"))
        await asyncio.sleep(0.3)
        assert not asked.done()
        await stack.kill("decode-0")
        assert await asked == (expected["killed"], held)
        assert await outcomes(stack) == {"ok": 1, "late": 1, "failed": 1}

        assert await fetched("gone") == (expected["gone"], held)
        assert await outcomes(stack) == {"ok": 1, "late": 1, "failed": 2}
        await stack.until_nothing_is_used("prefill-0", "decode-1")
