"""Statistics over records that are written down here, so that every figure can be checked by hand."""

import math
import random

import numpy as np
import pytest

from baton.errors import ConfigError
from baton_loadtest.metrics import Slo, distribution, measure, percentile
from baton_loadtest.record import ErrorKind, RequestRecord


def _record(
    index: int = 0,
    *,
    sent_s: float = 10.0,
    tokens_after_s: tuple[float, ...] = (0.5, 0.6, 0.8),
    done_after_s: float = 1.0,
    **changes: object,
) -> RequestRecord:
    """By default: TTFT 0.5, gaps 0.1 and 0.2, finish with the last token, four tokens by usage, E2E 1.0."""
    settings: dict[str, object] = {
        "token_s": tuple(sent_s + after_s for after_s in tokens_after_s),
        "finish_s": sent_s + tokens_after_s[-1] if tokens_after_s else None,
        "status": 200,
        "finish_reason": "stop",
        "num_prompt_tokens": 20,
        "num_tokens": 4,
        "text": "bob lima",
    }
    return RequestRecord(
        index=index,
        planned_s=sent_s - 0.001,
        sent_s=sent_s,
        done_s=sent_s + done_after_s,
        **(settings | changes),  # type: ignore[arg-type]
    )


def _failed(
    index: int, kind: ErrorKind = ErrorKind.CUT, status: int | None = 200, **changes: object
) -> RequestRecord:
    return _record(index, error=kind, status=status, error_text="because", finish_s=None, **changes)


# Percentiles


@pytest.mark.parametrize("num", [1, 2, 3, 10, 99, 100, 101, 1000])
def test_percentiles_equal_numpy(num: int) -> None:
    rng = random.Random(num)
    values = sorted(rng.lognormvariate(0, 2) for _ in range(num))
    for percent in (0, 1, 50, 90, 95, 99, 99.9, 100):
        assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-12)


def test_a_distribution_states_its_size_mean_and_maximum() -> None:
    values = distribution([3.0, 1.0, 2.0])
    assert values is not None
    assert (values.num, values.mean, values.p50, values.p90, values.max) == (3, 2.0, 2.0, 2.8, 3.0)
    assert distribution([]) is None


# One request


def test_the_times_of_one_request() -> None:
    record = _record()
    assert record.ttft_s == pytest.approx(0.5)
    assert list(record.gaps_s()) == pytest.approx([0.1, 0.2])
    assert record.tpot_s == pytest.approx(0.3 / 3)
    assert record.e2e_s == 1.0
    assert record.lag_s == pytest.approx(0.001)


def test_the_end_token_has_its_share_of_tpot() -> None:
    """Two words, and an end token 0.2 s after the second: three tokens, two steps after the first."""
    record = _record(tokens_after_s=(0.5, 0.7), num_tokens=3, finish_s=10.9)
    assert record.tpot_s == pytest.approx(0.2)


@pytest.mark.parametrize(
    "changes", [{"tokens_after_s": ()}, {"tokens_after_s": (0.5,)}, {"num_tokens": 1}], ids=str
)
def test_tpot_is_unknown_where_it_cannot_be_seen(changes: dict[str, object]) -> None:
    assert _record(**changes).tpot_s is None


def test_only_whole_answers_are_right_or_wrong() -> None:
    assert _record(expected="bob lima").correct is True
    assert _record(expected="bob lima", text=" bob lima\n").correct is True
    assert _record(expected="bob oslo").correct is False
    assert _record(expected=None).correct is None
    assert _failed(0, expected="bob lima").correct is None


# A run


def test_rates_are_over_the_window_from_first_sending_to_last_end() -> None:
    metrics = measure([_record(0, sent_s=10.0), _record(1, sent_s=12.0), _record(2, sent_s=13.0)])
    assert metrics.window_s == pytest.approx(4.0)
    assert metrics.drain_s == pytest.approx(1.0)
    assert metrics.requests_per_s == pytest.approx(3 / 4)
    assert metrics.output_tokens_per_s == pytest.approx(12 / 4)
    assert metrics.total_tokens_per_s == pytest.approx((60 + 12) / 4)
    assert (metrics.num_prompt_tokens, metrics.num_output_tokens) == (60, 12)
    assert metrics.tokens_per_event == pytest.approx(12 / 9)


def test_latencies_pool_all_gaps_and_one_value_per_request() -> None:
    metrics = measure([_record(0), _record(1, tokens_after_s=(0.1, 0.2), done_after_s=0.4, num_tokens=2)])
    assert metrics.ttft_s is not None and metrics.itl_s is not None
    assert metrics.tpot_s is not None and metrics.e2e_s is not None
    assert (metrics.ttft_s.num, metrics.itl_s.num, metrics.tpot_s.num, metrics.e2e_s.num) == (2, 3, 2, 2)
    assert metrics.ttft_s.mean == pytest.approx(0.3)
    assert metrics.itl_s.max == pytest.approx(0.2)
    assert metrics.tpot_s.p50 == pytest.approx(0.1)
    assert metrics.e2e_s.max == pytest.approx(1.0)


def test_warmup_counts_nowhere_and_is_counted() -> None:
    warmup = [_record(0, sent_s=1.0, done_after_s=500.0), _failed(1, sent_s=2.0)]
    measured = [_record(2), _record(3)]
    metrics = measure([*measured, *warmup], num_warmup=2, slo=Slo(e2e=5))
    alone = measure(measured, slo=Slo(e2e=5))
    assert metrics.num_warmup == 2
    assert alone.num_warmup == 0
    for name in ("num_requests", "num_failed", "errors", "window_s", "e2e_s", "goodput", "num_output_tokens"):
        assert getattr(metrics, name) == getattr(alone, name), name


