"""Composition root of a worker process: builds engine, transport and role services, serves until it is stopped.

Here and not in a service, because a worker may hold both roles and services do not know each other.
"""

import asyncio
import contextlib
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from prometheus_client import CollectorRegistry

from baton.certificates import Certificates, export_expiry, load_certificates
from baton.clock import Clock, SystemClock
from baton.config import WorkerConfig
from baton.engine.batch import Pressure, StepOutput
from baton.engine.engine import Engine
from baton.engine.model_runner import LoadedModel, load_runner
from baton.engine.policy import policy_for
from baton.engine.worker import Worker
from baton.events import LogEvents
from baton.garbage import tune_garbage_collector
from baton.handover.fetch import Fetcher
from baton.handover.owner import PrefixOwner
from baton.handover.receive import Receiver
from baton.index.base import PrefixIndex
from baton.index.redis import RedisIndex
from baton.kv.staging import for_transfer
from baton.messages import Role, WorkerRecord
from baton.otel import tracing
from baton.request import WorkerId
from baton.rpc import GrpcRpc, Handlers, Security
from baton.telemetry import event
from baton.transfer.base import Transport
from baton.transfer.choose import make_transport
from baton.vllm_metrics import WorkerVllmNames
from baton.worker_metrics import WorkerMetrics, serve_metrics
from baton_decode.service import DecodeService
from baton_prefill.service import PrefillService

log = logging.getLogger("baton.worker")

Ready = Callable[[dict[str, Any]], None]


async def run_worker(config: WorkerConfig, *, stop: asyncio.Event, ready: Ready) -> None:
    """One worker, until `stop` is set. `ready` gets what `baton up` shows of it. Raises ConfigError."""
    clock = SystemClock()
    emit = LogEvents(log)
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    certificates = load_certificates(config.tls, "worker", clock)
    export_expiry(certificates, registry)
    loaded = await asyncio.to_thread(load_runner, config.model, config.engine)
    runner = loaded.runner
    await asyncio.to_thread(runner.storage.populate)
    async with contextlib.AsyncExitStack() as closing:
        closing.push_async_callback(runner.aclose)
        tracer = await closing.enter_async_context(tracing("-".join(config.roles), clock))
        kv = config.transfer
        transport = make_transport(
            kv.transport,
            clock,
            kv.host,
            port=kv.port,
            advertise_host=_advertise_host(kv.host, kv.advertise_host),
            tls=certificates if kv.encrypt else None,
            piece_timeout_s=1.5 * kv.push_timeout_s,  # longer than a healthy sender waits
        )
        closing.push_async_callback(transport.aclose)
        storage = for_transfer(runner.storage)
        receiver = Receiver(storage, loaded.compatibility.identity, clock, emit, metrics.observe_transfer)
        kv_address = await transport.listen(receiver)
        engine = Engine(config.engine, runner, clock, loaded.fingerprint, policy_for(config.roles))
        index = _index(config, clock)
        if index is not None:
            closing.push_async_callback(index.aclose)
        worker = Worker(
            _record(config, loaded, transport, engine),
            engine,
            clock,
            emit,
            index=index,
            lease_s=config.index.lease_s,
            heartbeat_s=config.heartbeat_s,
        )
        worker.explain(receiver.explain)
        rpc = _rpc(config, clock, certificates)
        owner = PrefixOwner(
            worker, storage, transport, config.transfer, clock, emit, metrics.observe_transfer
        )
        handlers: Handlers = owner.handlers()
        if Role.DECODE in config.roles:
            decode = DecodeService(
                worker, receiver, transport.name, kv_address, config.transfer, clock, emit,
                heartbeat_s=config.heartbeat_s, tracer=tracer,
            )  # fmt: skip
            handlers |= decode.handlers()
        if Role.PREFILL in config.roles:
            fetcher = Fetcher(
                worker,
                receiver,
                rpc,
                transport,
                kv_address,
                config.transfer,
                clock,
                emit,
                metrics.observe_fetch,
            )
            closing.push_async_callback(fetcher.aclose)
            prefill = PrefillService(
                worker,
                storage,
                transport,
                fetcher,
                config.transfer,
                clock,
                emit,
                metrics.observe_transfer,
                tracer,
            )
            closing.push_async_callback(prefill.aclose)
            handlers |= prefill.handlers()
        metrics.set_transports(transport.names)
        metrics.set_cache_config(block_size=worker.record.block_size, num_blocks=worker.record.num_blocks)
        registry.register(WorkerVllmNames(registry, _served_name(config), worker.record.worker_id))
        metrics_port = await closing.enter_async_context(_metrics(config, worker, metrics, registry, clock))
        event(log, "KV comes in over", transports=transport.name, address=kv_address)
        tune_garbage_collector()
        await worker.serve(
            rpc,
            f"{config.host}:{config.port}",
            handlers,
            stop=stop,
            grace_s=config.stop_grace_s,
            ready=lambda record: ready(_shown(record, metrics_port)),
            advertise_host=_advertise_host(config.host, config.advertise_host),
        )


