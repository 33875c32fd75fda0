"""Traces for OpenTelemetry: the one module that knows its SDK, the extra `otel`. Configured by the standard variables.

Tracing is on where OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT says where spans go. The SDK reads
the rest by itself: OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_EXPORTER_OTLP_HEADERS, ...
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

import baton
from baton.clock import Clock
from baton.errors import ConfigError
from baton.tracing import NO_TRACING, Attributes, Span, SpanKind, Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


@contextlib.asynccontextmanager
async def tracing(component: str, clock: Clock, env: Mapping[str, str] = os.environ) -> AsyncIterator[Tracer]:
    """The tracer of this process; what it has recorded is sent when the block is left. Raises ConfigError."""
    if not is_wanted(env):
        yield NO_TRACING
        return
    exporter = await asyncio.to_thread(_exporter, env)
    provider = make_provider(component, env)
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield OtelTracer(provider, clock)
    finally:
        await asyncio.to_thread(provider.shutdown)


def is_wanted(env: Mapping[str, str]) -> bool:
    is_off = env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_TRACES_EXPORTER") == "none"
    return not is_off and any(env.get(name) for name in ENDPOINTS)


def _exporter(env: Mapping[str, str]) -> Any:
    protocol = next((env[name] for name in PROTOCOLS if env.get(name)), "http/protobuf")
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

            return OverGrpc()
        if protocol == "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

            return OverHttp()
    except ImportError as error:
        raise ConfigError(
            f"{_first_endpoint(env)} is set, but {error.name} is not installed: pip install 'baton-llm[otel]'"
        ) from None
    raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL: must be grpc or http/protobuf, got {protocol!r}")


def _first_endpoint(env: Mapping[str, str]) -> str:
    return next(name for name in ENDPOINTS if env.get(name))


def make_provider(component: str, env: Mapping[str, str]) -> Any:
    """A TracerProvider that says who this process is. A name in the environment wins."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    attributes = {"service.version": baton.__version__, "service.instance.id": f"{component}-{os.getpid()}"}
    if not env.get("OTEL_SERVICE_NAME") and "service.name=" not in env.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes["service.name"] = f"baton-{component}"
    return TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)


class OtelTracer:
    """Spans of one provider; times come from the clock, so that they can be told afterwards."""

    def __init__(self, provider: Any, clock: Clock) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind as Kinds
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("baton", baton.__version__)
        self._clock = clock
        self._extract = TraceContextTextMapPropagator().extract
        self._kinds = {kind: Kinds[kind.name] for kind in SpanKind}
        self._nowhere = Context()

    def begin(self, name: str, parent: str, at_s: float, attributes: Attributes) -> Span:
        return self._span(name, parent, at_s, SpanKind.SERVER, attributes)

    def start(self, name: str, parent: str, at_s: float, kind: SpanKind, attributes: Attributes) -> Span:
        if not parent:
            return NO_TRACING.start(name, parent, at_s, kind, attributes)
        return self._span(name, parent, at_s, kind, attributes)

    def _span(self, name: str, parent: str, at_s: float, kind: SpanKind, attributes: Attributes) -> Span:
        span = self._tracer.start_span(
            name,
            context=self._extract({"traceparent": parent}, context=self._nowhere),
            kind=self._kinds[kind],
            attributes=_known(attributes),
            start_time=self._unix_ns(at_s),
        )
        return _OtelSpan(span, self)

    def _unix_ns(self, at_s: float) -> int:
        return int((self._clock.wall() - self._clock.now() + at_s) * 1e9)

    def end(self, span: Any, at_s: float, error: str) -> None:
        from opentelemetry.trace import StatusCode

        if error:
            span.set_attribute("error.type", error)
            span.set_status(StatusCode.ERROR)
        span.end(end_time=self._unix_ns(at_s))


class _OtelSpan:
    def __init__(self, span: Any, tracer: OtelTracer) -> None:
        self._span = span
        self._tracer = tracer
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def set(self, attributes: Attributes) -> None:
        if self._span.is_recording():
            self._span.set_attributes(_known(attributes))

    def end(self, at_s: float, error: str = "") -> None:
        if self._span.is_recording():
            self._tracer.end(self._span, at_s, error)


def _known(attributes: Attributes) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
