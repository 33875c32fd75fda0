"""The hand-over's state machine: every edge, and its invariants under arbitrary sequences of events."""

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import TransferError, TransferRefused
from baton.kv.layout import KVLayout, LayerLayout
from baton.request import BlockId, RequestId
from baton.transfer.session import ENDINGS, MAX_SENDS, TRANSITIONS, HandOver, State
from baton.transfer.wire import PieceHeader

LAYOUT = KVLayout(16, (LayerLayout(2, 8, 8),) * 3, "float32", 4)
LEASE_S = 10.0


def hand_over(num_tokens: int = 64, first: int = 0, layout: KVLayout = LAYOUT) -> HandOver:
    ids = [BlockId(100 + i) for i in range(-(-num_tokens // 16))]
    return HandOver(RequestId("r"), 7, layout, ids, num_tokens, first, LEASE_S, lease_end_s=LEASE_S)


def piece(
    sequence: int, start: int, end: int, *, layers: tuple[int, int] = (0, 3), heads: tuple[int, int] = (0, 2),
    last: int = 0, **other: int
) -> PieceHeader:  # fmt: skip
    fields = {
        "epoch": 7,
        "num_bytes": max(0, end - start) * LAYOUT.token_bytes(*layers, *heads, 4),
        "num_pieces": last,
        "first_token": 5 if last else -1,
        **other,
    }
    return PieceHeader(
        RequestId("r"), sequence=sequence, layer_start=layers[0], layer_end=layers[1], token_start=start,
        token_end=end, head_start=heads[0], head_end=heads[1], dtype="float32", run_tokens=16, **fields,
    )  # fmt: skip


def deliver(h: HandOver, *pieces: PieceHeader) -> None:
    for p in pieces:
        h.open(p, 1.0)
        h.close(p, None, 2.0)


def test_the_straight_way_ends_live() -> None:
    h = hand_over()
    h.open(piece(0, 0, 48), 1.0)
    assert h.state is State.RECEIVING
    h.close(piece(0, 0, 48), None, 2.0)
    deliver(h, piece(1, 48, 64, last=2))
    assert h.state is State.VERIFIED
    assert h.first_token == 5
    h.go_live()
    assert h.state is State.LIVE


def test_layer_groups_may_come_apart_and_out_of_order() -> None:
    h = hand_over(32)
    deliver(h, piece(1, 0, 32, layers=(1, 3)), piece(2, 32, 32, last=3))
    assert h.state is State.RECEIVING
    deliver(h, piece(0, 0, 32, layers=(0, 1)))
    assert h.state is State.VERIFIED


def test_an_empty_last_piece_is_enough_when_everything_is_held_already() -> None:
    h = hand_over(32, first=32)
    deliver(h, piece(0, 32, 32, last=1))
    assert h.state is State.VERIFIED


def test_two_shards_bring_their_own_heads_and_number_their_own_pieces() -> None:
    h = hand_over(32)
    deliver(h, piece(0, 0, 32, heads=(0, 1), last=1, num_shards=2))
    assert (h.state, h.share) == (State.RECEIVING, 0.5)
    deliver(h, piece(0, 0, 16, heads=(1, 2), shard=1, num_shards=2))
    deliver(h, piece(1, 16, 32, heads=(1, 2), shard=1, num_shards=2, last=2))
    assert h.state is State.VERIFIED


def test_a_shard_that_says_another_first_token_is_refused() -> None:
    h = hand_over(32)
    deliver(h, piece(0, 0, 32, heads=(0, 1), last=1, num_shards=2))
    with pytest.raises(TransferRefused, match="different first tokens"):
        h.open(piece(0, 0, 32, heads=(1, 2), shard=1, num_shards=2, last=1, first_token=6), 1.0)


def test_a_rank_takes_only_the_heads_that_it_holds() -> None:
    half = replace(LAYOUT, layers=(LayerLayout(1, 8, 8),) * 3, shard=1, num_shards=2)
    h = hand_over(32, layout=half)
    with pytest.raises(TransferRefused, match="heads"):
        h.open(piece(0, 0, 32), 1.0)
    deliver(h, piece(0, 0, 32, heads=(1, 2), last=1))
    assert h.state is State.VERIFIED


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (piece(0, 32, 48, epoch=6), "epoch"),
        (piece(0, 32, 80), "prompt of 64"),
        (piece(0, 48, 32), "ends before it begins"),
        (piece(0, 32, 48, num_bytes=1), "bytes"),
        (piece(0, 31, 48), "held already"),
        (piece(0, 32, 48, layers=(1, 4), num_bytes=0), "layers"),
        (piece(0, 32, 48, heads=(0, 3)), "heads"),
        (piece(0, 32, 48, shard=1), "shard 1 of 1"),
        (piece(0, 32, 48, num_shards=1000), "shard"),
        (piece(0, 32, 48, last=1, first_token=-1), "first token"),
        (piece(0, 32, 48, last=3), "last of 3"),
    ],
)
def test_a_piece_that_does_not_fit_is_refused_and_changes_nothing(bad: PieceHeader, why: str) -> None:
    h = hand_over(first=32)
    with pytest.raises(TransferRefused, match=why):
        h.open(bad, 1.0)
    assert h.state is State.RESERVED
    assert h.num_open == 0


def test_a_duplicate_and_a_second_claim_on_the_same_place_are_refused() -> None:
    h = hand_over()
    deliver(h, piece(0, 0, 32))
    with pytest.raises(TransferRefused, match="twice"):
        h.open(piece(0, 32, 48), 1.0)
    with pytest.raises(TransferRefused, match="claim"):
        h.open(piece(1, 31, 33), 1.0)
    h.open(piece(1, 32, 48), 1.0)
    with pytest.raises(TransferRefused, match="claim"):
        h.open(piece(2, 47, 64), 1.0)


def test_all_pieces_but_a_missing_token_fails() -> None:
    h = hand_over()
    deliver(h, piece(0, 0, 63, last=1))
    assert h.ending is State.FAILED
    assert "98.4% of the KV" in h.reason


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_drains_before_it_is_free(ending: State) -> None:
    h = hand_over()
    h.open(piece(0, 0, 32), 1.0)
    h.open(piece(1, 32, 64), 1.0)
    h.end(ending, "because")
    assert h.state is State.DRAINING
    with pytest.raises(TransferRefused):
        h.open(piece(2, 0, 0, last=3), 1.0)
    h.close(piece(0, 0, 32), None, 2.0)
    assert h.state is State.DRAINING
    h.close(piece(1, 32, 64), TransferError("peer died"), 2.0)
    assert h.state is State.FREE
    assert h.ending is ending


def test_the_first_ending_counts() -> None:
    h = hand_over()
    h.end(State.CANCELLED, "client")
    h.end(State.FAILED, "later")
    assert (h.ending, h.reason, h.state) == (State.CANCELLED, "client", State.FREE)


def test_each_piece_renews_the_lease_and_silence_ends_it() -> None:
    h = hand_over()
    assert not h.expire(LEASE_S - 0.1)
    h.open(piece(0, 0, 16), 9.0)
    assert not h.expire(LEASE_S + 1)
    assert h.expire(9.0 + LEASE_S)
    assert h.state is State.DRAINING  # the piece is still open
    assert h.ending is State.EXPIRED


def test_a_verified_hand_over_does_not_expire() -> None:
    h = hand_over(16)
    deliver(h, piece(0, 0, 16, last=1))
    assert not h.expire(1e9)


def reject(h: HandOver, p: PieceHeader) -> None:
    h.open(p, 1.0)
    h.reject(p)


def test_a_rejected_piece_counts_for_nothing_until_its_repeat_is_right() -> None:
    h = hand_over(32)
    reject(h, piece(0, 0, 32))
    assert (h.state, h.num_open, h.num_bytes, h.share) == (State.RECEIVING, 0, 0, 0.0)
    deliver(h, piece(1, 0, 0, last=2))
    assert h.state is State.RECEIVING  # the last piece came, but one before it is still to be repeated
    deliver(h, piece(0, 0, 32))
    assert (h.state, h.num_mismatches) == (State.VERIFIED, 1)


def test_a_rejected_last_piece_may_come_again() -> None:
    h = hand_over(32)
    deliver(h, piece(0, 0, 16))
    reject(h, piece(1, 16, 32, last=2))
    assert (h.state, h.first_token) == (State.RECEIVING, -1)
    deliver(h, piece(1, 16, 32, last=2))
    assert (h.state, h.first_token) == (State.VERIFIED, 5)


def test_a_rejected_piece_gives_up_only_its_own_layers() -> None:
    h = hand_over(32)
    deliver(h, piece(0, 0, 32, layers=(0, 1)))
    reject(h, piece(1, 0, 32, layers=(1, 3)))
    with pytest.raises(TransferRefused, match="claim"):
        h.open(piece(2, 0, 32, layers=(0, 1)), 1.0)
    deliver(h, piece(1, 0, 32, layers=(1, 3)), piece(2, 0, 0, last=3))
    assert h.state is State.VERIFIED


def test_what_a_rejected_header_said_of_the_shards_is_not_believed() -> None:
    h = hand_over(32)
    reject(h, piece(0, 0, 32, num_shards=3))
    deliver(h, piece(0, 0, 32, last=1))
    assert h.state is State.VERIFIED


def test_a_piece_that_is_never_right_fails_the_hand_over() -> None:
    h = hand_over()
    for _ in range(MAX_SENDS - 1):
        reject(h, piece(0, 0, 32))
        assert h.state is State.RECEIVING
    h.open(piece(1, 32, 64), 1.0)
    reject(h, piece(0, 0, 32))
    assert (h.state, h.ending) == (State.DRAINING, State.FAILED)  # the other piece is still open
    assert "digest" in h.reason
    h.reject(piece(1, 32, 64))
    assert h.state is State.FREE


def test_pieces_are_counted_apart_when_they_are_rejected() -> None:
    h = hand_over(32)
    for _ in range(MAX_SENDS - 1):
        reject(h, piece(0, 0, 16))
        reject(h, piece(1, 16, 32, last=2))
    deliver(h, piece(0, 0, 16), piece(1, 16, 32, last=2))
    assert (h.state, h.num_mismatches) == (State.VERIFIED, 2 * (MAX_SENDS - 1))


def test_a_repeat_is_refused_while_the_piece_is_open_and_once_it_is_right() -> None:
    h = hand_over()
    h.open(piece(0, 0, 32), 1.0)
    with pytest.raises(TransferRefused, match="twice"):
        h.open(piece(0, 0, 32), 1.0)
    h.reject(piece(0, 0, 32))
    deliver(h, piece(0, 0, 32))
    with pytest.raises(TransferRefused, match="twice"):
        h.open(piece(0, 0, 32), 1.0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_rejected_piece_ends_the_draining(ending: State) -> None:
    h = hand_over()
    h.open(piece(0, 0, 32), 1.0)
    h.end(ending, "because")
    h.reject(piece(0, 0, 32))
    assert (h.state, h.ending) == (State.FREE, ending)


def test_rejected_pieces_do_not_renew_the_lease() -> None:
    h = hand_over()
    h.open(piece(0, 0, 32), 1.0)
    lease_end_s = h.lease_end_s
    h.reject(piece(0, 0, 32))
    assert h.lease_end_s == lease_end_s
    assert h.expire(lease_end_s)
    assert (h.state, h.ending) == (State.FREE, State.EXPIRED)


def test_the_transition_table_reaches_every_state_and_ends_free() -> None:
    seen, todo = set(), [State.RESERVED]
    while todo:
        state = todo.pop()
        if state not in seen:
            seen.add(state)
            todo.extend(TRANSITIONS[state])
    assert seen == set(State)
    assert [state for state in State if not TRANSITIONS[state]] == [State.FREE]


Cell = tuple[int, int, int]


def cells(p: PieceHeader) -> set[Cell]:
    """(token, layer, head)"""
    return set(itertools.product(range(*p.box[:2]), range(*p.box[2:4]), range(*p.box[4:])))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_history_frees_blocks_while_a_write_may_land(seed: int) -> None:
    """Random pieces (right, wrong, twice), closes, rejections, endings and lease checks, in random order."""
    rng = random.Random(seed)
    h = hand_over(num_tokens=rng.randint(1, 6), first=rng.randint(0, 1))
    opened: list[PieceHeader] = []
    right: set[Cell] = set()  # that came and matched
    now = 0.0
    for _ in range(40):
        now += rng.expovariate(1.0)
        match rng.randrange(5):
            case 0 | 1:
                start = rng.randrange(7)
                end = start + rng.randrange(4)
                last = rng.choice([0, 0, rng.randint(1, 4)])
                layers = rng.choice([(0, 3), (0, 1), (1, 3)])
                p = piece(
                    rng.randrange(6), start, end, layers=layers, last=last, epoch=rng.choice([7, 7, 7, 6])
                )
                try:
                    h.open(p, now)
                except TransferRefused:
                    continue
                assert h.state is State.RECEIVING
                opened.append(p)
            case 2 if opened:
                p = opened.pop(rng.randrange(len(opened)))
                match rng.randrange(6):
                    case 0:
                        h.close(p, TransferError("x"), now)
                    case 1 | 2:
                        h.reject(p)
                    case _:
                        if h.state is State.RECEIVING:
                            right |= cells(p)
                        h.close(p, None, now)
            case 3 if rng.random() < 0.2:
                h.end(rng.choice(ENDINGS), "test")
            case 4:
                h.expire(now)
        assert h.num_open == len(opened)
        if h.state is State.FREE:
            assert not opened
        if h.state is State.VERIFIED:
            assert not opened
            assert right == set(
                itertools.product(range(h.first_token_to_send, h.num_tokens), range(3), range(2))
            )
    h.end(State.CANCELLED, "end of test")
    while opened:
        assert h.state is not State.FREE
        h.close(opened.pop(), None, now)
    assert h.state is State.FREE


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_sender_that_repeats_what_was_rejected_always_gets_through(seed: int) -> None:
    """Layer groups in any order, up to MAX_SENDS - 1 rejections of each, several open at once."""
    rng = random.Random(seed)
    num_tokens, groups = rng.randint(1, 6), rng.choice([[(0, 3)], [(0, 1), (1, 3)], [(0, 1), (1, 2), (2, 3)]])
    places = [(token, layers) for token in range(num_tokens) for layers in groups]
    rng.shuffle(places)
    pieces = [piece(i, token, token + 1, layers=layers) for i, (token, layers) in enumerate(places)]
    pieces.append(piece(len(pieces), num_tokens, num_tokens, last=len(pieces) + 1))
    h = hand_over(num_tokens)
    waiting, opened, num_rejected = pieces, list[PieceHeader](), dict.fromkeys(range(len(pieces)), 0)
    while waiting or opened:
        assert h.state in (State.RESERVED, State.RECEIVING)
        if waiting and (not opened or rng.random() < 0.5):
            opened.append(waiting.pop(rng.randrange(len(waiting))))
            h.open(opened[-1], 1.0)
            continue
        p = opened.pop(rng.randrange(len(opened)))
        if num_rejected[p.sequence] < MAX_SENDS - 1 and rng.random() < 0.4:
            num_rejected[p.sequence] += 1
            h.reject(p)
            waiting.append(p)
        else:
            h.close(p, None, 1.0)
    assert h.state is State.VERIFIED
    assert h.num_mismatches == sum(num_rejected.values())
    assert h.num_bytes == num_tokens * LAYOUT.block_bytes // LAYOUT.block_size
