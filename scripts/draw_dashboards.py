"""Draws Grafana's dashboards without Grafana: every panel's queries, asked of a Prometheus over its HTTP API.

    .venv/bin/python scripts/draw_dashboards.py --prometheus http://127.0.0.1:9090 --minutes 5 --out docs/images

One PNG per file in helm/baton/dashboards, with its titles, units and legends. Panels whose query fails, or for which
Prometheus has nothing at all, are named, and the exit status is 1: a picture is evidence that each panel has data.
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from PIL import Image

FOLDER = Path(__file__).parents[1] / "helm" / "baton" / "dashboards"
NUM_STEPS = 120  # points of a line
RATE_WINDOW = "30s"  # for $__rate_interval: Grafana takes at least four scrapes
MAX_LEGENDS = 8
NUM_COLOURS = 64  # of a picture
COLUMNS = 24  # of Grafana's grid
UNITS = {
    "s": " s", "percentunit": " %", "reqps": " req/s", "ops": " /s", "Bps": " B/s", "short": "", "bool_yes_no": "",
}  # fmt: skip


class Line(NamedTuple):
    legend: str
    times_s: list[float]
    values: list[float]


class Window(NamedTuple):
    start_s: float
    end_s: float


class Source:
    def __init__(self, base_url: str, job: str) -> None:
        self._client = httpx.Client(base_url=base_url, timeout=30.0)
        self._job = job

    def lines(self, target: dict[str, Any], window: Window) -> list[Line]:
        """Raises ValueError where Prometheus refuses the query."""
        query = target["expr"].replace("$__rate_interval", RATE_WINDOW).replace("$job", self._job)
        step_s = max(1.0, (window.end_s - window.start_s) / NUM_STEPS)
        asked = {"query": query, "start": window.start_s, "end": window.end_s, "step": step_s}
        answer = self._client.get("/api/v1/query_range", params=asked).json()
        if answer["status"] != "success":
            raise ValueError(answer["error"])
        found = [_line(target["legendFormat"], series) for series in answer["data"]["result"]]
        return [line for line in found if line.values]


def _line(legend: str, series: dict[str, Any]) -> Line:
    points = [(float(t), float(v)) for t, v in series["values"] if math.isfinite(float(v))]
    name = re.sub(r"\{\{(\w+)\}\}", lambda found: series["metric"].get(found[1], ""), legend)
    return Line(name, [t for t, _ in points], [v for _, v in points])


def draw(board: dict[str, Any], source: Source, window: Window, file: Path) -> list[str]:
    """What is wrong with its panels."""
    panels = board["panels"]
    num_rows = (
        max((panel["gridPos"]["y"] + panel["gridPos"]["h"]) for panel in panels) // panels[0]["gridPos"]["h"]
    )
    num_columns = COLUMNS // panels[0]["gridPos"]["w"]
    figure, grid = plt.subplots(
        num_rows, num_columns, figsize=(4.4 * num_columns, 2.7 * num_rows), squeeze=False
    )
    figure.suptitle(f"{board['title']}, by seconds", fontsize=11)
    for axes in grid.flat:
        axes.axis("off")
    wrong: list[str] = []
    for panel, axes in zip(panels, grid.flat, strict=False):
        wrong += [f"{file.stem}: {panel['title']}: {why}" for why in _draw_panel(panel, axes, source, window)]
    figure.tight_layout()
    figure.savefig(file, dpi=72)
    plt.close(figure)
    Image.open(file).quantize(NUM_COLOURS).save(file, optimize=True)
    return wrong


def _draw_panel(panel: dict[str, Any], axes: Axes, source: Source, window: Window) -> list[str]:
    axes.axis("on")
    axes.set_title(panel["title"], fontsize=9)
    lines: list[Line] = []
    for target in panel["targets"]:
        try:
            lines += source.lines(target, window)
        except ValueError as error:
            return [f"{target['refId']}: {error}"]
    for line in lines:
        times_s = [t - window.start_s for t in line.times_s]
        axes.plot(
            times_s, line.values, linewidth=1, marker="." if len(times_s) == 1 else None, label=line.legend
        )
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.set_xlim(0, window.end_s - window.start_s)
    highest = max((value for line in lines for value in line.values), default=0.0)
    axes.set_ylim(0, 1.05 * highest if highest > 0 else 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))
    if unit == "bool_yes_no":
        axes.set_yticks([0, 1])
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, alpha=0.3)
    if lines:
        handles, legends = axes.get_legend_handles_labels()
        axes.legend(handles[:MAX_LEGENDS], legends[:MAX_LEGENDS], fontsize=6, loc="best")
    return [] if lines else ["no data"]


def shown(value: float, unit: str) -> str:
    """As Grafana would, more or less. Raises KeyError for a unit nobody drew yet."""
    suffix = UNITS[unit]
    if unit == "percentunit":
        return f"{value * 100:.3g}{suffix}"
    if unit == "bool_yes_no":
        return "yes" if value else "no"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{value * 1e3:.3g} ms"
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{suffix.replace(' ', ' ' + prefix, 1) or prefix}"
    return f"{value:.3g}{suffix}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draws the dashboards from what a Prometheus holds.")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--job", default="baton", help="the fleet, as Prometheus calls it")
    parser.add_argument("--minutes", type=float, default=5.0, help="that end now")
    parser.add_argument("--out", type=Path, default=Path("build/dashboards"), metavar="FOLDER")
    chosen = parser.parse_args(arguments)
    now_s = time.time()
    window = Window(now_s - 60 * chosen.minutes, now_s)
    source = Source(chosen.prometheus, chosen.job)
    chosen.out.mkdir(parents=True, exist_ok=True)
    wrong: list[str] = []
    for file in sorted(FOLDER.glob("*.json")):
        wrong += draw(json.loads(file.read_text()), source, window, chosen.out / f"dashboard-{file.stem}.png")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
