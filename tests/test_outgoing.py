"""What leaves the prefill worker when: everything exactly once, nothing before it is written, in few large pieces."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.kv.layout import KVLayout, LayerLayout
from baton_prefill.outgoing import Outgoing, Span, layer_group_ends

NUM_LAYERS = 6
LAYOUT = KVLayout(16, (LayerLayout(1, 4, 4),) * NUM_LAYERS, "float32", 4)
EVERYTHING = 10 * LAYOUT.block_bytes


def test_groups_differ_by_one_layer_at_most_and_end_with_the_last() -> None:
    assert layer_group_ends(6, 3) == (2, 4, 6)
    assert layer_group_ends(7, 3) == (2, 4, 7)
    assert layer_group_ends(2, 8) == (1, 2)
    assert layer_group_ends(32, 1) == layer_group_ends(1, 4) == ()


def test_a_group_leaves_while_the_next_is_computed() -> None:
    out = Outgoing(LAYOUT, 0, 4, EVERYTHING)
    out.written(3, 2)
    assert out.take() == Span(0, 3, 0, 2)
    assert out.take() is None
    out.written(3, 6)
    assert out.take() == Span(0, 3, 2, 6)
    out.written(4, 6)
    assert out.take() == Span(3, 4, 0, 6)


def test_what_waits_is_joined_over_layers_and_then_over_blocks() -> None:
    out = Outgoing(LAYOUT, 0, 8, EVERYTHING)
    for num_blocks in (2, 5, 8):
        for num_layers in (2, 4, 6):
            out.written(num_blocks, num_layers)
    assert out.take() == Span(0, 8, 0, 6)


def test_a_step_that_ends_without_telling_its_layers_is_sent_whole() -> None:
    out = Outgoing(LAYOUT, 1, 4, EVERYTHING)
    out.written(2, 6)
    out.written(4, 6)
    assert (out.take(), out.take()) == (Span(1, 4, 0, 6), None)


def test_pieces_keep_to_their_size_but_hold_at_least_one_block() -> None:
    out = Outgoing(LAYOUT, 0, 5, LAYOUT.group_bytes(0, 3) * 2)
    out.written(5, 3)
    assert [out.take() for _ in range(3)] == [Span(0, 2, 0, 3), Span(2, 4, 0, 3), Span(4, 5, 0, 3)]
    small = Outgoing(LAYOUT, 0, 2, 1)
    small.written(2, 6)
    assert [small.take() for _ in range(3)] == [Span(0, 1, 0, 6), Span(1, 2, 0, 6), None]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_block_and_layer_is_taken_once_and_only_after_it_was_written(seed: int) -> None:
    """Any chunks, any layers told of, a sender that is fast or slow."""
    rng = random.Random(seed)
    first, num_blocks = rng.randint(0, 3), rng.randint(4, 12)
    piece_bytes = rng.randint(1, 4) * LAYOUT.block_bytes
    out = Outgoing(LAYOUT, first, num_blocks, piece_bytes)
    written: set[tuple[int, int]] = set()
    taken: list[tuple[int, int]] = []

    def take() -> bool:
        span = out.take()
        if span is None:
            return False
        blocks, layers = (
            span.block_end - span.block_start,
            LAYOUT.group_bytes(span.layer_start, span.layer_end),
        )
        assert blocks == 1 or blocks * layers <= piece_bytes
        cells = [
            (block, layer)
            for block in range(span.block_start, span.block_end)
            for layer in range(span.layer_start, span.layer_end)
        ]
        assert cells and set(cells) <= written
        taken.extend(cells)
        return True

    end = 0
    while end < num_blocks:
        end = min(num_blocks, end + rng.randint(0, 4))
        for num_layers in [*sorted(rng.sample(range(1, NUM_LAYERS), rng.randint(0, 4))), NUM_LAYERS]:
            written |= {(block, layer) for block in range(end) for layer in range(num_layers)}
            out.written(end, num_layers)
            while rng.random() < 0.5 and take():
                pass
    while take():
        pass
    expected = {(block, layer) for block in range(first, num_blocks) for layer in range(NUM_LAYERS)}
    assert set(taken) == expected
    assert len(taken) == len(expected)
