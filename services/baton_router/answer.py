"""Answers that are being given, as both front doors see them: tokens in, text out, choice by choice.

An `Answer` is open for as long as its client is there: closing it early cancels the request everywhere.
"""

import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from baton.clock import Clock
from baton.engine.detokenizer import Delta, TokenText
from baton.errors import BatonError, InternalError
from baton.events import about
from baton.request import PromptLogprobs, Request, RequestId
from baton.telemetry import event
from baton.tracing import NO_TRACING, Span, Tracer
from baton_router.answer_choice import Choice, NoText
from baton_router.generation import AtOnce, Generator, Tokens, never
from baton_router.metrics import RouterMetrics

log = logging.getLogger(__name__)

CLIENT_GONE = 499


class OpenAnswers:
    """Owns the ids of the requests that are open here; counts how they end."""

    def __init__(
        self,
        generator: Generator,
        token_text: TokenText,
        clock: Clock,
        rng: random.Random,
        metrics: RouterMetrics,
        model_name: str,
        tracer: Tracer = NO_TRACING,
        prompt_text: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        """`prompt_text` where prompts may be logged."""
        self.generator = generator
        self.token_text = token_text
        self.clock = clock
        self._rng = rng
        self._metrics = metrics
        self._model_name = model_name
        self._tracer = tracer
        self._prompt_text = prompt_text
        self._ids: set[str] = set()

    def cancel_all(self) -> None:
        for request_id in tuple(self._ids):
            self.generator.cancel(request_id)

    def opened(self, request: Request) -> Request:
        """The request under an id that no other open one has: a client may try again under the same."""
        request_id = request.request_id
        while request_id in self._ids:
            request_id = RequestId(f"{request.request_id}-{self._rng.getrandbits(32):08x}")
        self._ids.add(request_id)
        self._metrics.num_running.inc()
        return replace(request, request_id=request_id)

    def begin_span(self, request: Request, arrival_s: float, operation: str) -> Span:
        sampling = request.sampling
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "baton",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.id": request.request_id,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.choice.count": sampling.n if sampling.n > 1 else None,
            "gen_ai.request.seed": sampling.seed,
        }
        name = f"{operation} {self._model_name}"
        return self._tracer.begin(name, request.traceparent, arrival_s, attributes)

    def closed(self, answer: "Answer") -> None:
        self._ids.discard(answer.request.request_id)
        self._metrics.num_running.dec()
        self._metrics.observe_answer(
            num_prompt_tokens=answer.request.num_prompt_tokens,
            num_output_tokens=answer.num_output_tokens,
            ttft_s=answer.ttft_s,
            mean_itl_s=answer.mean_itl_s,
            e2e_s=answer.e2e_s,
            finish_reason=answer.choices[0].finish_reason,
            num_cached_tokens=answer.num_cached_tokens,
        )
        sampling = answer.request.sampling
        self._metrics.observe_shape(
            n=sampling.n, max_tokens=sampling.max_tokens, num_longest_tokens=answer.num_longest_tokens
        )
        answer.span.set(_result_attributes(answer))
        answer.span.end(self.clock.now(), "" if answer.status == 200 else str(answer.status))
        self._log(answer)

    def _log(self, answer: "Answer") -> None:
        request, fields = answer.request, {}
        level = logging.WARNING if answer.status >= 500 else logging.DEBUG
        if self._prompt_text is not None:
            fields["prompt"], level = self._prompt_text(request.prompt_token_ids), max(level, logging.INFO)
        if not log.isEnabledFor(level):
            return
        record = self.generator.record(request.request_id)
        event(
            log,
            "request ended",
            level=level,
            **about(request),
            status=answer.status,
            why=answer.why,
            tokens_in=request.num_prompt_tokens,
            tokens_out=answer.num_output_tokens,
            user=answer.user,
            prefill=record.prefill_worker if record else None,
            decode=record.decode_worker if record else None,
            **fields,
        )


def _result_attributes(answer: "Answer") -> dict[str, Any]:
    reasons = [choice.finish_reason.value for choice in answer.choices if choice.finish_reason is not None]
    return {
        "gen_ai.usage.input_tokens": answer.request.num_prompt_tokens,
        "gen_ai.usage.output_tokens": answer.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": answer.num_cached_tokens,
        "gen_ai.response.finish_reasons": reasons or None,
        "gen_ai.latency.time_to_first_token": answer.ttft_s,
        "gen_ai.latency.e2e": answer.e2e_s,
        "http.response.status_code": answer.status,
    }