def _rpc(config: WorkerConfig, clock: Clock, certificates: Certificates | None) -> GrpcRpc:
    """Kubelets, which have no certificate, ask the health port."""
    security = Security(certificates) if certificates is not None else None
    health = None if config.health_port is None else f"{config.host}:{config.health_port}"
    return GrpcRpc(clock, security=security, health_address=health)


def _advertise_host(bound: str, configured: str | None) -> str | None:
    """None: peers use the address bound. A wildcard is no address: then it is the name of this host, which other
    containers of the same network resolve."""
    return configured or (socket.gethostname() if bound in ("0.0.0.0", "::", "[::]") else None)


def _index(config: WorkerConfig, clock: Clock) -> PrefixIndex | None:
    """None: routers watch this worker directly."""
    if config.index.index == "memory":
        return None
    return RedisIndex(config.index.redis_url, config.index.namespace, clock)


def _record(config: WorkerConfig, loaded: LoadedModel, transport: Transport, engine: Engine) -> WorkerRecord:
    storage = loaded.runner.storage
    return WorkerRecord(
        worker_id=WorkerId(
            config.worker_id or f"{config.roles[0].value}-{socket.gethostname()}-{os.getpid()}"
        ),
        incarnation=uuid.uuid4().hex,
        roles=config.roles,
        address="",  # known once the server is bound
        transports=transport.names,
        model=config.model.model,
        fingerprint=loaded.fingerprint,
        block_size=storage.layout.block_size,
        num_blocks=storage.num_blocks,
        max_model_len=engine.max_model_len,
        kv_block_bytes=storage.layout.block_bytes,
        compatibility=loaded.compatibility,
        prefills_ahead=Role.PREFILL in config.roles,
    )


def _served_name(config: WorkerConfig) -> str:
    return (config.model.served_model_name or (config.model.model,))[0]


def _shown(record: WorkerRecord, metrics_port: int | None) -> dict[str, Any]:
    return {
        "address": record.address,
        "worker_id": record.worker_id,
        "roles": [role.value for role in record.roles],
        "transport": ",".join(record.transports),
        "model": record.model,
        "num_blocks": record.num_blocks,
        "metrics_port": metrics_port,
    }


@contextlib.asynccontextmanager
async def _metrics(
    config: WorkerConfig,
    worker: Worker,
    metrics: WorkerMetrics,
    registry: CollectorRegistry,
    clock: Clock,
) -> AsyncIterator[int | None]:
    """Counts the engine's steps; serves the registry over HTTP if a port is configured."""
    count_steps(worker, metrics, clock)
    if config.metrics_port is None:
        yield None
    else:
        async with serve_metrics(config.host, config.metrics_port, registry) as port:
            yield port


def count_steps(worker: Worker, metrics: WorkerMetrics, clock: Clock) -> None:
    seen = Pressure()

    def on_step(output: StepOutput) -> None:
        nonlocal seen
        engine, load = worker.engine, worker.load()
        used = engine.num_used_blocks
        metrics.set_blocks(used=used, free=engine.num_blocks - used, total=engine.num_blocks)
        metrics.set_purposes(worker.blocks_by_purpose(), num_cached=engine.num_cached_blocks)
        metrics.set_load(load)
        metrics.set_prefix_lookups(engine.num_prefix_query_tokens, engine.num_prefix_hit_tokens)
        pressure = engine.pressure
        if pressure != seen:
            metrics.count_pressure(
                swapped=pressure.num_swapped - seen.num_swapped,
                recomputed=pressure.num_recomputed - seen.num_recomputed,
                retries=pressure.num_retries - seen.num_retries,
            )
            seen = pressure
        metrics.count_corrupted(sum(row.corrupted for row in output.outputs))
        for prompt in (row.prompt for row in output.outputs if row.prompt is not None):
            metrics.observe_prompt(
                queue_s=prompt.admitted_s - prompt.arrival_s, compute_s=clock.now() - prompt.admitted_s
            )
        if output.num_tokens:
            num_output = sum(len(row.token_ids) for row in output.outputs)
            metrics.observe_step(
                output.seconds,
                num_prompt_tokens=max(0, output.num_tokens - num_output),
                num_output_tokens=num_output,
            )

    worker.listen(on_step)
    on_step(StepOutput(outputs=(), admitted=(), num_tokens=0, seconds=0.0))
