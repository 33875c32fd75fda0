"""The protos, the modules made from them and the dataclasses say the same."""

import dataclasses
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from baton import codec, rpc
from baton import messages as m
from baton.v1 import decode_pb2, prefill_pb2, prefix_pb2, router_pb2, status_pb2

ROOT = Path(__file__).parent.parent
SERVICES = [
    service
    for module in (router_pb2, prefill_pb2, prefix_pb2, decode_pb2, status_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]
METHODS = [method for method in vars(rpc).values() if isinstance(method, rpc.Method)]


def test_committed_modules_are_what_the_protos_say(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    script = [sys.executable, str(ROOT / "scripts" / "gen_proto.py"), "--check"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("cls", codec.PROTOS, ids=lambda cls: cls.__name__)
def test_dataclass_and_proto_have_the_same_fields(cls: type) -> None:
    ours = [field.name for field in dataclasses.fields(cls)]
    theirs = [field.name for field in codec.PROTOS[cls].DESCRIPTOR.fields]
    if cls is m.Step:  # a list of pairs travels as two columns
        theirs = [name for name in theirs if name != "finished_reasons"]
        theirs[theirs.index("finished_handles")] = "finished"
    assert ours == theirs


def test_every_message_has_a_proto() -> None:
    ours = {cls for cls in vars(m).values() if dataclasses.is_dataclass(cls)}
    assert ours <= set(codec.PROTOS)


def test_the_method_table_is_the_services() -> None:
    kinds = {
        (False, False): rpc.Kind.UNARY,
        (False, True): rpc.Kind.SERVER_STREAM,
        (True, True): rpc.Kind.BIDI,
    }
    in_protos = {
        (service.full_name, method.name, kinds[method.client_streaming, method.server_streaming])
        for service in SERVICES
        for method in service.methods
    }
    assert {(method.service, method.name, method.kind) for method in METHODS} == in_protos


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.service}/{method.name}")
def test_the_messages_of_a_method_are_those_of_its_proto(method: "rpc.Method[object, object]") -> None:
    (service,) = [service for service in SERVICES if service.full_name == method.service]
    descriptor = service.methods_by_name[method.name]
    for expected, proto in (
        (method.request, descriptor.input_type),
        (method.response, descriptor.output_type),
    ):
        fields = [(field.name, field.number, field.message_type) for field in proto.fields]
        wire_type = codec._ROUTES[expected].pb_class.DESCRIPTOR
        assert fields == [(field.name, field.number, field.message_type) for field in wire_type.fields]


def _buf() -> str:
    """An installed buf, or the npm package in node_modules, which git ignores."""
    installed = shutil.which("buf") or shutil.which("buf", path=str(ROOT / "node_modules" / ".bin"))
    if installed:
        return installed
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("neither buf nor npm is installed")
    command = [
        npm,
        "install",
        "--no-save",
        "--no-audit",
        "--no-fund",
        f"--prefix={ROOT}",
        "@bufbuild/buf@1.75.0",
    ]
    try:
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot install @bufbuild/buf: {error}")
    found = shutil.which("buf", path=str(ROOT / "node_modules" / ".bin"))
    assert found is not None
    return found


@pytest.mark.parametrize("command", [["lint"], ["format", "--diff", "--exit-code"]], ids=["lint", "format"])
def test_buf(command: list[str]) -> None:
    environment = os.environ | {"BUF_CACHE_DIR": str(ROOT / "node_modules" / ".buf-cache")}
    done = subprocess.run(
        [_buf(), *command], cwd=ROOT / "proto", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_unions_have_the_members_of_their_oneofs() -> None:
    for union, proto in (
        (m.SessionUp, decode_pb2.SessionRequest),
        (m.SessionDown, decode_pb2.SessionResponse),
    ):
        fields = proto.DESCRIPTOR.oneofs_by_name["message"].fields
        by_class = {codec.PROTOS[cls].DESCRIPTOR for cls in typing.get_args(union)}
        assert {field.message_type for field in fields} == by_class
