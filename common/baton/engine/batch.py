"""What one engine step computes, and the contract of whoever computes it. Torch-free."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from baton.engine.prompt_scores import PromptScores
from baton.engine.sampling_state import Matcher, SamplingState
from baton.kv.block import BlockCopy, BlockHash, num_blocks_for
from baton.kv.layout import BlockStorage
from baton.request import (
    BlockId,
    FinishReason,
    Grammar,
    PromptLogprobs,
    Request,
    RequestId,
    SamplingParams,
    TokenLogprobs,
)


class SequenceStatus(enum.Enum):
    """WAITING -> RUNNING -> FINISHED; a reserved one: WAITING -> RESERVED -> RUNNING -> FINISHED.

    Preemption takes RUNNING back to WAITING with nothing computed.
    """

    WAITING = enum.auto()
    RESERVED = enum.auto()  # holds blocks, its KV is on the way from a prefill worker
    RUNNING = enum.auto()
    HELD = enum.auto()  # prefill only: done, but the blocks stay until the hand-over released them
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine's mutable state of one request. Only the engine writes it; everybody else reads.

    token_ids = prompt, then generated tokens. KV exists for the first num_computed_tokens of them; block_table covers
    at least these. A sequence may run when num_computed_tokens < len(token_ids).
    """

    request: Request
    remote: bool = False  # KV of the prompt comes from a prefill worker
    prefill_only: bool = False  # stop after the first token and hold the blocks
    status: SequenceStatus = SequenceStatus.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache when admitted
    block_table: list[BlockId] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)  # of the full blocks known so far
    parent: "Sequence | None" = (
        None  # until admitted: the one with the same prompt whose blocks it will share
    )
    block_copy: BlockCopy | None = (
        None  # to be made before its next tokens are computed; the source is kept till then
    )
    sampling_state: SamplingState | None = None  # where its parameters need one
    prompt_scores: PromptScores | None = None  # until they are told with the first token
    finish_reason: FinishReason | None = None
    in_flight: bool = (
        False  # part of the step that runs now: its blocks must not be given back before it ends
    )
    abort_requested: bool = False
    arrival_s: float = 0.0
    admitted_s: float = 0.0

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def prompt_blocks(self, block_size: int) -> list[BlockId]:
        """Where the prompt's KV lies; the last block may be partly filled."""
        return self.block_table[: num_blocks_for(self.request.num_prompt_tokens, block_size)]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """Tokens [start, start + len(token_ids)) of one sequence: their KV is written, and with `sample` the token after
    the last of them is drawn. The KV of positions below `start` is there already. With `scores` all of these positions
    are noted there that it has targets for."""

    request_id: RequestId
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[BlockId, ...]  # covers start + len(token_ids) positions
    sample: bool
    sampling: SamplingParams
    state: SamplingState | None = None
    scores: PromptScores | None = None


@dataclass(frozen=True, slots=True)
class LayerListener:
    """Someone who wants a batch's KV while later layers are still computed: `written(end)` says that the KV of layers
    [0, end) of all rows is in the pool. Called on the engine's loop before `execute` ends, for ends in ascending
    order; a runner may leave calls out, because the end of the step tells the same."""

    ends: tuple[int, ...]
    written: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Batch:
    """Ragged: rows one after another, prompt chunks and single decode tokens in one step. `copies` are made before
    anything is written; no destination is a source or comes twice."""

    rows: tuple[BatchRow, ...]
    listener: LayerListener | None = None
    copies: tuple[BlockCopy, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


class Grammars(Protocol):
    def matcher(self, grammar: Grammar) -> Matcher:
        """Raises InvalidRequest."""
        ...


class ModelRunner(Protocol):
    """Runs batches on one device. One at a time: the engine awaits `execute` before it calls it again."""

    @property
    def storage(self) -> BlockStorage: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int:
        """What the model's positions allow."""
        ...

    @property
    def grammars(self) -> Grammars | None:
        """None: requests with a grammar are refused."""
        ...

    async def execute(self, batch: Batch) -> tuple[int, ...]:
        """One token per row with `sample`, in row order; negative where there is none, because the logits are NaN or
        the request allows no token: that request fails, the others go on. Log probabilities go to the rows' states
        and scores.
        Must not be abandoned half-way: when the awaiting task is cancelled it still waits for the device, because
        the step writes to the pool."""
        ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What a step did for one sequence. `token_ids` are new ones, the first of them the `first_index`-th generated."""

    request_id: RequestId
    num_computed_tokens: int
    first_index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str = ""  # why, where finish_reason is ERROR
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token where the request asked for them
    prompt_logprobs: PromptLogprobs | None = None  # with the first token, where the request asked for them


@dataclass(frozen=True, slots=True)
class LayerProgress:
    """In the middle of a step: the KV of layers [0, num_layers) of positions [0, num_tokens) is in these blocks. It
    counts as computed only when the step has ended."""

    request_id: RequestId
    num_tokens: int
    num_layers: int
    block_table: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class StepOutput:
    outputs: tuple[SequenceOutput, ...]
    admitted: tuple[RequestId, ...]  # reservations that got their blocks
    num_tokens: int  # computed in this step
    seconds: float
