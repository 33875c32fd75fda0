"""One trace of each request, through all processes, as an OTLP collector receives it."""

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from stack import running_stack

from baton.clock import VirtualClock
from baton.errors import ConfigError
from baton.otel import OtelTracer, is_wanted, make_provider, tracing
from baton.tracing import NO_TRACING, Phases, SpanKind, valid_traceparent
from baton.v1 import router_pb2

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID = PARENT[3:35]
SECRET = "zanzibar"  # in the prompt, and nowhere else


class Collector:
    """What an OTLP collector is to its clients."""

    def __init__(self) -> None:
        self.spans: dict[bytes, tuple[str, object]] = {}  # span id -> (service, span)

    @contextmanager
    def running(self) -> Iterator[str]:
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    raise AssertionError("not asked for")
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    names = {a.key: a.value.string_value for a in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        spans.update({span.span_id: (names["service.name"], span) for span in scope.spans})
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def paths(self, trace_id: str) -> set[str]:
        """service/name of each span of one trace, from the outermost on."""
        return {self._path(span) for _, span in self.spans.values() if span.trace_id.hex() == trace_id}

    def _path(self, span: object) -> str:
        service, _ = self.spans[span.span_id]
        own = f"{service.removeprefix('baton-')}:{span.name}"
        known = span.parent_span_id in self.spans
        return f"{self._path(self.spans[span.parent_span_id][1])} > {own}" if known else own

    def find(self, name: str, trace_id: str) -> object:
        [found] = [s for _, s in self.spans.values() if s.name == name and s.trace_id.hex() == trace_id]
        return found


def attributes(span: object) -> dict[str, object]:
    values = {}
    for attribute in span.attributes:
        kind = attribute.value.WhichOneof("value")
        values[attribute.key] = getattr(attribute.value, kind)
    return values


ATTEMPT = "router:chat test > router:attempt"
THROUGH_A_PAIR = {
    "router:chat test",
    "router:chat test > router:place",
    ATTEMPT,
    f"{ATTEMPT} > router:ticket",
    f"{ATTEMPT} > router:answer",
    f"{ATTEMPT} > router:prefill call",
    f"{ATTEMPT} > router:prefill call > prefill:prefill",
    f"{ATTEMPT} > router:prefill call > prefill:prefill > prefill:queue",
    f"{ATTEMPT} > router:prefill call > prefill:prefill > prefill:compute",
    f"{ATTEMPT} > router:prefill call > prefill:prefill > prefill:kv push",
    f"{ATTEMPT} > decode:decode",
    f"{ATTEMPT} > decode:decode > decode:reserve",
    f"{ATTEMPT} > decode:decode > decode:kv receive",
    f"{ATTEMPT} > decode:decode > decode:run",
}


async def test_one_trace_from_http_through_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    with collector.running() as endpoint:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        async with running_stack(index="memory", log_format="json") as stack:
            await chat(stack.base_url, PARENT)
            await chat(stack.base_url, PARENT[:-2] + "00")  # whoever sent it does not want it recorded
            await chat(stack.base_url, "00-nonsense")
            await chat(stack.base_url, PARENT, status=400, max_tokens=-1)
            await generate(stack.router_grpc, PARENT.replace("0af7", "1111"))
        log = stack.log()
    assert collector.paths(TRACE_ID) == THROUGH_A_PAIR  # once each: the unsampled request adds none
    root = collector.find("chat test", TRACE_ID)
    assert root.parent_span_id.hex() == PARENT[36:52]
    said = attributes(root)
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.provider.name"] == "baton"
    assert said["gen_ai.request.model"] == "test"
    assert said["gen_ai.usage.output_tokens"] == 4
    assert said["gen_ai.usage.input_tokens"] > 4
    assert said["gen_ai.latency.time_to_first_token"] > 0
    sent, received = (attributes(collector.find(n, TRACE_ID)) for n in ("kv push", "kv receive"))
    assert sent["baton.bytes"] == received["baton.bytes"] > 0
    assert sent["baton.transport"] == "tcp"
    for name, parent in (("kv push", "prefill"), ("kv receive", "decode"), ("attempt", "chat test")):
        inner, outer = collector.find(name, TRACE_ID), collector.find(parent, TRACE_ID)
        assert outer.start_time_unix_nano <= inner.start_time_unix_nano <= inner.end_time_unix_nano
    over_grpc = collector.paths(PARENT.replace("0af7", "1111")[3:35])
    assert {path.replace("text_completion", "chat") for path in over_grpc} >= {"router:chat test", ATTEMPT}
    trace_ids = {span.trace_id for _, span in collector.spans.values()}
    assert len(trace_ids) == 3  # the canary's own requests are in none
    # Logs: one JSON object a line, the request and its trace on it in every process, and never the prompt.
    lines = [json.loads(line.partition(": ")[2]) for line in log.splitlines()]
    traced = {line["component"] for line in lines if line.get("trace_id") == TRACE_ID}
    assert traced == {"router", "prefill-0", "decode-0"}
    assert all(line["request"] for line in lines if "trace_id" in line)
    assert SECRET not in log


async def chat(base_url: str, traceparent: str, status: int = 200, max_tokens: int = 4) -> None:
    message = {"role": "user", "content": f"12 + 34 = {SECRET}"}
    body = {"model": "test", "messages": [message], "max_tokens": max_tokens, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=base_url, timeout=60.0) as client:
        answer = await client.post("/v1/chat/completions", json=body, headers={"traceparent": traceparent})
    assert answer.status_code == status, answer.text


async def generate(address: str, traceparent: str) -> None:
    request = router_pb2.RouterGenerateRequest(model="test", prompt=f"12 + 34 = {SECRET}", deadline_s=60)
    request.sampling.max_tokens = 4
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream(
            "/baton.v1.Router/Generate",
            request_serializer=router_pb2.RouterGenerateRequest.SerializeToString,
            response_deserializer=router_pb2.RouterGenerateResponse.FromString,
        )
        assert [chunk async for chunk in call(request, metadata=(("traceparent", traceparent),))]


def test_phases_follow_each_other_and_an_end_ends_all() -> None:
    exporter = InMemorySpanExporter()
    provider = make_provider("decode", {})
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    clock = VirtualClock()

    async def live() -> None:
        phases = Phases(OtelTracer(provider, clock), clock, "decode", PARENT, SpanKind.SERVER, {"gone": None})
        phases.phase("reserve")
        await asyncio.sleep(2.0)
        phases.phase("run", {"a": 1})
        await asyncio.sleep(3.0)
        phases.end("cancelled")
        phases.end()
        nobody = Phases(OtelTracer(provider, clock), clock, "decode", "", SpanKind.SERVER, {})
        assert nobody.traceparent == ""
        nobody.end()

    clock.run(live())
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert {n: (s.end_time - s.start_time) / 1e9 for n, s in spans.items()} == {
        "reserve": 2.0,
        "run": 3.0,
        "decode": 5.0,
    }
    assert [spans[name].attributes.get("error.type") for name in ("reserve", "run", "decode")] == [
        None,
        "cancelled",
        "cancelled",
    ]
    assert spans["decode"].resource.attributes["service.name"] == "baton-decode"


async def test_tracing_is_off_unless_an_endpoint_is_named() -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    assert is_wanted(endpoint)
    for env in ({}, endpoint | {"OTEL_SDK_DISABLED": "true"}, endpoint | {"OTEL_TRACES_EXPORTER": "none"}):
        async with tracing("router", VirtualClock(), env) as tracer:
            assert tracer is NO_TRACING
            assert tracer.begin("chat", PARENT, 0.0, {}).traceparent == PARENT  # it still goes on
    with pytest.raises(ConfigError, match=r"must be grpc or http/protobuf, got 'thrift'"):
        async with tracing("r", VirtualClock(), endpoint | {"OTEL_EXPORTER_OTLP_PROTOCOL": "thrift"}):
            pass


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_both_protocols_are_there_where_the_extra_is(
    monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    async with tracing("router", VirtualClock(), env) as tracer:
        assert isinstance(tracer, OtelTracer)
    part = "grpc" if protocol == "grpc" else "http"
    monkeypatch.setitem(sys.modules, f"opentelemetry.exporter.otlp.proto.{part}.trace_exporter", None)
    with pytest.raises(
        ConfigError, match=r"ENDPOINT is set, but opentelemetry\S+ is not installed: pip install"
    ):
        async with tracing("router", VirtualClock(), env):
            pass


def test_what_is_no_context_is_none() -> None:
    assert valid_traceparent(f" {PARENT} ") == PARENT
    assert valid_traceparent("01" + PARENT[2:] + "-more") == "01" + PARENT[2:] + "-more"
    for text in (
        None,
        "",
        "x",
        "ff" + PARENT[2:],
        PARENT.replace(TRACE_ID, "0" * 32),
        PARENT.upper(),
        PARENT * 9,
    ):
        assert valid_traceparent(text) == ""
