"""Writes Grafana's dashboards: helm/baton/dashboards/*.json, from the queries below. Run it after a change here.

    .venv/bin/python scripts/make_dashboards.py

A test holds the files to this script, and every metric in them to a live /metrics.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "helm" / "baton" / "dashboards"
WIDTH, HEIGHT = 8, 8  # of a panel; Grafana's grid has 24 columns


class Panel(NamedTuple):
    title: str
    unit: str
    queries: dict[str, str]  # legend -> PromQL; OURS stands for the labels that choose a fleet
    text: str = ""


OURS = 'job=~"$job"'
API = f'{OURS},endpoint=~"/v1/.*completions|baton.v1.Router/Generate"'


def rate(metric: str, labels: str = OURS, by: str = "") -> str:
    return f"sum(rate({metric}{{{labels}}}[$__rate_interval]))" + (f" by ({by})" if by else "")


def quantiles(metric: str, labels: str = OURS) -> dict[str, str]:
    buckets = rate(f"{metric}_bucket", labels, "le")
    return {f"p{round(q * 100)}": f"histogram_quantile({q}, {buckets})" for q in (0.5, 0.9, 0.99)}


def share_below(metric: str, seconds: str) -> str:
    within = rate(f"{metric}_bucket", f'{OURS},le="{seconds}"')
    return f"{within} / {rate(f'{metric}_count')}"


def share(metric: str, of: str) -> str:
    """0, not nothing, while no request ended so."""
    return f"({rate(metric, f'{API},{of}')} or vector(0)) / {rate(metric, API)}"


def ratio(above: str, below: str, by: str) -> str:
    return f"{rate(above, OURS, by)} / {rate(below, OURS, by)}"


def per_pair(above: str, below: str) -> str:
    return " / ".join(rate(f"baton_pair_{name}_total", SENT, BY_PAIR) for name in (above, below))


def rates(metric: str, labels: str = OURS, by: str = "instance") -> dict[str, str]:
    return {f"{{{{{by}}}}}": rate(metric, labels, by)}


def gauges(metric: str, labels: str = "", by: str = "instance", function: str = "sum") -> dict[str, str]:
    return {f"{{{{{by}}}}}": gauge(metric, by, labels, function)}


def gauge(metric: str, by: str, labels: str = "", function: str = "sum") -> str:
    return f"{function}({metric}{{{labels + ',' if labels else ''}{OURS}}}) by ({by})"


ENDED = "baton_router_requests_total"
TTFT, ITL = "baton_router_time_to_first_token_seconds", "baton_router_inter_token_latency_seconds"
E2E = "baton_router_e2e_request_latency_seconds"
RECEIVED = f'direction="received",{OURS}'
CACHE = "baton_prefix_cache"
PAIR, BY_PAIR = "{{instance}} to {{peer}}", "instance, peer"
SENT = f'direction="sent",{OURS}'

DASHBOARDS: dict[str, tuple[str, list[Panel]]] = {
    "user-experience": (
        "Baton: user experience",
        [
            Panel("Time to first token", "s", quantiles(TTFT)),
            Panel("Time between tokens", "s", quantiles(ITL), "A request's mean."),
            Panel("Whole answer", "s", quantiles(E2E)),
            Panel(
                "Goodput",
                "percentunit",
                {
                    "first token within 1 s": share_below(TTFT, "1.0"),
                    "a token within 50 ms": share_below(ITL, "0.05"),
                },
                "Share of answers that are fast enough. Choose your limits among the histograms' buckets.",
            ),
            Panel(
                "Errors",
                "percentunit",
                {
                    "failed": share(ENDED, 'status=~"5.."'),
                    "refused": share(ENDED, 'status="429"'),
                },
            ),
            Panel("Requests by status", "reqps", rates(ENDED, API, "status")),
            Panel("Being answered", "short", gauges("baton_router_num_requests_running")),
            Panel(
                "Tokens",
                "short",
                {
                    "prompt / s": rate("baton_router_prompt_tokens_total"),
                    "generated / s": rate("baton_router_generation_tokens_total"),
                },
            ),
            Panel("Ends", "reqps", rates("baton_router_request_success_total", OURS, "finished_reason")),
        ],
    ),
    "prefill": (
        "Baton: prefill",
        [
            Panel("Queue", "s", gauges("baton_prefill_queue_seconds", function="max"),
                  "Prompt tokens that wait, over the rate measured. Scale prefill workers by it."),
            Panel("Waiting requests", "short", gauges("baton_requests", 'state="waiting"')),
            Panel("Running requests", "short", gauges("baton_requests", 'state="running"')),
            Panel("Prompt tokens computed", "short", rates("baton_tokens_total", f'kind="prompt",{OURS}')),
            Panel("Steps", "s", quantiles("baton_step_seconds")),
            Panel("Prompt lengths", "short", quantiles("baton_router_request_prompt_tokens")),
            Panel("Workers", "short", {"{{state}}": gauge("baton_router_workers", "state", 'role="prefill"', "max")}),
        ],
    ),
    "decode": (
        "Baton: decode",
        [
            Panel("KV in use", "percentunit", gauges("baton_kv_cache_usage_ratio", function="max"),
                  "Scale decode workers by it."),
            Panel("Decode step", "s", gauges("baton_decode_step_seconds", function="max"),
                  "Time between two tokens of a running request; 0 when none runs."),
            Panel("Preemptions", "short", rates("baton_preemptions_total")),
            Panel("KV blocks held", "short", gauges("baton_kv_blocks_held", by="purpose"),
                  "Cached ones may be free: they live until somebody needs the room."),
            Panel("Running requests", "short", gauges("baton_requests", 'state="running"')),
            Panel("Tokens generated", "short", rates("baton_tokens_total", f'kind="output",{OURS}')),
            Panel("Answer lengths", "short", quantiles("baton_router_request_generation_tokens")),
            Panel("Corrupted requests", "short", rates("baton_corrupted_requests_total"),
                  "The model's logits were no numbers."),
            Panel("Workers", "short", {"{{state}}": gauge("baton_router_workers", "state", 'role="decode"', "max")}),
        ],
    ),
    "hand-over": (
        "Baton: hand-over",
        [
            Panel("Exposed time", "s", quantiles("baton_transfer_exposed_seconds"),
                  "End of the prompt's computation until its KV has arrived."),
            Panel("Hand-overs", "s", quantiles("baton_transfer_seconds", RECEIVED), "First piece to last."),
            Panel("Outcomes", "ops", rates("baton_transfer_seconds_count", RECEIVED, "outcome")),
            Panel("KV per pair", "Bps", {PAIR: rate("baton_pair_bytes_total", SENT, BY_PAIR)}),
            Panel("Speed of the wire per pair", "Bps", {PAIR: per_pair("bytes", "wire_seconds")}),
            Panel("Hand-overs per pair", "ops",
                  {PAIR + " {{outcome}}": rate("baton_pair_transfers_total", SENT, BY_PAIR + ", outcome")}),
            Panel("Mean exposed time per pair", "s", {PAIR: per_pair("exposed_seconds", "transfers")}),
            Panel("Troubles per pair", "short",
                  {"{{prefill}} to {{decode}} {{kind}}": gauge("baton_router_pair_troubles", "prefill, decode, kind")},
                  "Since the routers started: damaged pieces, prompts computed again, quarantines."),
            Panel("KV by transport", "Bps", rates("baton_transport_sent_bytes_total", OURS, "transport")),
            Panel("Damaged pieces", "short", rates("baton_transfer_digest_mismatches_total", RECEIVED),
                  "Found by their digest, never used."),
        ],
    ),
    "prefix-cache": (
        "Baton: prefix cache",
        [
            Panel(
                "Hits",
                "percentunit",
                {"{{instance}}": ratio(f"{CACHE}_hits_total", f"{CACHE}_queries_total", "instance")},
                "Share of prompt tokens that a worker held already.",
            ),
            Panel("Looked up", "short", {"tokens / s": rate(f"{CACHE}_queries_total")}),
            Panel("Found", "short", {"tokens / s": rate(f"{CACHE}_hits_total")}),
            Panel("Cached blocks", "short", gauges("baton_kv_blocks_held", 'purpose="cached"')),
            Panel("Free blocks", "short", gauges("baton_kv_blocks", 'state="free"'),
                  "Cached ones among them: they live until somebody needs the room."),
            Panel("Index is reached", "bool_yes_no", gauges("baton_router_index_healthy", function="min")),
        ],
    ),
}  # fmt: skip


def dashboard(uid: str, title: str, panels: list[Panel]) -> dict[str, Any]:
    return {
        "uid": f"baton-{uid}",
        "title": title,
        "tags": ["baton"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["baton"], "title": "Baton", "asDropdown": True}],
        "templating": {"list": [_data_source(), _job()]},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _data_source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _job() -> dict[str, Any]:
    """A fleet is one job: namespace/release under the chart's monitors, `baton` under compose."""
    return {
        "name": "job",
        "label": "Fleet",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": "label_values(baton_router_index_healthy, job)", "refId": "job"},
        "refresh": 2,
        "multi": False,
        "includeAll": True,
        "allValue": ".+",
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    columns = 24 // WIDTH
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": source,
        "gridPos": {
            "x": number % columns * WIDTH,
            "y": number // columns * HEIGHT,
            "w": WIDTH,
            "h": HEIGHT,
        },
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 8, "showPoints": "never"}},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": query, "legendFormat": legend}
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def files() -> dict[str, str]:
    """Name -> content."""
    return {
        f"{uid}.json": json.dumps(dashboard(uid, title, panels), indent=1) + "\n"
        for uid, (title, panels) in DASHBOARDS.items()
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, content in files().items():
        (FOLDER / name).write_text(content)
    print(f"{len(files())} dashboards in {FOLDER}")


if __name__ == "__main__":
    main()
