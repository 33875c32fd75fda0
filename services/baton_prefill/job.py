"""One prompt on this worker: what is known of it, what its push is told, and its trace."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from baton.engine.batch import SequenceOutput
from baton.handover.push import Push
from baton.messages import Fetched, Holder, Pushed
from baton.request import Request
from baton.tracing import Phases
from baton.transfer.report import TransferReport


@dataclass(slots=True)
class Job:
    request: Request
    trace: Phases
    started_s: float
    first_step_s: float | None = None
    fetched: Fetched | None = None
    is_added: bool = False  # to the engine
    push: Push | None = None  # None: there is no ticket
    failure: str = ""  # why there is no push
    _untold: list[Callable[[Push], None]] = field(default_factory=list)  # what the push will hear
    done: asyncio.Future[SequenceOutput] = field(  # with the first token
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def tell(self, what: Callable[[Push], None]) -> None:
        if self.push is None:
            self._untold.append(what)
        else:
            what(self.push)

    def send_with(self, push: Push) -> None:
        self.push = push
        for what in self._untold:
            what(push)
        self._untold.clear()

    @property
    def transport(self) -> str:
        """Empty while there is no connection."""
        return "" if self.push is None else self.push.transport

    def pushed(self) -> Pushed:
        """How the push ended."""
        push = self.push
        if push is None:
            return Pushed(self.failure)
        sending = push.sending
        return Pushed(
            sending.reason, sending.num_mismatches, push.num_bytes, push.wire.seconds, push.transport
        )

    def explain(self, holder: Holder) -> Holder:
        push = self.push
        if push is None:
            return replace(holder, note="a prompt whose ticket has not come")
        ticket = push.ticket
        return replace(
            holder,
            epoch=ticket.epoch,
            lease_left_s=push.lease_left_s,
            note=f"sending to {ticket.worker_id} over {push.transport or ticket.transport}",
        )

    def trace_computed(self, now_s: float, num_cached_tokens: int) -> tuple[float, float]:
        """Returns the seconds in the queue and those of computing."""
        first_step_s, fetched_s = self.first_step_s or now_s, self.started_s
        if self.fetched is not None:
            fetched_s += self.fetched.seconds
            self.trace.past("kv fetch", self.started_s, fetched_s, _said_of(self.fetched))
        self.trace.past("queue", fetched_s, first_step_s, {})
        tokens = {"baton.tokens": self.request.num_prompt_tokens, "baton.cached_tokens": num_cached_tokens}
        self.trace.past("compute", first_step_s, now_s, tokens)
        return first_step_s - fetched_s, now_s - first_step_s

    def end_trace(self, report: TransferReport, now_s: float) -> None:
        error = "" if report.outcome == "ok" else report.outcome
        attributes = {
            "baton.bytes": report.num_bytes,
            "baton.transport": report.transport,
            "baton.exposed_s": report.exposed_s,
            "baton.mismatches": report.num_mismatches,
            "baton.to": report.peer,
        }
        self.trace.past("kv push", now_s - report.seconds, now_s, attributes, error)
        self.trace.end(error)


def _said_of(fetched: Fetched) -> dict[str, str | int]:
    return {
        "baton.from": fetched.source_id,
        "baton.outcome": fetched.outcome.value,
        "baton.tokens": fetched.num_tokens,
    }
