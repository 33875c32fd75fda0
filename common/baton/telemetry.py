"""What a process tells about itself: log records and metrics. Configured once by whoever starts the process.

Logs are text for people on a terminal, one JSON object per line elsewhere. Code logs with the standard
library; fields go into `extra`, or shorter through `event(log, "worker ready", address=address)`.
Metrics live in a registry that is passed in; nothing here is global.
"""

import asyncio
import contextlib
import datetime
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, ClassVar, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from baton.config import LogConfig
from baton.errors import ConfigError
from baton.messages import Load, Purpose
from baton.pair_metrics import PairMetrics
from baton.transfer.report import TransferReport

# Each tells of every request, connection or phase of its own at INFO, which drowns what we say.
CHATTY_LOGGERS = ("httpx", "httpcore", "huggingface_hub", "uvicorn", "filelock")
MAX_TEXT_VALUE = 80  # characters of one field on a terminal; JSON has them all

STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
TRANSFER_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def configure_logging(
    config: LogConfig, component: str, stream: TextIO | None = None, *, show_component: bool = True
) -> None:
    """Send every record of this process to `stream` (default: stdout). Replaces what was configured before.

    `component` names the process, such as "prefill-0". Text can go without it, where a supervisor
    puts it in front.
    """
    out = sys.stdout if stream is None else stream
    as_text = config.format == "text" or (config.format == "auto" and out.isatty())
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        TextFormatter(component if show_component else "", color=wants_color(out))
        if as_text
        else JsonFormatter(component)
    )
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))


def event(log: logging.Logger, message: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """A record with named fields. Any name will do: they never clash with the attributes of `LogRecord`."""
    if log.isEnabledFor(level):
        log.log(level, message, extra={"fields": fields}, stacklevel=2)


def wants_color(stream: TextIO, env: Mapping[str, str] = os.environ) -> bool:
    if env.get("NO_COLOR"):
        return False
    return bool(env.get("FORCE_COLOR")) or stream.isatty()


_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "color_message",
    "fields",
}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    extras = {key: value for key, value in vars(record).items() if key not in _STANDARD_ATTRIBUTES}
    return extras | getattr(record, "fields", {})


class JsonFormatter(logging.Formatter):
    """One object per line: ts, level, component, logger, msg, the fields, exception."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "ts": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "component": self._component,
            "logger": record.name,
            "msg": record.getMessage(),
        }
        line |= {key: value for key, value in _fields(record).items() if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`12:00:01 prefill-0 INFO  worker ready  address=127.0.0.1:40001 blocks=512`"""

    _COLORS: ClassVar = {"DEBUG": "2", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}

    def __init__(self, component: str, *, color: bool) -> None:
        super().__init__()
        self._component = component
        self._color = color

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname
        parts = [self._paint(self.formatTime(record, "%H:%M:%S"), "2")]
        parts += [self._paint(self._component, "36")] if self._component else []
        parts += [self._paint(f"{level:<7}", self._COLORS.get(level, "0")), record.getMessage()]
        parts += [self._paint(f" {key}=", "2") + _text_value(value) for key, value in _fields(record).items()]
        text = " ".join(parts)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._color else text


def _text_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    if len(text) > MAX_TEXT_VALUE:
        text = text[: MAX_TEXT_VALUE - 3] + "..."
    return json.dumps(text) if not text or any(c.isspace() for c in text) else text


