"""Traces of requests: a span for each phase that a request goes through in a process, none per token.

A request carries the W3C context of the span it is part of (`Request.traceparent`), from process to process with the
messages that it travels in anyway. Only a front door begins traces: a request that comes to a worker without a context
is not traced there. `baton.otel` has the tracer that exports; `NO_TRACING` records nothing and passes contexts on.
"""

import enum
import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Protocol

from baton.clock import Clock

# Of the gRPC call that the current task answers; "" where the caller sent none.
CALLER: ContextVar[str] = ContextVar("traceparent of the caller", default="")

_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)

Attributes = Mapping[str, Any]  # None: not known, left out


def valid_traceparent(text: str | None) -> str:
    """The header's value, or "" where it is none."""
    text = (text or "").strip()
    return text if len(text) <= 256 and _TRACEPARENT.fullmatch(text) else ""


class SpanKind(enum.Enum):
    INTERNAL = enum.auto()
    SERVER = enum.auto()  # answers another process
    CLIENT = enum.auto()  # asks one


class Span(Protocol):
    @property
    def traceparent(self) -> str:
        """For children in this process and in others."""
        ...

    def set(self, attributes: Attributes) -> None: ...

    def end(self, at_s: float, error: str = "") -> None:
        """`error` is the kind of error, "" where all went well. What is said of a span after its end is ignored."""
        ...


class Tracer(Protocol):
    """Times are seconds of the clock that it was made with."""

    def begin(self, name: str, parent: str, at_s: float, attributes: Attributes) -> Span:
        """The span of a front door: with an empty parent it begins a trace."""
        ...

    def start(self, name: str, parent: str, at_s: float, kind: SpanKind, attributes: Attributes) -> Span: ...


class _NoSpan:
    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def set(self, attributes: Attributes) -> None:
        pass

    def end(self, at_s: float, error: str = "") -> None:
        pass


class NoTracing:
    """Records nothing; a context goes on to whom it may concern."""

    def begin(self, name: str, parent: str, at_s: float, attributes: Attributes) -> Span:
        return _NoSpan(parent)

    def start(self, name: str, parent: str, at_s: float, kind: SpanKind, attributes: Attributes) -> Span:
        return _NoSpan(parent)


NO_TRACING = NoTracing()


class Phases:
    """A span, and the phases it consists of: at most one is open, each ends where the next one begins."""

    __slots__ = ("_clock", "_phase", "_span", "_tracer", "traceparent")

    def __init__(
        self, tracer: Tracer, clock: Clock, name: str, parent: str, kind: SpanKind, attributes: Attributes
    ) -> None:
        self._tracer = tracer
        self._clock = clock
        self._span = tracer.start(name, parent, clock.now(), kind, attributes)
        self._phase: Span | None = None
        self.traceparent = self._span.traceparent

    def phase(self, name: str, attributes: Attributes | None = None) -> None:
        """What begins now."""
        now_s = self._clock.now()
        if self._phase is not None:
            self._phase.end(now_s)
        self._phase = self._tracer.start(name, self.traceparent, now_s, SpanKind.INTERNAL, attributes or {})

    def past(self, name: str, start_s: float, end_s: float, attributes: Attributes, error: str = "") -> None:
        """A part that is over, beside the phases."""
        span = self._tracer.start(name, self.traceparent, start_s, SpanKind.INTERNAL, attributes)
        span.end(end_s, error)

    def call(self, name: str, attributes: Attributes) -> Span:
        """Another process is asked, beside the phases; the caller ends the span."""
        return self._tracer.start(name, self.traceparent, self._clock.now(), SpanKind.CLIENT, attributes)

    def set(self, attributes: Attributes) -> None:
        """Of the phase that is open, else of the whole."""
        (self._phase or self._span).set(attributes)

    def end(self, error: str = "") -> None:
        now_s = self._clock.now()
        if self._phase is not None:
            self._phase.end(now_s, error)
        self._span.end(now_s, error)
