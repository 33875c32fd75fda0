"""Our metrics once more under vLLM's names, for dashboards, autoscalers and gateways that know these.

Nothing is counted for it: when somebody reads the metrics, the families that others keep are given out under a second
name. Each of vLLM's families comes from one kind of process, so that a sum over a fleet counts nothing twice. The three
gauges that the Gateway API's Inference Extension asks a model server for are the exception: workers tell them of
themselves, and the router, which is what a gateway sees, of the fleet, with the label engine="router".
"""

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

Labels = dict[str, str]


class Source(NamedTuple):
    """A family of ours, and what its samples are called for vLLM's; None leaves a sample out."""

    name: str
    labels: Callable[[Labels], Labels | None] = lambda labels: labels


def without(label: str) -> Callable[[Labels], Labels | None]:
    """The sum over a label that vLLM does not have."""
    return lambda labels: {k: v for k, v in labels.items() if k != label}


def only(label: str, value: str) -> Callable[[Labels], Labels | None]:
    """The samples with that label, which vLLM does not have."""
    return lambda labels: (
        {k: v for k, v in labels.items() if k != label} if labels.get(label) == value else None
    )


class VllmNames(Collector):
    """Reads `registry`, and is registered there itself."""

    families: ClassVar[Mapping[str, Source]]

    def __init__(self, registry: CollectorRegistry, model_name: str, engine: str) -> None:
        self._registry = registry
        self._common = {"model_name": model_name, "engine": engine}

    def describe(self) -> Iterable[Metric]:
        """Else the registry would call `collect` while it registers this."""
        return ()

    def collect(self) -> Iterable[Metric]:
        # By series, because a restricted view of the registry does not reach back to this collector.
        wanted = {source.name for source in self.families.values()}
        series = [
            f"{name}{suffix}" for name in wanted for suffix in ("", "_total", "_bucket", "_sum", "_count")
        ]
        ours = {metric.name: metric for metric in self._registry.restricted_registry(series).collect()}
        for name, source in self.families.items():
            if (metric := ours.get(source.name)) is not None:
                yield self._renamed(metric, f"vllm:{name}", source)

    def _renamed(self, metric: Metric, name: str, source: Source) -> Metric:
        values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for sample in metric.samples:
            labels = source.labels(dict(sample.labels))
            if labels is not None and not sample.name.endswith("_created"):
                key = name + sample.name.removeprefix(metric.name), frozenset((labels | self._common).items())
                values[key] = values.get(key, 0.0) + sample.value
        renamed = Metric(name, metric.documentation, metric.type)
        renamed.samples = [Sample(name, dict(labels), value) for (name, labels), value in values.items()]
        return renamed


class WorkerVllmNames(VllmNames):
    """`engine` is the worker's id."""

    families: ClassVar[Mapping[str, Source]] = {
        "num_requests_running": Source("baton_requests", only("state", "running")),
        "num_requests_waiting": Source("baton_requests", only("state", "waiting")),
        "kv_cache_usage_perc": Source("baton_kv_cache_usage_ratio"),
        "prefix_cache_queries": Source("baton_prefix_cache_queries"),
        "prefix_cache_hits": Source("baton_prefix_cache_hits"),
        "num_preemptions": Source("baton_preemptions", without("kind")),
        # Sequences whose KV is on its way have their blocks, and count as running.
        "num_requests_waiting_by_reason": Source(
            "baton_requests", lambda labels: {"reason": "capacity"} if labels["state"] == "waiting" else None
        ),
        "corrupted_requests": Source("baton_corrupted_requests"),
        "iteration_tokens_total": Source("baton_step_tokens"),
        # Of each prompt on the worker that computed it.
        "request_queue_time_seconds": Source("baton_prompt_queue_seconds"),
        "request_prefill_time_seconds": Source("baton_prompt_compute_seconds"),
        "cache_config_info": Source(
            "baton_cache_config_info",
            lambda labels: {"block_size": labels["block_size"], "num_gpu_blocks": labels["num_blocks"]},
        ),
    }


class RouterVllmNames(VllmNames):
    families: ClassVar[Mapping[str, Source]] = {
        "num_requests_running": Source("baton_router_num_requests_running"),
        "num_requests_waiting": Source("baton_router_num_requests_waiting"),
        "kv_cache_usage_perc": Source("baton_router_kv_cache_usage_ratio"),
        "prompt_tokens": Source("baton_router_prompt_tokens"),
        "generation_tokens": Source("baton_router_generation_tokens"),
        "prompt_tokens_cached": Source("baton_router_prompt_tokens_cached"),
        "request_success": Source("baton_router_request_success"),
        "request_prompt_tokens": Source("baton_router_request_prompt_tokens"),
        "request_generation_tokens": Source("baton_router_request_generation_tokens"),
        "request_max_num_generation_tokens": Source("baton_router_request_longest_choice_tokens"),
        "request_params_n": Source("baton_router_request_n"),
        "request_params_max_tokens": Source("baton_router_request_max_tokens"),
        "request_decode_time_seconds": Source("baton_router_decode_seconds"),
        "time_to_first_token_seconds": Source("baton_router_time_to_first_token_seconds"),
        # Observed per request, as its mean between tokens, not per token.
        "inter_token_latency_seconds": Source("baton_router_inter_token_latency_seconds"),
        "request_time_per_output_token_seconds": Source("baton_router_inter_token_latency_seconds"),
        "e2e_request_latency_seconds": Source("baton_router_e2e_request_latency_seconds"),
    }
