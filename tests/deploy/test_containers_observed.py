"""The profile `observability`, as far as its images can be had: Prometheus, and a receiver in the collector's place.

`make test-containers` says which Prometheus it is: the public image, or Debian's package under its name where no
registry can be reached. Grafana and Jaeger are not started; tests/deploy/test_compose.py reads their configuration.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from containers import MARKS, PROJECT, ROOT, ask, containers, run, running, wait

PROMETHEUS = "http://127.0.0.1:19090"
RECEIVER = f"{PROJECT}_receiver_1"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SERVED = ("redis", "router", "prefill", "decode")

pytestmark = MARKS


@pytest.fixture(scope="module")
def fleet() -> Iterator[None]:
    variables = {
        "PROMETHEUS_PUBLISH": PROMETHEUS.removeprefix("http://"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://otel-collector:4318",
    }
    command = ("--profile", "observability", "up", "-d", "--no-build", *SERVED, "prometheus")
    with running(*command, **variables):
        start_receiver()
        yield


def start_receiver() -> None:
    file = Path(__file__).with_name("otlp_receiver.py")
    where = ["--network", f"{PROJECT}_default", "--network-alias", "otel-collector"]
    mounted = ["-v", f"{file}:/otlp_receiver.py:ro", "--entrypoint", "python"]
    run("podman", "run", "-d", "--name", RECEIVER, *where, *mounted, "baton-worker", "/otlp_receiver.py")


def asked_of_prometheus(path: str, **query: str) -> Any:
    answer = httpx.get(f"{PROMETHEUS}/api/v1/{path}", params=query, timeout=10.0).json()
    assert answer["status"] == "success", answer
    return answer["data"]


def test_prometheus_reads_router_and_workers(fleet: None) -> None:
    def up() -> set[str]:
        targets = asked_of_prometheus("targets", state="active")["activeTargets"]
        return {t["labels"]["app_kubernetes_io_component"] for t in targets if t["health"] == "up"}

    wait("the targets", lambda: up() == {"router", "prefill", "decode"}, 60.0)


def test_prometheus_has_loaded_our_alerts(fleet: None) -> None:
    groups = yaml.safe_load((ROOT / "compose" / "alerts.yaml").read_text())["groups"]
    ours = {rule["alert"] for group in groups for rule in group["rules"]}

    def rules() -> list[dict[str, Any]]:
        return [rule for group in asked_of_prometheus("rules")["groups"] for rule in group["rules"]]

    wait("an evaluation", lambda: all(rule["health"] == "ok" for rule in rules()), 60.0)
    assert {rule["name"] for rule in rules()} == ours


def test_one_trace_leads_through_router_prefill_and_decode(fleet: None) -> None:
    assert ask({"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}) == "bob lima"

    def spans() -> set[tuple[str, str]]:
        lines = map(json.loads, run("podman", "logs", RECEIVER).splitlines())
        return {(line["service"], line["name"]) for line in lines if line["trace"] == TRACE_ID}

    expected = {
        ("baton-router", "attempt"),
        ("baton-prefill", "prefill"),
        ("baton-prefill", "kv push"),
        ("baton-decode", "kv receive"),
        ("baton-decode", "run"),
    }
    wait("the spans of three processes", lambda: spans() >= expected, 60.0)


def test_every_panel_of_the_dashboards_has_data(fleet: None, tmp_path: Path) -> None:
    script = [sys.executable, ROOT / "scripts" / "draw_dashboards.py", "--prometheus", PROMETHEUS]
    deadline = time.monotonic() + 180.0
    while True:
        for _ in range(20):
            assert ask() == "bob lima"
        done = subprocess.run(
            [*script, "--minutes", "2", "--out", tmp_path], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            break
        assert time.monotonic() < deadline, done.stderr
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_an_alert_comes_up_when_the_decode_worker_is_gone(fleet: None) -> None:
    """Until it fires Prometheus waits for two minutes; that it does is tested by promtool."""

    def alerts() -> set[str]:
        return {alert["labels"]["alertname"] for alert in asked_of_prometheus("alerts")["alerts"]}

    assert "BatonNoDecodeWorker" not in alerts()
    run("podman", "stop", "--time", "30", containers("decode")[0])
    wait("the alert", lambda: "BatonNoDecodeWorker" in alerts(), 90.0)
