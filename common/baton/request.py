"""What a user asked for, after validation: immutable, torch-free, the same in every process."""

import enum
from dataclasses import dataclass, field
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
class SamplingParams:
    """Sampling is a pure function of (seed, position): no state beyond these fields and the tokens themselves.

    temperature 0 is greedy. top_k 0 means all tokens. Stop strings are matched on text, in the router;
    the engine sees `stop_token_ids` only (EOS is added by the request unless `ignore_eos`).
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0  # 64 bit; the router draws one where the user gave none
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""  # prefix blocks are shared only among equal salts

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def stop_ids(self) -> frozenset[int]:
        eos = () if self.sampling.ignore_eos else self.eos_token_ids
        return frozenset(eos) | frozenset(self.sampling.stop_token_ids)
