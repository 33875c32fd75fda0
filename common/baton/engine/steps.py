"""The steps under way: at most two, so that the device goes from one to the next without waiting for the host.

    launch --> runs --> ended                  its tokens are known, its KV counts
                 +----> retracted              nobody wants it any more: it has had no effect

The second one is made while the first runs (`Batch.prepare_next` says when), with the first one's tokens still unknown.
When these turn out to end a sequence, its row in the second step is for nothing, and its blocks are kept until that
step has ended, too.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from baton.clock import Clock
from baton.engine.batch import Batch, BatchRow, LayerListener, ModelRunner
from baton.engine.sequence import ScheduledRow, Sequence


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    rows: tuple[ScheduledRow, ...]
    execution: asyncio.Task[tuple[int, ...]]
    late: asyncio.Event  # time to prepare the next one
    launched_s: float

    @property
    def must_end_first(self) -> bool:
        """What may follow a token is known only when that token is."""
        return any(row.sample and row.sequence.sampling_state is not None for row in self.rows)


class EndedStep(NamedTuple):
    rows: tuple[ScheduledRow, ...]
    tokens: tuple[int, ...]  # one per row with `sample`; none with an error
    error: BaseException | None
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


class Steps:
    """Owns them, and of a Sequence what it says about steps in flight."""

    def __init__(self, runner: ModelRunner, clock: Clock) -> None:
        self._runner = runner
        self._clock = clock
        self._under_way: deque[_Step] = deque()
        self._last_end_s = 0.0

    @property
    def are_under_way(self) -> bool:
        return bool(self._under_way)

    def launch(self, rows: Iterable[ScheduledRow], listener: LayerListener | None) -> None:
        rows, late = tuple(rows), asyncio.Event()
        drawn = _drawn(self._under_way[-1].rows) if self._under_way else {}
        batch = Batch(
            tuple(_batch_row(row, drawn) for row in rows),
            listener,
            # A sequence in flight has had its copy made by the step before.
            tuple(s.block_copy for s, *_ in rows if s.block_copy is not None and not s.num_steps_in_flight),
            late.set,
        )
        execution = asyncio.create_task(self._runner.execute(batch))
        execution.add_done_callback(lambda _: late.set())
        for row in rows:
            _begin(row)
        self._under_way.append(_Step(rows, execution, late, self._clock.now()))

    async def first_nears_its_end(self) -> bool:
        """True: the next one can be launched now. False: the first one has to end before."""
        first = self._under_way[0]
        if first.must_end_first or len(self._under_way) > 1:
            return False
        await first.late.wait()
        return not first.execution.done()

    async def first_ends(self) -> EndedStep:
        first = self._under_way[0]
        await asyncio.wait((first.execution,))
        self._under_way.popleft()
        for row in first.rows:
            _end(row)
        started_s, self._last_end_s = max(first.launched_s, self._last_end_s), self._clock.now()
        error = first.execution.exception()
        tokens = first.execution.result() if error is None else ()
        return EndedStep(first.rows, tokens, error, self._last_end_s - started_s)

    async def retract(self) -> list[Sequence]:
        """Returns when nothing runs any more, however often it is cancelled; then the sequences that were part of it
        are as if it had not been launched."""
        executions = [step.execution for step in self._under_way]
        for execution in executions:
            execution.cancel()
        while not all(execution.done() for execution in executions):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(executions)
        rows = [row for step in self._under_way for row in step.rows]
        self._under_way.clear()
        for execution in executions:
            if not execution.cancelled():
                execution.exception()  # seen
        for row in rows:
            _end(row)
        return [row.sequence for row in rows]


def _begin(row: ScheduledRow) -> None:
    sequence = row.sequence
    sequence.num_steps_in_flight += 1
    sequence.num_tokens_in_flight += row.num_tokens
    sequence.num_tokens_pending += row.sample


def _end(row: ScheduledRow) -> None:
    sequence = row.sequence
    sequence.num_steps_in_flight -= 1
    sequence.num_tokens_in_flight -= row.num_tokens
    sequence.num_tokens_pending -= row.sample


def _drawn(rows: Iterable[ScheduledRow]) -> dict[Sequence, int]:
    """The place of each sequence's token among those that the step draws."""
    return {row.sequence: i for i, row in enumerate(row for row in rows if row.sample)}


def _batch_row(row: ScheduledRow, drawn: dict[Sequence, int]) -> BatchRow:
    sequence = row.sequence
    token_ids = tuple(sequence.token_ids[row.start : row.end])
    if len(token_ids) < row.num_tokens:
        token_ids = (*token_ids, -1 - drawn[sequence])
    return BatchRow(
        sequence.request_id,
        row.start,
        token_ids,
        tuple(sequence.block_table),
        row.sample,
        sequence.request.sampling,
        sequence.sampling_state,
        sequence.prompt_scores,
    )
