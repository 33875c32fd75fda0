"""Who computes how many tokens in the next step. Decides only: no tensors, no waiting, no clock.

    add --> waiting --schedule, admit--> running --finish--> (gone)
                ^                          |  ^
                +------- preempt ----------+  +-- activate -- reserved <--schedule, admit-- waiting (remote)
                                           +-- hold --> held --remove--> (gone)             prefill only

There is no prefill phase and no decode phase: a sequence has tokens whose KV is not computed yet, and a step
computes some of them, one for a sequence that decodes, a chunk for a prompt.

Order. Sequences that decode come first, all of them in every step, so a long prompt delays them by no more than the
token budget. What is left of the budget goes to prompts, running and waiting ones alike, in the order of their turns
(see `turn`). In the queue nothing overtakes the one whose turn it is, so a big request does not starve; only a fork is
passed over, as long as its parent's prompt is under way.

One step ahead. A step may be asked for while the one before it runs; then sequences are taken as they will be when
that has ended. Nobody is preempted for such a step: their blocks are in use. When one would have to be, there is no
such step, and the next is scheduled when the running one has ended.

Blocks. A sequence is admitted with blocks for all its tokens and the next one, or not at all; only decoding
asks for more. When none is left, the running sequence with the last turn gives its blocks back and returns to the queue
(see `preemption`). A prefill-only sequence is never chosen: its blocks may be on the wire. The sequence with the first
turn is never chosen either as long as there is another, and it is admitted first: so there is always one that moves,
and every one becomes the first in the end.
"""

import bisect
import heapq
from collections.abc import Iterable
from typing import NamedTuple

from baton.engine.preemption import Preemption
from baton.engine.sequence import ScheduledRow, Sequence, SequenceStatus
from baton.kv.cache_manager import KVCacheManager
from baton.request import FinishReason


class Schedule(NamedTuple):
    rows: list[ScheduledRow]  # decodes first
    admitted: list[Sequence]  # from the waiting queue; those that are `remote` got blocks and no row