def test_failures_are_counted_by_kind_and_stay_out_of_the_latencies() -> None:
    records = [
        _record(0),
        _failed(1, ErrorKind.HTTP, 503),
        _failed(2, ErrorKind.HTTP, 503),
        _failed(3, ErrorKind.HTTP, 429),
        _failed(4, ErrorKind.CUT, done_after_s=90.0),
        _failed(5, ErrorKind.TIMEOUT, None),
    ]
    metrics = measure(records)
    assert (metrics.num_requests, metrics.num_ok, metrics.num_failed) == (6, 1, 5)
    assert metrics.errors == {"http 503": 2, "http 429": 1, "cut stream": 1, "timeout": 1}
    assert next(iter(metrics.errors)) == "http 503"
    assert metrics.error_examples == tuple(
        f"{kind}: because" for kind in ("http 503", "http 429", "cut stream", "timeout")
    )
    assert metrics.e2e_s is not None and metrics.e2e_s.num == 1
    assert metrics.lag_s is not None and metrics.lag_s.num == 6
    assert metrics.num_output_tokens == 4
    assert metrics.window_s == pytest.approx(90.0)


def test_wrong_answers_are_counted_and_shown() -> None:
    records = [
        _record(0, expected="bob lima"),
        _record(1, expected="ada oslo"),
        _record(2),
        _failed(3, expected="bob lima"),
    ]
    metrics = measure(records)
    assert (metrics.num_checked, metrics.num_wrong) == (2, 1)
    assert metrics.wrong_examples == ("'bob lima' instead of 'ada oslo'",)


def test_missing_usage_is_counted() -> None:
    metrics = measure([_record(0), _record(1, num_tokens=None, num_prompt_tokens=None)])
    assert metrics.num_without_usage == 1
    assert metrics.num_output_tokens == 4 + 3
    assert metrics.num_prompt_tokens == 20


@pytest.mark.parametrize("records", [[], [_failed(0)]], ids=["no request", "no success"])
def test_nothing_measured_is_no_crash(records: list[RequestRecord]) -> None:
    metrics = measure(records, slo=Slo(ttft=1))
    assert metrics.ttft_s is metrics.itl_s is metrics.tpot_s is metrics.e2e_s is None
    assert metrics.requests_per_s == 0
    assert metrics.goodput is not None and metrics.goodput.fraction == 0


# Goodput


def test_goodput_is_what_meets_every_objective() -> None:
    records = [
        _record(0, sent_s=10.0),  # meets both
        _record(1, sent_s=11.0, tokens_after_s=(0.7, 0.8)),  # TTFT missed
        _record(2, sent_s=12.0, tokens_after_s=(0.1, 0.9)),  # one gap too long
        _record(3, sent_s=13.0, tokens_after_s=(0.9, 1.9), done_after_s=2.0),  # both missed
        _failed(4, sent_s=13.5),  # quick, but failed
    ]
    goodput = measure(records, slo=Slo(ttft=0.5, itl=0.25)).goodput
    assert goodput is not None
    assert goodput.fraction == pytest.approx(1 / 5)
    assert goodput.requests_per_s == pytest.approx(1 / 5.0)
    assert goodput.attainment == pytest.approx({"ttft": 2 / 5, "itl": 2 / 5})


def test_a_bound_is_met_when_reached() -> None:
    record = _record(tokens_after_s=(0.5, 0.75), num_tokens=2)
    assert Slo(ttft=0.5, itl=0.25, tpot=0.25, e2e=1.0).met(record) == {
        "ttft": True,
        "itl": True,
        "tpot": True,
        "e2e": True,
    }
    assert Slo(ttft=math.nextafter(0.5, 0)).met(record) == {"ttft": False}


def test_one_stall_breaks_itl_but_not_tpot() -> None:
    stalled = _record(tokens_after_s=(0.1, 0.11, 0.9), num_tokens=40)
    assert Slo(itl=0.1, tpot=0.1).met(stalled) == {"itl": False, "tpot": True}


def test_a_wrong_answer_is_never_good() -> None:
    assert Slo(e2e=100).met(_record(expected="ada oslo")) == {"e2e": False}
    assert Slo(e2e=100).met(_record(expected="bob lima")) == {"e2e": True}


def test_a_single_token_has_no_gap_to_break() -> None:
    record = _record(tokens_after_s=(0.5,), num_tokens=1)
    assert Slo(ttft=1, itl=1e-9, tpot=1e-9).met(record) == {"ttft": True, "itl": True, "tpot": True}


def test_no_objective_no_goodput() -> None:
    assert measure([_record()]).goodput is None
    assert measure([_record()], slo=Slo()).goodput is None


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("", Slo()),
        ("ttft=0.5,itl=0.05", Slo(ttft=0.5, itl=0.05)),
        (" ttft=500ms , e2e=3s ", Slo(ttft=0.5, e2e=3.0)),
        ("tpot=20ms", Slo(tpot=0.02)),
    ],
)
def test_objectives_are_read_and_written_back(text: str, slo: Slo) -> None:
    assert Slo.parse(text) == slo
    assert Slo.parse(str(slo)) == slo


@pytest.mark.parametrize(
    "text",
    ["ttft", "ttft=", "ttft=fast", "ttft=0", "ttft=-1", "ttft=nan", "ttft=inf", "tbt=1", "ttft=1,ttft=2"],
)
def test_unreadable_objectives_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="objective"):
        Slo.parse(text)
