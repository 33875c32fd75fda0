"""The router's metrics: counted per request, never per token."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from baton.errors import Unavailable
from baton.messages import Role, WorkerRecord
from baton.request import FinishReason
from baton_router.canary import PairCounts
from baton_router.fleet_view import FleetView, transports_in_use

TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)
E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
N_BUCKETS = (1, 2, 5, 10, 20)
PROBES = ("/ready",)  # whose 503 is no refusal
LENGTH_BUCKETS = (
    1,
    2,
    5,
    10,
    20,
    50,
    100,
    200,
    500,
    1000,
    2000,
    5000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
)


class RouterMetrics:
    """One per router process; both front doors write to it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.num_running = Gauge(
            "baton_router_num_requests_running", "Requests being answered.", registry=registry
        )
        self._requests = Counter(
            "baton_router_requests", "Requests, as they ended.", ["endpoint", "status"], registry=registry
        )
        self._unserved = Counter(
            "baton_router_unserved_requests",
            "Requests refused with 503: no worker could serve them. Fleets that scaled to zero come back by it.",
            registry=registry,
        )
        self._ttft = self._histogram("time_to_first_token", "Arrival to first token.", TTFT_BUCKETS_S)
        self._itl = self._histogram("inter_token_latency", "A request's mean between tokens.", ITL_BUCKETS_S)
        self._e2e = self._histogram("e2e_request_latency", "Arrival to last token.", E2E_BUCKETS_S)
        self._decode = self._histogram("decode", "First token to last, of finished answers.", E2E_BUCKETS_S)
        self._prompt_tokens = Counter("baton_router_prompt_tokens", "Prompt tokens.", registry=registry)
        self._generation_tokens = Counter(
            "baton_router_generation_tokens", "Generated tokens.", registry=registry
        )
        self._successes = Counter(
            "baton_router_request_success",
            "Answers that were finished.",
            ["finished_reason"],
            registry=registry,
        )
        for reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._successes.labels(reason.value)  # 0 is news too
        self._cached_tokens = Counter(
            "baton_router_prompt_tokens_cached",
            "Prompt tokens that a worker held already.",
            registry=registry,
        )
        self._prompt_lengths = self._sizes("prompt_tokens", "Per request.")
        self._output_lengths = self._sizes("generation_tokens", "Per request, of all its choices.")
        self._longest = self._sizes("longest_choice_tokens", "Of a request's longest choice.")
        self._max_tokens = self._sizes("max_tokens", "The parameter max_tokens, or its default.")
        self._n = self._sizes("n", "The parameter n.", N_BUCKETS)
        self._waiting = Gauge(
            "baton_router_num_requests_waiting", "Requests that wait in a decode worker.", registry=registry
        )
        self._kv_usage = Gauge(
            "baton_router_kv_cache_usage_ratio", "Of all decode workers, 0 to 1.", registry=registry
        )
        self._workers = Gauge("baton_router_workers", "Workers known.", ["role", "state"], registry=registry)
        self._transport = Gauge(
            "baton_router_transport_info", "Transports between pairs.", ["transport"], registry=registry
        )
        self._pairs = Gauge(
            "baton_router_pair_troubles",
            "Since the router started: pieces that did not match their digest (mismatches), prompts that the decode "
            "worker computed because their KV did not come (repairs), times that the pair was quarantined.",
            ["prefill", "decode", "kind"],
            registry=registry,
        )
        self._index_healthy = Gauge(
            "baton_router_index_healthy", "1 while the prefix index answers.", registry=registry
        )

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"baton_router_{name}_seconds", text, buckets=buckets, registry=self.registry)

    def _sizes(self, name: str, text: str, buckets: Sequence[float] = LENGTH_BUCKETS) -> Histogram:
        return Histogram(f"baton_router_request_{name}", text, buckets=buckets, registry=self.registry)

    def count(self, endpoint: str, status: int) -> None:
        self._requests.labels(endpoint, str(status)).inc()
        if status == Unavailable.status and endpoint not in PROBES:
            self._unserved.inc()

    def observe_answer(
        self,
        *,
        num_prompt_tokens: int,
        num_output_tokens: int,
        ttft_s: float | None,
        mean_itl_s: float | None,
        e2e_s: float | None,
        finish_reason: FinishReason | None = None,
        num_cached_tokens: int = 0,
    ) -> None:
        """`e2e_s` of a finished request only; what was not reached is None."""
        self._prompt_lengths.observe(num_prompt_tokens)
        self._output_lengths.observe(num_output_tokens)
        self._cached_tokens.inc(num_cached_tokens)
        if e2e_s is not None and ttft_s is not None:
            self._decode.observe(e2e_s - ttft_s)
        if e2e_s is not None and finish_reason is not None:
            self._successes.labels(finish_reason.value).inc()
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generation_tokens.inc(num_output_tokens)
        for histogram, seconds in ((self._ttft, ttft_s), (self._itl, mean_itl_s), (self._e2e, e2e_s)):
            if seconds is not None:
                histogram.observe(seconds)

    def observe_shape(self, *, n: int, max_tokens: int, num_longest_tokens: int) -> None:
        """What a request asked for, and its longest choice."""
        self._n.observe(n)
        self._longest.observe(num_longest_tokens)
        self._max_tokens.observe(max_tokens)

    def observe_fleet(self, fleet: FleetView) -> None:
        """Called when somebody reads the metrics."""
        ready = {link.record.worker_id for link in fleet.ready()}
        self._workers.clear()
        for record in fleet.records():
            state = "ready" if record.worker_id in ready else "draining" if record.draining else "lost"
            for role in record.roles:
                self._workers.labels(role.value, state).inc()
        self._transport.clear()
        for transport in transports_in_use(fleet):
            self._transport.labels(transport).set(1)
        self._observe_load([record for record in fleet.records() if Role.DECODE in record.roles])
        unseen = {(p.worker_id, d.worker_id): PairCounts() for p, d in fleet.pairs()}  # 0 is news too
        for (prefill, decode), counts in (unseen | dict(fleet.pair_counts())).items():
            self._pairs.labels(prefill, decode, "mismatches").set(counts.num_mismatches)
            self._pairs.labels(prefill, decode, "repairs").set(counts.num_repairs)
            self._pairs.labels(prefill, decode, "quarantines").set(counts.num_quarantines)
        self._index_healthy.set(fleet.index_health().healthy)

    def _observe_load(self, decodes: Sequence[WorkerRecord]) -> None:
        self._waiting.set(sum(record.load.num_waiting for record in decodes))
        num_blocks = sum(record.num_blocks for record in decodes)
        num_free = sum(record.load.num_free_blocks for record in decodes)
        self._kv_usage.set((num_blocks - num_free) / num_blocks if num_blocks else 0.0)
