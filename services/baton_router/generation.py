"""One request on its way through the fleet, as the front doors see it: a stream of tokens and a record of how they
were made. The pipeline writes, one front door reads."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from baton.request import FinishReason, PromptLogprobs, Request, TokenLogprobs


class Tokens(NamedTuple):
    """Of one sample of a request."""

    first_index: int  # of these among all its generated tokens, from 0
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token where the request asked for them
    prompt_logprobs: PromptLogprobs | None = None  # before all others, where the request asked for them
    sample: int = 0
    num_cached_tokens: int = 0  # of the prompt: with the first token, where the decode worker computed it


# Offered tokens while the reader waits for them; says whether that was all that had to be done with them. What it
# raises is raised at the reader.
AtOnce: TypeAlias = Callable[[Tokens], bool]


def never(tokens: Tokens) -> bool:
    return False


@dataclass(slots=True)
class Record:
    """How a request was served. Times are seconds on the router's clock; shown by /debug/requests/{id}."""

    request_id: str
    num_prompt_tokens: int
    arrival_s: float
    prefill_worker: str | None = None
    decode_worker: str | None = None
    transport: str | None = None
    num_cached_tokens_prefill: int = 0  # in its own cache, or fetched
    fetched_from: str | None = None
    num_fetched_tokens: int = 0
    num_cached_tokens_decode: int = 0
    num_blocks_transferred: int = 0
    num_bytes_transferred: int = 0
    transfer_s: float | None = None
    placed_s: float | None = None
    ticket_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_output_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def mean_itl_s(self) -> float | None:
        if self.first_token_s is None or self.finished_s is None or self.num_output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.num_output_tokens - 1)


@dataclass(slots=True)
class TokenStream:
    """Tokens pushed by the step demultiplexer, taken by one reader. Pushing never blocks and wakes the reader at most
    once per turn of the loop, however many tokens came; not at all for those that `at_once` deals with, as waking a
    task costs more than a token."""

    at_once: AtOnce = never
    num_tokens: int = 0  # that were pushed
    _buffer: list[Tokens] = field(default_factory=list)
    _error: Exception | None = None
    _closed: bool = False
    _waiter: asyncio.Future[None] | None = None

    def push(self, tokens: Tokens) -> None:
        if self._error is not None:
            return
        self.num_tokens += len(tokens.token_ids)
        if not self._is_awaited or not self._done_at_once(tokens):
            self._buffer.append(tokens)
            self._wake()

    @property
    def _is_awaited(self) -> bool:
        """The reader has had everything."""
        return self._waiter is not None and not self._waiter.done()

    def _done_at_once(self, tokens: Tokens) -> bool:
        try:
            return self.at_once(tokens)
        except Exception as error:
            self.fail(error)
            return True

    def fail(self, error: Exception) -> None:
        """The reader gets what was pushed before, then this error."""
        if not self._closed:
            self._error, self._closed = error, True
            self._wake()

    def end(self) -> None:
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Tokens]:
        """All that came since the last call, at least one; [] at the end. Raises the error it was failed with."""
        while not self._buffer:
            if self._error is not None:
                raise self._error
            if self._closed:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        taken, self._buffer = self._buffer, []
        return taken


class Generator(Protocol):
    """What the front doors need of the pipeline."""

    def generate(
        self, request: Request, *, timeout_s: float, at_once: AtOnce = never
    ) -> AsyncGenerator[list[Tokens], None]:
        """Tokens in order, several steps' worth per item when the reader was slow; the last of each sample with a
        finish reason. Those that `at_once` deals with are no items. Raises BatonError (Overloaded, Unavailable,
        DeadlineExceeded, ...) before or between items, and whatever `at_once` raised. Closing the generator early
        cancels the request everywhere."""
        ...

    def drop(self, request_id: str, sample: int) -> None:
        """Nobody wants more of this one of several; what is under way of it may still come."""
        ...

    def cancel(self, request_id: str) -> bool:
        """True when the request was in flight; its reader gets Cancelled."""
        ...

    def record(self, request_id: str) -> Record | None:
        """Of a request in flight or one of the last few hundred."""
        ...
