"""What both front doors do with a request between its validation and its last token.

    prompt + limits --> request(...) --> answer(request) --tokens, read()--> text --> the context is left

An `Answer` is open for as long as its client is there: closing it early cancels the request everywhere.
"""

import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from baton.clock import Clock
from baton.engine.detokenizer import Delta, TokenText
from baton.engine.sampling_state import check_sampling
from baton.errors import (
    BatonError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    RequestTooLarge,
    Unavailable,
)
from baton.request import (
    FinishReason,
    Request,
    RequestId,
    SamplingParams,
    TokenLogprobs,
    TokenSequence,
)
from baton.telemetry import event
from baton.tokenizer import Tokenizer
from baton_router.generation import Generator, Tokens
from baton_router.metrics import RouterMetrics

log = logging.getLogger(__name__)

CLIENT_GONE = 499


class FrontDoor:
    """Shared by the HTTP and the gRPC API of one router. Owns the ids of the requests that are open here."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        served_model_names: Sequence[str],
        max_model_len: Callable[[], int | None],
        clock: Clock,
        rng: random.Random,
        metrics: RouterMetrics,
        *,
        request_timeout_s: float = 600.0,
    ) -> None:
        """`max_model_len` is None for as long as no worker is known. Model names: the first is the proper one."""
        self.generator = generator
        self.tokenizer = tokenizer
        self.served_model_names = tuple(served_model_names)
        self.max_model_len = max_model_len
        self.clock = clock
        self.metrics = metrics
        self.request_timeout_s = request_timeout_s
        self.token_text = TokenText(tokenizer.backend)
        self.started_at = int(clock.wall())
        self._rng = rng
        self._open_ids: set[str] = set()

    def check_model(self, name: str) -> None:
        if name not in self.served_model_names:
            served = ", ".join(self.served_model_names)
            raise ModelNotFound(f"the model {name!r} does not exist here; served: {served}", param="model")

    def draw_id(self) -> str:
        return f"{self._rng.getrandbits(128):032x}"

    def draw_seed(self) -> int:
        return self._rng.getrandbits(63)

    def check_prompt(self, token_ids: Sequence[int], param: str) -> None:
        if not token_ids:
            raise InvalidRequest("the prompt is empty", param=param)
        if min(token_ids) < 0 or max(token_ids) >= self.tokenizer.vocab_size:
            raise InvalidRequest(
                f"token ids must be 0 to {self.tokenizer.vocab_size - 1}, the model's vocabulary", param=param
            )

    def check_stop_token_ids(self, token_ids: Sequence[int]) -> None:
        if token_ids and max(token_ids) >= self.tokenizer.vocab_size:
            raise InvalidRequest(
                f"stop_token_ids must be below {self.tokenizer.vocab_size}, the size of the vocabulary",
                param="stop_token_ids",
            )

    def check_sampling(self, sampling: SamplingParams) -> None:
        """As the workers do, before any of them is asked."""
        check_sampling(sampling, self.tokenizer.vocab_size)

    def bad_words(self, words: Sequence[str]) -> tuple[TokenSequence, ...]:
        """Each as it is written at the start of a text and after a space. Other ways to make the word of tokens are
        not found."""
        encode = self.tokenizer.encode
        sequences = [tuple(encode(text, False)) for word in words for text in (word, " " + word.lstrip())]
        return tuple(TokenSequence(token_ids) for token_ids in dict.fromkeys(sequences) if token_ids)

    def max_tokens(self, num_prompt_tokens: int, asked: int | None, default: int | None, param: str) -> int:
        """How many tokens to generate at most; all that fit where neither `asked` nor `default` says otherwise.
        `param` is where the prompt is."""
        limit = self.max_model_len()
        if limit is None:
            raise Unavailable("no worker is known yet")
        room = limit - num_prompt_tokens
        length = f"this model's maximum context length is {limit} tokens"
        if room < 1:
            raise RequestTooLarge(f"{length}, but the prompt has {num_prompt_tokens}", param=param)
        if asked is None:
            return min(default or room, room)
        if asked > room:
            raise RequestTooLarge(
                f"{length}, but {num_prompt_tokens + asked} are asked for: {num_prompt_tokens} in the prompt "
                f"and {asked} to generate",
                param=param,
            )
        return asked

    def request(
        self, wanted_id: str, prompt_token_ids: Sequence[int], sampling: SamplingParams, cache_salt: str
    ) -> Request:
        eos = self.tokenizer.eos_token_ids
        return Request(RequestId(wanted_id), tuple(prompt_token_ids), sampling, eos, cache_salt)

    def answer(
        self, request: Request, *, arrival_s: float, timeout_s: float | None = None, user: str | None = None
    ) -> "Answer":
        """Nothing happens before it is entered."""
        return Answer(self, request, arrival_s, timeout_s or self.request_timeout_s, user)

    def cancel_all(self) -> None:
        """Every client that still waits for an answer gets an error instead."""
        for request_id in tuple(self._open_ids):
            self.generator.cancel(request_id)

    def opened(self, request: Request) -> Request:
        """The request under an id that no other open one has: a client may try again under the same."""
        request_id = request.request_id
        while request_id in self._open_ids:
            request_id = RequestId(f"{request.request_id}-{self._rng.getrandbits(32):08x}")
        self._open_ids.add(request_id)
        self.metrics.num_running.inc()
        return replace(request, request_id=request_id)

    def closed(self, answer: "Answer") -> None:
        self._open_ids.discard(answer.request.request_id)
        self.metrics.num_running.dec()
        self.metrics.observe_answer(
            num_prompt_tokens=answer.request.num_prompt_tokens,
            num_output_tokens=answer.num_output_tokens,
            ttft_s=answer.ttft_s,
            mean_itl_s=answer.mean_itl_s,
            e2e_s=answer.e2e_s,
        )
        event(
            log,
            "request ended",
            level=logging.DEBUG,
            request=answer.request.request_id,
            status=answer.status,
            tokens_in=answer.request.num_prompt_tokens,
            tokens_out=answer.num_output_tokens,
            user=answer.user,
        )


class Answer:
    """One request being answered: an async context, which ends the request when it is left, with one reader.

        async with door.answer(request) as answer:
            async for items in answer.tokens:
                text, token_ids, finish_reason = answer.read(items)
                if finish_reason is not None:
                    break

    Leaving it without a finish reason and without an error raises InternalError.
    """

    __slots__ = (
        "_arrival_s",
        "_door",
        "_finished_s",
        "_first_token_s",
        "_text",
        "_timeout_s",
        "finish_reason",
        "logprobs",
        "num_output_tokens",
        "request",
        "status",
        "tokens",
        "user",
    )

    tokens: AsyncGenerator[list[Tokens], None]

    def __init__(
        self, door: FrontDoor, request: Request, arrival_s: float, timeout_s: float, user: str | None
    ) -> None:
        self.request = request  # under its own id once it is open
        self.user = user
        self.num_output_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens read last, where they were asked for
        self.status = CLIENT_GONE  # as it is counted
        self._door = door
        self._arrival_s = arrival_s
        self._timeout_s = timeout_s
        self._first_token_s: float | None = None
        self._finished_s: float | None = None
        params = request.sampling
        self._text = door.token_text.stream(params.stop, request.stop_ids, params.min_tokens)

    async def __aenter__(self) -> Self:
        self.request = self._door.opened(self.request)
        self.tokens = self._door.generator.generate(self.request, timeout_s=self._timeout_s)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None and self.finish_reason is None:
            exc = InternalError("the tokens ended without a reason")
        try:
            await self.tokens.aclose()
        finally:
            if isinstance(exc, Exception):
                self.status = exc.status if isinstance(exc, BatonError) else InternalError.status
            elif exc is None:
                self.status = 200
            self._door.closed(self)
        if exc_type is None and exc is not None:
            raise exc

    def read(self, items: list[Tokens]) -> Delta:
        """The text of what came. Raises InternalError when the request ended, but not as it should."""
        if len(items) == 1:
            token_ids, finish_reason = items[0].token_ids, items[0].finish_reason
        else:
            token_ids = tuple([token_id for item in items for token_id in item.token_ids])
            finish_reason = items[-1].finish_reason
        delta = self._text.push(token_ids, finish_reason)
        if self._first_token_s is None:
            self._first_token_s = self._door.clock.now()
        self.num_output_tokens += len(delta[1])
        if self.request.sampling.logprobs is not None:
            found = [each for item in items for each in item.logprobs]
            self.logprobs = tuple(found[: len(delta[1])])
        if delta[2] is not None:
            self._finish(delta[2])
        return delta

    def _finish(self, reason: FinishReason) -> None:
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise InternalError(f"the request ended early: {reason}")
        self.finish_reason = reason
        self._finished_s = self._door.clock.now()

    @property
    def num_cached_tokens(self) -> int:
        record = self._door.generator.record(self.request.request_id)
        return max(record.num_cached_tokens_prefill, record.num_cached_tokens_decode) if record else 0

    @property
    def ttft_s(self) -> float | None:
        return None if self._first_token_s is None else self._first_token_s - self._arrival_s

    @property
    def mean_itl_s(self) -> float | None:
        if self._first_token_s is None or self._finished_s is None or self.num_output_tokens < 2:
            return None
        return (self._finished_s - self._first_token_s) / (self.num_output_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        return None if self._finished_s is None else self._finished_s - self._arrival_s
