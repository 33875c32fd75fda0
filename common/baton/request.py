"""What a user asked for, after validation: immutable, torch-free, the same in every process."""

import enum
from dataclasses import dataclass, field, replace
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
BlockId = NewType("BlockId", int)


class FinishReason(enum.StrEnum):
    STOP = "stop"  # EOS, a stop token or a stop string
    LENGTH = "length"  # max_tokens or max_model_len
    ABORT = "abort"  # cancelled, deadline, client gone
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenBias:
    token_id: int
    bias: float  # added to the token's logit


@dataclass(frozen=True, slots=True)
class TokenSequence:
    token_ids: tuple[int, ...]


class GrammarKind(enum.StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"  # or GBNF
    CHOICE = "choice"  # a JSON list of strings


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole answer has to match."""

    kind: GrammarKind
    source: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling is a pure function of (seed, position, tokens so far): no state beyond these fields and the tokens
    themselves.

    temperature 0 is greedy. top_k 0 means all tokens. Stop strings are matched on text, in the router;
    the engine sees `stop_token_ids` only (EOS is added by the request unless `ignore_eos`).
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None  # 64 bit; the router draws one where the user gave none, a worker takes 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0  # relative to the most likely token's probability
    presence_penalty: float = 0.0  # these two count generated tokens
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # this one counts the prompt's, too
    logit_bias: tuple[TokenBias, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()  # () means all
    bad_words: tuple[TokenSequence, ...] = ()  # sequences that the generated tokens never contain
    min_tokens: int = 0  # neither stop tokens nor stop strings end the answer before
    logprobs: int | None = None  # of the drawn token and of that many most likely ones; None: not wanted
    prompt_logprobs: int | None = None  # the same of each prompt token but the first
    grammar: Grammar | None = None
    n: int = 1  # answers to the one prompt, see Request.samples


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one generated token: what the model said, before penalties, masks and temperature."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()  # most likely first
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of each prompt token from the second on, which is the first that the model says anything about; column by
    column, because there are many."""

    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]  # 1: the most likely of all
    top_token_ids: tuple[int, ...]  # as many per token as were asked for, most likely first
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Request:
    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""  # prefix blocks are shared only among equal salts
    priority: int = 0  # lower is earlier
    traceparent: str = ""  # W3C context of the span that this is part of

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def trace_id(self) -> str:
        """For logs; "" without a trace."""
        return self.traceparent[3:35]

    def samples(self) -> "tuple[Request, ...]":
        """One request for each answer, each as it would be asked for alone; the first has this one's id and seed. Only
        that one says anything about the prompt."""
        sampling = replace(self.sampling, n=1)
        first, siblings = replace(self, sampling=sampling), replace(sampling, prompt_logprobs=None)
        others = (
            replace(
                self,
                request_id=sample_id(self.request_id, sample),
                sampling=replace(siblings, seed=sample_seed(sampling.seed, sample)),
            )
            for sample in range(1, self.sampling.n)
        )
        return (first, *others)

    @property
    def stop_ids(self) -> frozenset[int]:
        eos = () if self.sampling.ignore_eos else self.eos_token_ids
        return frozenset(eos) | frozenset(self.sampling.stop_token_ids)


def prefix_of(request: Request, num_tokens: int) -> Request:
    """The beginning of its prompt, as a request of its own that is never answered. No user can give one this name."""
    return Request(
        RequestId(f"{request.request_id}#prefix"),
        request.prompt_token_ids[:num_tokens],
        cache_salt=request.cache_salt,
        priority=request.priority,
        traceparent=request.traceparent,
    )


def sample_id(request_id: RequestId, sample: int) -> RequestId:
    """No user can give a request this name."""
    return RequestId(f"{request_id}#{sample}") if sample else request_id


def sample_seed(seed: int | None, sample: int) -> int:
    return ((seed or 0) + sample) % 2**64