class WorkerMetrics:
    """One per worker process. The engine's loop calls in once per step, never per token."""

    def __init__(self, registry: CollectorRegistry) -> None:
        blocks = Gauge("baton_kv_blocks", "KV blocks; used + free = total.", ["state"], registry=registry)
        self._blocks_used, self._blocks_free = blocks.labels("used"), blocks.labels("free")
        self._blocks_total = blocks.labels("total")
        self._purposes = Gauge(
            "baton_kv_blocks_held",
            "KV blocks by purpose: running, receiving, leased, draining (a block that requests share counts for each "
            "of them); cached: with a name that prompts match, used or free.",
            ["purpose"],
            registry=registry,
        )
        self._pairs = PairMetrics(registry)
        requests = Gauge("baton_requests", "Requests in this worker.", ["state"], registry=registry)
        self._running, self._waiting = requests.labels("running"), requests.labels("waiting")
        self._kv_usage = Gauge("baton_kv_cache_usage_ratio", "KV blocks in use, 0 to 1.", registry=registry)
        self._prefill_queue = Gauge(
            "baton_prefill_queue_seconds",
            "Prompt tokens that wait to be computed, over the rate measured: how long a new prompt waits.",
            registry=registry,
        )
        self._decode_step = Gauge(
            "baton_decode_step_seconds",
            "Decode steps of late: the time between two tokens of a running request; 0 when none runs.",
            registry=registry,
        )
        self._prefix_queries = Counter(
            "baton_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", registry=registry
        )
        self._prefix_hits = Counter(
            "baton_prefix_cache_hits", "Prompt tokens found in the prefix cache.", registry=registry
        )
        self._looked_up = (0, 0)
        self._cache_config = Gauge(
            "baton_cache_config_info",
            "The KV cache's shape.",
            ["block_size", "num_blocks"],
            registry=registry,
        )
        tokens = Counter("baton_tokens", "Tokens computed.", ["kind"], registry=registry)
        self._prompt_tokens, self._output_tokens = tokens.labels("prompt"), tokens.labels("output")
        self._preemptions = Counter(
            "baton_preemptions",
            "Requests that gave their KV blocks back while they ran; kind: swapped, recomputed.",
            ["kind"],
            registry=registry,
        )
        for kind in ("swapped", "recomputed"):
            self._preemptions.labels(kind)  # 0 is news too
        self._step_retries = Counter(
            "baton_step_retries",
            "Steps that did not fit into memory and were tried again.",
            registry=registry,
        )
        self._corrupted = Counter(
            "baton_corrupted_requests",
            "Requests that failed because the model's logits were no numbers.",
            registry=registry,
        )
        self._steps = Histogram(
            "baton_step_seconds", "Engine steps.", buckets=STEP_BUCKETS_S, registry=registry
        )
        self._transfer_seconds = Histogram(
            "baton_transfer_seconds",
            "KV hand-overs, first piece to last.",
            ["direction", "outcome"],
            buckets=TRANSFER_BUCKETS_S,
            registry=registry,
        )
        self._transfer_bytes = Counter(
            "baton_transfer_bytes", "KV bytes handed over.", ["direction"], registry=registry
        )
        self._transfer_exposed = Histogram(
            "baton_transfer_exposed_seconds",
            "KV hand-overs that were sent, end of the prompt's computation to last acknowledgement.",
            buckets=TRANSFER_BUCKETS_S,
            registry=registry,
        )
        self._transfer_mismatches = Counter(
            "baton_transfer_digest_mismatches",
            "Pieces of KV that did not match their digest.",
            ["direction"],
            registry=registry,
        )
        self._transport = Gauge(
            "baton_transport_info",
            "Transports of KV blocks this worker has.",
            ["transport"],
            registry=registry,
        )
        self._transport_bytes = Counter(
            "baton_transport_sent_bytes",
            "KV bytes sent, by the transport that really carried them.",
            ["transport"],
            registry=registry,
        )

    def set_blocks(self, *, used: int, free: int, total: int) -> None:
        self._blocks_used.set(used)
        self._blocks_free.set(free)
        self._blocks_total.set(total)
        self._kv_usage.set(used / total if total else 0.0)

    def set_purposes(self, blocks: Mapping[Purpose, int], *, num_cached: int) -> None:
        for purpose, number in blocks.items():
            self._purposes.labels(purpose.value).set(number)
        self._purposes.labels("cached").set(num_cached)

    def set_cache_config(self, *, block_size: int, num_blocks: int) -> None:
        self._cache_config.labels(str(block_size), str(num_blocks)).set(1)

    def set_load(self, load: Load) -> None:
        self._running.set(load.num_running)
        self._waiting.set(load.num_waiting)
        rate = load.prefill_tokens_per_s
        self._prefill_queue.set(load.num_waiting_tokens / rate if rate else 0.0)
        self._decode_step.set(load.decode_step_s if load.num_running else 0.0)

    def set_prefix_lookups(self, num_query_tokens: int, num_hit_tokens: int) -> None:
        """Since the engine began."""
        before, self._looked_up = self._looked_up, (num_query_tokens, num_hit_tokens)
        self._prefix_queries.inc(num_query_tokens - before[0])
        self._prefix_hits.inc(num_hit_tokens - before[1])

    def observe_step(self, seconds: float, *, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self._steps.observe(seconds)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._output_tokens.inc(num_output_tokens)

    def count_pressure(self, *, swapped: int, recomputed: int, retries: int) -> None:
        self._preemptions.labels("swapped").inc(swapped)
        self._preemptions.labels("recomputed").inc(recomputed)
        self._step_retries.inc(retries)

    def count_corrupted(self, num_requests: int) -> None:
        self._corrupted.inc(num_requests)

    def observe_transfer(self, report: TransferReport) -> None:
        self._transfer_seconds.labels(report.direction, report.outcome).observe(report.seconds)
        self._transfer_bytes.labels(report.direction).inc(report.num_bytes)
        self._transfer_mismatches.labels(report.direction).inc(report.num_mismatches)
        self._pairs.observe(report)
        if report.transport:
            self._transport_bytes.labels(report.transport).inc(report.num_bytes)
        if report.exposed_s is not None:
            self._transfer_exposed.observe(report.exposed_s)

    def set_transports(self, names: Iterable[str]) -> None:
        self._transport.clear()
        for name in names:
            self._transport.labels(name).set(1)
            self._transport_bytes.labels(name)  # 0 is news too


@contextlib.asynccontextmanager
async def serve_metrics(host: str, port: int, registry: CollectorRegistry) -> AsyncIterator[int]:
    """`/metrics` over HTTP from a thread of its own, until the block is left; yields the port (for port 0).

    Raises ConfigError when the address cannot be bound.
    """
    try:
        # In a thread: http.server looks its own name up in DNS.
        server, thread = await asyncio.to_thread(start_http_server, port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {host}:{port}: {error.strerror or error}") from error
    try:
        yield server.server_port
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()
