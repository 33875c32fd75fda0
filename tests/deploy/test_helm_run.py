"""The chart's containers as processes of this machine: started, probed, spoken to and stopped as a cluster would.

What differs from a cluster: ports are free ones, the pod's address is the loopback, /etc/baton and /models are
directories of the test, and Redis is the server found here instead of the image's.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from fake_cluster import Cluster, cluster
from free_ports import free_port, free_ports
from helm_engine import (
    Manifest,
    component,
    config_file,
    container_of,
    dashboard_queries,
    environment,
    example,
    first_request,
    manifests,
    notes,
    of_kind,
    ours,
    pod_of,
    workloads,
)
from redis_server import default_server
from typer.testing import CliRunner

from baton.errors import Unavailable
from baton.rpc import ROUTER_LIST_WORKERS, STATUS_GET
from baton_cli import cluster_secrets
from baton_cli.main import app
from baton_cli.probe import probe

pytest.importorskip("helm_python", reason="Helm's engine (helm-python-sdk) is not installed")

PORTS = ("BATON_PORT", "BATON_GRPC_PORT", "BATON_HEALTH_PORT", "BATON_METRICS_PORT", "BATON_TRANSFER__PORT")
READY_S = 120.0
LONG_REQUEST = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Say hello."}],
    "max_tokens": 400,
    "ignore_eos": True,
    "stream": True,
}


@dataclass
class Pod:
    """One container as a process. `ports`: the variable -> the free port in its place."""

    workload: Manifest
    process: subprocess.Popen[bytes]
    log: Path
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return self.ports["BATON_PORT"]

    async def until(self, kind: str) -> None:
        """Until the probe of that kind in the manifest succeeds."""
        deadline = time.monotonic() + READY_S
        while True:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            with contextlib.suppress(Unavailable):
                await asyncio.to_thread(probe, self.target(kind), 5.0)
                return
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            await asyncio.sleep(0.2)

    def target(self, kind: str) -> str:
        wanted = container_of(self.workload)[kind]
        if "httpGet" in wanted:
            return f"http://127.0.0.1:{self.port}{wanted['httpGet']['path']}"
        return f"127.0.0.1:{self.ports['BATON_HEALTH_PORT']}"

    async def stop(self) -> int:
        """SIGTERM, and the time that the pod would get; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        grace_s = pod_of(self.workload)["spec"].get("terminationGracePeriodSeconds", 30)
        return await asyncio.to_thread(self.process.wait, grace_s)


def mounted_secrets(workload: Manifest, given: dict[str, Path]) -> dict[str, str]:
    """Where the pod would find a Secret -> the directory of the test that stands for it."""
    volumes = pod_of(workload)["spec"]["volumes"]
    places = {m["name"]: m["mountPath"] for m in container_of(workload)["volumeMounts"]}
    return {places[v["name"]]: str(given[v["secret"]["secretName"]]) for v in volumes if "secret" in v}


def start_redis(workload: Manifest, directory: Path) -> Pod:
    server, *arguments = container_of(workload)["args"]
    assert server == "redis-server"
    ports = {"redis": free_port()}
    here = ["--port", str(ports["redis"]), "--bind", "127.0.0.1", "--dir", str(directory)]
    log = directory / "redis.log"
    with log.open("wb") as out:
        process = subprocess.Popen([default_server(), *arguments, *here], stdout=out, stderr=out)
    return Pod(workload, process, log, ports)


def start(
    files: list[Manifest], workload: Manifest, directory: Path, redis_url: str, secrets: dict[str, Path]
) -> Pod:
    container = container_of(workload)
    file = config_file(files, workload, directory)
    env = environment(container, pod_ip="127.0.0.1", secret="")
    names = [name for name in PORTS if name in env]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    env |= {name: str(port) for name, port in ports.items()}
    env |= {"HOME": str(directory), "HF_HOME": str(directory), "BATON_INDEX__REDIS_URL": redis_url}
    env |= {"PATH": os.environ["PATH"]}
    for place, here in mounted_secrets(workload, secrets).items():
        env = {name: value.replace(place, here) for name, value in env.items()}
    arguments = [
        str(file) if argument.startswith("/etc/baton/") else argument for argument in container["args"]
    ]
    log = directory / f"{component(workload)}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton_cli", *arguments], env=env, cwd=directory, stdout=out, stderr=out
        )
    return Pod(workload, process, log, ports)


