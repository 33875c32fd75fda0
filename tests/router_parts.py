"""A front door without a fleet: a tokenizer whose ids are the bytes of the text, a generator that follows a script."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from baton.chat_template import ChatTemplate
from baton.clock import SystemClock
from baton.engine.detokenizer import _byte_of_character
from baton.errors import BatonError, Cancelled, Unavailable
from baton.messages import BlockLedger, Holder, Load, Purpose, Role, WorkerRecord
from baton.request import BlockId, FinishReason, PromptLogprobs, Request, RequestId, TokenLogprobs, WorkerId
from baton.tokenizer import Tokenizer
from baton_router.canary import PairCounts
from baton_router.fleet_view import IndexHealth
from baton_router.front_door import FrontDoor
from baton_router.generation import AtOnce, Record, Tokens, never
from baton_router.metrics import RouterMetrics

MODEL = "m"
MAX_MODEL_LEN = 100
EOS, BOS = 256, 257
VOCAB_SIZE = 260
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no refusals') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


class StoppedClock(SystemClock):
    def wall(self) -> float:
        return 1767225600.5


def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """Token i is byte i; then <eos> and <bos>, which begins completions."""
    backend = Backend(models.BPE(_byte_of_character(), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<bos>"])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return Tokenizer(
        backend,
        chat_template=None if template is None else ChatTemplate(template, {}, StoppedClock()),
        vocab_size=VOCAB_SIZE,
        bos_token_id=BOS,
        eos_token_ids=(EOS,),
    )


@dataclass(frozen=True)
class Of:
    """Tokens or the end of one of several samples; what is not wrapped is the first one's."""

    sample: int
    said: "str | bytes | tuple[int, ...] | FinishReason"


# One item of a script: tokens (as text, bytes or ids), an end, an error, or something to wait for.
Step = str | bytes | tuple[int, ...] | FinishReason | Exception | asyncio.Event | Of


