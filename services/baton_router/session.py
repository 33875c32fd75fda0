"""The Step stream with one decode worker, and what goes over it: attempts.

An `Attempt` is one try at serving one request on one decode worker. It has a handle for each of the request's samples.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from baton.errors import BatonError, InternalError, WorkerLost, from_code
from baton.messages import (
    Cancel,
    Failure,
    Heartbeat,
    Load,
    Missed,
    Received,
    Recompute,
    SessionDown,
    SessionUp,
    Step,
    Submit,
    Ticket,
)
from baton.request import FinishReason, PromptLogprobs, Request, TokenLogprobs, WorkerId
from baton_router.generation import Tokens, TokenStream

_ENDED = -1


class Attempt:
    """One try at one request. The session writes, the pipeline reads. Tokens go straight into the request's stream."""

    def __init__(self, handle: int, request: Request, stream: TokenStream, first_index: int) -> None:
        """`first_index` of the first sample's tokens that come from the decode worker; it makes all of the others'."""
        loop = asyncio.get_running_loop()
        self.handle = handle
        self.request = request
        self.ticket: asyncio.Future[Ticket] = loop.create_future()
        self.received: asyncio.Future[Received] = loop.create_future()
        self.finished: asyncio.Future[None] = loop.create_future()  # the stream has the ends of all samples
        self._stream = stream
        self._next_index = [first_index] + [0] * (request.sampling.n - 1)  # of each sample; see _ENDED
        self._num_running = request.sampling.n
        self._held: list[Tokens] | None = []  # what came before the first token was given to the stream
        self.on_missed: Callable[[str], None] = lambda reason: None  # the KV did not arrive
        self.error = ""  # the code of what it failed with

    @property
    def handles(self) -> range:
        """One for each sample."""
        return range(self.handle, self.handle + self.request.sampling.n)

    def start_stream(self, first: Tokens | None = None) -> None:
        """Now that the first sample's first token is there, or is made by the decode worker, too, all others may
        follow."""
        held, self._held = self._held or [], None
        if first is not None:
            self._stream.push(first)
            if first.finish_reason is not None:
                held = [tokens for tokens in held if tokens.sample]  # the decode worker saw that end, too
                self.drop(0)
        for tokens in held:
            self._stream.push(tokens)
        self._finish_if_all_ended()

    def tokens(
        self,
        sample: int,
        first_index: int,
        token_ids: tuple[int, ...],
        reason: FinishReason | None,
        logprobs: tuple[TokenLogprobs, ...] = (),
        prompt_logprobs: PromptLogprobs | None = None,
        num_cached_tokens: int = 0,
    ) -> None:
        next_index = self._next_index[sample]
        if next_index == _ENDED:
            return
        if first_index > next_index:
            self.fail(InternalError(f"tokens {next_index} to {first_index - 1} are missing"))
            return
        if num_known := next_index - first_index:
            token_ids, logprobs = token_ids[num_known:], logprobs[num_known:]
        tokens = Tokens(next_index, token_ids, reason, logprobs, prompt_logprobs, sample, num_cached_tokens)
        self._next_index[sample] = next_index + len(token_ids)
        if self._held is None:
            self._stream.push(tokens)
        else:
            self._held.append(tokens)
        if reason is not None:
            self._end(sample)

    def finish(self, sample: int, reason: FinishReason) -> None:
        """Ended without a row of its own, or told so already by its last row."""
        if self._next_index[sample] != _ENDED:
            self.tokens(sample, self._next_index[sample], (), reason)

    def drop(self, sample: int) -> None:
        """Nobody wants more of it."""
        if self._next_index[sample] != _ENDED:
            self._end(sample)

    def _end(self, sample: int) -> None:
        self._next_index[sample] = _ENDED
        self._num_running -= 1
        self._finish_if_all_ended()

    def _finish_if_all_ended(self) -> None:
        """Not while anything is held: the decode worker may end before the prefill worker's answer is here."""
        if not self._num_running and self._held is None:
            self._resolve(self.finished, None)

    def recomputed(self) -> None:
        """The decode worker draws the first token, too, unless the stream has it."""
        if self._held is not None:
            if self._next_index[0] != _ENDED:
                self._next_index[0] = 0
            self.start_stream()

    def got_ticket(self, ticket: Ticket) -> None:
        self._resolve(self.ticket, ticket)

    def got_kv(self, received: Received) -> None:
        """After `recomputed` it means that the KV had come when the worker was asked to compute the prompt. It does
        not do so, and its first token is the one that came with the KV."""
        self._resolve(self.received, received)
        if self._held is None and self._next_index[0] == 0:
            self._first_from_kv(WorkerLost("the first token was lost with the prefill worker"))

    def answer_lost(self, error: BatonError) -> None:
        """The KV is there, but the prefill worker's answer will not come. May be said more than once."""
        if self._held is not None:
            self._first_from_kv(error)

    def _first_from_kv(self, error: BatonError) -> None:
        """Log probabilities do not travel with the KV: a request that asked for them fails with `error`."""
        sampling, first = self.request.sampling, self.received.result().first_token
        if first is None or sampling.logprobs is not None or sampling.prompt_logprobs is not None:
            self.fail(error)
            return
        self.start_stream(Tokens(0, (first,), None))
        if self._next_index[0] == 0:
            self._next_index[0] = 1

    def fail(self, error: BatonError) -> None:
        self.error = self.error or error.code
        for future in (self.ticket, self.received, self.finished):
            if not future.done():
                future.set_exception(error)
                future.exception()  # the pipeline waits for one of the three; the others need no reader

    @staticmethod
    def _resolve(future: asyncio.Future[Any], value: Any) -> None:
        if not future.done():
            future.set_result(value)


