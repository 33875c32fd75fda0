"""Pairs are proven before they carry traffic: a golden prompt goes through the pair, and the answer must be the one
that the decode worker gives when it computes the prompt itself.

    unknown --prove--> proven --interval, reconnect, new incarnation--> prove again
               |          |
               |          +--> quarantined: too many pieces did not match their digest; carries nothing for a while
               +------> failed: carries nothing, and is tried again after a while

Tokens must be equal, or differ only where the two best candidates are as good as equal: workers of low precision round
differently from one batch to the next. What both say of each token's log probability must agree as well.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from baton.clock import Clock
from baton.errors import BatonError
from baton.events import Emit
from baton.messages import WorkerRecord
from baton.request import Request, RequestId, SamplingParams, WorkerId
from baton_router.generation import Tokens

NUM_TOKENS = 4
TIMEOUT_S = 20.0
RETRY_S = 10.0
MAX_MISMATCHES = 3  # pieces of one pair within MISMATCH_WINDOW_S; with the third it is quarantined
MISMATCH_WINDOW_S = 60.0
QUARANTINE_S = 30.0
LOGPROB_TOLERANCE = (
    0.1  # bfloat16 rounds log probabilities by a few hundredths; another model is off by whole units
)
SMALLEST_VOCABULARY = 64

# (request, prefill worker or None for the decode worker alone, decode worker, timeout_s) -> its tokens
Trial = Callable[[Request, WorkerId | None, WorkerId, float], Awaitable[list[Tokens]]]
Pair = tuple[WorkerRecord, WorkerRecord]
_Key = tuple[WorkerId, str, WorkerId, str]


@dataclass(frozen=True, slots=True)
class Verdict:
    proven: bool
    reason: str
    due_s: float  # when it is tried again


@dataclass(slots=True)
class PairCounts:
    """Since this router started."""

    num_mismatches: int = 0  # pieces that did not match their digest
    num_repairs: int = 0  # prompts that the decode worker computed because the KV did not come
    num_quarantines: int = 0


class Canary:
    """Owns the verdicts. `run` proves; everybody else asks."""

    def __init__(self, clock: Clock, emit: Emit, *, interval_s: float) -> None:
        self._clock = clock
        self._emit = emit
        self._interval_s = interval_s
        self._verdicts: dict[_Key, Verdict] = {}
        self._mismatches: dict[_Key, list[float]] = {}  # when each was, within the window
        self._changed = asyncio.Event()
        self._num_trials = 0
        self.counts: dict[tuple[WorkerId, WorkerId], PairCounts] = {}

    def verdict(self, prefill: WorkerRecord, decode: WorkerRecord) -> Verdict | None:
        """None: not tried yet."""
        return self._verdicts.get(_key(prefill, decode))

    def is_proven(self, prefill: WorkerRecord, decode: WorkerRecord) -> bool:
        verdict = self.verdict(prefill, decode)
        return verdict is not None and verdict.proven

    def forget(self, worker_id: WorkerId) -> None:
        """Its connection was lost: whoever answers now has proven nothing."""
        for key in [key for key in self._verdicts if worker_id in (key[0], key[2])]:
            del self._verdicts[key]

    def note_mismatches(
        self, prefill: WorkerRecord, decode: WorkerRecord, number: int, *, is_fatal: bool
    ) -> None:
        """Pieces of a request did not match their digest; `is_fatal` when their repeats did not either."""
        key, now_s = _key(prefill, decode), self._clock.now()
        recent = [at_s for at_s in self._mismatches.get(key, []) if at_s > now_s - MISMATCH_WINDOW_S]
        self._mismatches[key] = recent = [*recent, *[now_s] * number]
        self._count(prefill, decode).num_mismatches += number
        verdict = self._verdicts.get(key)
        if (is_fatal or len(recent) >= MAX_MISMATCHES) and verdict is not None and verdict.proven:
            self._quarantine(prefill, decode, len(recent))

    def note_repair(self, prefill: WorkerRecord, decode: WorkerRecord) -> None:
        self._count(prefill, decode).num_repairs += 1

    def _quarantine(self, prefill: WorkerRecord, decode: WorkerRecord, number: int) -> None:
        reason = (
            f"quarantined for {QUARANTINE_S:g} s: {number} pieces did not match their digest within "
            f"{MISMATCH_WINDOW_S:g} s"
        )
        self._verdicts[_key(prefill, decode)] = Verdict(False, reason, self._clock.now() + QUARANTINE_S)
        self._mismatches.pop(_key(prefill, decode))
        self._count(prefill, decode).num_quarantines += 1
        self._emit("pair.quarantined", prefill=prefill.worker_id, decode=decode.worker_id, why=reason)
        self._changed.set()

    def _count(self, prefill: WorkerRecord, decode: WorkerRecord) -> "PairCounts":
        return self.counts.setdefault((prefill.worker_id, decode.worker_id), PairCounts())

    async def run(self, pairs: Callable[[], list[Pair]], changed: asyncio.Event, trial: Trial) -> None:
        """Until cancelled. `pairs` are those that fit; `changed` is set whenever they may be others."""
        self._changed = changed
        while True:
            changed.clear()
            for prefill, decode in self._due(pairs()):
                await self._prove(prefill, decode, trial)
            wait_s = max(0.0, self._next_due_s() - self._clock.now())
            try:
                async with self._clock.timeout(wait_s):
                    await changed.wait()
            except TimeoutError:
                pass

    def _due(self, pairs: list[Pair]) -> Iterator[Pair]:
        now_s = self._clock.now()
        for prefill, decode in pairs:
            verdict = self.verdict(prefill, decode)
            if verdict is None or verdict.due_s <= now_s:
                yield prefill, decode

    def _next_due_s(self) -> float:
        return min((v.due_s for v in self._verdicts.values()), default=self._clock.now() + self._interval_s)

    async def _prove(self, prefill: WorkerRecord, decode: WorkerRecord, trial: Trial) -> None:
        try:
            through = await trial(self._request(decode), prefill.worker_id, decode.worker_id, TIMEOUT_S)
            alone = await trial(self._request(decode), None, decode.worker_id, TIMEOUT_S)
            reason = difference(through, alone)
        except BatonError as error:
            reason = error.message
        due_s = self._clock.now() + (RETRY_S if reason else self._interval_s)
        self._verdicts[_key(prefill, decode)] = Verdict(not reason, reason, due_s)
        self._emit(
            "pair.refused" if reason else "pair.proven",
            prefill=prefill.worker_id,
            decode=decode.worker_id,
            why=reason,
        )

    def _request(self, decode: WorkerRecord) -> Request:
        """Two full blocks and a partial one, where the model takes that many; never the same prefix twice, so that
        every block is computed and sent."""
        self._num_trials += 1
        name = f"#canary-{self._num_trials}"  # no user can give a request this name
        num_tokens = max(1, min(2 * decode.block_size + 5, decode.max_model_len - NUM_TOKENS))
        rng = random.Random(0)
        prompt = tuple(rng.randrange(1, SMALLEST_VOCABULARY) for _ in range(num_tokens))
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, logprobs=1, ignore_eos=True)
        return Request(RequestId(name), prompt, sampling, cache_salt=name)


def difference(through: list[Tokens], alone: list[Tokens]) -> str:
    """Why the two answers are not the same; empty when they are."""
    pair, local = _by_token(through), _by_token(alone)
    if len(pair) != len(local):
        return f"the pair gave {len(pair)} tokens, the decode worker alone {len(local)}"
    for index, ((token, logprob), (other, other_logprob)) in enumerate(zip(pair, local, strict=True)):
        if (
            logprob is not None
            and other_logprob is not None
            and abs(logprob - other_logprob) > LOGPROB_TOLERANCE
        ):
            return (
                f"log probability of token {index}: {logprob:.3f} through the pair, {other_logprob:.3f} alone"
            )
        if token != other:
            if logprob is None:
                return f"token {index} is {token} through the pair and {other} alone"
            return ""  # a tie: what follows has another beginning
    return ""


def _by_token(answer: list[Tokens]) -> list[tuple[int, float | None]]:
    found: list[tuple[int, float | None]] = []
    for part in answer:
        for index, token_id in enumerate(part.token_ids):
            found.append((token_id, part.logprobs[index].logprob if part.logprobs else None))
    return found


def _key(prefill: WorkerRecord, decode: WorkerRecord) -> _Key:
    return prefill.worker_id, prefill.incarnation, decode.worker_id, decode.incarnation
