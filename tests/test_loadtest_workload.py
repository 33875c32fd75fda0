"""The load is what it is said to be: processes and distributions are held against their laws at fixed seeds.
The test of the gaps is shown to fail on the mistakes that it is there for."""

import asyncio
import math
import random
from collections import Counter
from itertools import islice, pairwise

import pytest

from baton.clock import Clock, VirtualClock
from baton.errors import ConfigError
from baton_loadtest.lengths import Fixed, LogNormal, Mix, Uniform, parse_lengths
from baton_loadtest.record import RequestRecord
from baton_loadtest.runner import Extent, Runner
from baton_loadtest.workload import Arrival, PlannedRequest, PromptKind, Workload, poisson_gaps, read_prompts

NUM_GAPS = 20_000
KS_LIMIT = 1.63  # of sqrt(n) * D: exceeded by 1 % of true exponential samples


def _workload(**changes: object) -> Workload:
    settings = {"rate": 4.0, "prompt_len": Uniform(2, 6), "output_len": Fixed(8)} | changes
    return Workload(**settings)  # type: ignore[arg-type]


def _take(workload: Workload, num: int) -> list[PlannedRequest]:
    return list(islice(workload.requests(), num))


def _ks_statistic(gaps: list[float], rate: float) -> float:
    """sqrt(n) times the largest distance between the sample's distribution and the exponential one."""
    law = [1 - math.exp(-rate * gap) for gap in sorted(gaps)]
    steps = range(len(law))
    distance = max(max((i + 1) / len(law) - law[i], law[i] - i / len(law)) for i in steps)
    return distance * math.sqrt(len(law))


# Arrivals


@pytest.mark.parametrize("seed", range(5))
def test_poisson_gaps_are_exponential(seed: int) -> None:
    gaps = list(islice(poisson_gaps(random.Random(seed), rate=8.0), NUM_GAPS))
    assert _ks_statistic(gaps, rate=8.0) < KS_LIMIT
    standard_error = 1 / 8.0 / math.sqrt(NUM_GAPS)
    assert abs(sum(gaps) / NUM_GAPS - 1 / 8.0) < 3 * standard_error


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_test_sees_a_clipped_process_and_a_wrong_rate(seed: int) -> None:
    gaps = list(islice(poisson_gaps(random.Random(seed), rate=8.0), NUM_GAPS))
    assert _ks_statistic([min(gap, 3 / 8.0) for gap in gaps], rate=8.0) > 2 * KS_LIMIT
    assert _ks_statistic(gaps, rate=8.0 * 1.05) > KS_LIMIT


def test_long_gaps_are_as_frequent_as_they_should_be() -> None:
    gaps = list(islice(poisson_gaps(random.Random(1), rate=1.0), NUM_GAPS))
    for length in (3, 5):
        expected = NUM_GAPS * math.exp(-length)
        assert abs(sum(gap > length for gap in gaps) - expected) < 3.3 * math.sqrt(expected)


def test_poisson_counts_per_second_have_the_variance_of_independent_arrivals() -> None:
    times = [request.at_s for request in _take(_workload(rate=10.0), NUM_GAPS)]
    counts = Counter(int(at_s) for at_s in times[:-1])
    counts_per_s = [counts[second] for second in range(int(times[-1]))]
    mean = sum(counts_per_s) / len(counts_per_s)
    variance = sum((count - mean) ** 2 for count in counts_per_s) / (len(counts_per_s) - 1)
    # The variance-to-mean ratio of n Poisson counts has a standard deviation of sqrt(2 / (n - 1)).
    assert abs(variance / mean - 1) < 3 * math.sqrt(2 / (len(counts_per_s) - 1))


def test_constant_arrivals_do_not_drift() -> None:
    times = [request.at_s for request in _take(_workload(arrival=Arrival.CONSTANT, rate=3.0), 3001)]
    assert times[0] == 0.0
    assert times[3000] == 1000.0


def test_closed_loop_requests_have_no_times() -> None:
    assert {request.at_s for request in _take(_workload(rate=None, concurrency=3), 20)} == {0.0}


