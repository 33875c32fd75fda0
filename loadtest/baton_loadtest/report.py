"""What a person reads: the table, warnings, a histogram; and the one JSON line that a script reads.

The JSON line holds everything that is needed to run the same test again and to judge whether its figures mean
anything: all parameters, versions, the machine and how busy it was, the client's own delay and CPU time.
"""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import baton
from baton_loadtest.metrics import Distribution, Metrics
from baton_loadtest.record import RequestRecord
from baton_loadtest.workload import PromptKind

SCHEMA = 1  # of the JSON line; grows when a field changes its meaning
_LATE_S = 0.01  # a request sent later than this is the client's doing
_CACHED = 0.1  # of the prompt tokens; made-up prompts that are new to the server share nearly nothing
_BUSY = 0.8  # CPU seconds per second: the client's one thread is nearly full
_NEW_PROMPTS = (PromptKind.DEMO, PromptKind.WORDS, PromptKind.RANDOM)
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class MachineState:
    """Taken before and after: what the client used and what else went on."""

    monotonic_s: float
    cpu_s: float  # of this process
    load_average: tuple[float, float, float]

    @classmethod
    def now(cls) -> "MachineState":
        return cls(time.monotonic(), time.process_time(), os.getloadavg())


@dataclass(frozen=True, slots=True)
class ClientCost:
    cpu_s: float
    cpu_share: float  # of one core, over the run
    load_average_before: float  # 1 minute
    load_average_after: float
    max_in_flight: int
    num_connections_opened: int

    @classmethod
    def between(
        cls, before: MachineState, after: MachineState, *, max_in_flight: int, num_connections_opened: int
    ) -> "ClientCost":
        cpu_s = after.cpu_s - before.cpu_s
        elapsed_s = after.monotonic_s - before.monotonic_s
        return cls(
            cpu_s=cpu_s,
            cpu_share=cpu_s / elapsed_s if elapsed_s > 0 else 0.0,
            load_average_before=before.load_average[0],
            load_average_after=after.load_average[0],
            max_in_flight=max_in_flight,
            num_connections_opened=num_connections_opened,
        )


@dataclass(frozen=True, slots=True)
class Report:
    regime: str
    parameters: dict[str, Any]  # as they took effect, defaults included
    server: dict[str, Any]  # what it said of itself
    metrics: Metrics
    cost: ClientCost
    interrupted: bool = False

    def json_line(self) -> str:
        line = {
            "tool": "baton loadtest",
            "schema": SCHEMA,
            "regime": self.regime,
            "interrupted": self.interrupted,
            "warnings": self.warnings(),
            "parameters": self.parameters,
            "server": self.server,
            "machine": machine(),
            "client": _rounded(asdict(self.cost)),
            "metrics": _rounded(asdict(self.metrics)),
        }
        return orjson.dumps(line).decode()

    def warnings(self) -> list[str]:
        metrics, found = self.metrics, []
        if self.interrupted:
            found.append("interrupted: requests in flight were cancelled and count nowhere")
        if metrics.lag_s is not None and metrics.lag_s.p99 > _LATE_S:
            found.append(
                f"the client sent late (p99 {metrics.lag_s.p99 * 1e3:.0f} ms): too few connections or CPU"
            )
        if self.cost.cpu_share > _BUSY:
            found.append(
                f"the client used {self.cost.cpu_share:.0%} of a core: its own time stamps may be late"
            )
        cached = metrics.num_cached_tokens / max(metrics.num_prompt_tokens, 1)
        if cached > _CACHED and self.parameters["prompt_kind"] in _NEW_PROMPTS:
            found.append(
                f"{cached:.0%} of the prompt tokens were cached: sent before with this seed? take another"
            )
        if metrics.num_wrong:
            found.append(f"{metrics.num_wrong} of {metrics.num_checked} answers are wrong")
        if metrics.num_without_usage:
            found.append(
                f"{metrics.num_without_usage} answers came without usage: their tokens are counted by events"
            )
        return found


def machine() -> dict[str, Any]:
    return {
        "cpu_count": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "baton": baton.__version__,
    }


