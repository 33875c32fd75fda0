"""Statistics over request records: pure functions, no clock.

TTFT    from a request's sending to its first event with tokens
ITL     each gap between two events with tokens of one request; all gaps of all requests are pooled
TPOT    per request: time from the first event with tokens to the finishing one, per token after the first
E2E     from a request's sending to the end of its answer

Latencies are those of the requests that succeeded; wrong answers are in (they took as long), failures are
not. Rates are over the window from the first measured sending to the last measured end: the drain of the last
answers is in it. Warm-up requests count nowhere.

Goodput is what met every objective: requests that failed or gave a wrong answer never do. `itl` is met when
no gap of the request is longer; for the mean per token use `tpot`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from baton.errors import ConfigError
from baton_loadtest.record import RequestRecord

MAX_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles interpolate between order statistics; a p99 of fewer than 100 values leans on the max."""

    num: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives in seconds; None is not asked for."""

    ttft: float | None = None
    itl: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """As in "ttft=0.5,itl=50ms": seconds, or with ms or s behind. Raises ConfigError."""
        objectives: dict[str, float] = {}
        known = [field.name for field in fields(cls)]
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = part.partition("=")
            if not equals or name not in known:
                raise ConfigError(
                    f"cannot read the objective {part!r}; known: {', '.join(known)}, as in ttft=0.5,itl=50ms"
                )
            if name in objectives:
                raise ConfigError(f"the objective {name} is given twice")
            objectives[name] = _seconds(value, part)
        return cls(**objectives)

    def __str__(self) -> str:
        return ",".join(f"{name}={bound:g}" for name, bound in self.bounds().items())

    def bounds(self) -> dict[str, float]:
        named = {"ttft": self.ttft, "itl": self.itl, "tpot": self.tpot, "e2e": self.e2e}
        return {name: bound for name, bound in named.items() if bound is not None}

    def met(self, record: RequestRecord) -> dict[str, bool]:
        """Per objective. What a request cannot show (no gaps, say) it does not break."""
        if not record.ok or record.correct is False:
            return dict.fromkeys(self.bounds(), False)
        worst = {
            "ttft": record.ttft_s,
            "itl": max(record.gaps_s(), default=None),
            "tpot": record.tpot_s,
            "e2e": record.e2e_s,
        }
        return {name: _at_most(worst[name], bound) for name, bound in self.bounds().items()}


@dataclass(frozen=True, slots=True)
class Goodput:
    fraction: float  # of all measured requests
    requests_per_s: float
    attainment: dict[str, float]  # each objective alone


@dataclass(frozen=True, slots=True)
class Metrics:
    num_warmup: int
    num_requests: int  # measured: everything below is about these
    num_ok: int
    num_failed: int
    num_checked: int  # answers that could be compared with the expected ones
    num_wrong: int
    errors: dict[str, int]  # by kind, most frequent first
    error_examples: tuple[str, ...]  # one of each kind
    wrong_examples: tuple[str, ...]
    window_s: float
    drain_s: float  # of the window, after the last sending
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float  # with prompt tokens, where the server told
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_without_usage: int  # successful requests whose tokens were counted by events
    tokens_per_event: float | None  # above 1: events with several tokens, or end tokens, which have no text
    finish_reasons: dict[str, int]
    ttft_s: Distribution | None  # None: no value at all
    itl_s: Distribution | None
    tpot_s: Distribution | None
    e2e_s: Distribution | None
    lag_s: Distribution | None  # of all measured requests, failed ones too
    goodput: Goodput | None  # None without objectives


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of an ascending, non-empty sequence; linear between order statistics, as numpy's default."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def distribution(values: Iterable[float]) -> Distribution | None:
    ordered = sorted(values)
    if not ordered:
        return None
    return Distribution(
        num=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p95=percentile(ordered, 95),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


def without_warmup(records: Iterable[RequestRecord], num_warmup: int) -> list[RequestRecord]:
    """In the workload's order; its first `num_warmup` requests are the warm-up."""
    return sorted((r for r in records if r.index >= num_warmup), key=lambda record: record.index)