@contextlib.asynccontextmanager
async def release(values: dict[str, Any], directory: Path, **secrets: Path) -> AsyncIterator[dict[str, Pod]]:
    files = manifests(values)
    pods: dict[str, Pod] = {}
    try:
        (redis,) = (w for w in workloads(files) if component(w) == "redis")
        pods["redis"] = start_redis(redis, directory)
        redis_url = f"redis://127.0.0.1:{pods['redis'].ports['redis']}/0"
        for workload in ours(files):
            pods[component(workload)] = start(files, workload, directory, redis_url, secrets)
        yield pods
    finally:
        for pod in pods.values():
            pod.process.kill()
            pod.process.wait()


async def stream(
    pod: Pod, body: bytes, progress: asyncio.Event | None = None, key: str | None = None
) -> list[dict[str, Any]]:
    """The chunks of one streamed answer; `progress` is set with the first."""
    url = f"http://127.0.0.1:{pod.port}/v1/chat/completions"
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    chunks = []
    async with (
        httpx.AsyncClient(timeout=120.0) as client,
        client.stream("POST", url, content=body, headers=headers) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return chunks
            if line.startswith("data: "):
                chunks.append(json.loads(line.removeprefix("data: ")))
                if progress is not None:
                    progress.set()
    raise AssertionError(f"the stream ended without [DONE]: {chunks[-1:]}")


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", pytest.param("ucx", marks=pytest.mark.ucx)])
async def test_the_chart_serves_and_stops_without_loss(tmp_path: Path, transport: str) -> None:
    values = example("laptop-kind")
    values["workerDefaults"]["settings"] = {"transfer": {"transport": transport}}
    async with release(values, tmp_path) as pods:
        for name in ("prefill", "decode", "router"):
            await pods[name].until("startupProbe")
            await pods[name].until("readinessProbe")
            await pods[name].until("livenessProbe")

        chunks = await stream(pods["router"], first_request(notes(values)))
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
        assert text.strip()
        await check_fleet(pods, transport)
        check_listeners(pods, values)
        await check_series(pods)
        await check_drain(pods)
        assert [await pods[name].stop() for name in ("prefill", "router", "redis")] == [0, 0, 0]


@pytest.mark.slow
async def test_the_chart_serves_with_keys_and_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed and upgraded: the chart's hook makes certificates, and new ones while the fleet runs."""
    values = example("laptop-kind")
    values["workerDefaults"]["settings"] = {"transfer": {"transport": "tcp"}}
    values["tls"] = {"ownAuthority": {"enabled": True}}
    values["router"] |= {"apiKeysSecret": "keys", "settings": {"grpc_tls": "mutual"}}
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/keys").write_text("sk-one\nsk-two\n")
    (role,) = of_kind(manifests(values), "Role")
    with cluster(role["rules"], tmp_path / "account") as kubernetes:
        monkeypatch.setattr(cluster_secrets, "ACCOUNT", kubernetes.account)
        run_hook(values, kubernetes)
        secrets = kubernetes.mount(tmp_path) | {"keys": tmp_path / "keys"}
        async with release(values, tmp_path, **secrets) as pods:
            for name in ("prefill", "decode", "router"):
                await pods[name].until("startupProbe")
                await pods[name].until("readinessProbe")
            body = first_request(notes(values))
            with pytest.raises(AssertionError, match="invalid_api_key"):
                await stream(pods["router"], body)
            await check_answer(pods["router"], body)
            await check_fleet(pods, "tcp")
            await check_who_may_call(pods, secrets)
            before, started = await check_encrypted(pods["decode"], secrets), asyncio.Event()
            running = asyncio.create_task(
                stream(pods["router"], json.dumps(LONG_REQUEST).encode(), started, key="sk-one")
            )
            await started.wait()
            run_hook(values, kubernetes)
            kubernetes.mount(tmp_path)
            assert not running.done()
            assert await check_encrypted(pods["decode"], secrets) != before
            await check_answer(pods["router"], body)
            assert ended(await running) == "length"
            assert "the certificate was read again" in pods["router"].log.read_text()
            stopped = [await pods[name].stop() for name in ("prefill", "decode", "router", "redis")]
            assert stopped == [0] * 4


def run_hook(values: dict[str, Any], kubernetes: Cluster) -> None:
    """The Job's command, as a pod of its ServiceAccount."""
    (job,) = of_kind(manifests(values), "Job")
    done = CliRunner().invoke(app, container_of(job)["args"], env=kubernetes.env)
    assert done.exit_code == 0, done.output
    assert "worker: worker.demo-baton.prod.svc" in done.output
    assert kubernetes.refused == []


async def check_answer(router: Pod, body: bytes) -> None:
    chunks = await stream(router, body, key="sk-two")
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]).strip()


