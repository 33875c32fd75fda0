"""The engine's state of one request, and its part in a step. Torch-free."""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.engine.prompt_scores import PromptScores
from baton.engine.sampling_state import SamplingState
from baton.kv.block import BlockCopy, BlockHash, num_blocks_for
from baton.kv.offload import HostBlockId
from baton.request import BlockId, FinishReason, Request, RequestId


class SequenceStatus(enum.Enum):
    """WAITING -> RUNNING -> FINISHED; a reserved one: WAITING -> RESERVED -> RUNNING -> FINISHED.

    Preemption takes RUNNING back to WAITING with nothing computed, or with its KV in host memory.
    """

    WAITING = enum.auto()
    RESERVED = enum.auto()  # holds blocks, its KV is on the way from a prefill worker
    RUNNING = enum.auto()
    HELD = enum.auto()  # prefill only: done, but the blocks stay until the hand-over released them
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable. Only the engine writes it; everybody else reads.

    token_ids = prompt, then generated tokens. KV exists for the first num_computed_tokens of them; block_table covers
    at least these. A step that has not ended is writing KV for the next num_tokens_in_flight, and the last
    num_tokens_pending of these are not in token_ids yet: only the device knows them.
    """

    request: Request
    remote: bool = False  # KV of the prompt comes from a prefill worker
    prefill_only: bool = False  # stop after the first token and hold the blocks
    status: SequenceStatus = SequenceStatus.WAITING
    token_ids: list[int] = field(default_factory=list)
    max_num_tokens: int = 2**31  # prompt and answer: what the request and the model allow
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache when admitted
    block_table: list[BlockId] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)  # of the full blocks known so far
    parent: "Sequence | None" = (
        None  # until admitted: the one with the same prompt whose blocks it will share
    )
    host_blocks: list[HostBlockId] = field(
        default_factory=list
    )  # swapped out: where its computed tokens' KV is
    block_copy: BlockCopy | None = None  # to be made before its next tokens are computed; keeps its source
    sampling_state: SamplingState | None = None  # where its parameters need one
    prompt_scores: PromptScores | None = None  # until they are told with the first token
    finish_reason: FinishReason | None = None
    arrival_s: float = 0.0
    turn_s: float = 0.0  # the smaller goes first; see `turn`
    number: int = 0  # in the order of arrival, among equal turns
    admitted_s: float = 0.0
    num_steps_in_flight: int = 0  # its blocks must not go back before they have ended
    num_tokens_in_flight: int = 0
    num_tokens_pending: int = 0
    stop_ids: frozenset[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        """Asked for at every token, and made anew by the request each time."""
        self.stop_ids = self.request.stop_ids
        self.num_prompt_tokens = self.request.num_prompt_tokens

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def next_start(self) -> int:
        """Where its next row begins, if the steps under way end well."""
        return self.num_computed_tokens + self.num_tokens_in_flight

    @property
    def num_ready_tokens(self) -> int:
        """How many the next step could compute; none where the token that is being drawn is certainly the last."""
        num_tokens = len(self.token_ids) + self.num_tokens_pending
        if self.num_tokens_pending and (self.prefill_only or num_tokens >= self.max_num_tokens):
            return 0
        return num_tokens - self.next_start

    def append(self, token: int) -> None:
        """It has been drawn; `finish_reason` is set when it is the last. Raises what a grammar has against it."""
        self.token_ids.append(token)
        if self.sampling_state is not None:
            self.sampling_state.append(token)
        has_ended = self.sampling_state is not None and self.sampling_state.has_ended
        if has_ended or token in self.stop_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) >= self.max_num_tokens:
            self.finish_reason = FinishReason.LENGTH

    def prompt_blocks(self, block_size: int) -> list[BlockId]:
        """Where the prompt's KV lies; the last block may be partly filled."""
        return self.block_table[: num_blocks_for(self.num_prompt_tokens, block_size)]


class ScheduledRow(NamedTuple):
    """Positions [start, start + num_tokens) are computed, and with `sample` the token after them is drawn."""

    sequence: Sequence
    start: int
    num_tokens: int
    sample: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens
