"""The report as one HTML file: tables, and plots as inline SVG; nothing to download, for light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import orjson

from baton_loadtest.metrics import percentile
from baton_loadtest.record import RequestRecord
from baton_loadtest.report import Report, latency_cells, latency_rows

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 40
_MAX_DOTS = 5000  # more are thinned out evenly, failures never
_NUM_QUANTILES = 400

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --dim: #66707c; --line: #d5dae0; --back: #fff;
        --blue: #2463c9; --orange: #c9621b; --red: #c62f3b; }
@media (prefers-color-scheme: dark) {
:root { --ink: #e3e7ec; --dim: #98a2ae; --line: #3a424c; --back: #15191e;
        --blue: #78a9f5; --orange: #efa05f; --red: #f0727c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
       max-width: 1340px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; margin-bottom: 0; } h2 { font-size: 1rem; margin: 0 0 .3rem; } p { margin: .3rem 0; }
.dim { color: var(--dim); } .warning { color: var(--orange); } .error { color: var(--red); }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; } .plots > div { flex: 1 1 520px; max-width: 640px; }
svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 12px; }
.dot { fill-opacity: .6; }
.grid { stroke: var(--line); stroke-width: 1; } .blue { fill: var(--blue); } .orange { fill: var(--orange); }
.red { fill: var(--red); } .line { fill: none; stroke: var(--blue); stroke-width: 2; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px;
      border: 1px solid var(--line); padding: .8rem; }
"""


@dataclass(frozen=True, slots=True)
class _Dot:
    x: float
    y: float
    color: str
    title: str


@dataclass(frozen=True, slots=True)
class _Frame:
    """Maps data to the drawing; both axes start at 0."""

    x_max: float
    y_max: float

    def x(self, value: float) -> float:
        return _LEFT + value / self.x_max * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / self.y_max * (_HEIGHT - _TOP - _BOTTOM)


def page(report: Report, measured: Sequence[RequestRecord]) -> str:
    parameters = orjson.dumps(orjson.loads(report.json_line()), option=orjson.OPT_INDENT_2).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>baton loadtest</title><style>{_STYLE}</style></head><body>
