"""The Prefix service: a worker gives the KV of a prefix that it holds to another worker, who asks for it.

    Fetch called --> engine.lease_prefix --> all of it is there: Push --> engine.release --> answer
                                        '--> it is not: engine.release --> answer says how much is

Leased blocks are found under their own name in the block ledger, and are neither evicted nor written to until the push
has ended, however it ended.
"""

from dataclasses import replace

from baton.clock import Clock
from baton.config import TransferConfig
from baton.engine.worker import Worker
from baton.errors import BatonError, DeadlineExceeded, TransferError
from baton.events import Emit, about
from baton.handover.push import Connections, Push
from baton.kv.layout import Storage
from baton.messages import FetchCall, FetchResult, Holder, Ticket
from baton.request import RequestId
from baton.rpc import FETCH, Handlers
from baton.transfer.base import Transport
from baton.transfer.handshake import Kind, decide
from baton.transfer.report import OnTransfer, Outcome


class PrefixOwner:
    """Owns the leases of this worker. Built once per process, whatever its roles."""

    def __init__(
        self,
        worker: Worker,
        storage: Storage,
        transport: Transport,
        config: TransferConfig,
        clock: Clock,
        emit: Emit,
        on_transfer: OnTransfer,
    ) -> None:
        """`on_transfer` hears of every push once it has ended."""
        self._worker = worker
        self._storage = storage
        self._transport = transport
        self._config = config
        self._clock = clock
        self._emit = emit
        self._on_transfer = on_transfer
        self._connections = Connections(transport, config.push_timeout_s)
        self._pushes: dict[RequestId, Push] = {}
        worker.explain(self._explain)

    def handlers(self) -> Handlers:
        return {FETCH: self.fetch}

    async def fetch(self, call: FetchCall) -> FetchResult:
        """Cancelling it stops the push; the blocks go back when no transport reads them any more."""
        check_ticket(self._worker, self._transport, call.ticket)
        prefix, engine = call.prefix, self._worker.engine
        sequence = engine.lease_prefix(prefix)
        try:
            if sequence.num_cached_tokens == prefix.num_prompt_tokens:
                push = self._push(call)
                push.finish(sequence.block_table)
                await self._run(push, call)
            return FetchResult(sequence.num_cached_tokens)
        finally:
            self._pushes.pop(prefix.request_id, None)
            engine.release(prefix.request_id)
            self._worker.admit()

    def _push(self, call: FetchCall) -> Push:
        push = self._pushes[call.prefix.request_id] = Push(
            call.ticket,
            call.prefix,
            self._storage,
            self._worker.record.compatibility.identity,
            self._clock,
            self._emit,
            self._config,
        )
        return push

    async def _run(self, push: Push, call: FetchCall) -> None:
        outcome: Outcome = "cancelled"
        try:
            async with self._clock.timeout(call.timeout_s):
                await push.run(self._connections)
            outcome = "ok"
        except TimeoutError:
            raise DeadlineExceeded(f"the prefix did not leave within {call.timeout_s:g} s") from None
        except BatonError as error:
            outcome = "failed"
            self._emit("push.failed", **about(call.prefix), why=error.message)
            raise
        finally:
            report = replace(push.report(outcome), exposed_s=None)  # nothing was being computed meanwhile
            self._worker.wire.note(report.num_bytes, report.wire_s)
            self._on_transfer(report)

    def _explain(self, holder: Holder) -> Holder:
        push = self._pushes.get(holder.request_id)
        if push is None:
            return holder
        ticket = push.ticket
        return replace(
            holder,
            epoch=ticket.epoch,
            lease_left_s=push.lease_left_s,
            note=f"a prefix that {ticket.worker_id} fetches over {push.transport or ticket.transport}",
        )


def check_ticket(worker: Worker, transport: Transport, ticket: Ticket) -> None:
    """May this worker send to whoever made the ticket? Raises TransferError."""
    if set(transport.names).isdisjoint(ticket.transport.split(",")):
        raise TransferError(
            f"worker {ticket.worker_id} receives over {ticket.transport}, {worker.record.worker_id} sends over "
            f"{transport.name}: start both with the same --transport"
        )
    fit = decide(worker.record, ticket)
    if fit.kind is Kind.REFUSED:
        raise TransferError(fit.reason)
