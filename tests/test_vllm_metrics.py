"""vLLM's names are second names of our own series, and of each series in one kind of process only."""

from prometheus_client import CollectorRegistry, generate_latest

from baton.messages import Load
from baton.request import FinishReason
from baton.vllm_metrics import RouterVllmNames, WorkerVllmNames
from baton.worker_metrics import WorkerMetrics
from baton_router.metrics import RouterMetrics

# docs/proposals/003-model-server-protocol of the Gateway API's Inference Extension
INFERENCE_EXTENSION = {"num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"}


def test_a_worker_tells_its_own() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    registry.register(WorkerVllmNames(registry, "llama", "decode-0"))
    metrics.set_blocks(used=3, free=5, total=8)
    metrics.set_load(Load(2, 1, num_waiting_tokens=500, prefill_tokens_per_s=1000.0, decode_step_s=0.02))
    metrics.set_prefix_lookups(100, 48)
    metrics.set_prefix_lookups(150, 64)
    metrics.count_pressure(swapped=1, recomputed=2, retries=0)
    metrics.set_cache_config(block_size=16, num_blocks=8)
    metrics.observe_step(0.01, num_prompt_tokens=30, num_output_tokens=3)
    metrics.observe_prompt(queue_s=0.2, compute_s=0.4)
    metrics.count_corrupted(1)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(
            f"vllm:{name}", {"model_name": "llama", "engine": "decode-0"} | labels
        )

    assert value("num_requests_running") == 2
    assert value("num_requests_waiting") == 1
    assert value("kv_cache_usage_perc") == 3 / 8
    assert value("num_preemptions_total") == 3
    assert value("num_requests_waiting_by_reason", reason="capacity") == 1
    assert value("iteration_tokens_total_sum") == 33
    assert value("iteration_tokens_total_bucket", le="64.0") == 1
    assert value("request_queue_time_seconds_sum") == 0.2
    assert value("request_prefill_time_seconds_sum") == 0.4
    assert value("corrupted_requests_total") == 1
    assert value("prefix_cache_queries_total") == 150
    assert value("prefix_cache_hits_total") == 64
    assert value("cache_config_info", block_size="16", num_gpu_blocks="8") == 1
    assert registry.get_sample_value("baton_prefill_queue_seconds") == 0.5
    assert registry.get_sample_value("baton_decode_step_seconds") == 0.02
    metrics.set_load(Load(decode_step_s=0.02))
    assert registry.get_sample_value("baton_decode_step_seconds") == 0  # nobody waits for a token
    assert registry.get_sample_value("baton_prefill_queue_seconds") == 0


def test_a_router_tells_what_clients_saw() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    registry.register(RouterVllmNames(registry, "llama", "router"))
    metrics.observe_answer(
        num_prompt_tokens=9, num_output_tokens=4, ttft_s=0.03, mean_itl_s=0.01, e2e_s=0.06,
        finish_reason=FinishReason.LENGTH, num_cached_tokens=8,
    )  # fmt: skip
    metrics.observe_shape(n=2, max_tokens=30, num_longest_tokens=3)
    metrics.observe_answer(num_prompt_tokens=9, num_output_tokens=0, ttft_s=None, mean_itl_s=None, e2e_s=None)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"vllm:{name}", {"model_name": "llama", "engine": "router"} | labels)

    assert value("prompt_tokens_total") == 18
    assert value("generation_tokens_total") == 4
    assert value("prompt_tokens_cached_total") == 8
    assert value("request_decode_time_seconds_count") == 1  # of the finished one
    assert value("request_decode_time_seconds_sum") == 0.06 - 0.03
    assert value("request_params_n_sum") == 2
    assert value("request_params_max_tokens_sum") == 30
    assert value("request_max_num_generation_tokens_sum") == 3
    assert value("request_success_total", finished_reason="length") == 1
    assert value("request_prompt_tokens_count") == 2
    assert value("time_to_first_token_seconds_count") == 1
    assert value("time_to_first_token_seconds_bucket", le="0.04") == 1
    assert value("time_to_first_token_seconds_bucket", le="0.02") == 0
    assert value("inter_token_latency_seconds_sum") == 0.01
    assert value("e2e_request_latency_seconds_sum") == 0.06


def test_no_family_is_told_twice_but_those_that_gateways_ask_for() -> None:
    shared = WorkerVllmNames.families.keys() & RouterVllmNames.families.keys()
    assert shared == INFERENCE_EXTENSION
    for kind, metrics in ((WorkerVllmNames, WorkerMetrics), (RouterVllmNames, RouterMetrics)):
        registry = CollectorRegistry()
        made = metrics(registry)
        if isinstance(made, WorkerMetrics):
            made.set_cache_config(block_size=16, num_blocks=8)
        registry.register(kind(registry, "m", "e"))
        text = generate_latest(registry).decode()
        for name in kind.families:  # each has a source
            assert f"# TYPE vllm:{name}" in text