class Answer:
    """One request being answered: an async context, which ends the request when it is left, with one reader.

        async with door.answer(request) as answer:
            async for items in answer.tokens:
                for choice, (text, token_ids, finish_reason) in answer.read(items):
                    ...
                if not answer.num_running:
                    break

    Leaving it unfinished and without an error raises InternalError.
    """

    __slots__ = (
        "_arrival_s",
        "_at_once",
        "_finished_s",
        "_first_token_s",
        "_open",
        "_operation",
        "_single",
        "_timeout_s",
        "choices",
        "num_running",
        "prompt_logprobs",
        "request",
        "span",
        "status",
        "tokens",
        "user",
        "why",
    )

    tokens: AsyncGenerator[list[Tokens], None]

    def __init__(
        self,
        open_answers: OpenAnswers,
        request: Request,
        arrival_s: float,
        timeout_s: float,
        user: str | None,
        *,
        prompt_only: bool = False,
        operation: str = "text_completion",
        at_once: AtOnce = never,
    ) -> None:
        self.request = request  # under its own id once it is open
        self.user = user
        self.prompt_logprobs: PromptLogprobs | None = None  # there before the first text, where asked for
        self.status = CLIENT_GONE  # as it is counted
        self.why = ""  # of an answer that failed
        self.span: Span
        params = request.sampling
        self.choices = tuple(
            Choice(
                index,
                NoText()
                if prompt_only
                else open_answers.token_text.stream(params.stop, request.stop_ids, params.min_tokens),
                wants_logprobs=params.logprobs is not None,
            )
            for index in range(params.n)
        )
        self.num_running = params.n  # choices that have not ended
        self._single = self.choices[0] if params.n == 1 else None
        self._open = open_answers
        self._operation = operation
        self._at_once = at_once
        self._arrival_s = arrival_s
        self._timeout_s = timeout_s
        self._first_token_s: float | None = None
        self._finished_s: float | None = None

    async def __aenter__(self) -> Self:
        request = self._open.opened(self.request)
        self.span = self._open.begin_span(request, self._arrival_s, self._operation)
        self.request = replace(request, traceparent=self.span.traceparent)
        self.tokens = self._open.generator.generate(
            self.request, timeout_s=self._timeout_s, at_once=self._at_once
        )
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None and self.num_running:
            exc = InternalError("the tokens ended without a reason")
        try:
            await self.tokens.aclose()
        finally:
            self._at_once = never  # its owner holds this answer: a cycle for the garbage collector
            if isinstance(exc, Exception):
                self.status = exc.status if isinstance(exc, BatonError) else InternalError.status
                self.why = str(exc) if self.status >= 500 else ""  # others may quote what the user wrote
            elif exc is None:
                self.status = 200
            self._open.closed(self)
        if exc_type is None and exc is not None:
            raise exc

    def read(self, items: list[Tokens]) -> Sequence[tuple[Choice, Delta]]:
        """The text of what came, choice by choice. Raises InternalError when one ended, but not as it should."""
        if self._first_token_s is None:
            self._first_token_s = self._open.clock.now()
            self.prompt_logprobs = items[0].prompt_logprobs
            if self.prompt_logprobs is None and self.request.sampling.prompt_logprobs is not None:
                raise InternalError("the worker said nothing of the prompt")
        if self._single is None:
            return self._read_choices(items)
        delta = self._single.read(items)
        if delta[2] is not None:
            self._finish()
        return ((self._single, delta),)

    def _read_choices(self, items: list[Tokens]) -> list[tuple[Choice, Delta]]:
        parts: dict[int, list[Tokens]] = {}
        for item in items:
            parts.setdefault(item.sample, []).append(item)
        read = []
        for sample, part in parts.items():
            choice = self.choices[sample]
            if choice.finish_reason is not None:
                continue  # its stop string was found, and this was under way
            delta = choice.read(part)
            read.append((choice, delta))
            if delta[2] is not None:
                self._finish()
                if part[-1].finish_reason is None:
                    self._open.generator.drop(self.request.request_id, sample)
        return read

    def _finish(self) -> None:
        self.num_running -= 1
        if not self.num_running:
            self._finished_s = self._open.clock.now()

    @property
    def num_output_tokens(self) -> int:
        return sum([choice.num_output_tokens for choice in self.choices])

    @property
    def num_longest_tokens(self) -> int:
        return max(choice.num_output_tokens for choice in self.choices)

    @property
    def num_cached_tokens(self) -> int:
        record = self._open.generator.record(self.request.request_id)
        return max(record.num_cached_tokens_prefill, record.num_cached_tokens_decode) if record else 0

    @property
    def ttft_s(self) -> float | None:
        return None if self._first_token_s is None else self._first_token_s - self._arrival_s

    @property
    def mean_itl_s(self) -> float | None:
        """Of the longest choice."""
        num_tokens = self.num_longest_tokens
        if self._first_token_s is None or self._finished_s is None or num_tokens < 2:
            return None
        return (self._finished_s - self._first_token_s) / (num_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        return None if self._finished_s is None else self._finished_s - self._arrival_s
