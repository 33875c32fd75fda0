"""What the sampler has to know of a sequence beyond its parameters; torch-free.

Most requests have no such state. Those that ask for something that depends on the tokens so far (penalties, bad
words, a minimum of tokens, a grammar), for fixed masks and biases, or for log probabilities, have one for as long as
their sequence lives. It is a function of the request and the tokens: the same on every worker, after preemption, and
when the tokens are told to a new one in one go. The engine tells it tokens between steps; the sampler reads it during
a step.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from baton.errors import InvalidRequest
from baton.request import Request, SamplingParams, TokenLogprobs

MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_ALLOWED_TOKEN_IDS = 65536
MAX_STOP_TOKEN_IDS = 256
MAX_BAD_WORD_TOKENS = 4096  # of all bad words together

Bitmask = NDArray[np.int32]  # [ceil(V / 32)], bit i of word w: token 32 w + i may be drawn
Tokens = NDArray[np.int64]


class Matcher(Protocol):
    """A grammar and how much of it the tokens so far have matched."""

    def accept(self, token_id: int) -> None:
        """Raises InternalError for a token that the mask did not allow."""
        ...

    @property
    def has_ended(self) -> bool:
        """Nothing but the end may follow."""
        ...

    def mask(self) -> Bitmask:
        """What may follow."""
        ...


class SamplingState:
    """`matcher` has matched nothing yet."""

    def __init__(self, request: Request, vocab_size: int, matcher: Matcher | None = None) -> None:
        params = request.sampling
        self.params = params
        self.matcher = matcher
        self.logprobs: TokenLogprobs | None = None  # of the token drawn last; written by the sampler
        self.counts = TokenCounts(request.prompt_token_ids, vocab_size) if has_penalties(params) else None
        self.bias_ids = np.array([bias.token_id for bias in params.logit_bias], dtype=np.int64)
        self.biases = np.array([bias.bias for bias in params.logit_bias], dtype=np.float32)
        self._allowed = _bitmask(params.allowed_token_ids, vocab_size) if params.allowed_token_ids else None
        self._stop_ids = tuple(sorted(i for i in request.stop_ids if i < vocab_size))
        self._output: list[int] = []
        self._mask: Bitmask | None = None  # the grammar's, for the tokens so far

    def append(self, token_id: int) -> None:
        self._output.append(token_id)
        self._mask = None
        if self.counts is not None:
            self.counts.add(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)

    @property
    def has_ended(self) -> bool:
        return self.matcher is not None and self.matcher.has_ended

    def mask(self) -> Bitmask | None:
        """Computed once for each token: see `masks`. A grammar cannot be combined with allowed tokens."""
        if self.matcher is None:
            return self._allowed
        if self._mask is None:
            self._mask = self.matcher.mask()
        return self._mask

    def forbidden(self) -> list[int]:
        """Tokens that may not come next, whatever the mask says."""
        forbidden = [
            word.token_ids[-1] for word in self.params.bad_words if self._ends_with(word.token_ids[:-1])
        ]
        if len(self._output) < self.params.min_tokens:
            forbidden.extend(self._stop_ids)
        return forbidden

    def _ends_with(self, token_ids: tuple[int, ...]) -> bool:
        return not token_ids or tuple(self._output[-len(token_ids) :]) == token_ids


class TokenCounts:
    """The distinct tokens of prompt and output, and how often each was generated; kept up to date, because counting
    anew would cost a long answer more with every token."""

    def __init__(self, prompt_token_ids: Iterable[int], vocab_size: int) -> None:
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(prompt_token_ids))}
        self._ids = np.fromiter(self._slots, dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._vocab_size = vocab_size

    def add(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            size = min(2 * slot + 16, self._vocab_size)
            self._ids = np.concatenate((self._ids, np.zeros(size - slot, dtype=np.int64)))
            self._counts = np.concatenate((self._counts, np.zeros(size - slot, dtype=np.float32)))
        self._ids[slot] = token_id
        self._counts[slot] += 1

    @property
    def token_ids(self) -> Tokens:
        return self._ids[: len(self._slots)]

    @property
    def output_counts(self) -> NDArray[np.float32]:
        """0 for a token that only the prompt has."""
        return self._counts[: len(self._slots)]


def has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def needs_state(params: SamplingParams) -> bool:
    return (
        params.logprobs is not None
        or params.grammar is not None
        or has_penalties(params)
        or bool(params.logit_bias or params.allowed_token_ids or params.bad_words or params.min_tokens)
    )


def _bitmask(token_ids: Sequence[int], vocab_size: int) -> Bitmask:
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequest for values that no sampler can honour."""
    for name, holds, rule in (
        ("max_tokens", params.max_tokens >= 1, "at least 1"),
        ("temperature", math.isfinite(params.temperature) and params.temperature >= 0, "0 or more"),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("top_k", params.top_k >= 0, "0 (all tokens) or more"),
        ("min_p", 0 <= params.min_p <= 1, "0 to 1"),
        ("presence_penalty", abs(params.presence_penalty) <= 100, "-100 to 100"),
        ("frequency_penalty", abs(params.frequency_penalty) <= 100, "-100 to 100"),
        ("repetition_penalty", 0.01 <= params.repetition_penalty <= 100, "0.01 to 100"),
        ("logprobs", params.logprobs is None or 0 <= params.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
        (
            "prompt_logprobs",
            params.prompt_logprobs is None or 0 <= params.prompt_logprobs <= MAX_LOGPROBS,
            f"0 to {MAX_LOGPROBS}",
        ),
        ("n", params.n >= 1, "at least 1"),
        ("min_tokens", 0 <= params.min_tokens <= params.max_tokens, "0 to max_tokens"),
        ("logit_bias", len(params.logit_bias) <= MAX_BIASES, f"at most {MAX_BIASES} tokens"),
        (
            "allowed_token_ids",
            len(params.allowed_token_ids) <= MAX_ALLOWED_TOKEN_IDS,
            f"at most {MAX_ALLOWED_TOKEN_IDS} tokens",
        ),
        (
            "stop_token_ids",
            len(params.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            f"at most {MAX_STOP_TOKEN_IDS} tokens",
        ),
        (
            "bad_words",
            sum(len(word.token_ids) for word in params.bad_words) <= MAX_BAD_WORD_TOKENS,
            f"at most {MAX_BAD_WORD_TOKENS} tokens together",
        ),
        ("logit_bias", all(abs(each.bias) <= 100 for each in params.logit_bias), "-100 to 100"),
        ("bad_words", all(word.token_ids for word in params.bad_words), "sequences of at least one token"),
    ):
        if not holds:
            raise InvalidRequest(f"{name} must be {rule}", param=name)
    _check_token_ids("logit_bias", [each.token_id for each in params.logit_bias], vocab_size)
    _check_token_ids("allowed_token_ids", params.allowed_token_ids, vocab_size)
    _check_token_ids(
        "bad_words", [token_id for word in params.bad_words for token_id in word.token_ids], vocab_size
    )
    _check_token_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    if len({each.token_id for each in params.logit_bias}) < len(params.logit_bias):
        raise InvalidRequest("logit_bias must name every token once", param="logit_bias")
    if params.grammar is not None:
        for name, value in (
            ("allowed_token_ids", params.allowed_token_ids),
            ("bad_words", params.bad_words),
            ("min_tokens", params.min_tokens),
        ):
            if value:
                raise InvalidRequest(f"{name} cannot be combined with structured output", param=name)


def _check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise InvalidRequest(
            f"{name} must be token ids from 0 to {vocab_size - 1}, the model's vocabulary", param=name
        )