async def check_who_may_call(pods: dict[str, Pod], secrets: dict[str, Path]) -> None:
    """Workers are called by routers alone, the router's gRPC API by who has a certificate and a key."""
    router, worker = (secrets[f"demo-baton-tls-{role}"] for role in ("router", "worker"))
    anonymous = grpc.ssl_channel_credentials((worker / "ca.crt").read_bytes())
    as_router, as_worker = (
        grpc.ssl_channel_credentials(*((d / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt")))
        for d in (router, worker)
    )
    code = grpc.StatusCode
    for credentials, expected in (
        (anonymous, code.UNAVAILABLE),
        (as_worker, code.UNAUTHENTICATED),
        (as_router, code.OK),
    ):
        call = (pods["decode"].port, "worker", STATUS_GET.path, credentials, None)
        assert await asyncio.to_thread(grpc_status, *call) is expected
    for credentials, key, expected in (
        (anonymous, "sk-one", code.UNAVAILABLE),
        (as_worker, None, code.UNAUTHENTICATED),
        (as_worker, "sk-one", code.OK),
    ):
        call = (
            pods["router"].ports["BATON_GRPC_PORT"],
            "router",
            ROUTER_LIST_WORKERS.path,
            credentials,
            key,
        )
        assert await asyncio.to_thread(grpc_status, *call) is expected


def grpc_status(port: int, peer: str, path: str, credentials: Any, key: str | None) -> grpc.StatusCode:
    name = ("grpc.ssl_target_name_override", f"{peer}.demo-baton.prod.svc")
    metadata = [("authorization", f"Bearer {key}")] if key else []
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, [name]) as channel:
        try:
            channel.unary_unary(path)(b"", timeout=10.0, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def check_encrypted(pod: Pod, secrets: dict[str, Path]) -> bytes:
    """gRPC and KV speak TLS 1.3 and show the certificate that the Secret holds now."""
    directory = secrets["demo-baton-tls-worker"]
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    context.set_alpn_protocols(["h2"])
    name, shown = "worker.demo-baton.prod.svc", ssl.PEM_cert_to_DER_cert((directory / "tls.crt").read_text())
    for variable in ("BATON_PORT", "BATON_TRANSFER__PORT"):
        _, writer = await asyncio.open_connection(
            "127.0.0.1", pod.ports[variable], ssl=context, server_hostname=name
        )
        tls = writer.get_extra_info("ssl_object")
        assert (tls.version(), tls.getpeercert(binary_form=True)) == ("TLSv1.3", shown)
        writer.transport.abort()
    return shown


async def check_fleet(pods: dict[str, Pod], transport: str) -> None:
    health = json.loads(await get(pods["router"], "BATON_PORT", "/health"))
    assert health["status"] == "ok"
    assert [pair["transport"] for pair in health["pairs"]] == [transport]
    addresses = {worker["address"] for worker in health["workers"]}
    assert addresses == {f"127.0.0.1:{pods[name].port}" for name in ("prefill", "decode")}


def check_listeners(pods: dict[str, Pod], values: dict[str, Any]) -> None:
    """Processes listen nowhere but at the ports that the network policies are about."""
    (policy,) = (p for p in of_kind(manifests(values), "NetworkPolicy") if component(p) == "worker")
    rules = [port for rule in policy["spec"]["ingress"] for port in rule["ports"]]
    ranges = [range(port["port"], port["endPort"] + 1) for port in rules if "endPort" in port]
    for name in ("prefill", "decode", "router"):
        connections = psutil.Process(pods[name].process.pid).net_connections("inet")
        listening = {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
        others = listening - set(pods[name].ports.values())
        assert all(any(port in known for known in ranges) for port in others), (name, listening)


async def check_series(pods: dict[str, Pod]) -> None:
    """Alerts and autoscalers ask for series that are there, with the labels that the code gives them."""
    files = manifests(example("autoscaled"))
    queries = [
        *(r["expr"] for m in of_kind(files, "PrometheusRule") for r in m["spec"]["groups"][0]["rules"]),
        *(t["metadata"]["query"] for m in of_kind(files, "ScaledObject") for t in m["spec"]["triggers"]),
        *dashboard_queries(files),
    ]
    exposed = await get(pods["router"], "BATON_PORT", "/metrics")
    for worker in ("prefill", "decode"):
        exposed += await get(pods[worker], "BATON_METRICS_PORT", "/metrics")
    for name in ("num_requests_waiting", "kv_cache_usage_perc", "time_to_first_token_seconds_sum"):
        assert (
            f"\nvllm:{name}{{" in exposed
        )  # those of vllm_metrics that gateways and autoscalers ask for most
    samples = [
        (name, dict(re.findall(r'(\w+)="([^"]*)"', labels)))
        for name, labels in re.findall(r"^(baton_\w+)(?:\{(.*)\})? ", exposed, re.MULTILINE)
    ]
    selectors = {found for query in queries for found in re.findall(r"(baton_\w+)\{(.*?)\}", query)}
    assert len(selectors) >= 30
    for name, text in selectors:
        conditions = [
            c for c in re.findall(r'(\w+)(=~?)"(.*?)"', text) if c not in NOT_HERE and c[0] not in SCRAPED
        ]
        assert any(name == n and all(fits(labels, *c) for c in conditions) for n, labels in samples), (
            name,
            text,
        )


async def check_drain(pods: dict[str, Pod]) -> None:
    """A running answer ends, then the process does."""
    started = asyncio.Event()
    answer = asyncio.create_task(stream(pods["router"], json.dumps(LONG_REQUEST).encode(), started))
    await started.wait()
    assert not answer.done()
    assert await pods["decode"].stop() == 0
    chunks = await answer
    assert ended(chunks) == "length"
    with pytest.raises(Unavailable):
        probe(pods["router"].target("readinessProbe"), 5.0)  # no decode worker is left


def ended(chunks: list[dict[str, Any]]) -> str:
    reason: str = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1]
    return reason


async def get(pod: Pod, variable: str, path: str) -> str:
    async with httpx.AsyncClient(timeout=10.0) as client:
        answer = await client.get(f"http://127.0.0.1:{pod.ports[variable]}{path}")
    assert answer.status_code == 200
    return answer.text


# Labels that come with the scrape; values that nothing has led to here.
SCRAPED = ("job", "app_kubernetes_io_component")
NOT_HERE = {
    ("state", "=", "lost"),
    ("outcome", "=~", "failed|expired"),
    ("status", "=~", "5.."),
    ("status", "=", "429"),
}


def fits(labels: dict[str, str], label: str, operator: str, value: str) -> bool:
    found = labels.get(label, "")
    return found == value if operator == "=" else re.fullmatch(value, found) is not None
