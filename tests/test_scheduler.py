"""The order in which sequences get tokens and blocks."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from baton.engine.preemption import Preemption
from baton.engine.rates import StepRates
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Sequence, SequenceStatus
from baton.kv.cache_manager import KVCacheManager
from baton.request import Request, RequestId

BLOCK_SIZE = 4


class Bench:
    """A scheduler, and a `step` that does to its sequences what an engine would."""

    def __init__(self, num_blocks: int = 32, *, max_num_seqs: int = 4, budget: int = 16) -> None:
        self.kv = KVCacheManager(num_blocks, BLOCK_SIZE, "model")
        self.scheduler = Scheduler(self.kv, Preemption(self.kv, StepRates()), max_num_seqs=max_num_seqs)
        self.budget = budget
        self.admitted: list[str] = []
        self.num_added = 0

    def add(
        self, name: str, num_tokens: int, *, remote: bool = False, prefill_only: bool = False
    ) -> Sequence:
        self.num_added += 1
        prompt = [1000 * self.num_added + i for i in range(num_tokens)]  # nothing is shared
        request = Request(RequestId(name), tuple(prompt))
        sequence = Sequence(request, remote=remote, prefill_only=prefill_only, token_ids=prompt)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[str, int]]:
        rows, admitted = self.scheduler.schedule(self.budget)
        self.admitted += [sequence.request_id for sequence in admitted]
        assert sum(row.num_tokens for row in rows) <= self.budget
        assert len({row.sequence.request_id for row in rows}) == len(rows)
        for sequence, _, num_tokens, _ in rows:
            assert sequence.status is SequenceStatus.RUNNING
            self.kv.commit(sequence, sequence.num_computed_tokens + num_tokens)
            if sequence.num_computed_tokens == len(sequence.token_ids):
                sequence.token_ids.append(0)
                if sequence.prefill_only:
                    self.scheduler.hold(sequence)
        self.check()
        return [(row.sequence.request_id, row.num_tokens) for row in rows]

    def check(self) -> None:
        self.kv.check_integrity()
        self.scheduler.check_integrity()


def test_a_long_prompt_is_computed_in_chunks_beside_running_decodes() -> None:
    bench = Bench()
    bench.add("a", 3)
    bench.add("b", 5)
    assert bench.step() == [("a", 3), ("b", 5)]
    bench.add("long", 40)
    assert bench.step() == [("a", 1), ("b", 1), ("long", 14)]
    assert bench.step() == [("a", 1), ("b", 1), ("long", 14)]
    assert bench.step() == [("a", 1), ("b", 1), ("long", 12)]
    assert bench.step() == [("a", 1), ("b", 1), ("long", 1)]


def test_decodes_come_before_prompts_that_were_there_earlier() -> None:
    bench = Bench()
    arrived = bench.add("arrived", 4, remote=True)
    bench.add("long", 40)
    assert bench.step() == [("long", 16)]
    bench.kv.commit(arrived, 4)
    arrived.token_ids.append(1)
    bench.scheduler.activate(arrived)
    assert bench.step() == [("arrived", 1), ("long", 15)]


def test_prompts_share_the_rest_of_the_budget_in_order() -> None:
    bench = Bench()
    bench.add("a", 20)
    bench.add("b", 20)
    assert bench.step() == [("a", 16)]
    assert bench.step() == [("a", 4), ("b", 12)]
    assert bench.step() == [("a", 1), ("b", 8)]


def test_nothing_overtakes_the_head_of_the_queue() -> None:
    bench = Bench(num_blocks=12)
    bench.add("a", 20)
    bench.step()
    bench.step()
    big = bench.add("big", 30)
    small = bench.add("small", 2)
    reservation = bench.add("reservation", 2, remote=True)
    bench.step()
    assert [s.status for s in (big, small, reservation)] == [SequenceStatus.WAITING] * 3
    assert bench.scheduler.admit_reservations() == []


def test_admission_counts_reservations_as_sequences() -> None:
    bench = Bench(max_num_seqs=2)
    bench.add("r1", 4, remote=True)
    bench.add("r2", 4, remote=True)
    third = bench.add("r3", 4, remote=True)
    assert [s.request_id for s in bench.scheduler.admit_reservations()] == ["r1", "r2"]
    assert third.status is SequenceStatus.WAITING


def test_a_reservation_gets_blocks_for_its_prompt_and_one_token_and_no_row() -> None:
    bench = Bench()
    sequence = bench.add("r", 8, remote=True)
    assert bench.step() == []
    assert bench.admitted == ["r"] and len(sequence.block_table) == 3
    bench.kv.commit(sequence, 8)
    sequence.token_ids.append(1)
    bench.scheduler.activate(sequence)
    assert bench.step() == [("r", 1)]


def test_a_reservation_knows_what_it_holds_already() -> None:
    bench = Bench()
    first = bench.add("x", 9)
    bench.step()
    bench.scheduler.remove(first)
    again = Sequence(first.request, remote=True, token_ids=list(first.request.prompt_token_ids))
    bench.scheduler.add(again)
    assert bench.scheduler.admit_reservations() == [again]
    assert again.num_cached_tokens == again.num_computed_tokens == 8
    bench.check()


def test_prefill_only_takes_no_block_for_a_next_token_and_keeps_its_blocks() -> None:
    bench = Bench()
    sequence = bench.add("p", 8, prefill_only=True)
    assert bench.step() == [("p", 8)]
    assert sequence.status is SequenceStatus.HELD and len(sequence.block_table) == 2
    assert bench.step() == [] and bench.kv.num_used_blocks == 2
    bench.scheduler.remove(sequence)
    assert bench.kv.num_used_blocks == 0


def test_the_latest_sequence_gives_way_and_comes_back_first() -> None:
    bench = Bench(num_blocks=5)
    old = bench.add("old", 7)
    young = bench.add("young", 6)
    bench.step()
    waiting = bench.add("waiting", 2)
    tokens = []
    while young.status is SequenceStatus.RUNNING:
        tokens = list(young.token_ids)
        bench.step()
    assert old.status is SequenceStatus.RUNNING and bench.scheduler.num_preemptions == 1
    assert young.token_ids == tokens and young.block_table == [] and young.num_computed_tokens == 0
    assert list(bench.scheduler.waiting) == [young, waiting]
    bench.scheduler.remove(old)
    # It takes up its own cached blocks again and computes the rest of prompt and answer.
    [(name, num_tokens), *_] = bench.step()
    assert name == "young" and num_tokens == 1 and len(tokens) == 9


def test_a_prefill_only_sequence_is_never_preempted() -> None:
    bench = Bench(num_blocks=7, budget=4)
    old = bench.add("old", 3)
    bench.step()
    pushed = bench.add("pushed", 20, prefill_only=True)
    while bench.scheduler.num_preemptions == 0:
        bench.step()
    assert pushed.status is SequenceStatus.RUNNING and 0 < pushed.num_computed_tokens < 20
    assert old.status is SequenceStatus.WAITING


def test_an_empty_pool_is_filled_to_the_brim() -> None:
    bench = Bench(num_blocks=4)
    bench.add("all", 15)
    assert bench.step() == [("all", 15)]
    assert bench.kv.num_free_blocks == 0


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 30), st.integers(1, 20), st.sampled_from(["local", "remote", "prefill_only"])
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(8, 16),
    st.integers(4, 12),
)
def test_every_request_is_served_in_the_end(
    work: list[tuple[int, int, str]], num_blocks: int, budget: int
) -> None:
    """No starvation and no deadlock, whatever comes: each step something moves."""
    bench = Bench(num_blocks, max_num_seqs=4, budget=budget)
    todo: dict[RequestId, tuple[Sequence, int]] = {}
    for number, (num_prompt, num_output, kind) in enumerate(work):
        num_output = min(num_output, num_blocks * BLOCK_SIZE - num_prompt)
        if num_output > 0:
            sequence = bench.add(
                str(number), num_prompt, remote=kind == "remote", prefill_only=kind == "prefill_only"
            )
            todo[sequence.request_id] = (sequence, num_output)
    for _ in range(2000):
        if not todo:
            break
        moved = bool(bench.step())
        for sequence, num_output in list(todo.values()):
            if sequence.status is SequenceStatus.RESERVED:
                bench.kv.commit(sequence, sequence.request.num_prompt_tokens)
                sequence.token_ids.append(0)
                bench.scheduler.activate(sequence)
                moved = True
            done = sequence.status is SequenceStatus.HELD or sequence.num_output_tokens >= num_output
            if done and sequence.status is not SequenceStatus.WAITING:
                bench.scheduler.remove(sequence)
                del todo[sequence.request_id]
                moved = True
        assert moved, f"nothing moves: {bench.scheduler.waiting}"
    assert not todo
    bench.check()
    assert bench.kv.num_used_blocks == 0


@pytest.mark.parametrize("num_prompts", [1, 5])
def test_arrivals_do_not_starve_an_old_prompt(num_prompts: int) -> None:
    """New short prompts in every step; the old long one still gets its share."""
    bench = Bench(num_blocks=400, max_num_seqs=8, budget=16)
    old = bench.add("old", 100)
    for step in range(40):
        for i in range(num_prompts):
            bench.add(f"{step}.{i}", 3)
        bench.step()
        for sequence in list(bench.scheduler.running):
            if sequence is not old and sequence.num_output_tokens >= 2:
                bench.scheduler.remove(sequence)
        if old.num_output_tokens:
            break
    assert old.num_output_tokens and step < 12