def logprobs_of(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(-token_id / 4, (EOS, token_id), (-0.5, -token_id / 4))


def prompt_logprobs_of(request: Request) -> PromptLogprobs | None:
    """Token i has the log probability -i / 4 and rank i; the most likely ones are 0, 1, ... at -0.5, -1, ..."""
    num_top = request.sampling.prompt_logprobs
    if num_top is None:
        return None
    scored = request.prompt_token_ids[1:]
    top = range(num_top)
    return PromptLogprobs(
        tuple(-token_id / 4 for token_id in scored),
        scored,
        tuple(top) * len(scored),
        tuple(-(i + 1) / 2 for i in top) * len(scored),
    )


@dataclass
class ScriptedGenerator:
    """Says what `script` says, a list per step; tokens of a finish reason's own step come with it."""

    script: Callable[[Request], Sequence[Step]]
    requests: list[Request] = field(default_factory=list)
    timeouts_s: list[float] = field(default_factory=list)
    records: dict[str, Record] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)  # ids, in the order in which their generators were closed
    dropped: list[tuple[str, int]] = field(default_factory=list)  # samples that nobody wants more of
    num_turns_to_end: int = 0  # of the event loop, that closing takes
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _cancelled: dict[str, asyncio.Event] = field(default_factory=dict)

    async def generate(
        self, request: Request, *, timeout_s: float, at_once: AtOnce = never
    ) -> AsyncGenerator[list[Tokens], None]:
        self.requests.append(request)
        self.timeouts_s.append(timeout_s)
        self._cancelled[request.request_id] = asyncio.Event()
        self.records[request.request_id] = Record(request.request_id, request.num_prompt_tokens, 0.0)
        index = [0] * request.sampling.n
        of_prompt = prompt_logprobs_of(request)
        try:
            for step in self.script(request):
                sample, step = (step.sample, step.said) if isinstance(step, Of) else (0, step)
                if isinstance(step, asyncio.Event):
                    await self._wait(step, request)
                elif isinstance(step, Exception):
                    raise step
                elif isinstance(step, FinishReason):
                    yield [Tokens(index[sample], (), step, (), of_prompt, sample)]
                else:
                    ids = tuple(step.encode() if isinstance(step, str) else step)
                    wanted = request.sampling.logprobs is not None
                    logprobs = tuple(map(logprobs_of, ids)) if wanted else ()
                    yield [Tokens(index[sample], ids, None, logprobs, of_prompt, sample)]
                    index[sample] += len(ids)
                of_prompt = None
        finally:
            for _ in range(self.num_turns_to_end):
                await asyncio.sleep(0)
            self.ended.append(request.request_id)
            async with self.changed:
                self.changed.notify_all()

    async def _wait(self, event: asyncio.Event, request: Request) -> None:
        cancelled = self._cancelled[request.request_id]
        waits = [asyncio.ensure_future(each.wait()) for each in (event, cancelled)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if cancelled.is_set():
            raise Cancelled(f"request {request.request_id} was cancelled")

    async def wait_until_ended(self, num: int) -> None:
        async with asyncio.timeout(30), self.changed:
            await self.changed.wait_for(lambda: len(self.ended) >= num)

    def drop(self, request_id: str, sample: int) -> None:
        self.dropped.append((request_id, sample))

    def cancel(self, request_id: str) -> bool:
        found = request_id in self._cancelled and request_id not in self.ended
        if found:
            self._cancelled[request_id].set()
        return found

    def record(self, request_id: str) -> Record | None:
        return self.records.get(request_id)


def worker(name: str, *roles: Role, **changes: Any) -> WorkerRecord:
    record = WorkerRecord(
        worker_id=WorkerId(name),
        incarnation="1",
        roles=roles,
        address=f"127.0.0.1:{len(name)}",
        transports=("tcp",),
        model=MODEL,
        fingerprint="f",
        block_size=16,
        num_blocks=64,
        max_model_len=MAX_MODEL_LEN,
        kv_block_bytes=1024,
        load=Load(num_free_blocks=60),
    )
    return replace(record, **changes)


@dataclass(frozen=True)
class Link:
    record: WorkerRecord


@dataclass
class ScriptedFleet:
    """What the front doors see of a fleet. `lost` are the names of workers that are known and not ready."""

    workers: list[WorkerRecord] = field(
        default_factory=lambda: [worker("prefill-0", Role.PREFILL), worker("decode-0", Role.DECODE)]
    )
    lost: set[str] = field(default_factory=set)
    index: IndexHealth = field(default_factory=lambda: IndexHealth("memory", True))
    unproven: dict[tuple[WorkerId, WorkerId], str] = field(default_factory=dict)
    refused: dict[tuple[WorkerId, WorkerId], str] = field(default_factory=dict)

    def records(self) -> Sequence[WorkerRecord]:
        return self.workers

    def ready(self) -> Sequence[Link]:
        return [Link(w) for w in self.workers if w.worker_id not in self.lost and not w.draining]

    def pairs(self) -> Sequence[tuple[WorkerRecord, WorkerRecord]]:
        ready = [link.record for link in self.ready()]
        return [
            (p, d)
            for p in ready
            for d in ready
            if Role.PREFILL in p.roles and Role.DECODE in d.roles and p.fingerprint == d.fingerprint
        ]

    def bytes_per_s(self, prefill: WorkerId, decode: WorkerId) -> float | None:
        return 1e9

    def transport(self, prefill: WorkerId, decode: WorkerId) -> str | None:
        return "tcp"

    def unproven_pairs(self) -> dict[tuple[WorkerId, WorkerId], str]:
        return self.unproven

    def refused_pairs(self) -> dict[tuple[WorkerId, WorkerId], str]:
        return self.refused

    def unreachable(self) -> dict[str, str]:
        return {}

    def pair_counts(self) -> dict[tuple[WorkerId, WorkerId], PairCounts]:
        return {}

    def index_health(self) -> IndexHealth:
        return self.index

    async def blocks(self) -> dict[WorkerId, BlockLedger | BatonError]:
        holder = Holder(RequestId("r"), Purpose.RUNNING, (BlockId(3),), held_s=1.5)
        ledger = BlockLedger(WorkerId("decode-0"), 8, 1, 7, 0, (holder,))
        return {WorkerId("decode-0"): ledger, WorkerId("prefill-0"): Unavailable("gone")}


def scripted_door(
    *script: Step,
    tokenizer: Tokenizer | None = None,
    max_model_len: int | None = MAX_MODEL_LEN,
    log_prompts: bool = False,
    generator: ScriptedGenerator | None = None,
) -> tuple[FrontDoor, ScriptedGenerator]:
    generator = generator or ScriptedGenerator(lambda _: script)
    door = FrontDoor(
        generator,
        tokenizer or byte_tokenizer(),
        (MODEL, "org/other"),
        lambda: max_model_len,
        StoppedClock(),
        random.Random(0),
        RouterMetrics(CollectorRegistry()),
        request_timeout_s=60.0,
        log_prompts=log_prompts,
    )
    return door, generator


@contextmanager
def raises(error: type[BatonError], *, param: str | None = None) -> Iterator[None]:
    """Like pytest.raises, and the error names the field."""
    try:
        yield
    except error as caught:
        assert caught.param == param, caught.message
        return
    raise AssertionError(f"{error.__name__} was not raised")