def render(report: Report, measured: Sequence[RequestRecord]) -> RenderableType:
    metrics = report.metrics
    parts: list[RenderableType] = [Text(report.regime, style="bold"), _counts(report), _latencies(metrics)]
    if metrics.goodput is not None:
        parts.append(_goodput(report))
    ttfts = [record.ttft_s for record in measured if record.ttft_s is not None]
    if len(ttfts) > 1:
        parts.append(Text(f"TTFT {histogram(ttfts)}", style="cyan"))
    parts += [Text(f"! {warning}", style="yellow") for warning in report.warnings()]
    parts += [
        Text(f"  {example}", style="red") for example in (*metrics.error_examples, *metrics.wrong_examples)
    ]
    return Group(*parts)


def _counts(report: Report) -> Table:
    metrics = report.metrics
    failed = ", ".join(f"{num} x {label}" for label, num in metrics.errors.items())
    checked = f", {metrics.num_checked - metrics.num_wrong} of {metrics.num_checked} answers right"
    rows = {
        "requests": f"{metrics.num_ok} ok, {metrics.num_failed} failed{f' ({failed})' if failed else ''}"
        f"{checked if metrics.num_checked else ''}; {metrics.num_warmup} warm-up not counted",
        "window": f"{metrics.window_s:.2f} s, of it {metrics.drain_s:.2f} s after the last sending",
        "throughput": f"{metrics.requests_per_s:.2f} req/s, {metrics.output_tokens_per_s:.1f} output tok/s, "
        f"{metrics.total_tokens_per_s:.1f} total tok/s",
        "tokens": f"{metrics.num_prompt_tokens} prompt ({metrics.num_cached_tokens} cached), "
        f"{metrics.num_output_tokens} output, {_or_dash(metrics.tokens_per_event, '.2f')} per event",
        "client": f"{report.cost.cpu_s:.2f} CPU s ({report.cost.cpu_share:.0%} of a core), "
        f"{report.cost.max_in_flight} in flight at most, {report.cost.num_connections_opened} connections, "
        f"load average {report.cost.load_average_before:.1f} -> {report.cost.load_average_after:.1f}",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="dim"), value)
    return table


def _latencies(metrics: Metrics) -> Table:
    table = Table("ms", "mean", "p50", "p90", "p95", "p99", "max", "values")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in latency_rows(metrics):
        table.add_row(name, *latency_cells(values))
    return table


def latency_rows(metrics: Metrics) -> list[tuple[str, Distribution | None]]:
    return [
        ("TTFT", metrics.ttft_s),
        ("ITL", metrics.itl_s),
        ("TPOT", metrics.tpot_s),
        ("E2E", metrics.e2e_s),
        ("send lag", metrics.lag_s),
    ]


def latency_cells(values: Distribution | None) -> list[str]:
    """mean, p50, p90, p95, p99, max in milliseconds, then how many values there are."""
    if values is None:
        return ["-"] * 6 + ["0"]
    times = (values.mean, values.p50, values.p90, values.p95, values.p99, values.max)
    return [_milliseconds(seconds) for seconds in times] + [str(values.num)]


def _goodput(report: Report) -> Text:
    goodput = report.metrics.goodput
    assert goodput is not None
    each = ", ".join(f"{name} {share:.1%}" for name, share in goodput.attainment.items())
    figures = f"goodput {goodput.fraction:.1%} = {goodput.requests_per_s:.2f} req/s"
    return Text(f"{figures} within {report.parameters['slo']} ({each})", style="bold")


def histogram(values: Sequence[float], num_bins: int = 40) -> str:
    """One line over the range of the values, equal bins; any bin that is not empty has a bar."""
    low, high = min(values), max(values)
    counts = [0] * num_bins
    for value in values:
        counts[min(int((value - low) / ((high - low) or 1.0) * num_bins), num_bins - 1)] += 1
    top = max(counts)
    bars = "".join(_BARS[-(-count * len(_BARS) // top) - 1] if count else " " for count in counts)
    return f"{low * 1e3:.1f} ms |{bars}| {high * 1e3:.1f} ms"


def write_records(records: Sequence[RequestRecord], path: Path) -> None:
    """One JSON object per request, raw times as measured."""
    with path.open("wb") as file:
        for record in sorted(records, key=lambda record: record.index):
            file.write(orjson.dumps(asdict(record), option=orjson.OPT_APPEND_NEWLINE))


def _milliseconds(seconds: float) -> str:
    """Three digits or more, and never wider than a column."""
    milliseconds = seconds * 1e3
    return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 1000 else 0}f}"


def _or_dash(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _rounded(value: Any) -> Any:
    """To the microsecond: what is beyond is noise and makes the line hard to read."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
