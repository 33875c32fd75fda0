"""A worker's metrics, in a registry that is passed in, and the server that gives them out. Counted per step, per
request and per hand-over, never per token."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from baton.errors import ConfigError
from baton.messages import Fetched, FetchOutcome, Load, Purpose
from baton.pair_metrics import PairMetrics
from baton.transfer.report import TransferReport

STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
STEP_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TRANSFER_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
REQUEST_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


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
        self._step_tokens = Histogram(
            "baton_step_tokens",
            "Prompt and output tokens of an engine step.",
            buckets=STEP_TOKENS_BUCKETS,
            registry=registry,
        )
        self._queue = Histogram(
            "baton_prompt_queue_seconds",
            "Prompts computed here: arrival on this worker until they got blocks.",
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._prefill = Histogram(
            "baton_prompt_compute_seconds",
            "Prompts computed here: from then on until the first token.",
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
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
        self._fetches = Histogram(
            "baton_prefix_fetch_seconds",
            "Prefixes that another worker held; outcome: ok, and of those that were computed after all evicted, late, "
            "failed, cancelled.",
            ["outcome"],
            buckets=TRANSFER_BUCKETS_S,
            registry=registry,
        )
        for outcome in FetchOutcome:
            self._fetches.labels(outcome.value)  # 0 is news too
        self._fetched_tokens = Counter(
            "baton_prefix_fetched_tokens",
            "Prompt tokens whose KV came from another worker instead of being computed.",
            registry=registry,
        )
        self._transport = Gauge(
            "baton_transport_info",
            "Transports of KV blocks this worker has.",
            ["transport"],
            registry=registry,
        )
        self._transport_bytes = {
            direction: Counter(
                f"baton_transport_{direction}_bytes",
                f"KV bytes {direction}, by the transport that really carried them.",
                ["transport"],
                registry=registry,
            )
            for direction in ("sent", "received")
        }

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
        self._step_tokens.observe(num_prompt_tokens + num_output_tokens)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._output_tokens.inc(num_output_tokens)

    def observe_prompt(self, *, queue_s: float, compute_s: float) -> None:
        self._queue.observe(queue_s)
        self._prefill.observe(compute_s)

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
            self._transport_bytes[report.direction].labels(report.transport).inc(report.num_bytes)
        if report.exposed_s is not None:
            self._transfer_exposed.observe(report.exposed_s)

    def observe_fetch(self, fetched: Fetched) -> None:
        self._fetches.labels(fetched.outcome.value).observe(fetched.seconds)
        self._fetched_tokens.inc(fetched.num_tokens)

    def set_transports(self, names: Iterable[str]) -> None:
        self._transport.clear()
        for name in names:
            self._transport.labels(name).set(1)
            for counter in self._transport_bytes.values():
                counter.labels(name)  # 0 is news too


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