class Scheduler:
    """Owns the queues and the status of every sequence. Not to be called while a step of its own is half
    done."""

    def __init__(self, kv: KVCacheManager, preemption: Preemption, *, max_num_seqs: int) -> None:
        self.waiting: list[Sequence] = []  # in the order of their turns
        self.running: list[Sequence] = []  # in the order of their turns
        self.num_reserved = 0
        self.num_preemptions = 0
        self._kv = kv
        self._preemption = preemption
        self._max_num_seqs = max_num_seqs
        self._num_added = 0
        # Room for running sequences to grow into, so that an admission is not followed by a preemption at
        # once.
        self._watermark = max(1, kv.num_blocks // 100)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        self._num_added += 1
        sequence.number = self._num_added
        self._wait(sequence)

    def schedule(self, budget: int, *, ahead: bool = False) -> Schedule:
        """At most `budget` tokens. `ahead`: a step is running."""
        rows: list[ScheduledRow] = []
        admitted: list[Sequence] = []
        decodes, prompts = self._decodes_and_prompts()
        num_preemptions, blocked = self.num_preemptions, False
        for sequence in (*decodes, *heapq.merge(prompts, self._in_line(), key=_turn)):
            if sequence.status is SequenceStatus.WAITING:
                # Nobody enters a step in which somebody had to give way.
                blocked = blocked or self.num_preemptions > num_preemptions
                if blocked or not (sequence.remote or budget) or not self._admit(sequence):
                    blocked = True
                    continue
                admitted.append(sequence)
                if sequence.remote:
                    continue
            row = _row(sequence, budget)
            if not row.num_tokens:
                continue
            if self._make_room(sequence, row.end, may_preempt=not ahead):
                rows.append(row)
                budget -= row.num_tokens
            elif ahead:
                return Schedule([], admitted)
        return Schedule(rows, admitted)

    def admit_reservations(self) -> list[Sequence]:
        """Those at the head of the queue, without a step; harmless while one runs."""
        admitted = []
        for sequence in self._in_line():
            if not sequence.remote or not self._admit(sequence):
                break
            admitted.append(sequence)
        return admitted

    def activate(self, sequence: Sequence) -> None:
        """The KV of a reserved sequence has arrived, or will be computed here."""
        assert sequence.status is SequenceStatus.RESERVED
        self.num_reserved -= 1
        self._run(sequence)

    def hold(self, sequence: Sequence) -> None:
        """A prefill-only sequence is done; its blocks stay until `remove`."""
        self.running.remove(sequence)
        sequence.status = SequenceStatus.HELD

    def lease(self, sequence: Sequence) -> None:
        """What is cached of it stays until `remove`; nothing is computed, and nobody waits."""
        self._kv.hold(sequence)
        sequence.status = SequenceStatus.HELD

    def remove(self, sequence: Sequence) -> list[Sequence]:
        """Out of whatever queue it is in; its blocks go back, now or when the steps that write to them have ended.
        Returns who was admitted in its place."""
        match sequence.status:
            case SequenceStatus.WAITING:
                self.waiting.remove(sequence)
            case SequenceStatus.RESERVED:
                self.num_reserved -= 1
            case SequenceStatus.RUNNING:
                self.running.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        admitted = self._hand_down(sequence)
        self.ended((sequence,))
        return admitted

    def ended(self, sequences: Iterable[Sequence]) -> None:
        """A step that had rows of them has ended."""
        for sequence in sequences:
            if sequence.status is SequenceStatus.FINISHED and not sequence.num_steps_in_flight:
                self._kv.free(sequence)

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        assert all(s.status is SequenceStatus.WAITING and not s.block_table for s in self.waiting)
        assert self.waiting == sorted(self.waiting, key=_turn)
        assert all(s.status is SequenceStatus.RUNNING and s.block_table for s in self.running)
        assert self.running == sorted(self.running, key=_turn)
        assert 0 <= self.num_reserved <= self._max_num_seqs - len(self.running)

    def _decodes_and_prompts(self) -> tuple[list[Sequence], list[Sequence]]:
        """In the order of their turns: who has to give way has no row yet, for only decodes ask for blocks."""
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            (decodes if sequence.num_ready_tokens <= 1 else prompts).append(sequence)
        return decodes, prompts

    def _in_line(self) -> list[Sequence]:
        return [sequence for sequence in self.waiting if not self._waits_for_parent(sequence)]

    def _waits_for_parent(self, sequence: Sequence) -> bool:
        """One that has gone, or whose prompt is there, is not waited for."""
        parent = sequence.parent
        return (
            parent is not None
            and parent.status is not SequenceStatus.FINISHED
            and not self._kv.can_fork(parent)
        )

    def _admit(self, sequence: Sequence) -> bool:
        if len(self.running) + self.num_reserved >= self._max_num_seqs:
            return False
        num_tokens = len(sequence.token_ids) + (not sequence.prefill_only)
        # An empty pool may be filled to the brim: otherwise the largest request that fits would wait for
        # ever.
        keep_free = self._watermark if self._kv.num_used_blocks else 0
        if not self._take_blocks(sequence, num_tokens, keep_free):
            return False
        self.waiting.remove(sequence)
        sequence.parent = None
        if sequence.remote:
            sequence.status = SequenceStatus.RESERVED
            self.num_reserved += 1
        else:
            self._run(sequence)
        return True

    def _hand_down(self, sequence: Sequence) -> list[Sequence]:
        """A prompt whose forks still wait outlives the one that goes: the first of them takes its place and shares the
        prompt's blocks before they are given back; the others are forks of that one from now on."""
        children = [child for child in self.waiting if child.parent is sequence]
        if not children or sequence.finish_reason is FinishReason.ERROR or not self._kv.can_fork(sequence):
            return []
        heir, *others = children
        if not self._admit(heir):
            return []
        for other in others:
            other.parent = heir
        return [heir]

    def _take_blocks(self, sequence: Sequence, num_tokens: int, keep_free: int) -> bool:
        parent = sequence.parent
        if parent is not None and self._kv.can_fork(parent):
            return self._kv.fork(sequence, parent, num_tokens, keep_free=keep_free)
        return self._kv.allocate(sequence, num_tokens, keep_free=keep_free)

    def _run(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        bisect.insort(self.running, sequence, key=_turn)

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        bisect.insort(self.waiting, sequence, key=_turn)

    def _make_room(self, sequence: Sequence, num_tokens: int, *, may_preempt: bool) -> bool:
        """False: there is none, or it was itself the one to give way."""
        while not self._kv.allocate(sequence, num_tokens):
            if not may_preempt:
                return False
            victim = next(s for s in reversed(self.running) if not s.prefill_only)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._preemption.give_up(sequence)
        sequence.remote = False  # what is missing of its prompt is computed here now
        self._wait(sequence)


def _row(sequence: Sequence, budget: int) -> ScheduledRow:
    start, num_ready = sequence.next_start, sequence.num_ready_tokens
    num_tokens = min(num_ready, budget)
    return ScheduledRow(sequence, start, num_tokens, num_tokens == num_ready)


def _turn(sequence: Sequence) -> tuple[float, int]:
    return sequence.turn_s, sequence.number