<h1>{escape(report.regime)}</h1>
<p class="dim">{escape(_subtitle(report))}</p>
{_messages(report)}{_summary(report)}{_latency_table(report)}
<div class="plots">{"".join(_plots(measured))}</div>
<h2>Everything, as in the JSON line</h2><pre>{escape(parameters)}</pre>
</body></html>
"""


def _subtitle(report: Report) -> str:
    where = f"{report.parameters.get('model', '')} at {report.parameters.get('base_url', '')}"
    return f"{where}; {report.metrics.num_requests} requests measured"


def _messages(report: Report) -> str:
    lines = [("warning", text) for text in report.warnings()]
    lines += [("error", text) for text in (*report.metrics.error_examples, *report.metrics.wrong_examples)]
    return "".join(f'<p class="{kind}">{escape(text)}</p>' for kind, text in lines)


def _summary(report: Report) -> str:
    metrics = report.metrics
    rows = [
        ("succeeded", f"{metrics.num_ok} of {metrics.num_requests}"),
        ("right answers", f"{metrics.num_checked - metrics.num_wrong} of {metrics.num_checked} checked"),
        ("requests per second", f"{metrics.requests_per_s:.2f}"),
        ("output tokens per second", f"{metrics.output_tokens_per_s:.1f}"),
        ("window", f"{metrics.window_s:.2f} s, {metrics.drain_s:.2f} s after the last sending"),
        ("client", f"{report.cost.cpu_share:.0%} of a core"),
    ]
    if metrics.goodput is not None:
        slo = report.parameters.get("slo", "")
        rows.append(
            (
                "goodput",
                f"{metrics.goodput.fraction:.1%}, {metrics.goodput.requests_per_s:.2f} req/s in {slo}",
            )
        )
    return _table(rows)


def _latency_table(report: Report) -> str:
    head = ("ms", "mean", "p50", "p90", "p95", "p99", "max", "values")
    return _table([(name, *latency_cells(values)) for name, values in latency_rows(report.metrics)], head)


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)] if head else []
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _plots(measured: Sequence[RequestRecord]) -> list[str]:
    if not measured:
        return []
    start_s = min(record.sent_s for record in measured)
    ttft, e2e = [], []
    for record in measured:
        at_s = record.sent_s - start_s
        if not record.ok:
            e2e.append(_Dot(at_s, record.e2e_s, "red", f"request {record.index}: {record.error_label}"))
            continue
        color = "orange" if record.correct is False else "blue"
        e2e.append(_Dot(at_s, record.e2e_s, color, f"request {record.index}: {record.e2e_s * 1e3:.1f} ms"))
        if record.ttft_s is not None:
            ttft.append(
                _Dot(at_s, record.ttft_s, color, f"request {record.index}: {record.ttft_s * 1e3:.1f} ms")
            )
    gaps = sorted(gap for record in measured if record.ok for gap in record.gaps_s())
    plots = [
        _figure("TTFT by time of sending", _dots_svg(ttft)) if ttft else "",
        _figure("E2E by time of sending (failures red, wrong answers orange)", _dots_svg(e2e)),
        _figure("ITL by percentile", _quantiles_svg(gaps)) if gaps else "",
    ]
    return [plot for plot in plots if plot]


def _figure(title: str, svg: str) -> str:
    return f"<div><h2>{escape(title)}</h2>{svg}</div>"


def _dots_svg(dots: Sequence[_Dot]) -> str:
    kept = _thinned(dots)
    frame = _Frame(_axis_end(max(dot.x for dot in kept)), _axis_end(max(dot.y for dot in kept)))
    circles = "".join(
        f'<circle class="dot {dot.color}" cx="{frame.x(dot.x):.1f}" cy="{frame.y(dot.y):.1f}" r="3">'
        f"<title>{escape(dot.title)}</title></circle>"
        for dot in kept
    )
    return _svg(frame, circles, "s since the first sending")


def _thinned(dots: Sequence[_Dot]) -> list[_Dot]:
    step = math.ceil(len(dots) / _MAX_DOTS)
    return [dot for number, dot in enumerate(dots) if number % step == 0 or dot.color != "blue"]


def _quantiles_svg(ordered: Sequence[float]) -> str:
    frame = _Frame(100.0, _axis_end(ordered[-1]))
    percents = [100 * step / _NUM_QUANTILES for step in range(_NUM_QUANTILES + 1)]
    points = " ".join(f"{frame.x(each):.1f},{frame.y(percentile(ordered, each)):.1f}" for each in percents)
    return _svg(frame, f'<polyline class="line" points="{points}"/>', "percentile")


def _svg(frame: _Frame, marks: str, x_label: str) -> str:
    grid = []
    for tick in _ticks(frame.y_max):
        y = frame.y(tick)
        grid.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        grid.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick * 1e3:g} ms</text>')
    for tick in _ticks(frame.x_max):
        grid.append(f'<text x="{frame.x(tick):.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{tick:g}</text>')
    label = f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(grid)}{marks}{label}</svg>'


def _ticks(end: float) -> list[float]:
    step = _tick_step(end)
    return [round(number * step, 12) for number in range(round(end / step) + 1)]


def _axis_end(highest: float) -> float:
    """The first tick at or above the highest value."""
    if highest <= 0:
        return 1.0
    step = _tick_step(highest)
    return step * math.ceil(highest / step * (1 - 1e-12))


def _tick_step(end: float) -> float:
    """1, 2 or 5 times a power of ten, so that four to ten ticks fit."""
    power = 10.0 ** math.floor(math.log10(end / 4))
    return power * max(factor for factor in (1, 2, 5) if factor * power <= end / 4 * (1 + 1e-9))
