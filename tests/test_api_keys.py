"""With a file of keys the router answers /v1 and gRPC to who has one of them, and everybody's health checks."""

from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from router_parts import MODEL, STOP, ScriptedFleet, scripted_door

from baton.clock import SystemClock
from baton.errors import ConfigError, Unauthenticated
from baton.rpc import GrpcRpc
from baton.v1 import router_pb2, router_pb2_grpc
from baton_router.api_keys import ApiKeys, load_api_keys, read_keys
from baton_router.app import create_app
from baton_router.grpc_api import RouterService

KEYS = ApiKeys(["sk-one", "sk-two"])
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
REFUSED = (
    None,
    "",
    "sk-one",
    "Basic sk-one",
    "Bearer",
    "Bearer ",
    "Bearer sk-on",
    "Bearer sk-one2",
    "Bearer \xe9",
)


@pytest.mark.parametrize("authorization", REFUSED)
def test_who_has_no_key_is_refused(authorization: str | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        KEYS.check(authorization)
    assert caught.value.status == 401
    assert "sk-" not in caught.value.message


@pytest.mark.parametrize("authorization", ["Bearer sk-one", "bearer sk-two", "Bearer  sk-two "])
def test_any_of_the_keys_will_do(authorization: str) -> None:
    KEYS.check(authorization)


async def test_http_asks_for_a_key_on_v1_only() -> None:
    door, generator = scripted_door("ok", STOP)
    transport = httpx.ASGITransport(app=create_app(door, ScriptedFleet(), keys=KEYS))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        for path in ("/health", "/ready", "/metrics"):
            assert (await client.get(path)).status_code == 200
        for headers in ({}, {"authorization": "Bearer sk-three"}):
            chat = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            models = await client.get("/v1/models", headers=headers)
            for answer in (chat, models):
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert generator.requests == []
        client.headers["authorization"] = "Bearer sk-two"
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert len(generator.requests) == 1


async def test_grpc_asks_for_the_same_keys() -> None:
    door, generator = scripted_door("ok", STOP)
    service = RouterService(door, ScriptedFleet())
    server = await GrpcRpc(SystemClock(), authorize=KEYS.check).serve("127.0.0.1:0", service.handlers())
    server.set_serving(True)
    call = router_pb2.RouterGenerateRequest(model=MODEL, prompt="hi", deadline_s=30.0)
    call.sampling.max_tokens = 4
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        for metadata in ((), (("authorization", "Bearer nobody"),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(call, metadata=metadata, timeout=10).read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert generator.requests == []
        metadata = (("authorization", "Bearer sk-one"),)
        answers = [r.chunk.text async for r in stub.Generate(call, metadata=metadata, timeout=10)]
        assert "".join(answers) == "ok"
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    await server.aclose(0.0)


def test_a_file_holds_one_key_per_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-one\n\n  sk-two\n")
    assert read_keys(str(file)) == ["sk-one", "sk-two"]
    assert load_api_keys(None) is None


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "No such file"), ("\n", "no key in it"), ("a\nb c", "key 2 must be")]
)
def test_a_wrong_file_stops_the_start(tmp_path: Path, content: str | None, complaint: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        load_api_keys(str(file))
