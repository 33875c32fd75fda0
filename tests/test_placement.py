"""Placement is a pure function: each term of the cost decides when nothing else differs."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from baton.messages import Compatibility, Load, PrefixSource, Role, WorkerRecord
from baton.request import WorkerId
from baton_router.costs import Candidate
from baton_router.placement import FETCH_S, FETCH_SLACK_S, Placement, place

CanFetch = Callable[[WorkerRecord, WorkerRecord, WorkerRecord], bool]
LOAD = Load(
    num_free_blocks=1000, prefill_tokens_per_s=1000, decode_step_s=0.02, transfer_bytes_per_s=1e9,
    decode_batch_size=1.0, decode_seq_s=0.002, num_measured_steps=1_000_000, num_measured_tokens=1_000_000,
)  # fmt: skip
SEEN = ("num_held_blocks", "num_seqs", "num_queued_tokens", "num_unseen_tokens")


def worker(name: str, role: Role, **changes: object) -> Candidate:
    record = WorkerRecord(
        worker_id=WorkerId(name),
        incarnation="1",
        roles=(role,),
        address=name,
        transports=("tcp",),
        model="m",
        fingerprint="f",
        block_size=16,
        num_blocks=1000,
        max_model_len=4096,
        kv_block_bytes=1 << 20,
        load=LOAD,
    )
    candidate = {k: v for k, v in changes.items() if k in SEEN}
    load = {k: v for k, v in changes.items() if hasattr(LOAD, k)}
    rest = {k: v for k, v in changes.items() if k not in candidate and k not in load}
    return Candidate(replace(record, load=replace(LOAD, **load), **rest), **candidate)  # type: ignore[arg-type]


def proven(prefill: WorkerRecord, decode: WorkerRecord) -> bool:
    return True


def prefill(name: str, **changes: object) -> Candidate:
    return worker(name, Role.PREFILL, **changes)


def decode(name: str, **changes: object) -> Candidate:
    return worker(name, Role.DECODE, **changes)


def choice(prefills: list[Candidate], decodes: list[Candidate], tokens: int = 640) -> Placement:
    found = place(tokens, 64, prefills, decodes, random.Random(0), proven)
    assert found is not None
    return found


def test_without_a_decode_worker_there_is_no_placement() -> None:
    assert place(10, 10, [prefill("p")], [], random.Random(0), proven) is None


def test_without_a_prefill_worker_the_decode_worker_serves_alone() -> None:
    assert choice([], [decode("d")]).prefill is None


def test_the_owner_of_the_prefix_computes_it() -> None:
    assert choice([prefill("p1"), prefill("p2", num_held_blocks=30)], [decode("d")]).prefill == "p2"


def test_a_long_queue_outweighs_a_prefix() -> None:
    busy_owner = prefill("p2", num_held_blocks=30, num_queued_tokens=5000)
    assert choice([prefill("p1"), busy_owner], [decode("d")]).prefill == "p1"


def test_blocks_the_decode_worker_holds_need_no_wire() -> None:
    slow_wire = prefill("p", transfer_bytes_per_s=1e7)
    assert choice([slow_wire], [decode("d1"), decode("d2", num_held_blocks=40)]).decode == "d2"


def test_a_full_pool_and_a_slow_step_repel() -> None:
    assert choice([prefill("p")], [decode("d1", num_free_blocks=60), decode("d2")]).decode == "d2"
    assert choice([prefill("p")], [decode("d1", decode_step_s=0.05), decode("d2")]).decode == "d2"


def test_a_worker_takes_its_share_by_its_speed_and_one_that_is_too_slow_is_spared() -> None:
    for step_s, fewer, more in (
        (0.024, 0, 2),
        (0.03, 1, 3),
        (0.039, 2, 3),
    ):  # noise, a half more, twice as much
        slow = decode("slow", decode_step_s=step_s, decode_seq_s=0.0002, num_seqs=1)
        fast = [decode("fast", decode_seq_s=0.0002, num_seqs=n) for n in (fewer, more)]
        assert [choice([prefill("p")], [slow, each]).decode for each in fast] == ["fast", "slow"], step_s
    too_slow = decode("slow", decode_step_s=0.08, decode_seq_s=0.0002)
    busy = decode("fast", decode_seq_s=0.0002, num_seqs=20)
    assert choice([prefill("p")], [too_slow, busy]).decode == "fast"


def test_equal_workers_are_chosen_by_chance_whoever_measured_less() -> None:
    """So that several routers do not all send their first request to the same one."""
    idle = [decode("d1", decode_step_s=0.02), decode("d2", decode_step_s=0.023)]
    placed = [place(640, 64, [prefill("p")], idle, random.Random(seed), proven) for seed in range(40)]
    assert {each.decode for each in placed if each} == {"d1", "d2"}


def test_requests_that_the_report_does_not_show_will_take_blocks() -> None:
    tight = {"num_free_blocks": 150}
    unseen = decode("d1", num_unseen_tokens=1600, **tight)
    assert choice([prefill("p")], [unseen, decode("d2", num_seqs=2, **tight)]).decode == "d2"


def test_a_prefix_outweighs_a_queue_of_fewer_tokens() -> None:
    prefills = [prefill("p1", num_held_blocks=30, num_queued_tokens=400), prefill("p2")]
    assert choice(prefills, [decode("d")]).prefill == "p1"
    on_decode = [decode("d1", num_held_blocks=40, num_seqs=5), decode("d2", num_seqs=4)]
    assert choice([prefill("p", transfer_bytes_per_s=1e8)], on_decode).decode == "d1"  # 0.4 s of wire


def test_a_pair_needs_the_same_model_and_a_common_transport() -> None:
    other_model = prefill("p1", compatibility=Compatibility(weights="g"), num_held_blocks=40)
    other_wire = prefill("p2", transports=("ucx",), num_held_blocks=40)
    assert choice([other_model, other_wire, prefill("p3")], [decode("d")]).prefill == "p3"
    assert choice([other_model, other_wire], [decode("d")]).prefill is None


def test_unmeasured_workers_are_tried_and_equals_are_shared() -> None:
    new = Load(num_free_blocks=1000)
    prefills = [prefill(f"p{i}") for i in range(3)] + [Candidate(replace(prefill("p3").record, load=new))]
    rng = random.Random(1)
    chosen = {place(640, 64, prefills, [decode("d")], rng, proven).prefill for _ in range(200)}  # type: ignore[union-attr]
    assert chosen == {"p0", "p1", "p2", "p3"}


def test_a_worker_with_both_roles_is_no_pair_with_itself() -> None:
    both = worker("w", Role.DECODE, roles=(Role.PREFILL, Role.DECODE))
    assert choice([both], [both]) == Placement(None, WorkerId("w"), choice([both], [both]).predicted_s, 640)
    slow = prefill("p", num_queued_tokens=9000)
    assert choice([slow, both], [both]).prefill is None
    busy = worker("w", Role.DECODE, roles=(Role.PREFILL, Role.DECODE), num_queued_tokens=9000)
    assert choice([prefill("p"), busy], [busy]).prefill == "p"


def test_a_pair_that_has_not_proven_itself_carries_nothing() -> None:
    p1, p2, d = prefill("p1", num_held_blocks=40), prefill("p2"), decode("d")
    placed = place(640, 64, [p1, p2], [d], random.Random(0), lambda p, _: p.worker_id == "p2")
    assert placed is not None and placed.prefill == "p2"
    placed = place(640, 64, [p1, p2], [d], random.Random(0), lambda p, d: False)
    assert placed is not None and placed.prefill is None


def test_each_of_several_samples_needs_blocks_of_its_own_beside_those_of_the_prompt() -> None:
    """40 blocks for 640 tokens of prompt, which all share, and 4 more for the answer of each."""
    nearly_full, slow = decode("d1", num_free_blocks=200), decode("d2", decode_step_s=0.08)

    def chosen(num_samples: int) -> Placement | None:
        return place(640, 64, [prefill("p")], [nearly_full, slow], random.Random(0), proven, num_samples)

    assert [placed and placed.decode for placed in map(chosen, (1, 2, 32))] == ["d1", "d1", "d2"]


# --- a prefix that somebody else holds ---


def anybody(owner: WorkerRecord, prefill: WorkerRecord, decode: WorkerRecord) -> bool:
    return True


def source(
    prefills: list[Candidate], decodes: list[Candidate], tokens: int = 648, can_fetch: CanFetch = anybody
) -> PrefixSource | None:
    found = place(tokens, 64, prefills, decodes, random.Random(0), proven, can_fetch=can_fetch)
    assert found is not None
    return found.source


def test_what_the_decode_worker_holds_is_fetched_where_that_is_faster_than_computing_it() -> None:
    found = source([prefill("p")], [decode("d", num_held_blocks=40)])
    assert found == PrefixSource(WorkerId("d"), "d", 640, timeout_s=0.64 + FETCH_SLACK_S)
    # 40 blocks of 1 MiB: 0.42 s over this wire, 0.064 s of computing
    fast = prefill("p", prefill_tokens_per_s=10_000)
    assert source([fast], [decode("d", num_held_blocks=40, transfer_bytes_per_s=1e8)]) is None
    assert source([fast], [decode("d", num_held_blocks=40, transfer_bytes_per_s=1e9)]) is not None


def test_the_cost_of_a_fetch_is_the_wire_instead_of_the_computation() -> None:
    p, d = prefill("p", num_held_blocks=10), decode("d", num_held_blocks=40)
    fetched = place(648, 64, [p], [d], random.Random(0), proven, can_fetch=anybody)
    computed = place(648, 64, [p], [d], random.Random(0), proven)
    assert fetched is not None and computed is not None and computed.source is None
    saved_s = 30 * 16 / 1000 - (FETCH_S + 30 * (1 << 20) / 1e9)
    assert computed.predicted_s - fetched.predicted_s == pytest.approx(saved_s)


def test_the_last_token_is_always_computed() -> None:
    found = source([prefill("p")], [decode("d", num_held_blocks=40)], tokens=640)
    assert found is not None and found.num_tokens == 624


def test_one_block_is_not_worth_a_call() -> None:
    slow = 1.0  # token per second: computing the block takes 16 s
    p = prefill("p", num_held_blocks=39, prefill_tokens_per_s=slow)
    assert source([p], [decode("d", num_held_blocks=40)]) is None
    p = prefill("p", num_held_blocks=38, prefill_tokens_per_s=slow)
    assert source([p], [decode("d", num_held_blocks=40)]) is not None


def test_the_longest_prefix_is_fetched_from_whoever_may_give_it() -> None:
    d1, d2 = decode("d1", num_held_blocks=20), decode("d2", num_held_blocks=40, num_free_blocks=10)
    found = source([prefill("p")], [d1, d2])
    assert found is not None and (found.worker_id, found.num_tokens) == ("d2", 640)
    found = source([prefill("p")], [d1, d2], can_fetch=lambda owner, p, d: owner.worker_id != "d2")
    assert found is not None and (found.worker_id, found.num_tokens) == ("d1", 320)
    assert source([prefill("p")], [d1, d2], can_fetch=lambda owner, p, d: False) is None


def test_an_owner_needs_the_same_model_and_a_common_transport() -> None:
    other_model = decode("d1", num_held_blocks=40, compatibility=Compatibility(weights="g"))
    other_wire = decode("d2", num_held_blocks=40, transports=("ucx",))
    assert source([prefill("p")], [other_model, other_wire, decode("d3")]) is None


def test_an_idle_prefill_worker_fetches_what_a_busy_one_holds() -> None:
    busy = prefill("p1", num_held_blocks=40, num_queued_tokens=5000)
    placed = place(648, 64, [busy, prefill("p2")], [decode("d")], random.Random(0), proven, can_fetch=anybody)
    assert placed is not None and placed.prefill == "p2"
    assert placed.source is not None and placed.source.worker_id == "p1"


def test_blocks_of_another_size_are_counted_in_tokens() -> None:
    """The owner's 20 blocks of 32 are 640 tokens; the prefill worker's 39 of 16 are all but one block of its own."""
    d = decode("d", num_held_blocks=20, block_size=32, kv_block_bytes=2 << 20)
    found = source([prefill("p", prefill_tokens_per_s=1.0)], [d])
    assert found is not None and found.num_tokens == 640
    assert source([prefill("p", num_held_blocks=39, prefill_tokens_per_s=1.0)], [d]) is None
