"""Log formats and worker metrics."""

import io
import json
import logging
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry

from baton.config import LogConfig
from baton.errors import ConfigError
from baton.messages import Load, Purpose
from baton.pair_metrics import MAX_PEERS
from baton.telemetry import configure_logging, event, wants_color
from baton.transfer.report import TransferReport
from baton.worker_metrics import WorkerMetrics, serve_metrics


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    logging.captureWarnings(False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_lines_off_a_terminal_carry_fields_and_exceptions() -> None:
    out = io.StringIO()
    configure_logging(LogConfig(), "decode-0", out)
    log = logging.getLogger("baton.test")
    event(log, "worker ready", name="n", blocks=3)
    log.info("by extra", extra={"address": "a:1"})
    try:
        raise ValueError("broken\nin two lines")
    except ValueError:
        log.exception("it failed")
    log.debug("not shown")
    first, second, third = (json.loads(line) for line in out.getvalue().splitlines())
    assert first.pop("ts").endswith("Z")
    assert first == {
        "level": "info",
        "component": "decode-0",
        "logger": "baton.test",
        "msg": "worker ready",
        "name": "n",
        "blocks": 3,
    }
    assert second["address"] == "a:1"
    assert "ValueError: broken" in third["exception"]


def test_text_on_a_terminal_is_coloured_unless_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    out = Terminal()
    configure_logging(LogConfig(), "router", out)
    event(logging.getLogger("x"), "up", text="two words", seconds=0.123456)
    assert "\x1b[" in out.getvalue()
    plain = io.StringIO()
    configure_logging(LogConfig(format="text"), "router", plain)
    event(logging.getLogger("x"), "up", text="two words", seconds=0.123456)
    assert plain.getvalue().split(" ", 1)[1] == 'router INFO    up  text="two words"  seconds=0.1235\n'
    assert wants_color(plain, {"FORCE_COLOR": "1"})
    assert not wants_color(out, {"NO_COLOR": "1", "FORCE_COLOR": "1"})


def test_the_level_hides_what_is_less_severe() -> None:
    out = io.StringIO()
    configure_logging(LogConfig(level="error", format="text"), "", out)
    logging.getLogger("a").warning("quiet")
    logging.getLogger("a").error("loud")
    assert [line.split()[1:] for line in out.getvalue().splitlines()] == [["ERROR", "loud"]]


def test_worker_metrics_read_as_they_were_set() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.set_blocks(used=3, free=5, total=8)
    metrics.set_load(Load(num_running=2, num_waiting=1))
    metrics.observe_step(0.01, num_prompt_tokens=7, num_output_tokens=2)
    metrics.observe_transfer(TransferReport("received", "ok", 0.2, 4096, 1, transport="shm"))
    metrics.observe_transfer(
        TransferReport("sent", "ok", 0.3, 100, 0, 0.05, "tcp", peer="decode-0", num_pieces=2, wire_s=0.1)
    )
    metrics.observe_transfer(TransferReport("sent", "failed", 0.4, 10, num_mismatches=3))
    metrics.set_purposes({Purpose.RUNNING: 3, Purpose.DRAINING: 1}, num_cached=4)
    metrics.set_transports(["ucx"])
    metrics.set_transports(["tcp"])

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert [value("baton_kv_blocks", state=s) for s in ("used", "free", "total")] == [3, 5, 8]
    assert [value("baton_requests", state=s) for s in ("running", "waiting")] == [2, 1]
    assert [value("baton_tokens_total", kind=k) for k in ("prompt", "output")] == [7, 2]
    assert value("baton_step_seconds_count") == 1
    assert value("baton_transfer_seconds_sum", direction="received", outcome="ok") == 0.2
    assert value("baton_transfer_seconds_count", direction="sent", outcome="failed") == 1
    assert [value("baton_transfer_bytes_total", direction=d) for d in ("sent", "received")] == [110, 4096]
    assert [value("baton_transfer_digest_mismatches_total", direction=d) for d in ("sent", "received")] == [
        3,
        1,
    ]
    assert value("baton_transfer_exposed_seconds_count") == 1
    assert value("baton_transfer_exposed_seconds_sum") == 0.05
    assert value("baton_kv_blocks_held", purpose="draining") == 1
    assert value("baton_kv_blocks_held", purpose="cached") == 4
    pair = {"direction": "sent", "peer": "decode-0"}
    assert value("baton_pair_transfers_total", **pair, outcome="ok") == 1
    names = ("bytes", "pieces", "wire_seconds", "exposed_seconds")
    assert [value(f"baton_pair_{name}_total", **pair) for name in names] == [100, 2, 0.1, 0.05]
    assert value("baton_transport_sent_bytes_total", transport="tcp") == 100
    assert value("baton_transport_received_bytes_total", transport="shm") == 4096
    assert value("baton_transport_info", transport="tcp") == 1
    assert value("baton_transport_info", transport="ucx") is None


def test_workers_that_come_and_go_do_not_make_series_without_end() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    for number in range(200):
        metrics.observe_transfer(
            TransferReport("sent", "ok", 0.1, 1, num_mismatches=0, peer=f"decode-{number}")
        )
    peers = {s.labels["peer"] for m in registry.collect() for s in m.samples if "peer" in s.labels}
    assert len(peers) == MAX_PEERS + 1
    assert registry.get_sample_value("baton_pair_bytes_total", {"direction": "sent", "peer": "other"}) == 136


async def test_metrics_are_served_until_the_block_ends() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(registry).set_transports(["tcp"])
    async with serve_metrics("127.0.0.1", 0, registry) as port, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}/metrics"
        assert 'baton_transport_info{transport="tcp"} 1.0' in (await client.get(url)).text
        with pytest.raises(
            ConfigError, match=f"cannot serve metrics on 127.0.0.1:{port}: Address already in use"
        ):
            async with serve_metrics("127.0.0.1", port, registry):
                pass
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(url)