# The same seed is the same workload


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompt_kind": PromptKind.WORDS},
        {"prompt_kind": PromptKind.RANDOM, "vocab_size": 900},
        {"prompt_kind": PromptKind.SHARED_PREFIX, "prefix_len": 12},
        {"rate": None, "concurrency": 5},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()) or "demo",
)
def test_same_seed_same_workload(changes: dict[str, object]) -> None:
    first = _take(_workload(seed=7, **changes), 200)
    assert first == _take(_workload(seed=7, **changes), 200)
    assert [r.prompt for r in first] != [r.prompt for r in _take(_workload(seed=8, **changes), 200)]


def test_workload_is_pinned_across_processes_and_versions() -> None:
    """A change here means that old results cannot be compared with new ones: say so in the CHANGELOG."""
    requests = _take(
        _workload(seed=3, prompt_kind=PromptKind.RANDOM, vocab_size=1000, output_len=Uniform(1, 99)), 2
    )
    assert [(round(r.at_s, 9), r.prompt, r.max_tokens) for r in requests] == PINNED


def test_rate_and_output_length_leave_the_prompts_as_they_were() -> None:
    base = _take(_workload(), 50)
    faster = _take(_workload(rate=40.0, output_len=Uniform(1, 50)), 50)
    assert [r.prompt for r in base] == [r.prompt for r in faster]
    assert [r.at_s for r in base] == pytest.approx([r.at_s * 10 for r in faster])
    assert [r.max_tokens for r in base] != [r.max_tokens for r in faster]


# Lengths


def test_uniform_reaches_both_ends_evenly() -> None:
    rng = random.Random(0)
    counts = Counter(Uniform(3, 7).sample(rng) for _ in range(10_000))
    assert sorted(counts) == [3, 4, 5, 6, 7]
    assert sum((count - 2000) ** 2 / 2000 for count in counts.values()) < 13.28  # chi-square, 4 degrees, 1 %


def test_lognormal_has_the_mean_and_spread_that_it_states() -> None:
    lengths = parse_lengths("lognormal:mean=200,sigma=0.8")
    rng = random.Random(0)
    values = [lengths.sample(rng) for _ in range(40_000)]
    deviation = 200 * math.sqrt(math.exp(0.8**2) - 1)
    assert abs(sum(values) / len(values) - 200) < 3 * deviation / math.sqrt(len(values))
    logs = [math.log(value) for value in values]
    mean_log = sum(logs) / len(logs)
    assert math.sqrt(sum((log - mean_log) ** 2 for log in logs) / len(logs)) == pytest.approx(0.8, rel=0.02)


def test_truncated_lognormal_redraws_and_states_the_mean_of_what_is_left() -> None:
    lengths = LogNormal(200, 0.8, 50, 300)
    rng = random.Random(0)
    values = [lengths.sample(rng) for _ in range(40_000)]
    assert min(values) == 50 and max(values) == 300
    # Clipping would put 15 % of all draws on the upper edge; redrawing leaves it as rare as its neighbours.
    assert values.count(300) < 3 * max(values.count(299), 20)
    assert sum(values) / len(values) == pytest.approx(lengths.mean, rel=0.01)
    assert lengths.mean < 190


def test_mix_draws_its_parts_by_weight() -> None:
    lengths = parse_lengths("mix:3*fixed:10+1*uniform:100-200")
    rng = random.Random(0)
    values = [lengths.sample(rng) for _ in range(10_000)]
    assert abs(values.count(10) - 7500) < 3 * math.sqrt(10_000 * 0.75 * 0.25)
    assert lengths.mean == pytest.approx((3 * 10 + 150) / 4)
    assert lengths.highest == 200


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("128", Fixed(128)),
        ("fixed:128", Fixed(128)),
        ("uniform:16-256", Uniform(16, 256)),
        ("lognormal:mean=200,sigma=0.8", LogNormal(200, 0.8)),
        ("lognormal:mean=200,sigma=0.8,min=4,max=1000", LogNormal(200, 0.8, 4, 1000)),
        ("mix:0.8*fixed:64+0.2*uniform:5-9", Mix(((0.8, Fixed(64)), (0.2, Uniform(5, 9))))),
    ],
)
def test_lengths_are_read_and_written_back(text: str, lengths: object) -> None:
    assert parse_lengths(text) == lengths
    assert parse_lengths(str(lengths)) == lengths


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-3",
        "many",
        "fixed:",
        "uniform:7",
        "uniform:9-3",
        "uniform:0-3",
        "normal:5",
        "lognormal:mean=200",
        "lognormal:mean=200,sigma=0",
        "lognormal:mean=nan,sigma=1",
        "lognormal:mean=200,sigma=0.8,top=3",
        "lognormal:mean=200,sigma=0.8,min=9,max=3",
        "lognormal:mean=200,sigma=0.1,min=2000",
        "mix:fixed:3",
        "mix:0*fixed:3",
        "mix:1*fixed:3+",
        "mix:1*mix:1*fixed:3",
    ],
)
def test_unreadable_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_lengths(text)


