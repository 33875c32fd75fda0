"""What must be nowhere in the code, and what nobody gets in by: formats that run code, ids and paths that are more."""

import ast
import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from router_parts import STOP, ScriptedFleet, scripted_door

from baton.errors import ConfigError, TransferError
from baton.model_files import weight_files
from baton.transfer.wire import FIXED_BYTES, PieceHeader
from baton_router.app import create_app

ROOT = Path(__file__).parents[1]
PACKAGES = ("common/baton", "services", "kernels", "loadtest")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def complaints(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.partition(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FORBIDDEN_MODULES:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            if dotted(node.func) in FORBIDDEN_CALLS:
                yield dotted(node.func)
            for keyword in node.keywords:
                named = (keyword.arg, getattr(keyword.value, "value", None))
                if named in (("shell", True), ("allow_pickle", True), ("trust_remote_code", True)):
                    yield f"{keyword.arg}=True"


@pytest.mark.parametrize("code", ["import pickle", "eval(x)", "torch.load(f)", "run(c, shell=True)"])
def test_the_reader_of_the_code_finds_what_it_looks_for(code: str) -> None:
    assert list(complaints(ast.parse(code)))


def test_nothing_that_is_read_can_run_code() -> None:
    assert len(SOURCES) > 150
    found = {
        str(p.relative_to(ROOT)): c for p in SOURCES if (c := list(complaints(ast.parse(p.read_text()))))
    }
    assert not found


def test_weights_in_pickle_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match="safetensors"):
        weight_files(tmp_path)


def test_an_index_of_weights_names_files_of_its_own_directory_only(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="outside"):
        weight_files(tmp_path)


@settings(max_examples=500, deadline=None)
@given(
    data=st.binary(max_size=400), num_id_bytes=st.integers(0, 70000), num_digest_bytes=st.integers(0, 70000)
)
def test_no_header_makes_its_reader_look_beyond_its_end(
    data: bytes, num_id_bytes: int, num_digest_bytes: int
) -> None:
    header = bytearray(data.ljust(FIXED_BYTES, b"\0"))
    header[0:2] = struct.pack("<H", 2)
    header[FIXED_BYTES - 4 : FIXED_BYTES] = struct.pack("<HH", num_id_bytes % 65536, num_digest_bytes % 65536)
    try:
        read = PieceHeader.decode(bytes(header))
    except TransferError:
        return
    assert len(read.request_id.encode()) + len(read.digest) == len(header) - FIXED_BYTES
    assert read.encode() == bytes(header)


class Server:
    """A router's real HTTP server on a script, in a thread."""

    def __init__(self) -> None:
        door, _ = scripted_door("x", STOP)
        config = uvicorn.Config(
            create_app(door, ScriptedFleet()), port=0, log_level="critical", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._socket = config.bind_socket()
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._socket])))

    def __enter__(self) -> "Server":
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def raw(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(65536):
                answer += part
            return answer


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.mark.parametrize(
    "request_id", ["a\r\nset-cookie: x=1", "a\nb", "a\tb", "../../etc/passwd\x00", "ü", "x" * 129, "<script>"]
)
def test_a_request_id_cannot_be_more_than_one(server: Server, request_id: str) -> None:
    raw = f"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: {request_id}\r\nconnection: close\r\n\r\n"
    answer = server.raw(raw.encode())
    head = answer.partition(b"\r\n\r\n")[0].lower()
    lines = head.split(b"\r\n")[1:]
    # What follows a line end in a request is a header of the request, and never one of the answer.
    assert not any(line.startswith(b"set-cookie") for line in lines)
    assert request_id.encode() not in head or request_id.encode().isalnum()
    assert head.split()[1] in (b"200", b"400", b"503")


@pytest.mark.parametrize(
    "path",
    ["/debug/requests/" + quote("../../etc/passwd", safe=""), "/v1/models/" + quote("../../x", safe=""),
     "/../../etc/passwd", "/v1/%2e%2e/health", "//health", "/debug/requests/" + "x" * 5000],
)  # fmt: skip
def test_no_path_leads_out(server: Server, path: str) -> None:
    answer = httpx.get(f"http://127.0.0.1:{server.port}{path}", timeout=5)
    assert answer.status_code in (400, 404)
    assert "root:" not in answer.text


@pytest.mark.parametrize("model", ["../../etc/passwd", "m\r\nx: y", "m\x00", "x" * 10_000, "{{7*7}}", "%s%n"])
def test_a_model_name_is_a_name(server: Server, model: str) -> None:
    body = {"model": model, "prompt": "a"}
    answer = httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json=body, timeout=5)
    assert answer.status_code == 404
    assert "49" not in answer.json()["error"]["message"]
