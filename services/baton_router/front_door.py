"""What both front doors do with a request between its validation and its last token.

prompt + limits --> request(...) --> answer(request): see `answer`
"""

import random
from collections.abc import Callable, Sequence

from baton.clock import Clock
from baton.engine.detokenizer import TokenText
from baton.engine.prompt_scores import check_prompt_scores
from baton.engine.sampling_state import check_sampling
from baton.errors import (
    InvalidRequest,
    ModelNotFound,
    RequestTooLarge,
    Unavailable,
)
from baton.request import (
    Request,
    RequestId,
    SamplingParams,
    TokenSequence,
)
from baton.tokenizer import Tokenizer
from baton.tracing import NO_TRACING, Tracer, valid_traceparent
from baton_router.answer import Answer, OpenAnswers
from baton_router.generation import AtOnce, Generator, never
from baton_router.metrics import RouterMetrics


class FrontDoor:
    """Shared by the HTTP and the gRPC API of one router."""

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
        tracer: Tracer = NO_TRACING,
        log_prompts: bool = False,
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
        self._open = OpenAnswers(
            generator,
            self.token_text,
            clock,
            rng,
            metrics,
            self.served_model_names[0],
            tracer,
            tokenizer.decode if log_prompts else None,
        )

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

    def check_sampling(self, sampling: SamplingParams, num_prompt_tokens: int) -> None:
        """As the workers do, before any of them is asked."""
        check_sampling(sampling, self.tokenizer.vocab_size)
        check_prompt_scores(sampling, num_prompt_tokens)

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
            raise Unavailable("no worker is known yet", retry_after_s=1.0)
        room = limit - num_prompt_tokens
        length = f"this model's maximum context length is {limit} tokens"
        if room < 1:
            raise RequestTooLarge(f"{length}, but the prompt has {num_prompt_tokens}", param=param)
        if asked is None:
            return min(default or room, room)
        if asked > room:
            raise RequestTooLarge(
                f"{length}, but {num_prompt_tokens + asked} are asked for: {num_prompt_tokens} in the prompt "
                f"and {asked} to generate (max_tokens)",
                param=param,
            )
        return asked

    def request(
        self,
        wanted_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        cache_salt: str,
        priority: int,
        traceparent: str,
    ) -> Request:
        """`traceparent` as the client sent it, if it did."""
        eos = self.tokenizer.eos_token_ids
        return Request(
            RequestId(wanted_id),
            tuple(prompt_token_ids),
            sampling,
            eos,
            cache_salt,
            priority,
            valid_traceparent(traceparent),
        )

    def answer(
        self,
        request: Request,
        *,
        arrival_s: float,
        timeout_s: float | None = None,
        user: str | None = None,
        prompt_only: bool = False,
        operation: str = "text_completion",
        at_once: AtOnce = never,
    ) -> Answer:
        """Nothing happens before it is entered. `prompt_only`: no text is wanted but the prompt's. `operation` is
        OpenTelemetry's name for what is done. `at_once` may be offered tokens, which then do not come as items."""
        timeout_s = timeout_s or self.request_timeout_s
        return Answer(
            self._open,
            request,
            arrival_s,
            timeout_s,
            user,
            prompt_only=prompt_only,
            operation=operation,
            at_once=at_once,
        )

    def cancel_all(self) -> None:
        """Every client that still waits for an answer gets an error instead."""
        self._open.cancel_all()
