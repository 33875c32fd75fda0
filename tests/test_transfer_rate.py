"""What a wire is said to carry per second, from hand-overs of known overhead and rate."""

import random

import pytest

from baton.transfer.rate import MAX_BYTES_PER_S, Rate

OVERHEAD_S, BYTES_PER_S = 0.001, 1e9


def measured(sizes: list[int], noise: float = 0.0, bytes_per_s: float = BYTES_PER_S) -> float:
    rng, rate = random.Random(0), Rate()
    for size in sizes:
        rate.note(size, (OVERHEAD_S + size / bytes_per_s) * rng.uniform(1 - noise, 1 + noise))
    assert rate.bytes_per_s is not None
    return rate.bytes_per_s


def plain(sizes: list[int]) -> float:
    return sum(sizes) / sum(OVERHEAD_S + size / BYTES_PER_S for size in sizes)


def sizes_of(least: int, greatest: int, num: int = 50) -> list[int]:
    rng = random.Random(1)
    return [rng.randrange(least, greatest) for _ in range(num)]


@pytest.mark.parametrize("noise", [0.0, 0.2], ids=["exact", "noisy"])
def test_small_hand_overs_of_many_sizes_tell_the_rate_of_the_wire(noise: float) -> None:
    sizes = sizes_of(10_000, 1_000_000)
    assert plain(sizes) < 0.4 * BYTES_PER_S
    assert 0.6 * BYTES_PER_S < measured(sizes, noise) < 1.4 * BYTES_PER_S


def test_large_hand_overs_tell_it_as_before() -> None:
    sizes = sizes_of(50_000_000, 500_000_000)
    assert measured(sizes) == pytest.approx(BYTES_PER_S, rel=0.01)


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_hand_overs_of_one_size_tell_no_more_than_bytes_over_seconds(noise: float) -> None:
    sizes = sizes_of(990_000, 1_010_000)
    assert 0.7 * plain(sizes) < measured(sizes, noise) < 1.4 * plain(sizes)


def test_it_is_neither_negative_nor_beyond_memory() -> None:
    rate = Rate()
    for size, seconds in [(1000, 0.9), (1_000_000, 0.01)] * 5:  # larger ones took less
        rate.note(size, seconds)
    assert rate.bytes_per_s == MAX_BYTES_PER_S


def test_a_wire_that_became_slow_is_known_to_be_so_soon() -> None:
    rate = Rate()
    for bytes_per_s, num in ((1e9, 50), (1e7, 25)):
        for size in sizes_of(10_000, 1_000_000, num):
            rate.note(size, OVERHEAD_S + size / bytes_per_s)
    assert rate.bytes_per_s == pytest.approx(1e7, rel=0.3)


def test_nothing_is_known_of_a_wire_over_which_no_bytes_went() -> None:
    rate = Rate()
    rate.note(0, 0.0)
    rate.note(0, 0.001)  # a piece without tokens
    assert rate.bytes_per_s is None
    rate.note(1_000_000, 0.002)
    assert rate.bytes_per_s == pytest.approx(1e9, rel=0.2)
