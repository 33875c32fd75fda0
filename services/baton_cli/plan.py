"""What `baton up` starts. Decides only, after a look at this machine: mistakes raise ConfigError before any
process is started."""

import dataclasses
import json
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.config import (
    IndexConfig,
    LogConfig,
    RouterConfig,
    TransferConfig,
    UpConfig,
    WorkerConfig,
)
from baton.demo_task import DEMO_MODEL_DIR
from baton.errors import ConfigError
from baton.index.redis_url import parse_redis_url
from baton.messages import Role
from baton.transfer.choose import available
from baton_cli.supervisor import ChildSpec

REDIS_CONNECT_S = 3.0


def check_machine(config: UpConfig) -> None:
    """The mistakes that can be seen before the first process starts."""
    _check_model(config.model.model)
    _check_transport(config.transfer)
    if config.index.index == "redis" and config.index.redis_url:
        _check_redis(config.index.redis_url)
    for port in (config.port, config.grpc_port):
        _check_port(config.host, port)


def _check_model(model: str) -> None:
    if model == "demo":
        directory, hint = DEMO_MODEL_DIR, "; `make demo-model` trains it"
    else:
        directory, hint = Path(model).expanduser(), ""
        looks_like_a_path = model.startswith(("/", ".", "~")) or directory.exists() or model.count("/") > 1
        if not looks_like_a_path:
            return  # a hub id; the worker asks the hub
    if not directory.is_dir():
        raise ConfigError(f"model directory {directory} does not exist{hint}")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} holds no Hugging Face model: config.json is missing{hint}")


def _check_transport(config: TransferConfig) -> None:
    if config.transport == "ucx" and "ucx" not in available():
        raise ConfigError(
            "--transport ucx: UCX is not installed; pip install 'baton-llm[ucx]', or --transport tcp"
        )


def _check_redis(url: str) -> None:
    """Only whether somebody listens there; the password in the URL is not shown."""
    place = parse_redis_url(url)
    why = ""
    for address in place.hosts or (place.options.get("path", ""),):
        try:
            _reach(address)
            return
        except OSError as error:
            why = error.strerror or str(error)
    raise ConfigError(f"cannot reach Redis at {place.where}: {why}")


def _reach(address: tuple[str, int] | str) -> None:
    if isinstance(address, str):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(address)
    else:
        socket.create_connection(address, timeout=REDIS_CONNECT_S).close()


def _check_port(host: str, port: int) -> None:
    """Taken ports are seen at once and not after the model is loaded; the router's own bind still decides."""
    if port == 0:
        return
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def redis_spec(binary: Path, env: Mapping[str, str]) -> ChildSpec:
    # Ended last: workers and router say goodbye to it.
    argv = (sys.executable, "-m", "baton_cli.private_redis", str(binary))
    return ChildSpec("redis", argv, _child_env(env, {}), wave=1)


def worker_specs(
    config: UpConfig, index: IndexConfig, log: LogConfig, env: Mapping[str, str]
) -> list[ChildSpec]:
    return [
        _role_spec(f"{role}-{i}", str(role), _worker_config(config, index, role, i), log, env)
        for role, count in ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode))
        for i in range(count)
    ]


def _worker_config(config: UpConfig, index: IndexConfig, role: Role, number: int) -> WorkerConfig:
    # A short name is not unique in an index shared with other machines; there the worker makes its own.
    return WorkerConfig(
        worker_id="" if index.index == "redis" and index == config.index else f"{role}-{number}",
        roles=(role,),
        metrics_port=0,
        stop_grace_s=config.stop_grace_s,
        model=config.model,
        engine=config.engine,
        transfer=config.transfer,
        tls=config.tls,
        index=index,
    )


def router_spec(
    config: UpConfig,
    index: IndexConfig,
    log: LogConfig,
    env: Mapping[str, str],
    workers: tuple[str, ...] = (),
) -> ChildSpec:
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(RouterConfig)}
    router = RouterConfig(**settings | {"index": index, "workers": config.workers + workers})
    return _role_spec("router", "router", router, log, env)


def _role_spec(name: str, command: str, config: Any, log: LogConfig, env: Mapping[str, str]) -> ChildSpec:
    """The whole configuration goes in by the standard input: nothing of it is read twice, or seen in `ps`."""
    argv = (sys.executable, "-m", "baton_cli", command, "--config", "-")
    # A child writes to a pipe; whoever reads `up` is a person unless JSON was asked for.
    log_format = "json" if log.format == "json" else "text"
    log_env = {"BATON_LOG_LEVEL": log.level, "BATON_LOG_FORMAT": log_format}
    stdin = json.dumps(dataclasses.asdict(config)).encode()
    return ChildSpec(name, argv, _child_env(env, log_env), stdin)


def _child_env(env: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in env.items() if not name.startswith("BATON_")}
    return {"PYTHONUNBUFFERED": "1", **inherited, **added}
