"""What leaves the prefill worker when: everything exactly once, nothing before it is written, in few large pieces."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.handover.outgoing import Outgoing, Span, layer_group_ends
from baton.kv.layout import KVLayout, LayerLayout

NUM_LAYERS = 6
LAYOUT = KVLayout(16, (LayerLayout(1, 4, 4),) * NUM_LAYERS, "float32", 4)
EVERYTHING = 10 * LAYOUT.block_bytes


def test_groups_differ_by_one_layer_at_most_and_end_with_the_last() -> None:
    assert layer_group_ends(6, 3) == (2, 4, 6)
    assert layer_group_ends(7, 3) == (2, 4, 7)
    assert layer_group_ends(2, 8) == (1, 2)
    assert layer_group_ends(32, 1) == layer_group_ends(1, 4) == ()


def outgoing(first_token: int, num_tokens: int, piece_bytes: int = EVERYTHING) -> Outgoing:
    return Outgoing(LAYOUT, first_token, num_tokens, piece_bytes)


def test_a_group_leaves_while_the_next_is_computed() -> None:
    out = outgoing(0, 60)
    out.written(50, 2)
    assert out.take() == Span(0, 48, 0, 2)
    assert out.take() is None
    out.written(50, 6)
    assert out.take() == Span(0, 48, 2, 6)
    out.written(60, 6)
    assert out.take() == Span(48, 60, 0, 6)


def test_what_waits_is_joined_over_layers_and_then_over_tokens() -> None:
    out = outgoing(0, 128)
    for num_tokens in (32, 80, 128):
        for num_layers in (2, 4, 6):
            out.written(num_tokens, num_layers)
    assert out.take() == Span(0, 128, 0, 6)


def test_less_than_is_worth_a_piece_waits_for_more_but_never_longer_than_the_prompt_is_written() -> None:
    out = Outgoing(LAYOUT, 0, 80, EVERYTHING, min_piece_bytes=2 * LAYOUT.block_bytes)
    for num_tokens, num_layers in ((16, 3), (16, 6), (32, 3)):
        out.written(num_tokens, num_layers)
        assert out.take() is None
    out.written(32, 6)
    assert (out.take(), out.take()) == (Span(0, 32, 0, 6), None)
    out.written(64, 3)
    assert not out.has_ready
    out.written(80, 6)
    taken = [out.take(), out.take()]
    assert out.take() is None
    assert sorted(span for span in taken if span) == [Span(32, 80, 0, 6)]


def test_what_waits_counts_together_so_that_a_little_in_front_keeps_nothing_back() -> None:
    out = Outgoing(LAYOUT, 0, 256, 3 * LAYOUT.block_bytes, min_piece_bytes=3 * LAYOUT.block_bytes)
    out.written(64, 6)
    assert out.take() == Span(0, 48, 0, 6)
    assert out.take() is None  # one block is left
    out.written(96, 3)
    assert not out.has_ready
    out.written(128, 3)
    assert out.has_ready


def test_a_step_that_ends_without_telling_its_layers_is_sent_whole() -> None:
    out = outgoing(16, 64)
    out.written(32, 6)
    out.written(64, 6)
    assert (out.take(), out.take()) == (Span(16, 64, 0, 6), None)


def test_what_the_receiver_holds_may_end_in_the_middle_of_a_block() -> None:
    out = outgoing(24, 70, LAYOUT.block_bytes)
    out.written(16, 6)
    assert out.take() is None
    out.written(70, 6)
    spans = [out.take() for _ in range(4)]
    assert spans == [Span(24, 32, 0, 6), Span(32, 48, 0, 6), Span(48, 64, 0, 6), Span(64, 70, 0, 6)]


def test_pieces_keep_to_their_size_but_hold_at_least_one_block() -> None:
    out = outgoing(0, 80, LAYOUT.group_bytes(0, 3) * 2)
    out.written(80, 3)
    assert [out.take() for _ in range(3)] == [Span(0, 32, 0, 3), Span(32, 64, 0, 3), Span(64, 80, 0, 3)]
    small = outgoing(0, 32, 1)
    small.written(32, 6)
    assert [small.take() for _ in range(3)] == [Span(0, 16, 0, 6), Span(16, 32, 0, 6), None]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_token_and_layer_is_taken_once_and_only_after_it_was_written(seed: int) -> None:
    """Any chunks, any layers told of, any beginning, a sender that is fast or slow."""
    rng = random.Random(seed)
    first, num_tokens = rng.randint(0, 60), rng.randint(64, 190)
    piece_bytes = rng.randint(1, 4) * LAYOUT.block_bytes
    out = outgoing(first, num_tokens, piece_bytes)
    final: set[tuple[int, int]] = set()  # (token, layer) in blocks that nobody writes to again
    taken: list[tuple[int, int]] = []

    def take() -> bool:
        span = out.take()
        if span is None:
            return False
        num_blocks = -(-span.token_end // 16) - span.token_start // 16
        assert num_blocks == 1 or num_blocks * LAYOUT.group_bytes(*span[2:]) <= piece_bytes
        assert span.token_end % 16 == 0 or span.token_end == num_tokens
        cells = [(token, layer) for token in range(*span[:2]) for layer in range(*span[2:])]
        assert cells and set(cells) <= final
        taken.extend(cells)
        return True

    end = 0
    while end < num_tokens:
        end = min(num_tokens, end + rng.randint(0, 60))
        full = end if end == num_tokens else end // 16 * 16
        for num_layers in [*sorted(rng.sample(range(1, NUM_LAYERS), rng.randint(0, 4))), NUM_LAYERS]:
            final |= {(token, layer) for token in range(full) for layer in range(num_layers)}
            out.written(end, num_layers)
            while rng.random() < 0.5 and take():
                pass
    while take():
        pass
    expected = {(token, layer) for token in range(first, num_tokens) for layer in range(NUM_LAYERS)}
    assert set(taken) == expected
    assert len(taken) == len(expected)