@dataclass(slots=True)
class Session:
    """The Step stream with one decode worker."""

    _out: list[SessionUp] = field(default_factory=list)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _attempts: dict[int, Attempt] = field(
        default_factory=dict
    )  # by the handles of samples that have not ended
    _next_handle: int = 1

    def submit(
        self,
        request: Request,
        stream: TokenStream,
        *,
        epoch: int,
        deadline_s: float,
        prefill_id: WorkerId | None,
    ) -> Attempt:
        """With `prefill_id` the worker reserves blocks for KV from there; without, it computes the prompt itself."""
        remote_prefill = prefill_id is not None
        attempt = Attempt(self._next_handle, request, stream, first_index=1 if remote_prefill else 0)
        self._next_handle += request.sampling.n
        self._attempts.update(dict.fromkeys(attempt.handles, attempt))
        self._send(Submit(attempt.handle, request, epoch, remote_prefill, deadline_s, prefill_id or ""))
        return attempt

    def cancel(self, attempt: Attempt) -> None:
        """Forget the attempt and tell the worker; what has ended already is left alone."""
        for handle in attempt.handles:
            if self._attempts.pop(handle, None) is not None:
                self._send(Cancel(handle))

    def drop(self, attempt: Attempt, sample: int) -> None:
        """Likewise one sample of several."""
        handle = attempt.handle + sample
        if self._attempts.pop(handle, None) is not None:
            self._send(Cancel(handle))
            attempt.drop(sample)

    def recompute(self, attempt: Attempt, reason: str, first_token: int | None) -> None:
        """Its KV will not come: the worker computes the prompt."""
        attempt.recomputed()
        self._send(Recompute(attempt.handle, reason, first_token))

    @property
    def num_seqs(self) -> int:
        """Samples of this router that have not ended, whether the worker knows of them yet or not."""
        return len(self._attempts)

    def num_unseen_tokens(self, num_seen: int) -> int:
        """Of what the worker takes blocks for as soon as it can: where it knows of `num_seen` samples, the latest ones
        it does not know."""
        unseen = islice(self._attempts.items(), num_seen, None)
        return sum(_num_first_tokens(attempt, handle) for handle, attempt in unseen)

    def fail_all(self, error: BatonError) -> None:
        """Their pipelines hear of it and cancel them, so a worker that is still there gives everything back."""
        for attempt in tuple(self._attempts.values()):
            attempt.fail(error)

    def _send(self, message: SessionUp) -> None:
        self._out.append(message)
        self._wake.set()

    async def outgoing(self) -> AsyncGenerator[SessionUp, None]:
        while True:
            await self._wake.wait()
            self._wake.clear()
            taken, self._out = self._out, []
            for message in taken:
                yield message

    def dispatch(self, message: SessionDown) -> Load | None:
        """Tell the attempts; returns the worker's load where the message carries it."""
        match message:
            case Step():
                self._step(message)
                return message.load
            case Heartbeat():
                return message.load
            case Failure():
                self._failure(message)
            case Ticket():
                if (attempt := self._attempt_of(message.handle)) is not None:
                    attempt.got_ticket(message)
            case Missed():
                if (attempt := self._attempt_of(message.handle)) is not None:
                    attempt.on_missed(message.reason)
            case Received():
                if (attempt := self._attempt_of(message.handle)) is not None:
                    attempt.got_kv(message)
        return None

    def _attempt_of(self, handle: int) -> Attempt | None:
        """By what is said of its first sample, which may have ended before the others."""
        if (attempt := self._attempts.get(handle)) is None:
            attempt = next((each for each in self._attempts.values() if each.handle == handle), None)
        return attempt

    def _failure(self, failure: Failure) -> None:
        if (attempt := self._attempt_of(failure.handle)) is not None:
            for handle in attempt.handles:
                self._attempts.pop(handle, None)
            attempt.fail(from_code(failure.code, failure.message, failure.param, failure.retry_after_s))

    def _step(self, step: Step) -> None:
        reasons = dict(step.finished)
        logprobs = _logprobs(step)
        of_prompts = dict(zip(step.prompt_logprob_handles, step.prompt_logprobs, strict=True))
        cached = dict(zip(step.cached_handles, step.num_cached_tokens, strict=True))
        start = 0
        for handle, first_index, num in zip(step.handles, step.first_index, step.num_tokens, strict=True):
            token_ids = step.token_ids[start : start + num]
            start += num
            if (attempt := self._attempts.get(handle)) is not None:
                attempt.tokens(
                    handle - attempt.handle, first_index, token_ids, reasons.get(handle),
                    logprobs.get(handle, ()), of_prompts.get(handle), cached.get(handle, 0),
                )  # fmt: skip
        for handle, reason in step.finished:
            if (attempt := self._attempts.pop(handle, None)) is None:
                continue
            if reason is FinishReason.ERROR:
                attempt.fail(InternalError(f"the engine failed on {attempt.request.request_id}"))
            else:
                attempt.finish(handle - attempt.handle, reason)


def _num_first_tokens(attempt: Attempt, handle: int) -> int:
    """Samples share their prompt."""
    return 1 if handle != attempt.handle else attempt.request.num_prompt_tokens + 1


def _logprobs(step: Step) -> dict[int, tuple[TokenLogprobs, ...]]:
    """By handle."""
    found, start = {}, 0
    for row in step.logprob_rows:
        end = start + step.num_tokens[row]
        found[step.handles[row]] = step.logprobs[start:end]
        start = end
    return found
