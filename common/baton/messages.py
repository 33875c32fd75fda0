"""What processes say to each other. `codec` turns these into the protobuf messages of `proto/baton/v1`;
the in-process RPC hands them over as they are, so all of them are immutable."""

import enum
from dataclasses import dataclass, field

from baton.request import (
    BlockId,
    FinishReason,
    PromptLogprobs,
    Request,
    RequestId,
    SamplingParams,
    TokenLogprobs,
    WorkerId,
)


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's own measurements, sent with every Step and every lease renewal. Rates are 0 until measured.

    The time of a decode step is a line over the number of its sequences, through (decode_batch_size, decode_step_s)."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0  # prompt tokens accepted but not yet computed
    num_free_blocks: int = 0  # free or evictable
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    transfer_bytes_per_s: float = 0.0
    decode_batch_size: float = 0.0  # sequences in the steps that decode_step_s is the mean of
    decode_seq_s: float = 0.0  # what one sequence more adds to a step
    num_measured_steps: int = 0  # that decode_step_s was measured by lately
    num_measured_tokens: int = 0  # prompt tokens that prefill_tokens_per_s was measured on lately
    num_own: int = 0  # of running and waiting ones, those of the router that is told over its session


@dataclass(frozen=True, slots=True)
class Compatibility:
    """What a worker's KV is made of: what two workers compare before KV goes from one to the other
    (transfer.handshake). Digests are hexadecimal; "" is what nobody knows."""

    weights: str = ""  # digest
    config: str = ""  # digest of config.json without RoPE and dtype
    tokenizer: str = ""  # digest
    rope: str = ""  # in words
    layers: str = ""  # in words: how many, KV heads, dimensions
    revision: str = ""  # commit of a model from the hub
    arithmetic: str = ""  # in bit-exact mode, what makes the last bit
    dtype: str = ""  # of the KV
    num_shards: int = 1  # ranks that the KV heads are split over
    release: str = ""  # of Baton
    wire_versions: tuple[int, ...] = (2,)

    @property
    def identity(self) -> str:
        """Equal for workers whose KV means the same, however it lies in memory."""
        return "\x00".join((self.layers, self.rope, self.weights, self.config, self.arithmetic))


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """How the fleet knows a worker. A restart is a new incarnation; claims of an old one never count."""

    worker_id: WorkerId
    incarnation: str
    roles: tuple[Role, ...]
    address: str  # gRPC host:port
    transports: tuple[str, ...]  # names of the transports it has open, best first
    model: str  # the name it was started with
    fingerprint: str  # of model and KV layout: the root of its prefix blocks' names
    block_size: int
    num_blocks: int
    max_model_len: int
    kv_block_bytes: int
    draining: bool = False
    load: Load = field(default_factory=Load)
    compatibility: Compatibility = field(default_factory=Compatibility)
    prefills_ahead: bool = False  # it serves PREFILL_AHEAD; a release before did not


