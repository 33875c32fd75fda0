"""Real processes for system tests: Redis, a router and workers, started like `baton up` starts them, but each one can
be killed and started by itself."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from redis_server import RedisServer

from baton.certificates import load_certificates
from baton.clock import SystemClock
from baton.config import (
    EngineConfig,
    IndexConfig,
    LogConfig,
    ModelConfig,
    TlsConfig,
    TransferConfig,
    UpConfig,
)
from baton.messages import StatusCall, WorkerStatus
from baton.rpc import STATUS_GET, GrpcRpc, Security
from baton_cli import plan
from baton_cli.supervisor import Child, ChildSpec, Supervisor

START_S = 120.0
SETTLE_S = 30.0


@dataclass
class Stack:
    config: UpConfig
    redis: RedisServer | None
    supervisor: Supervisor
    output: list[str]
    logging: LogConfig
    children: dict[str, Child] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)  # of workers: gRPC; of the router: HTTP
    metrics_ports: dict[str, int] = field(default_factory=dict)  # of workers
    router_grpc: str = ""
    certificates: Path | None = None  # of `baton certs`: every process has its role's
    _rpc: GrpcRpc = field(init=False)

    def __post_init__(self) -> None:
        own = load_certificates(self._tls("router"), "router", SystemClock())
        self._rpc = GrpcRpc(SystemClock(), security=Security(own) if own is not None else None)

    def _tls(self, role: str) -> TlsConfig:
        if self.certificates is None:
            return TlsConfig()
        return TlsConfig(*(str(self.certificates / role / name) for name in ("tls.crt", "tls.key", "ca.crt")))

    @property
    def base_url(self) -> str:
        return f"http://{self.addresses['router']}"

    def log(self) -> str:
        return "\n".join(self.output)

    # --- processes ---

    def spec(self, name: str) -> ChildSpec:
        config = replace(self.config, tls=self._tls("router" if name == "router" else "worker"))
        index, log = config.index, self.logging
        if name == "router":
            workers = (
                tuple(a for n, a in self.addresses.items() if n != "router")
                if index.index == "memory"
                else ()
            )
            return plan.router_spec(config, index, log, os.environ, workers)
        specs = {spec.name: spec for spec in plan.worker_specs(config, index, log, os.environ)}
        return specs[name]

    async def start(self, *names: str) -> None:
        started = [(name, await self.supervisor.start(self.spec(name))) for name in names]
        for name, child in started:
            info = await self.supervisor.ready(child, START_S)
            self.children[name], self.addresses[name] = child, info["address"]
            if "metrics_port" in info:
                self.metrics_ports[name] = info["metrics_port"]
            self.router_grpc = info.get("grpc_address", self.router_grpc)

    async def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.children[name].pid, number)

    async def kill(self, name: str) -> None:
        await self.signal(name, signal.SIGKILL)
        await self.children[name].process.wait()
        del self.addresses[name]

    # --- what it says of itself ---

    async def status(self, name: str) -> WorkerStatus:
        channel = self._rpc.connect(self.addresses[name])
        try:
            return await channel.unary(STATUS_GET, StatusCall(), timeout_s=5.0)
        finally:
            await channel.aclose()

    async def metric(self, name: str, line: str) -> float:
        """Of a worker; `line` as it is in its /metrics."""
        async with httpx.AsyncClient() as client:
            said = (await client.get(f"http://127.0.0.1:{self.metrics_ports[name]}/metrics")).text
        [value] = [each.removeprefix(line) for each in said.splitlines() if each.startswith(f"{line} ")]
        return float(value)

    async def until_ready(self, num_workers: int) -> None:
        """Until the router is linked to that many live workers."""
        async with httpx.AsyncClient(base_url=self.base_url) as client:
            await until(lambda: self._num_up(client), num_workers, "workers linked to the router")

    async def until_proven(self, num_pairs: int) -> None:
        """Until so many pairs may carry requests."""
        async with httpx.AsyncClient(base_url=self.base_url) as client:
            await until(lambda: self._num_pairs(client), num_pairs, "proven pairs")

    async def _num_pairs(self, client: httpx.AsyncClient) -> int:
        return len((await client.get("/health")).json()["pairs"])

    async def _num_up(self, client: httpx.AsyncClient) -> int:
        with contextlib.suppress(httpx.HTTPError):
            ready = (await client.get("/ready")).status_code == 200
            workers = (await client.get("/health")).json()["workers"]
            return sum(worker["ready"] for worker in workers) if ready or not workers else 0
        return 0

    async def until_nothing_is_used(self, *names: str) -> None:
        for name in names:
            await until(lambda name=name: self._num_used(name), 0, f"used blocks on {name}")

    async def _num_used(self, name: str) -> int:
        return (await self.status(name)).num_used_blocks


async def until(measure: Any, wanted: Any, what: str, timeout_s: float = SETTLE_S) -> None:
    seen = None
    try:
        async with asyncio.timeout(timeout_s):
            while (seen := await measure()) != wanted:
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"{what}: {seen} after {timeout_s:g} s, expected {wanted}") from None


@contextlib.asynccontextmanager
async def running_stack(
    *,
    model: str = "demo",
    transport: str = "tcp",
    index: str = "redis",
    num_prefill: int = 1,
    num_decode: int = 1,
    engine: EngineConfig | None = None,
    log_format: str = "auto",
    certificates: Path | None = None,
    **settings: Any,
) -> AsyncIterator[Stack]:
    redis = RedisServer() if index == "redis" else None
    url = redis.url if redis is not None else ""
    config = UpConfig(
        port=0,
        model=ModelConfig(model=model, served_model_name=("test",), dtype="float32"),
        engine=engine or EngineConfig(),
        transfer=TransferConfig(transport=transport, min_piece_bytes=1),  # type: ignore[arg-type]
        index=IndexConfig(index=index, redis_url=url, lease_s=5.0),  # type: ignore[arg-type]
        prefill=num_prefill,
        decode=num_decode,
    )
    config = replace(config, **settings)
    output: list[str] = []
    supervisor = Supervisor(lambda name, line: output.append(f"{name}: {line}"), grace_s=15.0)
    workers = [f"prefill-{i}" for i in range(num_prefill)] + [f"decode-{i}" for i in range(num_decode)]
    logging = LogConfig(level="debug", format=log_format)  # type: ignore[arg-type]
    stack = Stack(config, redis, supervisor, output, logging, certificates=certificates)
    try:
        async with supervisor:
            if index == "redis":
                await stack.start("router", *workers)
            else:
                await stack.start(*workers)
                await stack.start("router")
            await stack.until_ready(len(workers))
            yield stack
    finally:
        if redis is not None:
            redis.stop()
