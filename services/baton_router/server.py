"""Composition root of the router process: builds every part, serves until it is stopped, closes in order."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry

from baton.certificates import Certificates, export_expiry, load_certificates
from baton.clock import Clock, SystemClock
from baton.config import RouterConfig
from baton.errors import ConfigError
from baton.events import LogEvents
from baton.garbage import tune_garbage_collector
from baton.index.base import PrefixIndex
from baton.index.redis import RedisIndex
from baton.model_files import resolve_model
from baton.otel import tracing
from baton.rpc import GrpcRpc, Security, Server
from baton.tokenizer import load_tokenizer
from baton.vllm_metrics import RouterVllmNames
from baton_router.api_keys import load_api_keys
from baton_router.app import HttpServer, create_app, serve_http
from baton_router.fleet import Fleet
from baton_router.front_door import FrontDoor
from baton_router.grpc_api import RouterService
from baton_router.metrics import RouterMetrics
from baton_router.mirror import PrefixMirror
from baton_router.pipeline import Pipeline

log = logging.getLogger("baton.router")

MIRROR_GRACE_LEASES = 1.5  # who lives renews every third of its lease
TOKENIZER_FILES = ("*.json", "*.jinja")

Ready = Callable[[dict[str, Any]], None]


async def run_router(config: RouterConfig, *, stop: asyncio.Event, ready: Ready) -> None:
    """One router, until `stop` is set. `ready` gets what `baton up` shows of it. Raises ConfigError."""
    clock, emit = SystemClock(), LogEvents(log)
    keys = load_api_keys(config.api_keys_file)
    certificates = load_certificates(config.tls, "router", clock)
    security = _security(config, certificates)
    model_dir = await asyncio.to_thread(
        resolve_model, config.model.model, config.model.revision, TOKENIZER_FILES
    )
    tokenizer = load_tokenizer(model_dir, clock)
    async with contextlib.AsyncExitStack() as closing:
        tracer = await closing.enter_async_context(tracing("router", clock))
        index = _index(config, clock)
        if index is not None:
            closing.push_async_callback(index.aclose)
        rpc = GrpcRpc(clock, authorize=keys.check if keys else None, security=security)
        mirror = PrefixMirror(clock, grace_s=MIRROR_GRACE_LEASES * config.index.lease_s)
        fleet = Fleet(config, rpc, mirror, index, clock, emit)
        rng = random.SystemRandom()
        pipeline = Pipeline(config, fleet, clock, rng, emit, tracer)
        door = FrontDoor(
            pipeline,
            tokenizer,
            config.model.served_model_name or (config.model.model,),
            lambda: _max_model_len(config, fleet),
            clock,
            rng,
            _metrics(config, certificates),
            request_timeout_s=config.request_timeout_s,
            tracer=tracer,
            log_prompts=config.log_prompts,
        )
        following = asyncio.create_task(fleet.run(pipeline.trial))
        closing.push_async_callback(_cancelled, following)
        grpc = await rpc.serve(f"{config.host}:{config.grpc_port}", RouterService(door, fleet).handlers())
        closing.push_async_callback(grpc.aclose, 0.1)
        http = await serve_http(create_app(door, fleet, keys=keys), config.host, config.port)
        closing.push_async_callback(_drained, http, grpc, config.stop_grace_s)
        grpc.set_serving(True)
        tune_garbage_collector()
        ready({"address": http.address, "grpc_address": grpc.address, "model": config.model.model})
        stopping = asyncio.create_task(stop.wait())
        closing.push_async_callback(_cancelled, stopping)
        await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()


def _security(config: RouterConfig, certificates: Certificates | None) -> Security | None:
    if certificates is not None:
        mode = config.grpc_tls
        return Security(certificates, serve_plain=mode == "none", ask_callers=mode == "mutual")
    if config.grpc_tls != "none":
        raise ConfigError(f"grpc_tls {config.grpc_tls}: set tls.cert, tls.key and tls.ca too")
    return None


def _metrics(config: RouterConfig, certificates: Certificates | None) -> RouterMetrics:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    export_expiry(certificates, registry)
    names = config.model.served_model_name or (config.model.model,)
    registry.register(RouterVllmNames(registry, names[0], "router"))
    return metrics


def _index(config: RouterConfig, clock: Clock) -> PrefixIndex | None:
    """None: the configured workers are watched directly."""
    if config.index.index == "memory":
        return None
    return RedisIndex(config.index.redis_url, config.index.namespace, clock)


def _max_model_len(config: RouterConfig, fleet: Fleet) -> int | None:
    """What every known worker can take; None while none is known."""
    lengths = [record.max_model_len for record in fleet.records()]
    if config.model.max_model_len is not None:
        lengths.append(config.model.max_model_len)
    return min(lengths) if fleet.records() else None


async def _drained(http: HttpServer, grpc: Server, grace_s: float) -> None:
    """No new requests at either door; running ones may end for `grace_s` seconds."""
    grpc.set_serving(False)
    await asyncio.gather(http.aclose(grace_s), grpc.aclose(grace_s))


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