@dataclass(frozen=True, slots=True)
class Submit:
    """Router to decode worker. `handle` is the router's short name on this session for the request's first sample;
    sample k is handle + k. What concerns the whole request (Ticket, Failure, Received) is said of the first.

    With `remote_prefill` the worker reserves blocks and answers with a Ticket; without it the worker computes the
    prompt itself. `epoch` tells attempts at the same request apart: messages and pieces of another epoch are refused.
    """

    handle: int
    request: Request
    epoch: int
    remote_prefill: bool
    deadline_s: float  # from now, on the receiver's clock
    prefill_id: str = ""  # the worker that is to send the KV


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drops one sample; with the last one whatever is under way for the request."""

    handle: int


@dataclass(frozen=True, slots=True)
class Recompute:
    """The KV of the request behind `handle` will not come: compute its prompt in the blocks that are reserved for it.
    Ignored once the KV is there."""

    handle: int
    reason: str
    first_token: int | None = None  # where the prefill worker has drawn it: the client may have it already


SessionUp = Submit | Cancel | Recompute


@dataclass(frozen=True, slots=True)
class Ticket:
    """Decode worker to router to prefill worker: where this request's KV goes. Valid until the lease ends."""

    handle: int
    request_id: RequestId
    epoch: int
    worker_id: WorkerId
    transport: str  # names of those that the decode worker listens on, best first, with commas
    address: str  # opaque to everyone but these transports
    fingerprint: str
    block_size: int
    num_cached_tokens: int  # already held by the decode worker: not to be sent; a multiple of block_size
    lease_s: float
    compatibility: Compatibility = field(default_factory=Compatibility)  # the decode worker's

    @classmethod
    def of(
        cls, record: WorkerRecord, transport: str, address: str, lease_s: float,
        *, handle: int, request_id: RequestId, epoch: int, num_cached_tokens: int,
    ) -> "Ticket":  # fmt: skip
        """To the worker of this record."""
        return cls(
            handle, request_id, epoch, record.worker_id, transport, address, record.fingerprint, record.block_size,
            num_cached_tokens, lease_s, record.compatibility,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Failure:
    """The request behind `handle` and all its samples ended with an error; its blocks are already given back."""

    handle: int
    code: str
    message: str
    param: str | None = None  # the field that is wrong
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step of one decode worker, for all samples of one session, column by column.

    Row i carries tokens `first_index[i] ... first_index[i] + num_tokens[i] - 1` of sample `handles[i]`, counted from
    the first generated token; `token_ids` holds all rows one after another. `finished` lists (handle, reason).
    `logprobs` has one entry per token of the rows in `logprob_rows`, those of requests that asked for them;
    `prompt_logprobs` one for each of `prompt_logprob_handles`, requests whose first token is in this step; likewise
    `num_cached_tokens`, of a prompt that was computed here, found in the prefix cache; none found is not said.
    """

    handles: tuple[int, ...]
    first_index: tuple[int, ...]
    num_tokens: tuple[int, ...]
    token_ids: tuple[int, ...]
    finished: tuple[tuple[int, FinishReason], ...]
    load: Load
    logprob_rows: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprob_handles: tuple[int, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    cached_handles: tuple[int, ...] = ()
    num_cached_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Received:
    """The hand-over behind `handle` is verified and the sequence runs. For the record of the request."""

    handle: int
    num_blocks: int
    num_bytes: int
    seconds: float  # first piece opened to last piece verified
    first_token: int | None = (
        None  # as the last piece said: the prefill worker may be lost before it answers with it
    )


@dataclass(frozen=True, slots=True)
class Missed:
    """The hand-over behind `handle` failed here. Its blocks stay reserved for a Recompute, or a Cancel."""

    handle: int
    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    load: Load


SessionDown = Ticket | Failure | Step | Received | Missed | Heartbeat


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """A worker that is said to hold the first num_tokens of a prompt. To be fetched within timeout_s: computing them
    takes about as long."""

    worker_id: WorkerId
    address: str  # gRPC host:port
    num_tokens: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class PrefillCall:
    request: Request
    ticket: Ticket
    deadline_s: float
    source: PrefixSource | None = (
        None  # where to fetch the beginning of the prompt from, instead of computing it
    )


@dataclass(frozen=True, slots=True)
class PrefillBegin:
    """A prompt whose ticket follows. Nothing of its KV leaves before."""

    request: Request


@dataclass(frozen=True, slots=True)
class PrefillTicket:
    ticket: Ticket


PrefillUp = PrefillBegin | PrefillTicket


class FetchOutcome(enum.StrEnum):
    OK = "ok"
    EVICTED = "evicted"  # the owner does not hold as much any more
    LATE = "late"  # computing it would have been as fast
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Fetched:
    """What became of a prefix that was to be fetched. Unless it is OK, the prefix was computed."""

    outcome: FetchOutcome
    source_id: WorkerId
    num_tokens: int  # that came
    num_held_tokens: (
        int  # by the owner, as far as it was asked for; it said so itself unless it FAILED or was LATE
    )
    seconds: float
    num_mismatches: int = 0  # pieces that did not match their digest
    reason: str = ""


@dataclass(frozen=True, slots=True)
class FetchCall:
    """To the owner of a prefix: push all of it to this ticket, if all of it is there. `prefix` is a request whose
    prompt is the prefix; nothing is generated for it."""

    prefix: Request
    ticket: Ticket
    timeout_s: float


@dataclass(frozen=True, slots=True)
class FetchResult:
    """Less than what was asked for is held: nothing was pushed. Else all of it was."""

    num_held_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """The first token leaves from here. `finish_reason` is set when it is also the last one."""

    token_id: int
    finish_reason: FinishReason | None
    num_cached_tokens: int  # of the prompt: found in the prefill worker's own prefix cache, or fetched
    queue_s: float
    prefill_s: float
    load: Load
    logprobs: TokenLogprobs | None = None  # where the request asked for them
    prompt_logprobs: PromptLogprobs | None = None  # likewise
    transport: str = ""  # over which the KV goes; empty when none is sent
    fetched: Fetched | None = None  # where it had a source


@dataclass(frozen=True, slots=True)
class Pushed:
    """Nothing more of the KV leaves the prefill worker: the decode worker has it all, or, with a `reason`, never
    will. The last answer to a PrefillCall; the first one, too, when the push failed before the first token."""

    reason: str = ""
    num_mismatches: int = 0  # times that a piece did not match its digest where it arrived
    num_bytes: int = 0  # of KV that were acknowledged
    wire_s: float = 0.0  # during which some of it was on the wire
    transport: str = ""  # that carried it


PrefillAnswer = PrefillResult | Pushed


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """`Decode.Generate`: one request on one decode worker, prompt computed there; for simple clients."""

    request: Request
    deadline_s: float


@dataclass(frozen=True, slots=True)
class RouterGenerateCall:
    """`Router.Generate`: a prompt as text or as token ids (exactly one of them), served by the fleet."""

    model: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float
    request_id: str = ""  # drawn by the router where empty
    cache_salt: str = ""
    priority: int = 0  # lower is earlier


@dataclass(frozen=True, slots=True)
class GenerateChunk:
    first_index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token where the request asked for them
    prompt_logprobs: PromptLogprobs | None = None  # with the first token, where the request asked for them
    sample: int = 0  # of the request's n


@dataclass(frozen=True, slots=True)
class CancelCall:
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class CancelResult:
    found: bool


@dataclass(frozen=True, slots=True)
class StatusCall:
    blocks: bool = False  # Watch: send claims too, not only the record


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """`Status.Get` and each message of `Status.Watch`. Watch sends a snapshot first (`snapshot=True`: `added` is all),
    then changes as they happen and the record every few seconds; `sequence` rises by one per message."""

    record: WorkerRecord
    num_used_blocks: int
    sequence: int = 0
    snapshot: bool = False
    added: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


class Purpose(enum.StrEnum):
    """Why blocks are in use. Cached blocks are not: they are free and have a name."""

    RUNNING = "running"  # the engine computes with them
    RECEIVING = "receiving"  # reserved; a prefill worker writes to them, or will
    LEASED = "leased"  # computed; kept until the hand-over to a decode worker ended
    DRAINING = "draining"  # given up; a transport may still write to them


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds blocks. One block may have several holders: they share a prefix."""

    request_id: RequestId
    purpose: Purpose
    block_ids: tuple[BlockId, ...]
    held_s: float  # since they were taken
    epoch: int = 0  # of the hand-over, if there is one
    lease_left_s: float | None = None  # until the hand-over expires unless something comes
    note: str = ""  # what a person should know


@dataclass(frozen=True, slots=True)
class BlocksCall:
    pass


@dataclass(frozen=True, slots=True)
class BlockLedger:
    """num_used + num_free == num_blocks, always. num_cached blocks, used or free, have a name that prompts match."""

    worker_id: WorkerId
    num_blocks: int
    num_used: int
    num_free: int
    num_cached: int
    holders: tuple[Holder, ...]


@dataclass(frozen=True, slots=True)
class ListWorkersCall:
    pass


@dataclass(frozen=True, slots=True)
class WorkerList:
    workers: tuple[WorkerRecord, ...]
