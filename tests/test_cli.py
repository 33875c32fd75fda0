"""The `baton` command: flags, one clear line for every mistake, what `up` shows and what it leaves behind."""

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from baton.clock import SystemClock
from baton.config import (
    IndexConfig,
    LogConfig,
    ModelConfig,
    RouterConfig,
    TransferConfig,
    UpConfig,
    WorkerConfig,
)
from baton.errors import ConfigError, Unavailable
from baton.index.redis_url import HINT
from baton.messages import Role
from baton.rpc import GrpcRpc
from baton.settings import load
from baton_cli import plan
from baton_cli import up as up_module
from baton_cli.chat_client import ChatClient, ChatError
from baton_cli.flags import spread
from baton_cli.main import app, main
from baton_cli.probe import probe
from baton_cli.supervisor import ChildDied, ChildSpec, Supervisor
from baton_cli.up import up
from baton_cli.view import View

SLOW_IMPORTS = {"torch", "transformers", "fastapi", "grpc", "httpx", "redis", "prometheus_client", "pydantic"}


def baton(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "baton_cli", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def some_model(tmp_path: Path) -> ModelConfig:
    """Enough of a model for `up` to start its children."""
    (tmp_path / "config.json").write_text("{}")
    return ModelConfig(str(tmp_path))


# --- flags ---------------------------------------------------------------------------------------------------------


def test_several_values_behind_one_flag() -> None:
    many = {"--name"}
    assert spread(["--name", "A", "B", "--x", "1"], many) == ["--name", "A", "--name", "B", "--x", "1"]
    assert spread(["--name", "A", "--name", "B"], many) == ["--name", "A", "--name", "B"]
    assert spread(["--x", "1", "2"], many) == ["--x", "1", "2"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[UpConfig, LogConfig, bool]]:
    """What `baton up` would have started."""
    calls: list[tuple[UpConfig, LogConfig, bool]] = []

    async def record(config: UpConfig, log: LogConfig, view: View, *, first_request: bool) -> int:
        calls.append((config, log, first_request))
        return 0

    monkeypatch.setattr(up_module, "up", record)
    return calls


def test_up_takes_vllms_flags(started: list[Any]) -> None:
    line = (
        "up --port 8001 --model DIR --served-model-name A B --dtype float32 --prefill 2 --decode 3 "
        "--max-model-len 512 --max-num-seqs 8 --max-num-batched-tokens 64 --block-size 32 "
        "--no-enable-prefix-caching --transport tcp --index memory --demo-request --log-level debug"
    )
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    [(config, log, first_request)] = started
    assert (config.port, config.prefill, config.decode) == (8001, 2, 3)
    assert config.model == ModelConfig("DIR", None, ("A", "B"), "float32", 512)
    assert (config.engine.max_num_seqs, config.engine.max_num_batched_tokens) == (8, 64)
    assert (config.engine.block_size, config.engine.enable_prefix_caching) == (32, False)
    assert (config.transfer.transport, config.index.index) == ("tcp", "memory")
    assert (log.level, first_request) == ("debug", True)


def test_up_without_flags_is_the_default(started: list[Any], tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["up"]).exit_code == 0
    file = tmp_path / "up.yaml"
    file.write_text("prefill: 4")
    assert CliRunner().invoke(app, ["up", "--config", str(file)], env={"BATON_DECODE": "5"}).exit_code == 0
    assert [call[0] for call in started] == [UpConfig(), UpConfig(prefill=4, decode=5)]


@pytest.mark.parametrize("command", ["up", "router", "prefill", "decode", "worker"])
def test_help_shows_the_defaults_of_the_config(command: str) -> None:
    text = " ".join(CliRunner().invoke(app, [command, "--help"]).output.split())
    config = {"up": UpConfig(), "router": RouterConfig()}.get(command, WorkerConfig())
    assert f"(default: {config.port})" in text
    assert "--served-model-name" in text
    assert "(default: redis)" in text


def test_help_imports_nothing_slow() -> None:
    code = f"import sys, baton_cli.main; print(sorted({SLOW_IMPORTS!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loadtest_has_its_own_flags() -> None:
    done = baton("loadtest", "--help")
    assert done.returncode == 0, done.stderr
    assert "baton loadtest" in done.stdout
    assert "--concurrency" in done.stdout


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_line_and_starts_nothing(some_model: ModelConfig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = baton("up", "--port", str(port), "--model", some_model.model)
    assert done.returncode == 2
    assert done.stderr == f"baton: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("up", "--model", "./nowhere"), "model directory nowhere does not exist"),
        (("up", "--model", "."), ". holds no Hugging Face model: config.json is missing"),
        (("up", "--block-size", "24"), "--block-size: must be a power of two, got 24"),
        (("up", "--transport", "rdma"), "--transport: must be 'auto', 'shm', 'ucx' or 'tcp', got 'rdma'"),
        (("up", "--decode", "0"), "--decode: must be greater than or equal to 1, got 0"),
        (("up", "--config", "no.yaml"), "cannot read the config file no.yaml: No such file or directory"),
        (
            ("up", "--log-level", "loud"),
            "--log-level: must be 'debug', 'info', 'warning' or 'error', got 'loud'",
        ),
        (
            ("prefill", "--dtype", "int3"),
            "--dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', got 'int3'",
        ),
        (("worker", "--role", "cook"), "--role: must be 'prefill' or 'decode', got ['cook']"),
        (("up", "--redis-url", "redis://h:x"), f"the Redis URL cannot be read: {HINT}"),
        (
            ("up", "--redis-url", "redis://user:secret@127.0.0.1:1/0"),
            "cannot reach Redis at redis://127.0.0.1:1/0: Connection refused",
        ),
        (
            ("up", "--redis-url", "unix:///no/redis.sock"),
            "cannot reach Redis at unix:///no/redis.sock: No such file or directory",
        ),
        (
            ("up", "--redis-url", "http://x"),
            f"the Redis URL cannot be read: {HINT}",
        ),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(
    args: tuple[str, ...],
    line: str,
    some_model: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = () if "--model" in args or args[0] != "up" else ("--model", some_model.model)
    monkeypatch.setattr(sys, "argv", ["baton", *args, *model])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err) == (2, f"baton: {line}\n")


def test_ucx_that_is_asked_for_and_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, some_model: ModelConfig
) -> None:
    config = UpConfig(port=0, model=some_model, transfer=TransferConfig("ucx"))
    monkeypatch.setattr(plan, "available", lambda: ["tcp"])
    with pytest.raises(ConfigError, match="UCX is not installed"):
        plan.check_machine(config)
    plan.check_machine(replace(config, transfer=TransferConfig("auto")))


# --- the plan ------------------------------------------------------------------------------------------------------


def test_children_get_their_whole_configuration_by_standard_input(tmp_path: Path) -> None:
    config = UpConfig(prefill=1, decode=2, port=8001, max_num_requests=5)
    config = replace(config, engine=replace(config.engine, block_size=32))
    index = IndexConfig("redis", "unix:///tmp/r.sock")
    env = {"PATH": "/bin", "BATON_ENGINE__BLOCK_SIZE": "64"}
    workers = plan.worker_specs(config, index, LogConfig(level="debug"), env)
    assert [(spec.name, spec.argv[3]) for spec in workers] == [
        ("prefill-0", "prefill"),
        ("decode-0", "decode"),
        ("decode-1", "decode"),
    ]
    settings = tmp_path / "stdin"
    settings.write_bytes(workers[2].stdin)
    worker = load(WorkerConfig, file=settings, env={}, overrides={})
    assert (worker.worker_id, worker.roles, worker.port) == ("decode-1", (Role.DECODE,), 0)
    assert (worker.engine.block_size, worker.index) == (32, index)
    assert "BATON_ENGINE__BLOCK_SIZE" not in workers[2].env
    assert workers[2].env["BATON_LOG_LEVEL"] == "debug"

    router_spec = plan.router_spec(config, index, LogConfig(), env, ("a:1",))
    settings.write_bytes(router_spec.stdin)
    router = load(RouterConfig, file=settings, env={}, overrides={})
    assert (router.port, router.max_num_requests, router.workers, router.index) == (8001, 5, ("a:1",), index)


def test_workers_name_themselves_in_an_index_that_others_share() -> None:
    shared = UpConfig(index=IndexConfig("redis", "redis://elsewhere/0"))
    [prefill, _] = plan.worker_specs(shared, shared.index, LogConfig(), {})
    assert json.loads(prefill.stdin)["worker_id"] == ""


# --- up, with stand-ins for router and workers ---------------------------------------------------------------------

WORKER = """
import asyncio, os, sys
from baton_cli.process import SupervisorLink, run

async def serve(stop, ready):
    print("loading", flush=True)
    ready({"address": "127.0.0.1:5", "roles": [sys.argv[1]], "transport": "tcp", "num_blocks": 7, "model": "m"})
    if FAILS:
        raise RuntimeError("broken on purpose")
    await stop.wait()

raise SystemExit(run(lambda: serve, SupervisorLink.from_env(os.environ)))
"""

ROUTER = """
import asyncio, json, os, sys
from baton_cli.process import SupervisorLink, run

RECORD = {"prefill_worker": "prefill-0", "decode_worker": "decode-0", "transport": "tcp", "ttft_s": 0.0123,
          "num_blocks_transferred": 5, "num_bytes_transferred": 81920, "transfer_s": 0.002, "mean_itl_s": 0.004,
          "num_prompt_tokens": 63, "num_output_tokens": 2}

def answer(path):
    if path == "/v1/chat/completions":
        pieces = [json.dumps({"choices": [{"delta": {"content": text}}]}) for text in ("hi ", "there")]
        return "".join(f"data: {piece}\\n\\n" for piece in (*pieces, "[DONE]"))
    return json.dumps({"data": [{"id": "m"}]} if path == "/v1/models" else RECORD)

async def handle(reader, writer):
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    body = answer(head.split()[1].decode()).encode()
    writer.write(b"HTTP/1.1 200 OK\\r\\nx-request-id: r1\\r\\nconnection: close\\r\\n\\r\\n" + body)
    await writer.drain()
    writer.close()

async def serve(stop, ready):
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    ready({"address": "127.0.0.1:%d" % server.sockets[0].getsockname()[1], "workers": sys.argv[1:]})
    await stop.wait()

raise SystemExit(run(lambda: serve, SupervisorLink.from_env(os.environ)))
"""


def stand_ins(monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
    def workers(config: UpConfig, index: IndexConfig, log: LogConfig, env: Any) -> list[ChildSpec]:
        code = WORKER.replace("FAILS", str(fails))
        return [
            ChildSpec(f"{role}-0", (sys.executable, "-c", code, role), dict(os.environ))
            for role in ("prefill", "decode")
        ]

    def router(config: Any, index: Any, log: Any, env: Any, workers: tuple[str, ...] = ()) -> ChildSpec:
        return ChildSpec("router", (sys.executable, "-c", ROUTER, *workers), dict(os.environ))

    monkeypatch.setattr(plan, "worker_specs", workers)
    monkeypatch.setattr(plan, "router_spec", router)


async def run_up(config: UpConfig, until: str, signals: Callable[[], None]) -> str:
    """Run `up`, call `signals` once it has shown `until`; returns all that it showed."""
    shown = io.StringIO()

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            shown.write(text)
            if until in shown.getvalue() and not self.closed:
                self.close()
                signals()
            return len(text)

        def flush(self) -> None:
            pass

    view = View(Console(file=Screen(), width=120), prefix=True)
    try:
        async with asyncio.timeout(120):
            assert await up(config, LogConfig(), view, first_request=True) == 0
    finally:
        assert psutil.Process().children() == []
    return shown.getvalue()


@pytest.mark.parametrize("index", ["redis", "memory"])
async def test_up_starts_shows_answers_and_ends_on_a_signal(
    monkeypatch: pytest.MonkeyPatch, some_model: ModelConfig, index: Any
) -> None:
    stand_ins(monkeypatch)
    config = UpConfig(port=0, model=some_model, index=IndexConfig(index, ""))
    text = await run_up(config, "until Ctrl-C", lambda: os.kill(os.getpid(), signal.SIGINT))
    assert "decode-0  | loading" in text
    assert "hi there" in text
    assert "5 blocks, 80 KiB in 2.0 ms" in text
    assert "12.3 ms" in text
    assert "curl -N http://127.0.0.1:" in text
    rows = [line.split() for line in text.splitlines()]
    names = [row[0] for row in rows if len(row) >= 6 and row[1].isdigit()]
    assert sorted(names) == sorted(["prefill-0", "decode-0", "router"] + ["redis"] * (index == "redis"))


async def test_up_reports_the_death_of_a_child_and_ends_the_rest(
    monkeypatch: pytest.MonkeyPatch, some_model: ModelConfig
) -> None:
    stand_ins(monkeypatch, fails=True)
    with pytest.raises(ChildDied, match="ended by itself with exit code 1"):
        await run_up(
            UpConfig(port=0, model=some_model, index=IndexConfig("memory")), "never shown", lambda: None
        )


async def test_up_takes_the_memory_index_where_there_is_no_redis(
    monkeypatch: pytest.MonkeyPatch, some_model: ModelConfig
) -> None:
    stand_ins(monkeypatch)
    monkeypatch.setattr(up_module, "find_redis_server", lambda: None)
    config = UpConfig(port=0, model=some_model)
    text = await run_up(config, "until Ctrl-C", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert "no redis-server" in text


# --- probe ---------------------------------------------------------------------------------------------------------


async def test_probe_knows_a_serving_grpc_server_from_one_that_is_not() -> None:
    server = await GrpcRpc(SystemClock()).serve("127.0.0.1:0", {})
    try:
        with pytest.raises(Unavailable, match="NOT_SERVING"):
            await asyncio.to_thread(probe, server.address, 10.0)
        server.set_serving(True)
        await asyncio.to_thread(probe, server.address, 10.0)
    finally:
        await server.aclose(0.0)
    with pytest.raises(Unavailable, match=server.address):
        await asyncio.to_thread(probe, server.address, 0.5)


async def test_probe_knows_a_healthy_http_server_from_one_that_is_not() -> None:
    status = b"200 OK"

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/health"
        await asyncio.to_thread(probe, url, 10.0)
        status = b"503 Service Unavailable"
        with pytest.raises(Unavailable, match="answers 503"):
            await asyncio.to_thread(probe, url, 10.0)
    with pytest.raises(Unavailable, match="Connection refused"):
        await asyncio.to_thread(probe, url, 10.0)


# --- chat ----------------------------------------------------------------------------------------------------------


def client_of(handler: Callable[[httpx.Request], httpx.Response]) -> ChatClient:
    return ChatClient("http://test/v1/", api_key="k", transport=httpx.MockTransport(handler))


async def told(handler: Callable[[httpx.Request], httpx.Response]) -> str:
    async with client_of(handler) as client:
        return "".join(
            [piece async for piece in client.stream("m", [{"role": "user", "content": "x"}], seed=1)]
        )


async def test_chat_streams_what_the_server_sends() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert request.url == "http://test/v1/chat/completions"
        assert request.headers["authorization"] == "Bearer k"
        assert json.loads(request.content)["seed"] == 1
        deltas = [{"role": "assistant"}, {"content": "a"}, {"content": "b"}]
        events = [json.dumps({"choices": [{"delta": delta}]}) for delta in deltas]
        usage = json.dumps({"choices": [], "usage": {"total_tokens": 3}})
        return httpx.Response(
            200, text=": ping\n\n" + "".join(f"data: {e}\n\n" for e in (*events, usage, "[DONE]"))
        )

    assert await told(handler) == "ab"


def refused(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("connection refused")


@pytest.mark.parametrize(
    ("handler", "line"),
    [
        (refused, "cannot reach http://test: is the server running?"),
        (
            lambda _: httpx.Response(
                404, json={"error": {"message": "no model\nm", "code": "model_not_found"}}
            ),
            "404 no model m",
        ),
        (lambda _: httpx.Response(502, text="<html>"), "502 Bad Gateway"),
        (
            lambda _: httpx.Response(200, text='data: {"error": {"message": "worker lost"}}\n\n'),
            "worker lost",
        ),
        (
            lambda _: httpx.Response(200, text="data: nonsense\n\n"),
            "http://test does not speak the OpenAI API",
        ),
    ],
)
async def test_chat_errors_are_one_line(
    handler: Callable[[httpx.Request], httpx.Response], line: str
) -> None:
    with pytest.raises(ChatError) as caught:
        await told(handler)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


async def test_chat_answers_one_prompt_or_holds_a_conversation() -> None:
    async with Supervisor(lambda name, line: None) as fleet:
        child = await fleet.start(ChildSpec("router", (sys.executable, "-c", ROUTER), dict(os.environ)))
        base_url = f"http://{(await fleet.watch(fleet.ready(child, 60)))['address']}"
        once = await asyncio.to_thread(baton, "chat", "hello", "--base-url", base_url)
        assert (once.returncode, once.stdout, once.stderr) == (0, "hi there\n", "")
        talk = await asyncio.to_thread(baton, "chat", "--base-url", base_url, stdin="hello\n\n/new\nagain\n")
        assert (talk.returncode, talk.stderr) == (0, "")
        assert talk.stdout.count("hi there") == 2


def test_chat_without_a_server_is_one_line() -> None:
    done = baton("chat", "hello", "--base-url", "http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "baton: cannot reach http://127.0.0.1:1: is the server running?\n"
