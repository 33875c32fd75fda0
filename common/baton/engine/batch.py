"""What one engine step computes, and the contract of whoever computes it. Torch-free."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from baton.engine.prompt_scores import PromptScores
from baton.engine.sampling_state import Matcher, SamplingState
from baton.kv.block import BlockCopy
from baton.kv.layout import BlockStorage
from baton.request import (
    BlockId,
    FinishReason,
    Grammar,
    PromptLogprobs,
    RequestId,
    SamplingParams,
    TokenLogprobs,
)


class BatchRow(NamedTuple):
    """Tokens [start, start + len(token_ids)) of one sequence: their KV is written, and with `sample` the token after
    the last of them is drawn. The KV of positions below `start` is there already. With `scores` all of these positions
    are noted there that it has targets for.

    Where a step is prepared before the one before it has ended, its input may be a token that this one draws. It is
    written as a negative number: -1 - i is the i-th token that the batch before draws.
    """

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
    anything is written; no destination is a source or comes twice.

    `prepare_next` may be called once, on the engine's loop, when it is time to prepare the next batch: early enough for
    that to be ready when this one ends, late enough for it to hold what arrives meanwhile. A runner that does not
    call it gets the next batch when this one has ended."""

    rows: tuple[BatchRow, ...]
    listener: LayerListener | None = None
    copies: tuple[BlockCopy, ...] = ()
    prepare_next: Callable[[], None] = lambda: None

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


class Grammars(Protocol):
    async def prepare(self, grammar: Grammar) -> None:
        """Compiles it beside the event loop, so that `matcher` answers at once. Raises InvalidRequest."""
        ...

    def matcher(self, grammar: Grammar) -> Matcher:
        """Raises InvalidRequest."""
        ...


class ModelRunner(Protocol):
    """Runs batches on one device, in the order of the calls. A batch may be given while the one before runs."""

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
        and scores. A row that waits for a token of the batch before computes anything when that failed or drew none:
        the engine takes no notice of it.
        Raises OutOfMemory when it takes fewer tokens to fit; any other error ends all requests of the batch.
        Must not be abandoned half-way: when the awaiting task is cancelled it still waits for the device, because
        the step writes to the pool."""
        ...

    async def aclose(self) -> None: ...


class PromptFacts(NamedTuple):
    """Of a prompt that was computed here."""

    arrival_s: float  # on the engine's clock
    admitted_s: float
    num_cached_tokens: int  # found in the prefix cache


class SequenceOutput(NamedTuple):
    """What a step did for one sequence. `token_ids` are new ones, the first of them the `first_index`-th generated."""

    request_id: RequestId
    num_computed_tokens: int
    first_index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str = ""  # why, where finish_reason is ERROR
    corrupted: bool = False  # it is because the model's logits were no numbers
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token where the request asked for them
    prompt_logprobs: PromptLogprobs | None = None  # with the first token, where the request asked for them
    prompt: PromptFacts | None = None  # with the first token


@dataclass(frozen=True, slots=True)
class LayerProgress:
    """In the middle of a step: the KV of layers [0, num_layers) of positions [0, num_tokens) is in these blocks. It
    counts as computed only when the step has ended."""

    request_id: RequestId
    num_tokens: int
    num_layers: int
    block_table: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class Pressure:
    """What an engine has had to do since its start because memory was short."""

    num_swapped: int = 0  # requests that gave their blocks back, their KV kept in host memory
    num_recomputed: int = 0  # the same, their KV computed again
    num_retries: int = 0  # steps that did not fit into the device's memory

    @property
    def num_preemptions(self) -> int:
        return self.num_swapped + self.num_recomputed


@dataclass(frozen=True, slots=True)
class StepOutput:
    outputs: tuple[SequenceOutput, ...]
    admitted: tuple[RequestId, ...]  # reservations that got their blocks
    num_tokens: int  # computed in this step
    seconds: float