# Prompts


def test_demo_prompts_hold_their_answers() -> None:
    for request in _take(_workload(), 100):
        assert isinstance(request.prompt, str) and request.expected is not None
        listed, _, question = request.prompt.rpartition(". ")
        pairs = listed.split(", ")
        assert 2 <= len(pairs) <= 6
        assert request.expected in pairs
        assert question == f"{request.expected.split()[0]}?"


def test_words_and_token_ids_have_the_drawn_lengths() -> None:
    words = _take(_workload(prompt_kind=PromptKind.WORDS), 200)
    assert {len(str(r.prompt).split()) for r in words} == {2, 3, 4, 5, 6}
    tokens = _take(_workload(prompt_kind=PromptKind.RANDOM, vocab_size=50), 2000)
    assert {len(r.prompt) for r in tokens} == {2, 3, 4, 5, 6}
    assert {token_id for r in tokens for token_id in r.prompt} == set(range(50))
    assert all(r.expected is None for r in (*words, *tokens))


@pytest.mark.parametrize("vocab_size", [None, 5000])
def test_shared_prefixes_are_shared_by_groups_and_the_rest_is_not(vocab_size: int | None) -> None:
    workload = _workload(
        prompt_kind=PromptKind.SHARED_PREFIX, num_groups=3, prefix_len=40, vocab_size=vocab_size
    )
    prompts = [r.prompt.split() if isinstance(r.prompt, str) else r.prompt for r in _take(workload, 300)]
    groups = Counter(tuple(prompt[:40]) for prompt in prompts)
    assert len(groups) == 3
    assert min(groups.values()) > 60
    assert len({tuple(prompt[40:]) for prompt in prompts}) > 250
    assert {len(prompt) for prompt in prompts} == {42, 43, 44, 45, 46}


def test_prompts_from_a_file_come_in_order_and_again(tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a b"}\n\n{"prompt": [5, 6], "max_tokens": 3}\n{"prompt": "q?", "expected": "yes"}\n'
    )
    requests = _take(_workload(prompt_kind=PromptKind.FILE, prompts_file=path), 4)
    assert [r.prompt for r in requests] == ["a b", (5, 6), "q?", "a b"]
    assert [r.max_tokens for r in requests] == [8, 3, 8, 8]
    assert [r.expected for r in requests] == [None, None, "yes", None]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ('"text"', "needs an object"),
        ('{"text": "a"}', "needs an object"),
        ('{"prompt": ""}', "prompt must be"),
        ('{"prompt": [1, "a"]}', "prompt must be"),
        ('{"prompt": [true]}', "prompt must be"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens must be"),
        ('{"prompt": "a", "expected": 5}', "expected must be"),
        ('{"prompt": "a", "answer": "b"}', "unknown field answer"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line: str, complaint: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=f"prompts.jsonl:2: {complaint}"):
        read_prompts(path)


def test_a_missing_or_empty_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": None},
        {"concurrency": 2},
        {"rate": 0.0},
        {"rate": math.inf},
        {"rate": math.nan},
        {"rate": None, "concurrency": 0},
        {"prompt_len": Fixed(5000)},
        {"prompt_len": LogNormal(10, 1.0)},
        {"prompt_kind": PromptKind.RANDOM},
        {"prompt_kind": PromptKind.RANDOM, "vocab_size": 0},
        {"prompt_kind": PromptKind.FILE},
        {"prompt_kind": PromptKind.SHARED_PREFIX, "num_groups": 0},
    ],
    ids=str,
)
def test_impossible_workloads_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        _workload(**changes)


