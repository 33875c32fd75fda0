"""What is sent to a server, and what came back: one client for all, `baton_loadtest`'s.

Everything is greedy and streamed, and every prompt is sent to a server once only, so that no prefix cache helps where
it is not the thing that is measured. Each function gives one sample: names with their units, plus `cpu_s` that all of
the server's processes used and `wall_s`.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count, pairwise
from string import ascii_lowercase
from typing import Any, NamedTuple

import uvloop

from baton.clock import Clock, SystemClock
from baton_loadtest.client import Endpoint, OpenAIClient, RequestOptions
from baton_loadtest.metrics import Distribution, distribution, measure
from baton_loadtest.record import RequestRecord
from baton_loadtest.workload import PlannedRequest
from engine_bench.servers import Server

VOCAB_SIZE, FIRST_WORD = 16_384, 962  # of make_bench_model.py: the ids from 962 on are words of three letters
TIMEOUT_S = 300.0
MAX_CONNECTIONS = 256

NUM_DECODERS = 8
DECODER_PROMPT, DECODER_OUTPUT = 64, (200, 600)
LONG_PROMPT, LONG_OUTPUT = 2048, 8
SETTLE_S = 4.0  # until all decoders are past their prompts

Sample = dict[str, float]


class Failed(Exception):
    """A request was not answered as it should be, so there is no sample."""


class Lengths(NamedTuple):
    """In tokens."""

    prompt: int
    output: int


def throughput(server: Server, lengths: Lengths, concurrency: int, num_requests: int, seed: int) -> Sample:
    """Random tokens, `concurrency` users."""
    return _metered(server, _throughput(server, lengths, concurrency, num_requests, seed))


def decoders_and_long_prompts(server: Server, alone_s: float, num_long: int, seed: int) -> Sample:
    """Eight users who decode all the time: first alone, then while long prompts come one after another."""
    return _metered(server, _decoders_and_long_prompts(server, alone_s, num_long, seed))


def prefix_hit(server: Server, seed: int) -> Sample:
    """The time to the first token of a long prompt, and of the same prompt again."""
    return _metered(server, _prefix_hit(server, seed))


def _metered(server: Server, work: Coroutine[Any, Any, Sample]) -> Sample:
    cpu_s, wall_s = server.cpu_s(), time.monotonic()
    sample = uvloop.run(work)
    return sample | {"cpu_s": server.cpu_s() - cpu_s, "wall_s": time.monotonic() - wall_s}


async def _throughput(
    server: Server, lengths: Lengths, concurrency: int, num_requests: int, seed: int
) -> Sample:
    clock, records, rng = SystemClock(), list[RequestRecord](), random.Random(f"{seed}/throughput")
    requests = iter([_request(rng, index, *lengths) for index in range(num_requests)])

    async def user(target: Target) -> None:
        for request in requests:
            records.append(await target.send(request, clock.now()))

    async with _target(server, clock) as target, asyncio.TaskGroup() as users:
        for _ in range(concurrency):
            users.create_task(user(target))
    _check(records)
    metrics = measure(records)
    return {
        "output_tok_per_s": metrics.output_tokens_per_s,
        "ttft_p50_s": _of(metrics.ttft_s).p50,
        "itl_p50_s": _of(metrics.itl_s).p50,
        "itl_p99_s": _of(metrics.itl_s).p99,
    }


async def _decoders_and_long_prompts(server: Server, alone_s: float, num_long: int, seed: int) -> Sample:
    clock, patience = SystemClock(), _Patience()
    records: list[RequestRecord] = []
    async with _target(server, clock) as target, _target(server, patience) as decoders:
        requests = _decoder_requests(seed)
        tasks = [
            asyncio.create_task(_keep_decoding(decoders, requests, patience, records))
            for _ in range(NUM_DECODERS)
        ]
        await clock.sleep(SETTLE_S)
        alone = (clock.now(), clock.now() + alone_s)
        await clock.sleep(alone_s)
        rng = random.Random(f"{seed}/long")
        long = [await target.send(_request(rng, i, LONG_PROMPT, LONG_OUTPUT), 0.0) for i in range(num_long)]
        mixed = (alone[1], clock.now())
        patience.end()
        await asyncio.gather(*tasks)
    _check(long)
    itl, mixed_itl = _of(distribution(_gaps(records, alone))), _of(distribution(_gaps(records, mixed)))
    return {
        "alone_itl_p50_s": itl.p50,
        "alone_itl_p99_s": itl.p99,
        "mixed_itl_p50_s": mixed_itl.p50,
        "mixed_itl_p99_s": mixed_itl.p99,
        "mixed_itl_max_s": mixed_itl.max,
        "long_ttft_p50_s": _of(distribution(record.ttft_s or 0.0 for record in long)).p50,
        "alone_output_tok_per_s": itl.num / alone_s,
        "mixed_output_tok_per_s": mixed_itl.num / (mixed[1] - mixed[0]),
    }


async def _prefix_hit(server: Server, seed: int) -> Sample:
    clock, request = SystemClock(), _request(random.Random(f"{seed}/prefix"), 0, LONG_PROMPT, 2)
    async with _target(server, clock) as target:
        cold, hit = [await target.send(request, clock.now()) for _ in range(2)]
    _check([cold, hit])
    return {"cold_ttft_s": cold.ttft_s or 0.0, "hit_ttft_s": hit.ttft_s or 0.0}


# --- requests ---


@dataclass(frozen=True)
class Target:
    """One run's requests, to the server's URLs in turn."""

    clients: tuple[OpenAIClient, ...]
    takes_token_ids: bool

    async def send(self, request: PlannedRequest, planned_s: float) -> RequestRecord:
        if not self.takes_token_ids:
            request = replace(request, prompt=text_of(request.prompt))
        return await self.clients[request.index % len(self.clients)].send(request, planned_s)


@asynccontextmanager
async def _target(server: Server, clock: Clock) -> AsyncIterator[Target]:
    spec = server.spec
    options = RequestOptions(spec.model, api="completions", ignore_eos=spec.takes_ignore_eos)
    async with AsyncExitStack() as stack:
        clients = [
            OpenAIClient(
                Endpoint.parse(url), options, clock, timeout_s=TIMEOUT_S, max_connections=MAX_CONNECTIONS
            )
            for url in spec.urls
        ]
        for client in clients:
            stack.push_async_callback(client.aclose)
        yield Target(tuple(clients), spec.takes_token_ids)


def text_of(token_ids: Iterable[int]) -> str:
    """Of words only; its tokens are these."""

    def word(index: int) -> str:
        return " " + "".join(ascii_lowercase[index // 26**place % 26] for place in (2, 1, 0))

    return "".join(word(token_id - FIRST_WORD) for token_id in token_ids)


def _request(rng: random.Random, index: int, num_prompt: int, num_output: int) -> PlannedRequest:
    prompt = tuple(rng.choices(range(FIRST_WORD, VOCAB_SIZE), k=num_prompt))
    return PlannedRequest(index, 0.0, prompt, num_output)


def _decoder_requests(seed: int) -> Iterator[PlannedRequest]:
    rng = random.Random(f"{seed}/decoders")
    return (_request(rng, index, DECODER_PROMPT, rng.randint(*DECODER_OUTPUT)) for index in count())


class _Patience(SystemClock):
    """A clock on which every request's deadline is now, once `end` was called: its record tells what came until
    then."""

    def __init__(self) -> None:
        self.ended = False
        self._timeouts: list[asyncio.Timeout] = []

    def timeout(self, seconds: float | None) -> asyncio.Timeout:
        self._timeouts.append(super().timeout(seconds))
        return self._timeouts[-1]

    def end(self) -> None:
        self.ended = True
        now_s = asyncio.get_running_loop().time()
        for timeout in self._timeouts:
            with contextlib.suppress(RuntimeError):  # that request has ended
                timeout.reschedule(now_s)


async def _keep_decoding(
    target: Target, requests: Iterator[PlannedRequest], patience: _Patience, records: list[RequestRecord]
) -> None:
    while not patience.ended:
        record = await target.send(next(requests), patience.now())
        if not patience.ended:
            _check([record])
        records.append(record)


def _gaps(records: list[RequestRecord], window: tuple[float, float]) -> Iterator[float]:
    """Between tokens of one request, where the later one came in the window."""
    for record in records:
        for earlier, later in pairwise(record.token_s):
            if window[0] < later <= window[1]:
                yield later - earlier


def _check(records: list[RequestRecord]) -> None:
    failed = [record for record in records if not record.ok]
    if failed:
        first = failed[0]
        raise Failed(
            f"{len(failed)} of {len(records)} requests failed: {first.error_label}: {first.error_text}"
        )


def _of(found: Distribution | None) -> Distribution:
    if found is None:
        raise Failed("no token came")
    return found
