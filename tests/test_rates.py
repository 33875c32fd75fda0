"""A worker's measurements of itself, and what a router makes of several workers' ones."""

import random
from dataclasses import replace

import pytest
from test_placement import decode, prefill

from baton.engine.rates import StepRates
from baton_router.costs import FALLBACK_SEQ_SHARE, FALLBACK_STEP_S, Rates, StepLine, step_lines


def measured(*batch_sizes: int, noise: float = 0.0) -> StepRates:
    """Of a device that takes 10 ms, and half a one for each sequence."""
    rates, rng = StepRates(), random.Random(0)
    for num_seqs in batch_sizes:
        rates.note(num_seqs, 0, (0.010 + 0.0005 * num_seqs) * rng.uniform(1 - noise, 1 + noise))
    return rates


def test_steps_of_several_sizes_tell_what_one_sequence_more_takes() -> None:
    rates = measured(1, 1, 4, 4, 8, 8)
    assert rates.decode_seq_s == pytest.approx(0.0005)
    at_no_batch_s = rates.decode_step_s - rates.decode_seq_s * rates.decode_batch_size
    assert at_no_batch_s == pytest.approx(0.010)
    noisy = measured(*(1 + i // 10 % 8 for i in range(400)), noise=0.1)
    assert noisy.decode_seq_s == pytest.approx(0.0005, rel=0.5)


def test_a_long_time_at_one_size_does_not_make_it_forgotten() -> None:
    assert measured(*range(1, 9), *[8] * 2000).decode_seq_s == pytest.approx(0.0005)
    assert measured(*[1] * 50).decode_seq_s == 0


def test_a_sequence_is_never_free_and_an_empty_step_never_takes_less_than_nothing() -> None:
    falling, steep = StepRates(), StepRates()
    for num_seqs in (1, 8, 1, 8):
        falling.note(num_seqs, 0, 0.020 - 0.001 * num_seqs)
        steep.note(num_seqs, 0, 0.001 * num_seqs**2)
    assert 0 < falling.decode_seq_s < 0.001 * falling.decode_step_s + 1e-12
    assert steep.decode_seq_s <= steep.decode_step_s / steep.decode_batch_size


def test_workers_measured_at_different_batches_have_the_same_line() -> None:
    busy = decode("d1", decode_batch_size=32.0, decode_step_s=0.02, decode_seq_s=0.0002)
    idle = decode("d2", decode_batch_size=1.0, decode_step_s=0.0138, decode_seq_s=0.0)
    one, other = step_lines([busy, idle])
    assert one.seconds(20) == pytest.approx(other.seconds(20))
    nothing = decode("d3", decode_step_s=0.0, decode_seq_s=0.0)
    assert step_lines([busy, nothing])[1] == one
    assert step_lines([nothing]) == [StepLine(FALLBACK_STEP_S, FALLBACK_STEP_S * FALLBACK_SEQ_SHARE)]


def test_a_slow_start_is_hardly_believed_and_many_slow_steps_are() -> None:
    busy = [decode(f"d{i}", num_measured_steps=100) for i in (1, 2)]
    for num_steps, ratio in ((6, 1.6), (100, 2.7)):
        slow = decode("d3", decode_step_s=0.06, decode_seq_s=0.0, num_measured_steps=num_steps)
        one, _, line = step_lines([*busy, slow])
        assert line.one_s / one.one_s == pytest.approx(ratio, abs=0.1)


def test_a_rate_that_was_measured_on_a_canary_alone_is_hardly_believed() -> None:
    """One that had a slow start is not left alone for ever because of it."""
    busy = [prefill(f"p{i}", prefill_tokens_per_s=20_000, num_measured_tokens=4000) for i in (1, 2)]
    new = prefill("p3", prefill_tokens_per_s=4_000, num_measured_tokens=70)
    rates = Rates.of([*busy, new], [decode("d", prefill_tokens_per_s=1.0)])
    assert rates.compute_s(busy[0], 20_000) == pytest.approx(1.0)
    assert rates.compute_s(new, 20_000) < 1.2
    slow = prefill("p3", prefill_tokens_per_s=4_000, num_measured_tokens=20_000)
    assert rates.compute_s(slow, 20_000) > 4
    assert (
        rates.compute_s(
            replace(new, record=replace(new.record, load=replace(new.record.load, prefill_tokens_per_s=0))),
            20_000,
        )
        == 1
    )
