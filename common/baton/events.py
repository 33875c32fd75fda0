"""What happened, as structured events. Whoever makes something happen is handed an `Emit` and calls it.

Processes write events to the log; the simulation keeps them as lines, which two runs of one seed must repeat byte for
byte. Never called per token.
"""

import json
import logging
from typing import Any, Protocol

from baton.clock import Clock
from baton.request import Request

# What an operator must see without asking for it: bytes that changed on the way between two workers.
WARNINGS = frozenset(
    {
        "piece.mismatch",
        "piece.corrupt",
        "handover.repaired",
        "pair.quarantined",
        "link.failed",
        "worker.unreachable",
    }
)


class Emit(Protocol):
    def __call__(self, kind: str, /, **fields: Any) -> None: ...


def about(request: Request) -> dict[str, str]:
    """The fields by which a request's events are found."""
    fields: dict[str, str] = {"request": request.request_id}
    return fields | {"trace_id": request.trace_id} if request.traceparent else fields


class LogEvents:
    """Events as log records: the kind is the message, the fields are extras (see telemetry)."""

    def __init__(self, logger: logging.Logger, level: int = logging.DEBUG) -> None:
        self._logger = logger
        self._level = level

    def __call__(self, kind: str, /, **fields: Any) -> None:
        level = logging.WARNING if kind in WARNINGS else self._level
        if self._logger.isEnabledFor(level):
            self._logger.log(level, kind, extra={"fields": fields})


class EventLines:
    """Events as text, in order, with the clock's time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.lines: list[str] = []

    def __call__(self, kind: str, /, **fields: Any) -> None:
        self.lines.append(f"{self._clock.now():.6f} {kind} {json.dumps(fields, sort_keys=True)}")