def test_the_regime_says_what_load_it_is() -> None:
    assert "Poisson 4 req/s (exponential gaps, unclipped)" in _workload().regime
    assert "constant 4 req/s" in _workload(arrival=Arrival.CONSTANT).regime
    assert "closed loop, 3 users" in _workload(rate=None, concurrency=3).regime


# The runner, on virtual time


class SlowTarget:
    """Answers each request after `service_s`; keeps who was there when."""

    def __init__(self, clock: Clock, service_s: float) -> None:
        self.clock, self.service_s = clock, service_s
        self.num_inside, self.max_inside, self.num_cancelled = 0, 0, 0

    async def send(self, request: PlannedRequest, planned_s: float) -> RequestRecord:
        sent_s = self.clock.now()
        self.num_inside += 1
        self.max_inside = max(self.max_inside, self.num_inside)
        try:
            await self.clock.sleep(self.service_s)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_inside -= 1
        return RequestRecord(index=request.index, planned_s=planned_s, sent_s=sent_s, done_s=self.clock.now())


def _run(workload: Workload, extent: Extent, service_s: float) -> tuple[list[RequestRecord], SlowTarget]:
    clock, records = VirtualClock(), []
    target = SlowTarget(clock, service_s)
    clock.run(Runner(target, clock, records.append).run(workload, extent))
    return sorted(records, key=lambda record: record.index), target


def test_open_loop_sends_on_time_however_slow_the_answers_are() -> None:
    workload = _workload(rate=10.0)
    records, target = _run(workload, Extent(num_requests=300), service_s=7.0)
    planned = [request.at_s for request in _take(workload, 300)]
    assert [record.sent_s for record in records] == pytest.approx(planned, abs=1e-6)
    assert target.max_inside > 40


def test_closed_loop_keeps_exactly_its_users_busy() -> None:
    records, target = _run(_workload(rate=None, concurrency=4), Extent(num_requests=40), service_s=0.5)
    assert target.max_inside == 4
    assert [record.index for record in records] == list(range(40))
    starts = Counter(round(record.sent_s, 6) for record in records)
    assert starts == {round(0.5 * turn, 6): 4 for turn in range(10)}


@pytest.mark.parametrize(
    "load", [{"rate": 10.0, "arrival": Arrival.CONSTANT}, {"rate": None, "concurrency": 5}], ids=str
)
def test_duration_ends_the_sending_and_warmup_is_before_it(load: dict[str, object]) -> None:
    """Ten requests per second either way: 20 warm-up requests take 2 s, then 3 s are measured."""
    records, _ = _run(_workload(**load), Extent(duration_s=3.0, num_warmup=20), service_s=0.5)
    assert len(records) == 50
    assert records[20].planned_s == pytest.approx(2.0)
    assert max(record.planned_s for record in records) < 5.0


def test_the_number_of_requests_does_not_count_warmup() -> None:
    records, _ = _run(_workload(), Extent(num_requests=10, duration_s=1e6, num_warmup=5), service_s=0.1)
    assert [record.index for record in records] == list(range(15))


def test_a_cancelled_run_cancels_what_is_in_flight() -> None:
    clock = VirtualClock()
    target, records = SlowTarget(clock, service_s=10.0), []

    async def cut_short() -> None:
        with pytest.raises(TimeoutError):
            async with clock.timeout(12.0):
                await Runner(target, clock, records.append).run(_workload(rate=None, concurrency=3), Extent())

    clock.run(cut_short())
    assert len(records) == 3
    assert (target.num_cancelled, target.num_inside) == (3, 0)


def test_a_bug_in_the_target_ends_the_run_loudly() -> None:
    class Broken:
        async def send(self, request: PlannedRequest, planned_s: float) -> RequestRecord:
            raise RuntimeError("bug")

    clock = VirtualClock()
    with pytest.raises(ExceptionGroup) as caught:
        clock.run(Runner(Broken(), clock, lambda record: None).run(_workload(), Extent(num_requests=5)))
    assert caught.group_contains(RuntimeError, match="bug")


def test_gaps_between_arrivals_are_never_negative() -> None:
    times = [request.at_s for request in _take(_workload(), 1000)]
    assert all(later >= earlier for earlier, later in pairwise(times))


PINNED = [(0.092027497, (302, 863, 867, 109, 213, 591), 79), (0.220096378, (755, 415, 256, 460), 34)]
