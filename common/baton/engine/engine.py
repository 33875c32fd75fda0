"""The engine: requests in, tokens out, one step at a time. The same for every role, and without servers.

    check     would `add` take this prompt now?
    add       a prompt to be computed here; prefill_only: stops after the first token, keeps its blocks: HELD
    reserve   a prompt whose KV is computed elsewhere; when admitted its blocks can be written to: RESERVED
    activate  the KV has arrived, the sequence decodes from its first token on
    recompute it will not: the prompt is computed here after all
    fork      one more answer to a prompt that is here already
    reserve_prefix  the beginning of a prompt that another worker holds; when it has arrived: keep_prefix
    lease_prefix    the beginning of a prompt that is here, for another worker: HELD until release
    abort     the end of any of them, at any time; release is the end of a HELD one
    step      schedule, run, process; the next one is prepared while the device is still busy with this one

Blocks have one owner at any time, and go back when the last one who reads or writes them is done:
- the steps under way: a sequence that ends while a step has a row of it keeps its blocks until that step has ended;
- the transfer: blocks of a RESERVED sequence are written, blocks of a prefill-only one are read from outside.
  Only `abort` or `release` give those back, and whoever calls them has stopped the transfer before.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator

from baton.clock import Clock
from baton.config import EngineConfig
from baton.engine.batch import LayerListener, LayerProgress, ModelRunner, Pressure, StepOutput
from baton.engine.budget import StepBudget
from baton.engine.intake import Intake
from baton.engine.outcomes import Outcomes
from baton.engine.policy import MIXED, AdmissionPolicy, Kind
from baton.engine.preemption import Preemption
from baton.engine.rates import StepRates
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import ScheduledRow, Sequence, SequenceStatus
from baton.engine.steps import EndedStep, Steps
from baton.errors import ConfigError, InvalidRequest, OutOfMemory, Overloaded
from baton.kv.block import BlockHash
from baton.kv.cache_manager import KVCacheManager
from baton.kv.offload import HostBlocks
from baton.messages import Load
from baton.request import FinishReason, Request, RequestId

_log = logging.getLogger(__name__)


class Engine:
    """Owns the sequences. Confined to one event loop; every method but `step` returns at once and may be
    called while a step runs. `work` is set whenever a step might find something to do: await it instead of
    polling."""

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        clock: Clock,
        fingerprint: str,
        policy: AdmissionPolicy = MIXED,
    ) -> None:
        """`fingerprint` names model and layout: the root of the block hashes. Raises ConfigError."""
        if config.max_num_batched_tokens < config.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({config.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({config.max_num_seqs}): every running sequence needs one token per step"
            )
        storage = runner.storage
        self.work = asyncio.Event()
        self._config = config
        self._runner = runner
        self._clock = clock
        self._policy = policy
        self._rates = StepRates()
        self._budget = StepBudget(config.max_num_batched_tokens)
        self._kv = KVCacheManager(
            storage.num_blocks,
            storage.layout.block_size,
            fingerprint,
            enable_prefix_caching=config.enable_prefix_caching,
            host_blocks=self._host_blocks(),
        )
        self._preemption = Preemption(self._kv, self._rates)
        self._scheduler = Scheduler(self._kv, self._preemption, max_num_seqs=config.max_num_seqs)
        self._intake = Intake(runner)
        self._outcomes = Outcomes(self._kv, self._scheduler, self._drop)
        self._steps = Steps(runner, clock)
        self._sequences: dict[RequestId, Sequence] = {}
        self.num_prefix_query_tokens = 0  # of prompts that were admitted
        self.num_prefix_hit_tokens = 0  # of these, in the prefix cache
        self._granted: list[RequestId] = []  # reservations that got blocks; the next step's output tells
        self._layer_ends: tuple[int, ...] = ()
        self._on_layers: Callable[[LayerProgress], None] | None = None

    # --- requests ---

    async def prepare(self, request: Request) -> None:
        """Before `add` or `reserve`: whatever of it takes long is done beside the event loop. Raises
        InvalidRequest."""
        grammar, grammars = request.sampling.grammar, self._runner.grammars
        if grammar is not None and grammars is not None:
            await grammars.prepare(grammar)

    def check(self, request: Request, *, prefill_only: bool = False) -> None:
        """Raises what `add` would raise now."""
        self._check(request, _kind(remote=False, prefill_only=prefill_only))

    def add(self, request: Request, *, prefill_only: bool = False) -> None:
        """Raises InvalidRequest, RequestTooLarge or Overloaded; then nothing has changed."""
        self._enqueue(request, prefill_only=prefill_only)

    def reserve(self, request: Request) -> None:
        """Like `add`, for a prompt whose KV is computed elsewhere. `admit` or a step's `admitted` tells when
        its blocks are there; the first `num_cached_tokens` positions, a multiple of the block size and always
        less than the whole prompt, are filled already and must not be written."""
        self._enqueue(request, remote=True)

    def fork(self, parent_id: RequestId, request: Request) -> None:
        """Like `add`, for another answer to the prompt of `parent_id`, which may be in any state: the child waits
        for its prompt, wherever that is computed, then shares its blocks (copy on write) and draws tokens of its
        own from the first one on. When the parent has gone or goes before, the child is computed like any other."""
        self._enqueue(request, parent=self._sequences.get(parent_id))

    def admit(self) -> tuple[RequestId, ...]:
        """Grant the reservations at the head of the queue now, without a step. Returns those that got their
        blocks."""
        return tuple(self._stamped(self._scheduler.admit_reservations()))

    def activate(self, request_id: RequestId, first_token: int) -> FinishReason | None:
        """KV of the whole prompt is in the reserved blocks. Returns the reason if the first token is also the
        last: the sequence is gone then. Raises InvalidRequest, without effect, when there is no such
        reservation."""
        sequence = self._reserved(request_id, first_token)
        self._kv.commit(sequence, sequence.num_prompt_tokens)
        sequence.append(first_token)
        return self._start(sequence)

    def recompute(self, request_id: RequestId, first_token: int | None) -> FinishReason | None:
        """The KV of a reservation will not come, and nobody writes to its blocks any more: its prompt is computed here,
        in these blocks. `first_token`, where somebody has drawn it, is kept, and only what follows is drawn. Returns
        and raises like `activate`."""
        sequence = self._reserved(request_id, first_token)
        sequence.remote = False
        if first_token is not None:
            sequence.append(first_token)
        return self._start(sequence)

    def reserve_prefix(self, prefix: Request) -> None:
        """Like `reserve`, for blocks that are to be cached and no more: `keep_prefix` or `abort` follows."""
        if not self._config.enable_prefix_caching:
            raise InvalidRequest("this worker keeps no prefixes: it was started without prefix caching")
        self._enqueue(prefix, remote=True, prefill_only=True)

    def keep_prefix(self, request_id: RequestId) -> None:
        """Its KV has arrived. The reservation is over; its full blocks are cached prefix from now on."""
        sequence = self._reserved(request_id, None)
        self._kv.commit(sequence, sequence.num_prompt_tokens)
        self.abort(request_id)

    def lease_prefix(self, prefix: Request) -> Sequence:
        """What is cached of this prompt (`num_cached_tokens` of it, full blocks) is neither evicted nor written to
        until `release`. Raises InvalidRequest when the name is in use."""
        self._check_name(prefix)
        sequence = Sequence(prefix, prefill_only=True, token_ids=list(prefix.prompt_token_ids))
        sequence.admitted_s = self._clock.now()
        self._sequences[prefix.request_id] = sequence
        self._scheduler.lease(sequence)
        return sequence

    def abort(self, request_id: RequestId) -> None:
        """The request is unknown from now on. Its blocks go back at once, or when the steps it is part of have
        ended. Unknown requests are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            sequence.finish_reason = FinishReason.ABORT
            self._drop(sequence)
            self.work.set()

    def release(self, request_id: RequestId) -> None:
        """The hand-over of a HELD sequence is done. Its blocks go back and stay as cached prefix."""
        self.abort(request_id)

    def sequence(self, request_id: RequestId) -> Sequence | None:
        return self._sequences.get(request_id)

    # --- steps ---

    @property
    def has_work(self) -> bool:
        """False: a step would find nothing to do until another method changed something."""
        return self.work.is_set()

    async def step(self) -> StepOutput:
        """Waits for one batch to end. When the runner raises, all sequences of the batch fail; the engine goes on.
        When cancelled, what was under way has had no effect, and the sequences are as they were."""
        if not self._steps.are_under_way and not self._launch():
            self.work.clear()
            return StepOutput((), self._take_granted(), 0, 0.0)
        try:
            if await self._steps.first_nears_its_end():
                self._launch()
            ended = await self._steps.first_ends()
        except asyncio.CancelledError:
            self._scheduler.ended(await self._steps.retract())
            raise
        if isinstance(ended.error, OutOfMemory) and self._budget.did_not_fit(ended.num_tokens):
            return await self._take_back(ended)
        self._note(ended)
        outputs = tuple(self._outcomes.of(ended))
        return StepOutput(outputs, self._take_granted(), ended.num_tokens, ended.seconds)

    def _launch(self) -> bool:
        rows, admitted = self._scheduler.schedule(self._budget.num_tokens, ahead=self._steps.are_under_way)
        self._granted.extend(self._stamped(admitted))
        if rows:
            self._steps.launch(rows, self._layer_listener(rows))
        return bool(rows)

    def _note(self, step: EndedStep) -> None:
        if step.error is not None:
            _log.error("a step of %d sequences failed", len(step.rows), exc_info=step.error)
            return
        num_decode = sum(row.num_tokens == 1 for row in step.rows)
        self._rates.note(num_decode, step.num_tokens - num_decode, step.seconds)
        self._budget.fitted()

    async def _take_back(self, step: EndedStep) -> StepOutput:
        """It did not fit. Nor may the next one, which counts on its tokens."""
        _log.warning("a step of %d tokens did not fit into memory: smaller ones follow", step.num_tokens)
        self._scheduler.ended(await self._steps.retract())
        self._scheduler.ended(row.sequence for row in step.rows)
        return StepOutput((), self._take_granted(), 0, step.seconds)

    def _take_granted(self) -> tuple[RequestId, ...]:
        """Since the last step, and those that fit in now that it has given blocks back."""
        taken, self._granted = (*self._granted, *self.admit()), []
        return taken

    def listen_to_layers(
        self, ends: tuple[int, ...], listener: Callable[[LayerProgress], None] | None
    ) -> None:
        """While a step computes prompts that are handed over, tell when layers [0, end) of each are written, for each
        of `ends`. One listener; None takes it away."""
        self._layer_ends, self._on_layers = ends, listener

    # --- what others want to know ---

    def load(self) -> Load:
        waiting = sum(_num_to_compute(s) for s in self._scheduler.waiting if not s.remote)
        running = sum(len(s.token_ids) - s.num_computed_tokens - 1 for s in self._scheduler.running)
        return Load(
            num_running=len(self._scheduler.running) + self._scheduler.num_reserved,
            num_waiting=len(self._scheduler.waiting),
            num_waiting_tokens=waiting + running,
            num_free_blocks=self._kv.num_free_blocks,
            prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
            decode_step_s=self._rates.decode_step_s,
            decode_batch_size=self._rates.decode_batch_size,
            decode_seq_s=self._rates.decode_seq_s,
            num_measured_steps=round(self._rates.num_decode_steps),
            num_measured_tokens=round(self._rates.num_prefill_tokens),
        )

    def block_events(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Cached prefix blocks that were (added, removed) since the last call."""
        return self._kv.drain_events()

    def cached_hashes(self) -> Iterator[BlockHash]:
        return self._kv.cached_hashes()

    @property
    def num_cached_blocks(self) -> int:
        """That have a name, used or free."""
        return self._kv.num_cached

    def owners(self) -> Iterator[Sequence]:
        """Every sequence that holds blocks."""
        return self._kv.owners()

    @property
    def max_model_len(self) -> int:
        return self._intake.max_model_len

    @property
    def num_used_blocks(self) -> int:
        return self._kv.num_used_blocks

    @property
    def num_blocks(self) -> int:
        return self._kv.num_blocks

    @property
    def max_num_seqs(self) -> int:
        return self._config.max_num_seqs

    @property
    def num_sequences(self) -> int:
        """Requests that are here in any state."""
        return len(self._sequences)

    @property
    def pressure(self) -> Pressure:
        did = self._preemption
        return Pressure(did.num_swapped, did.num_recomputed, self._budget.num_retries)

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        self._kv.check_integrity()
        self._scheduler.check_integrity()
        if not self._steps.are_under_way:
            assert not any(sequence.num_steps_in_flight for sequence in self._kv.owners())
        if not self._sequences and not self._steps.are_under_way:
            assert self._kv.num_used_blocks == 0 and not self._scheduler.has_work

    # --- a sequence's way through ---

    def _enqueue(
        self,
        request: Request,
        *,
        remote: bool = False,
        prefill_only: bool = False,
        parent: Sequence | None = None,
    ) -> None:
        self._check(request, _kind(remote, prefill_only))
        sequence = self._intake.sequence(
            request,
            remote=remote,
            prefill_only=prefill_only,
            parent=parent,
            arrival_s=self._clock.now(),
            prefill_s=self._rates.prefill_s(request.num_prompt_tokens),
        )
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)
        self.work.set()

    def _check(self, request: Request, kind: Kind) -> None:
        self._check_name(request)
        self._policy.check(kind)
        if len(self._scheduler.waiting) >= self._config.max_num_waiting:
            raise Overloaded(
                f"{len(self._scheduler.waiting)} requests are waiting already", retry_after_s=self._queue_s()
            )
        self._intake.check(request)

    def _check_name(self, request: Request) -> None:
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request {request.request_id} is here already", param="request_id")

    def _host_blocks(self) -> HostBlocks | None:
        num_bytes = self._config.swap_space_bytes
        if not num_bytes:
            return None
        return HostBlocks(self._runner.storage, num_bytes, self._clock, self._rates.note_swap)

    def _queue_s(self) -> float:
        load = self.load()
        if not load.prefill_tokens_per_s:
            return 1.0
        return max(1.0, load.num_waiting_tokens / load.prefill_tokens_per_s)

    def _stamped(self, admitted: Iterable[Sequence]) -> list[RequestId]:
        """The time of admission; the ids of those that wait for their KV now."""
        admitted = list(admitted)
        for sequence in admitted:
            is_prefix = sequence.remote and sequence.prefill_only  # not a prompt, but a part of one
            if not sequence.admitted_s and not is_prefix:  # else it had to give way in between
                self.num_prefix_query_tokens += sequence.num_prompt_tokens
                self.num_prefix_hit_tokens += sequence.num_cached_tokens
            sequence.admitted_s = self._clock.now()
        return [sequence.request_id for sequence in admitted if sequence.remote]

    def _layer_listener(self, rows: Iterable[ScheduledRow]) -> LayerListener | None:
        handed_over = [(row, tuple(row.sequence.block_table)) for row in rows if row.sequence.prefill_only]
        tell = self._on_layers
        if tell is None or not self._layer_ends or not handed_over:
            return None

        def written(num_layers: int) -> None:
            for row, block_table in handed_over:
                # An aborted request's name may be in use again.
                if not row.sequence.finished:
                    tell(LayerProgress(row.sequence.request_id, row.end, num_layers, block_table))

        return LayerListener(self._layer_ends, written)

    def _reserved(self, request_id: RequestId, first_token: int | None) -> Sequence:
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.status is not SequenceStatus.RESERVED:
            raise InvalidRequest(f"request {request_id} holds no reservation")
        if first_token is not None and not 0 <= first_token < self._runner.vocab_size:
            raise InvalidRequest(f"token {first_token} is not in the vocabulary", param="first_token")
        if first_token is not None:
            sequence.prompt_scores = None  # whoever drew it has told them
        return sequence

    def _start(self, sequence: Sequence) -> FinishReason | None:
        if sequence.finished:
            self._drop(sequence)
        else:
            self._scheduler.activate(sequence)
        self.work.set()
        return sequence.finish_reason

    def _drop(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self._stamped(self._scheduler.remove(sequence))


def _num_to_compute(waiting: Sequence) -> int:
    return 1 if waiting.parent else len(waiting.token_ids) - waiting.num_computed_tokens


def _kind(remote: bool, prefill_only: bool) -> Kind:
    return Kind.PREFILL_ONLY if prefill_only else Kind.REMOTE if remote else Kind.LOCAL