def measure(records: Sequence[RequestRecord], *, num_warmup: int = 0, slo: Slo | None = None) -> Metrics:
    """`records` in any order; `Metrics` says what is computed."""
    measured = without_warmup(records, num_warmup)
    succeeded = [record for record in measured if record.ok]
    wrong = [record for record in succeeded if record.correct is False]
    window_s, drain_s = _window(measured)
    num_output_tokens = sum(record.num_output_tokens for record in succeeded)
    num_prompt_tokens = sum(record.num_prompt_tokens or 0 for record in succeeded)
    return Metrics(
        num_warmup=len(records) - len(measured),
        num_requests=len(measured),
        num_ok=len(succeeded),
        num_failed=len(measured) - len(succeeded),
        num_checked=sum(record.correct is not None for record in succeeded),
        num_wrong=len(wrong),
        errors=_counted(record.error_label for record in measured if not record.ok),
        error_examples=_examples(
            {r.error_label: f"{r.error_label}: {r.error_text}" for r in measured if not r.ok}
        ),
        wrong_examples=_examples({r.index: f"{r.text.strip()!r} instead of {r.expected!r}" for r in wrong}),
        window_s=window_s,
        drain_s=drain_s,
        requests_per_s=_rate(len(succeeded), window_s),
        output_tokens_per_s=_rate(num_output_tokens, window_s),
        total_tokens_per_s=_rate(num_prompt_tokens + num_output_tokens, window_s),
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=sum(record.num_cached_tokens or 0 for record in succeeded),
        num_output_tokens=num_output_tokens,
        num_without_usage=sum(record.num_tokens is None for record in succeeded),
        tokens_per_event=_tokens_per_event(succeeded),
        finish_reasons=_counted(record.finish_reason or "none" for record in succeeded),
        ttft_s=distribution(r.ttft_s for r in succeeded if r.ttft_s is not None),
        itl_s=distribution(gap for record in succeeded for gap in record.gaps_s()),
        tpot_s=distribution(r.tpot_s for r in succeeded if r.tpot_s is not None),
        e2e_s=distribution(record.e2e_s for record in succeeded),
        lag_s=distribution(record.lag_s for record in measured),
        goodput=_goodput(measured, slo, window_s) if slo and slo.bounds() else None,
    )


def _goodput(measured: Sequence[RequestRecord], slo: Slo, window_s: float) -> Goodput:
    met = [slo.met(record) for record in measured]
    num_good = sum(all(each.values()) for each in met)
    return Goodput(
        fraction=_rate(num_good, len(measured)),
        requests_per_s=_rate(num_good, window_s),
        attainment={name: _rate(sum(each[name] for each in met), len(met)) for name in slo.bounds()},
    )


def _window(measured: Sequence[RequestRecord]) -> tuple[float, float]:
    """(length, the part of it after the last sending), in seconds."""
    if not measured:
        return 0.0, 0.0
    end_s = max(record.done_s for record in measured)
    sent = [record.sent_s for record in measured]
    return end_s - min(sent), end_s - max(sent)


def _tokens_per_event(succeeded: Sequence[RequestRecord]) -> float | None:
    counted = [record for record in succeeded if record.num_tokens is not None]
    num_events = sum(len(record.token_s) for record in counted)
    return sum(record.num_output_tokens for record in counted) / num_events if num_events else None


def _rate(count: float, per: float) -> float:
    return count / per if per > 0 else 0.0


def _counted(labels: Iterable[str]) -> dict[str, int]:
    return dict(Counter(labels).most_common())


def _examples(by_kind: dict[Any, str]) -> tuple[str, ...]:
    return tuple(text[:300] for text in list(by_kind.values())[:MAX_EXAMPLES])


def _at_most(value: float | None, bound: float) -> bool:
    return value is None or value <= bound


def _seconds(text: str, where: str) -> float:
    scale = 1e-3 if text.endswith("ms") else 1.0
    try:
        seconds = float(text.removesuffix("ms").removesuffix("s")) * scale
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(
            f"the objective {where!r} needs a time greater than 0, as in ttft=0.5 or ttft=500ms"
        )
    return seconds
